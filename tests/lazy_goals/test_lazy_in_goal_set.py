"""Test lazy goals in a GoalSet: errors inside, evaluation mode, and `probe`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bomkern import Calibrated, GoalSet, lazy, probe
from tests.support.lazy_problem import Wrap, error, plain, size
from tests.support.lazy_rows import ONE, Net, linear, rivals, rows


@pytest.mark.parametrize("when", ["first", "again"])
def test_errors_inside_come_out_and_teach_nothing(when: str) -> None:
    goals = GoalSet(a=Calibrated(3), b=ONE, route="always", spill=0.5).double()
    fails = False

    def goal(v: Tensor) -> Tensor:
        if fails and (when == "first" or torch.is_grad_enabled()):
            raise KeyError("inside")
        return size(v)

    x = rows().requires_grad_()
    goals({"a": lazy(goal, x), "b": rivals()})
    before = {name: buffer.clone() for name, buffer in goals.named_buffers()}
    fails = True
    with pytest.raises(KeyError, match="inside"):
        goals({"a": lazy(goal, x * 100), "b": rivals()})
    for name, buffer in goals.named_buffers():
        assert torch.equal(buffer, before[name]), name
    with pytest.raises(ValueError, match=r"the raw value of b must have shape \[B\] or \[\], got \[16, 1\]"):
        goals({"a": lazy(size, x), "b": rivals()[:, None]})
    assert goals.steps == 1


def test_evaluation_and_no_grad() -> None:
    net = linear()
    goals = GoalSet(a=ONE, b=ONE, route="always").double().eval()
    want = goals({"a": size(net(rows())), "b": rivals()})
    with torch.no_grad():
        quiet = goals({"a": lazy(size, lazy(net, rows())), "b": rivals()})
    loud = goals({"a": lazy(size, lazy(net, rows())), "b": rivals()})
    with torch.inference_mode():
        inferred = goals({"a": lazy(size, lazy(net, rows() + 0)), "b": rivals()})
    for out in (quiet, loud, inferred):
        assert torch.allclose(out.loss, want.loss) and torch.equal(out.bottleneck, want.bottleneck)
    assert loud.loss.requires_grad and not quiet.loss.requires_grad


def test_probe() -> None:
    found = []
    for wrap in (plain, lazy):
        net = linear()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        goals = GoalSet(a=ONE, b=ONE, route="always").double()

        def step(net: Net = net, optimizer: Any = optimizer, goals: GoalSet = goals, wrap: Wrap = wrap) -> None:
            optimizer.zero_grad()
            hidden = wrap(net, rows())
            goals({"a": wrap(size, hidden), "b": wrap(error, hidden, rows())}).loss.backward()
            optimizer.step()

        found.append(probe(step, goals, 4, state=[net, optimizer], progress=False).table)
    assert torch.allclose(*found)
