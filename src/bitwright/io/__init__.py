"""Files in and out: strict parsers, the safetensors reader and writer, atomic publication, the model hub."""
