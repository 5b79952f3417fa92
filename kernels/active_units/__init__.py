"""Kernels of `active_units`: column moments and what a code has in use, forward and backward."""
