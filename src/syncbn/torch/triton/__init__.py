"""Triton kernels for CUDA: what the host does."""
