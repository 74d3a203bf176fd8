"""Stage 1: the tensors of a checkpoint, wherever it lies and however it stores them."""
