"""Kernels of `goal_set`: the bottleneck rule of groups of goals, hard or smoothed, forward and backward."""
