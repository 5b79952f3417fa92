"""A seeded differential fuzzer of every op and implementation: ``python -m tests.fuzz --seconds 600``.

A case is drawn from one integer, ``--case SEED:N``, and is plain data (`cases.Case`): sizes, tensors as (axes, dtype,
layout, kind of values), options. `judging` runs it by an implementation and holds what comes out, gradients too,
against the reference in float64; `shrinking` makes a failing case smaller.
"""
