"""Bytes: files by path or URL, arrays, tars and images."""
