"""Test each stage of evaluating lazy goals: the rows of each call, its measured cost, and the memory it keeps."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
import torch._dynamo  # its first import, by torch itself inside a call, leaves frames with that call's tensors
from torch import Tensor, nn

from bomkern import GoalSet, Lazy, Minimize, lazy, min_goal_loss
from bomkern.lazy_goals.cost import FunctionStatistics, partial_pays, record_owned
from bomkern.lazy_goals.evaluate import Evaluation

BATCH, WIDTH = 16, 4
ONE = Minimize(1.0)


class Net(nn.Module):
    """A linear layer that records the rows of each call, and keeps weak references to its activations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(WIDTH, WIDTH).double()
        self.calls: list[int] = []
        self.activations: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x).tanh()
        self.calls.append(len(x))
        self.activations.append(weakref.ref(hidden))
        out: Tensor = hidden * hidden  # the product saves its input for backward
        return out

    def alive(self) -> int:
        return sum(ref() is not None for ref in self.activations)


def size(x: Tensor) -> Tensor:
    return x.square().sum(1)


def inputs() -> Tensor:
    return torch.randn(BATCH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def two_goals(net: Net) -> list[Lazy]:
    """Return two goals that read one network, for a single call of it."""
    return [lazy(size, lazy(net, inputs())), lazy(size, lazy(net, inputs().flip(0)))]


@pytest.mark.parametrize("how", ["min_goal_loss", "GoalSet"])
@pytest.mark.parametrize("backward", [True, False])
def test_activations_are_freed_with_the_loss(how: str, backward: bool) -> None:
    net = Net()
    goals = two_goals(net)
    with torch.no_grad():
        rival = size(net(inputs())).median().expand(BATCH)
    rest: tuple[Tensor, ...]
    named = GoalSet(a=ONE, b=ONE, c=ONE, route="always").double()
    gc.collect()
    gc.disable()
    try:
        if how == "GoalSet":
            out = named({"a": goals[0], "b": goals[1], "c": rival})
            loss, rest = out.loss, (out.bottleneck, out.record, out.share)
            del out
        else:
            loss, stats = min_goal_loss([*goals, rival], ONE, route="always", return_stats=True)
            rest = tuple(stats)
        assert 0 < net.calls[-1] < 2 * BATCH and net.alive() == 1  # the call with a graph
        if backward:
            loss.backward()
        del loss
        assert net.alive() == 0 and len(rest) > 1 and all(goal.graph is None for goal in goals)
    finally:
        gc.enable()


def test_rows_that_a_node_is_needed_for() -> None:
    net = Net()
    hidden = lazy(net, inputs())
    goals = [lazy(size, hidden), lazy(torch.sum, lazy(net, inputs()), 1), lazy(torch.amax, hidden, 1)]
    evaluation = Evaluation([goals[0], "anything else", goals[1], goals[2]])
    owned = torch.zeros(3, BATCH, dtype=torch.bool)
    owned[0, 2] = owned[0, 5] = owned[2, 3] = True
    index = [evaluation.nodes.index(goal) for goal in goals]
    rows = evaluation.choose({i: owned[k] for k, i in enumerate(index)})
    assert {i: x.tolist() for i, x in rows.items()} == {
        index[0]: [2, 5],
        index[2]: [3],
        evaluation.nodes.index(hidden): [2, 3, 5],
    }


def test_rows_can_be_evaluated_without_a_look_at_all() -> None:
    net = Net()
    goals = two_goals(net)
    evaluation = Evaluation(goals)
    wanted = [torch.tensor([1, 2, 7]), torch.tensor([0])]
    index = [evaluation.nodes.index(goal) for goal in goals]
    masks = [torch.zeros(BATCH, dtype=torch.bool).index_fill(0, rows, True) for rows in wanted]
    parts = evaluation.rebuild(evaluation.choose(dict(zip(index, masks, strict=True))))
    assert net.calls == [4]
    for i, rows, x in zip(index, wanted, (inputs(), inputs().flip(0)), strict=True):
        (got,) = torch.autograd.grad(parts[i].sum(), net.layer.weight, retain_graph=True)
        (want,) = torch.autograd.grad(size(net(x[rows])).sum(), net.layer.weight)
        assert torch.allclose(got, want)
    assert goals[0].whole is None and torch.allclose(goals[0].value, size(net(inputs())))


def measured(owned: float, ratio: float = 2.0, forward: float = 1.0) -> FunctionStatistics:
    statistics = FunctionStatistics()
    statistics.checked, statistics.owned, statistics.backward_ratio, statistics.forward = True, owned, ratio, forward
    return statistics


def test_when_partial_graphs_pay() -> None:
    """Partial graphs pay if forward and backward of the owned rows are cheaper than backward of all rows.

    The first forward takes place in both cases.
    """
    assert partial_pays([(measured(0.5), 10)])  # 0.5 * 3 < 0.9 * 2
    assert not partial_pays([(measured(0.7), 10)])
    assert not partial_pays([(measured(0.1), 1), (measured(1.0), 10)])
    assert partial_pays([(measured(1.0), 1), (measured(0.1), 10)])
    assert partial_pays([(measured(1.0), 10), (measured(math.nan), 1)])  # one goal is not measured yet
    assert partial_pays([(FunctionStatistics(), 1), (measured(1.0), 10)])


def test_fraction_of_the_backward_that_runs() -> None:
    cheap, dear = measured(math.nan), measured(0.5, forward=3.0)
    assert record_owned([(cheap, 10, 5), (dear, 10, 0)]) == pytest.approx(5 / 40)
    assert cheap.owned == 0.5 and dear.owned == pytest.approx(0.4)  # the first value starts a moving average
    assert record_owned([]) == 1
