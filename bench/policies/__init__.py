"""The study of `python -m bench.policies`: compare rules, scales and ideals for many goals, with and without faults."""
