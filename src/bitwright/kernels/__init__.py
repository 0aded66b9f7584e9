"""Kernels: how it computes. ``numba_*`` on the CPU, ``triton_*`` on the GPU, ``reference`` as everybody's oracle."""
