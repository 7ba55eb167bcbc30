"""The GPU kernels of one frame, in Triton: products, attention, sampling.

Importing a module of this package needs Triton, which comes with PyTorch's CUDA builds; nothing else of quaver does.
"""
