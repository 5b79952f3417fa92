"""Second derivatives of the compiled ops.

Under ``create_graph=True`` the backward of a compiled op (csrc/autograd.h) calls the reference by the names registered
here, and autograd differentiates it: once for the gradient, and again for each further derivative. For total
correlation the reference is the gradient itself, whose memory stays bounded. The Triton implementations do the same in
Python, see triton/library.py.
"""

from __future__ import annotations

from .schemas import OPS, library

for op in OPS.values():
    signature, function = op.definition
    library.define(signature)
    library.impl(signature.partition("(")[0], function, "CompositeImplicitAutograd")
