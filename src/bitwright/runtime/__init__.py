"""Use the result: open any supported checkpoint, decode it, or load it as a model with packed weights."""
