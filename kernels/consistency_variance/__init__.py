"""Kernels of `consistency_variance`: the variance over views, forward and backward."""
