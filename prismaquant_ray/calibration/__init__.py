"""Calibration data: the text and images that a model is measured on."""
