"""Measurements on a GPU: the kernels, streaming, and encoders fed from JPEG files. One command, one JSON file."""
