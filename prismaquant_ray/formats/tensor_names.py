"""Suffixes of a quantized module's tensors, as compressed-tensors names them."""

#: Divisor of NVFP4's group scales, one per matrix.
WEIGHT_GLOBAL_SCALE = "weight_global_scale"
#: Divisor of the group scales of an input, one per module.
INPUT_GLOBAL_SCALE = "input_global_scale"
INPUT_SCALE = "input_scale"
INPUT_ZERO_POINT = "input_zero_point"
#: Tensors that only affect inputs; a weight is decoded without them.
OF_INPUTS = (INPUT_GLOBAL_SCALE, INPUT_SCALE, INPUT_ZERO_POINT)
