"""Helpers for every room: checks, processes, torch's private names. Nothing here knows of goals."""
