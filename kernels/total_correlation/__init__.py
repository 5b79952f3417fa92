"""Kernels of `total_correlation`: streaming mixtures of the batch's posteriors, forward and backward."""
