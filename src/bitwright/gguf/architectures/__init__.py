"""One file for each family of models, found by listing this folder. A file defines ``ARCHITECTURE`` and holds only what is special."""
