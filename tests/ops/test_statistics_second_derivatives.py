"""Test second derivatives of the statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.servers import servers
from tests.support.statistics import EVERY, OPS, calls, check_second_derivative, leaves, values_of

SEVERAL = pytest.mark.parametrize(
    ("name", "server"),
    [pytest.param(op, *s.values, id=f"{op}-{s.id}") for op in OPS if len(OPS[op].arguments) > 1 for s in servers(op)],
)


@EVERY
def test_second_derivative(name: str, server: tuple[str, str]) -> None:
    for call in calls(name):
        check_second_derivative(call, leaves(OPS[name].make(8, 4), torch.float64, server[1]), server[0])


@SEVERAL
def test_of_inputs_made_of_one_another(name: str, server: tuple[str, str]) -> None:
    """If inputs depend on one another, as z depends on mu and logvar, each gradient path counts once."""
    impl, device = server

    def chained(first: Tensor, *others: Tensor, impl: str | None = None) -> Any:
        return OPS[name].call(first, *(x * first for x in others), impl=impl)

    check_second_derivative(chained, leaves(OPS[name].make(8, 4), torch.float64, device), impl)


@EVERY
def test_of_some_results_for_some_inputs(name: str, server: tuple[str, str]) -> None:
    """Some results have no gradient, some inputs want none, and the incoming gradient is differentiable."""
    impl, device = server
    inputs = leaves(OPS[name].make(8, 4), torch.float64, device)
    found = []
    for which in (impl, "reference"):
        value = values_of(OPS[name].call(*inputs, impl=which))[0]
        pull = value.detach().clone().requires_grad_()
        (first,) = torch.autograd.grad(value, inputs[-1:], pull, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), [*inputs, pull], allow_unused=True)
        found.append([first, *(torch.zeros(()) if g is None else g for g in second)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
