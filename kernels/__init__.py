"""Kernels without PyTorch's dispatcher, one folder per op; installed as `bomkern.kernels`."""
