"""Calibration data: what is run through the model to measure it."""
