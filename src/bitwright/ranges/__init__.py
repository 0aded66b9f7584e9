"""Ranges of static activation quantization."""
