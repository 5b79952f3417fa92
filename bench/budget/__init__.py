"""The study of `python -m bench.budget`: spill with a budget of rows against the same rule on all rows."""
