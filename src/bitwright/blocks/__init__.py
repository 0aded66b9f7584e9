"""GGUF's block types: exact bytes, quantized and decoded. Pure functions over numpy arrays; nothing here knows of models or files."""
