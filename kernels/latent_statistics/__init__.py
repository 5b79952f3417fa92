"""Kernels of `latent_statistics`: a latent code's statistics from one read, forward and backward."""
