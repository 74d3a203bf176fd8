"""Suffixes of a quantized module's tensors, as compressed-tensors names them."""

#: Divides NVFP4's group scales: one of a matrix.
WEIGHT_GLOBAL_SCALE = "weight_global_scale"
#: Divides the scales of an input's groups: one of a module.
INPUT_GLOBAL_SCALE = "input_global_scale"
INPUT_SCALE = "input_scale"
INPUT_ZERO_POINT = "input_zero_point"
#: What only rounds inputs; a weight is decoded without it.
OF_INPUTS = (INPUT_GLOBAL_SCALE, INPUT_SCALE, INPUT_ZERO_POINT)
