"""Between Hugging Face folders and GGUF files: architectures, tokenizers, and which type each tensor gets.

``export.describe`` says everything that goes into a GGUF file; ``to_hf.HfView`` shows a GGUF file as a Hugging Face checkpoint. Both read
the same table per architecture (``architectures/``), in one direction or the other.
"""
