"""Kernels of `gaussian_kl`: the information cost of a code, forward and backward."""
