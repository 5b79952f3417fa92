"""The study of `python -m bench.policies`: which rule, scales and ideals train many goals best, faults included."""
