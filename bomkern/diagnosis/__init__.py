"""Findings about a run, from its history alone."""
