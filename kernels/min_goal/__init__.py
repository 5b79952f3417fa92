"""Kernels of `min_goal`: the bottleneck rule, forward and backward."""
