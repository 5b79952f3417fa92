"""Test `StepGuard`: a step that is not finite changes nothing, and the host never waits for the check."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bomkern import Anchored, GoalSet, StepGuard
from tests.support.syncs import CountSyncs

FUSED: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
}
OTHERS: dict[str, Any] = {
    "plain SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
}
EVERY = pytest.mark.parametrize("name", [*FUSED, *OTHERS])
BAD = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def gradients(net: nn.Module, value: float | None = None) -> None:
    """Compute the gradients of a loss, and put ``value`` into one element of the last."""
    x = torch.ones(4, 3, dtype=next(net.parameters()).dtype)
    net(x).square().mean().backward()
    if value is not None:
        list(net.parameters())[-1].grad[0] = value  # type: ignore[index]


def everything(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor)]
    return [t.detach().clone() for t in [*net.parameters(), *state]]


def make(name: str, net: nn.Module, **given: Any) -> tuple[torch.optim.Optimizer, StepGuard]:
    optimizer = {**FUSED, **OTHERS}[name](net.parameters())
    return optimizer, StepGuard(optimizer, **given)


@EVERY
def test_a_finite_step_is_the_plain_one(name: str) -> None:
    ours, theirs = model(), model()
    (optimizer, guard), plain = make(name, ours), {**FUSED, **OTHERS}[name](theirs.parameters())
    for _ in range(3):
        gradients(ours), gradients(theirs)
        assert guard.step(torch.tensor(True))
        plain.step()
        guard.zero_grad(), plain.zero_grad()
    for a, b in zip(everything(ours, optimizer), everything(theirs, plain), strict=True):
        assert torch.equal(a, b)
    assert guard.state_dict() == {"rejected": 0, "rejected_in_a_row": 0}


@EVERY
@pytest.mark.parametrize("bad", BAD)
def test_a_gradient_that_is_not_finite_changes_nothing(name: str, bad: str) -> None:
    net = model()
    optimizer, guard = make(name, net)
    gradients(net)
    guard.step()
    guard.zero_grad()
    before = everything(net, optimizer)
    gradients(net, BAD[bad])
    assert not guard.step()
    assert not hasattr(optimizer, "found_inf")
    for a, b in zip(before, everything(net, optimizer), strict=True):
        assert torch.equal(a, b)
    guard.zero_grad()
    gradients(net)
    assert guard.step() and guard.state_dict() == {"rejected": 1, "rejected_in_a_row": 0}


@EVERY
def test_a_loss_that_is_not_finite_changes_nothing(name: str) -> None:
    net = model()
    optimizer, guard = make(name, net)
    gradients(net)
    guard.step()
    before = everything(net, optimizer)
    for _ in range(2):
        assert not guard.step(torch.tensor(False))
    assert all(torch.equal(a, b) for a, b in zip(before, everything(net, optimizer), strict=True))
    assert guard.state_dict() == {"rejected": 2, "rejected_in_a_row": 2}


def test_a_gradient_is_not_changed_by_the_look() -> None:
    net = model()
    _, guard = make("AdamW", net)
    gradients(net)
    tiny = next(iter(net.parameters())).grad
    assert tiny is not None
    tiny[0, 0] = 1e-45
    before = [p.grad.clone() for p in net.parameters()]  # type: ignore[union-attr]
    guard.step()
    assert all(torch.equal(a, p.grad) for a, p in zip(before, net.parameters(), strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FUSED)
def test_no_host_sync(name: str) -> None:
    net = model()
    goals = GoalSet(a=Anchored(0.0, 1.0), b=Anchored(0.0, 1.0), spill=0.5)
    _, guard = make(name, net, goals=goals)
    x = torch.ones(4, 3)
    for warm in (True, False):
        with CountSyncs() as counter:
            out = goals({"a": net(x)[:, 0] ** 2, "b": net(x)[:, 0].abs()})
            out.loss.backward()
            guard.step(out.finite)
            guard.zero_grad()
        if guard._waits:  # torch 2.11's fused Adagrad reads no found_inf
            assert name == "Adagrad" and torch.__version__.startswith("2.11.")
        else:
            assert warm or not counter.seen.keys() - {"_to_copy"}


@pytest.mark.parametrize(
    ("name", "what", "hint"), [("plain SGD", "SGD", "; fused=True would not"), ("RMSprop", "RMSprop", "")]
)
def test_an_unfused_optimizer_waits_and_says_so_once(
    name: str, what: str, hint: str, caplog: pytest.LogCaptureFixture
) -> None:
    net = model()
    _, guard = make(name, net)
    gradients(net)
    with caplog.at_level(logging.WARNING, "bomkern"):
        guard.step(), guard.step()
    assert [r.getMessage() for r in caplog.records] == [
        f"StepGuard: {what} takes no found_inf: each step waits for the device{hint}"
    ]
    with CountSyncs() as counter:
        guard.step()
    assert counter.seen


def test_optimizers_step_together_or_not_at_all() -> None:
    a, b = model(0), model(1)
    guard = StepGuard(FUSED["AdamW"](a.parameters()), FUSED["SGD"](b.parameters()))
    gradients(a), gradients(b, torch.nan)
    before = copy.deepcopy([*a.state_dict().values(), *b.state_dict().values()])
    assert not guard.step()
    assert all(
        torch.equal(x, y) for x, y in zip(before, [*a.state_dict().values(), *b.state_dict().values()], strict=True)
    )


def test_goals_take_the_step_back_too() -> None:
    net = model()
    goals = GoalSet(a=Anchored(0.0, 1.0), b=Anchored(0.0, 1.0), spill=0.5)
    _, guard = make("AdamW", net, goals=goals)

    def step(bad: float | None = None) -> None:
        guard.zero_grad()
        out = goals({"a": net(torch.ones(4, 3))[:, 0] ** 2, "b": net(torch.ones(4, 3))[:, 0].abs()})
        out.loss.backward()
        if bad is not None:
            next(iter(net.parameters())).grad[0, 0] = bad  # type: ignore[index]
        guard.step(out.finite)

    step()
    kept = goals.average.clone()
    step(torch.nan)
    assert torch.equal(goals.average, kept) and goals.history["finite"].tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    net = model(dtype=dtype)
    optimizer, guard = make("AdamW", net)
    gradients(net)
    assert guard.step()
    before = everything(net, optimizer)
    gradients(net, torch.inf)
    assert not guard.step()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(net, optimizer), strict=True))


def test_sparse_gradients_and_parameters_without_one() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    guard = StepGuard(torch.optim.SGD([*table.parameters(), nn.Parameter(torch.ones(1))], lr=0.1))
    table(torch.tensor([1])).sum().backward()
    assert guard.step()
    guard.zero_grad()
    (table(torch.tensor([1])) * torch.nan).sum().backward()
    assert not guard.step() and table.weight.isfinite().all()


def test_counts_are_saved() -> None:
    _, guard = make("AdamW", model())
    guard.step(torch.tensor(False))
    _, again = make("AdamW", model())
    again.load_state_dict(guard.state_dict())
    assert again.state_dict() == {"rejected": 1, "rejected_in_a_row": 1}


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        ([], {}, ValueError, "must be given at least one optimizer"),
        ([3], {}, TypeError, "optimizers must be torch.optim.Optimizer, got int"),
        (["net"], {"goals": ["a"]}, TypeError, "goals must be GoalSet, got str"),
        (["net", "meta"], {}, ValueError, "parameters must be on one device, got cpu, meta"),
    ],
)
def test_bad_input_is_named(given: list[Any], options: Any, error: type[Exception], message: str) -> None:
    made = {
        "net": torch.optim.SGD(model().parameters()),
        "meta": torch.optim.SGD(nn.Linear(2, 2, device="meta").parameters()),
    }
    with pytest.raises(error, match=message):
        StepGuard(*(made.get(x, x) for x in given), **options)
