"""Measured loss: token divergence between a model and its quantized copy."""
