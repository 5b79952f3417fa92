"""Second derivatives of the statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.statistics_helpers import OPS, leaves, values_of
from tests.test_statistics_bridge import EVERY, calls


@EVERY
def test_second_derivative(name: str, server: tuple[str, str]) -> None:
    """That of the reference in float64, by the compiled implementations; refused by those of Triton."""
    impl, device = server
    for call in calls(name):
        inputs = leaves(OPS[name].make(8, 4), torch.float64, device)

        def once(which: str, call: Any = call, inputs: Any = inputs) -> tuple[Tensor, ...]:
            value = sum(x.square().sum() for x in values_of(call(*inputs, impl=which)))
            return torch.autograd.grad(value, inputs, create_graph=True)

        def twice(first: tuple[Tensor, ...], inputs: Any = inputs) -> tuple[Tensor, ...]:
            return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)  # type: ignore[arg-type]

        if impl == "triton":
            with pytest.raises(RuntimeError, match=f"{name} cannot be differentiated twice"):
                twice(once(impl))
            continue
        plain = torch.autograd.grad(sum(x.square().sum() for x in values_of(call(*inputs, impl=impl))), inputs)
        ours, theirs = once(impl), once("reference")
        for made, want in ((ours, plain), (ours, theirs), (twice(ours), twice(theirs))):
            for a, b in zip(made, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
