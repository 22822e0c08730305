"""Deformable convolution for Python, with no compiler and no CUDA toolkit."""

__version__ = "0.1.0.dev0"
