"""Fuzz every op and implementation with seeded cases: ``python -m tests.fuzz --seconds 600``.

An integer determines each case, ``--case SEED:N``. A case is plain data (`cases.Case`): sizes, options and tensors as
(axes, dtype, layout, kind of values). `judging` runs a case by an implementation and compares results and gradients
with the reference in float64. `shrinking` makes a failing case smaller.
"""
