"""Test lazy goals with random layers and generators, and the tolerance for rows evaluated among other rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bomkern import lazy, min_goal_loss
from bomkern.lazy_goals.cost import statistics_of
from tests.support.lazy_problem import size
from tests.support.lazy_rows import DOUBLE, ONE, check, linear, rivals, rows, step_alone

# Tolerance for differing rows.


def test_what_cancels_is_no_dependence() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(65, 257), nn.SiLU(), nn.Linear(257, 63))
    for step in range(5):
        x = torch.randn(61, 65) + step
        goal = lazy(lambda u, v: (u - v).square().sum(1), lazy(net, x), lazy(net, x + 1e-6))
        min_goal_loss([goal, goal.value.median().expand(61)], ONE, route="always").backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("inside", [True, False])
def test_halves_are_checked_as_halves(inside: bool) -> None:
    """The check uses the tolerance of half precision, even if the loss is computed outside of autocast."""
    off = 0.0

    def rough(v: Tensor) -> Tensor:
        return v.float().abs().sum(1) * (1 + off)

    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        goal = lazy(rough, lazy(nn.Linear(4, 4), rows().float()))
    _ = goal.value
    off = 0.01
    if inside:
        min_goal_loss([goal], ONE, route="always")
    else:
        with pytest.raises(ValueError, match="depend on one another"):
            min_goal_loss([goal], ONE, route="always")


def test_modules_that_change_their_mode() -> None:
    norm = nn.BatchNorm1d(4).double().eval()

    def goal(v: Tensor) -> Tensor:
        return size(norm(v))

    step_alone(goal, rows())
    norm.train()
    with pytest.raises(ValueError, match="depend on one another"):
        step_alone(goal, rows() * 3 + 5)
    with pytest.raises(ValueError, match="depend on one another"):  # all rows of the goal, but not all rows of the call
        min_goal_loss([lazy(goal, rows() * 3 + 5), lazy(goal, rows())], ONE, route="always")


# Layers that draw random numbers.


def test_attention() -> None:
    torch.manual_seed(0)
    words = torch.randn(16, 5, 8, dtype=DOUBLE)
    for p in (0.0, 0.2):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=p).double()
        check(lambda wrap, net=layer: [wrap(size, wrap(net, words)), rivals(high=1.2)], layer.parameters())
    net = linear(8)

    def attend(v: Tensor) -> Tensor:
        return size(F.scaled_dot_product_attention(net(v)[:, None], v[:, None], v[:, None]))

    check(lambda wrap: [wrap(attend, words), rivals(high=1.0)], net.parameters())
    assert not statistics_of(attend).draws


def test_draws_of_many_kinds() -> None:
    net = linear()
    image = torch.rand(16, 3, 4, 4, dtype=DOUBLE).contiguous(memory_format=torch.channels_last)

    def draws(v: Tensor, image: Tensor) -> Tensor:
        code = net(v)
        found = size(torch.distributions.Normal(code, code.exp()).rsample()) + size(
            F.gumbel_softmax(code, dim=1) * code
        )
        found = found + size(code * torch.randint(3, (len(v), 1)) + torch.randn(4, dtype=DOUBLE))
        found = found + size(code * torch.randint_like(code, 1, 4)) + size(code[torch.randperm(4)[0] :])[0] * 0
        moved = image * code[:, :3, None, None] + torch.randn_like(image)
        found = found + size(F.dropout2d(moved, 0.5)) + size(moved * torch.bernoulli(torch.rand_like(moved)))
        found = found + size(code * torch.empty_like(code).bernoulli_(torch.full((4,), 0.3, dtype=DOUBLE)))
        found = found + size(code * torch.empty_like(code).bernoulli_(code.detach().sigmoid()))
        return found + size(code + torch.empty(len(v), 8, dtype=DOUBLE)[:, ::2].uniform_(-1, 1))

    check(lambda wrap: [wrap(draws, rows(), image), rivals(high=12.0)], net.parameters())


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda v: size(v * torch.rand(len(v), 1, generator=torch.Generator())), "by rand from a generator of its own"),
        (lambda v: size(v + torch.randn(4, len(v), dtype=DOUBLE).t()), "it must draw in rows"),
        (lambda v: size(v[torch.randperm(len(v))]), "randperm"),
        (lambda v: size(v) + torch.multinomial(v.softmax(1), 1)[:, 0], "multinomial, which cannot be repeated"),
        (lambda v: checkpoint(lambda u: size(F.dropout(u)), v, use_reentrant=False), "inside torch.utils.checkpoint"),
    ],
)
def test_draws_that_cannot_be_repeated_are_refused(fn: Any, message: str) -> None:
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=message):
        step_alone(fn, rows().requires_grad_())
    torch.set_rng_state(before)
    assert step_alone(fn, rows().requires_grad_(), route="never").requires_grad


def test_other_generators_are_found_out() -> None:
    source = np.random.default_rng(0)
    with pytest.raises(ValueError, match="depend on one another"):
        step_alone(lambda v: size(v * source.random()), rows())


def test_checkpointing_without_draws() -> None:
    net = linear()

    def goal(v: Tensor) -> Tensor:
        return checkpoint(lambda u: size(net(u)), v, use_reentrant=False)

    check(lambda wrap: [wrap(goal, rows()), rivals()], net.parameters())


def test_a_function_may_begin_to_draw() -> None:
    net, drop = linear(), nn.Dropout(0.5).eval()

    def goal(v: Tensor) -> Tensor:
        return size(drop(net(v)))

    for training in (False, True, False, True):
        drop.train(training)
        check(lambda wrap: [wrap(goal, rows()), rivals()], net.parameters(), steps=2)
