"""Quantization of matrices: which ones and how, the folders that hold them, calibration."""
