"""Kernels of `covariance_penalty`: the stages around the matrix products, forward and backward."""
