"""Test second derivatives of min_goal_loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bomkern import min_goal_loss
from tests.support.goals import REDUCTIONS, SIX, leaf
from tests.support.servers import servers

IMPLS = pytest.mark.parametrize("server", servers("min_goal"))


@IMPLS
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("constraints", [None, SIX], ids=["scores", "six"])
@pytest.mark.parametrize("matrix", [False, True], ids=["columns", "matrix"])
def test_second_derivative(matrix: bool, constraints: Any, reduction: str, server: tuple[str, str]) -> None:
    """The second derivative matches the reference's.

    With routing, a goal without a share has neither a first nor a second derivative.
    """
    impl, device = server
    values = torch.rand(7, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
    raw = [values] if matrix else [*values[:, :5].unbind(1), values[0, 5]]
    raw = [x.to(device, copy=True).requires_grad_() for x in raw]
    found = []
    for served, route in ((impl, "never"), (impl, "always"), ("reference", "never")):
        given = raw[0] if matrix else raw
        loss = min_goal_loss(given, constraints, reduction=reduction, impl=served, route=route).square().sum()
        first = torch.autograd.grad(loss, raw, create_graph=True, allow_unused=True)
        value = sum((k + 1) * (g * g).sum() for k, g in enumerate(first) if g is not None)
        second = torch.autograd.grad(value, raw, allow_unused=True)
        pairs = zip([*first, *second], [*raw, *raw], strict=True)
        found.append([torch.zeros_like(x) if g is None else g for g, x in pairs])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert any(x.any() for x in found[0][len(raw) :])


@IMPLS
def test_gradgradcheck(server: tuple[str, str]) -> None:
    impl, device = server
    raw = [(torch.rand(3, dtype=torch.float64, device=device) + 0.2).requires_grad_() for _ in range(6)]
    assert torch.autograd.gradgradcheck(lambda *x: min_goal_loss(list(x), SIX, route="never", impl=impl), raw)


@IMPLS
def test_goals_made_of_one_another(server: tuple[str, str]) -> None:
    """If one goal depends on another, each gradient path counts once."""
    impl, device = server
    raw = (torch.rand(9, dtype=torch.float64, device=device) + 0.2).requires_grad_()
    found = []
    for served in (impl, "reference"):
        goal = raw.exp()
        loss = min_goal_loss([goal, goal * raw, goal], SIX[:3], impl=served, route="never")
        (first,) = torch.autograd.grad(loss, raw, create_graph=True)
        found.append((first, *torch.autograd.grad(first.square().sum(), raw)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@IMPLS
def test_goals_may_change_before_a_plain_backward_alone(server: tuple[str, str]) -> None:
    impl, device = server
    if impl == "reference":
        pytest.skip("eager PyTorch keeps what its formulas need")
    raw = leaf(torch.rand(5, 6), torch.float32, device)
    shifted = raw * 1.0
    loss = min_goal_loss(shifted, SIX, impl=impl)
    shifted.detach().add_(1)  # forward saved everything that backward needs
    torch.autograd.grad(loss, raw, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, raw, create_graph=True)


@IMPLS
def test_after_a_backward_needs_retain_graph(server: tuple[str, str]) -> None:
    impl, device = server
    x = leaf(torch.rand(5, 6), torch.float32, device)
    loss = min_goal_loss(x, SIX, impl=impl)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x, create_graph=True)
