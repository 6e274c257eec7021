"""The Triton kernels and what launches them; `launch` is the only door."""
