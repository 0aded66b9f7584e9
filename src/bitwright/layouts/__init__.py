"""Layouts: which bytes go to disk. One file each; ``catalog.load("layouts", name)`` finds them.

``gptq`` and ``compressed_tensors`` are what serving engines load; ``native`` stores any scheme without loss, for
bitwright itself. ``docs/layouts.md`` tells what each one stores and who reads it.
"""
