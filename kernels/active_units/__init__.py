"""Kernels of `active_units`: column moments and the fractions of a code in use, forward and backward."""
