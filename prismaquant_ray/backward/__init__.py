"""Sensitivity of the loss: Fisher probe and predicted cost."""
