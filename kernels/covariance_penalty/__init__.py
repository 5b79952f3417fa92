"""Kernels of `covariance_penalty`: all that stands around the matrix products, forward and backward."""
