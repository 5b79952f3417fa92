"""Test that a `StepGuard` names the goal of a rejected step, and gives up after too many in a row."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch import distributed as dist

from bomkern import Anchored, GoalSet, StepGuard, lazy
from bomkern.goals import rejections
from bomkern.goals.branches import Branches
from tests.support.syncs import CountSyncs

MASKED_TOO_LATE = "in the branch of recon, PowBackward0 made a gradient not finite: mask the input of an operation"


class Loop:
    """A loop with an encoder that both goals share, and a decoder that only ``recon`` needs."""

    def __init__(self, rule: dict[str, Any] | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(3, 4), nn.Linear(4, 1)
        self.goals = GoalSet(recon=Anchored(0.0, 1.0), kl=Anchored(0.0, 1.0), **(rule or {"spill": 0.5}))
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.guard = StepGuard(torch.optim.AdamW(parameters, lr=0.01, fused=True), goals=self.goals, **options)

    def raw(self, y: Tensor) -> dict[str, Any]:
        z = self.encoder(torch.rand(8, 3))
        error = torch.where(y.isnan(), 0, (y - self.decoder(z)[:, 0]) ** 2)
        return {"recon": error, "kl": z.square().mean(1)}

    def step(self, bad: bool = False) -> bool:
        y = torch.rand(8)
        if bad:
            y[2] = torch.nan
        out = self.goals(self.raw(y))
        out.loss.backward()
        ok = self.guard.step(out.finite)
        self.guard.zero_grad()
        return bool(ok)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    "rule", [{"spill": 0.5}, {"spill": "auto"}, {"temperature": 0.1}, {}, {"route": "never"}], ids=str
)
def test_the_branch_is_found(rule: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop(rule)
    for step in range(12):
        assert loop.step(bad := step in (3, 6, 8)) is not bad
    assert loop.guard.reason is not None and loop.guard.reason.startswith(MASKED_TOO_LATE)
    first, second = messages(caplog)  # each once
    assert first.startswith("StepGuard rejected step 4: its loss is finite, a gradient is not. The next steps are")
    assert second == f"StepGuard rejected step 7: {loop.guard.reason}"
    assert loop.goals.branches is None


def test_a_seldom_nan_is_found_too() -> None:
    loop = Loop()
    for step in range(60):
        loop.step(step in (1, 30, 59))  # the second is beyond the first 16 steps, the third within the next 32
    assert loop.guard.reason is not None and loop.guard.reason.startswith(MASKED_TOO_LATE)


def test_steps_before_a_rejection_have_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Branches, "__init__", lambda *args: pytest.fail("a step that was not rejected is searched"))
    loop = Loop()
    for _ in range(5):
        assert loop.step()


def test_searching_changes_no_value() -> None:
    plain, searched = Loop(), Loop()
    for step in range(6):
        searched.goals.branches = []
        torch.manual_seed(step)
        plain.step()
        torch.manual_seed(step)
        searched.step()
    for a, b in zip(plain.encoder.parameters(), searched.encoder.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_node_that_goals_share_names_them_all() -> None:
    x = torch.zeros(4, requires_grad=True)
    root = x.sqrt()  # an infinite derivative, which both branches multiply by 0
    a, b = root * 0, root * 0
    branches = Branches(["a", "b", "c"], [a, b, x + 1])
    (a + b).sum().backward()
    assert branches.find(nan_only=False) == ("SqrtBackward0", ["a", "b"])
    branches.close()
    assert branches.find(nan_only=False) is None


def test_an_infinite_gradient_is_no_fault_under_a_scaler() -> None:
    for factor, found in ((torch.inf, None), (torch.nan, ("MulBackward0", ["a"]))):
        x = torch.ones(4, requires_grad=True)
        value = x * factor
        branches = Branches(["a"], [value])
        value.sum().backward()
        assert branches.find(nan_only=True) == found
        assert branches.find(nan_only=False) == ("MulBackward0", ["a"])


@pytest.mark.parametrize("route", ["always", "never"])
def test_lazy_goals(route: str) -> None:
    loop = Loop({"route": route})
    y = torch.zeros(8)
    y[0] = torch.nan

    def late(z: Tensor, y: Tensor) -> Tensor:
        return torch.where(y.isnan(), 5.0, 5 + (y - loop.decoder(z)[:, 0]) ** 2)

    for _ in range(2):
        z = loop.encoder(torch.ones(8, 3))
        out = loop.goals({"recon": lazy(late, z, y), "kl": z.square().mean(1)})
        out.loss.backward()
        assert not loop.guard.step(out.finite)
        loop.guard.zero_grad()
    assert loop.guard.reason is not None and loop.guard.reason.startswith(MASKED_TOO_LATE)


def test_a_loss_that_is_not_finite_is_named_at_once(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    loop.step()
    z = loop.encoder(torch.rand(8, 3))
    out = loop.goals({"recon": loop.decoder(z)[:, 0] ** 2, "kl": z.mean(1) * torch.tensor([torch.nan, *[1.0] * 7])})
    out.loss.backward()
    assert not loop.guard.step(out.finite)
    assert messages(caplog) == ["StepGuard rejected step 2: the loss is not finite, because the deficit of kl is not"]


def test_a_gradient_from_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    for _ in range(2):
        out = loop.goals(loop.raw(torch.rand(8)))
        (out.loss + (loop.encoder.weight * 0).sqrt().sum()).backward()
        loop.guard.step(out.finite)
    assert "comes from another loss" in messages(caplog)[-1]


def test_a_compiled_step_says_that_it_cannot_be_searched(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    loop = Loop()

    def raw_and_loss(y: Tensor) -> Any:
        return loop.goals(loop.raw(y))

    compiled = torch.compile(raw_and_loss, backend="aot_eager")
    y = torch.tensor([torch.nan, *[0.5] * 7])
    for _ in range(2):
        out = compiled(y)
        out.loss.backward()
        assert not loop.guard.step(out.finite)
        loop.guard.zero_grad()
    assert "run a step without torch.compile" in messages(caplog)[-1]


def test_it_gives_up_with_the_goals_name() -> None:
    loop = Loop(limit=4)
    for _ in range(2):
        loop.step(True), loop.step(True), loop.step(True), loop.step()
    for _ in range(3):
        loop.step(True)
    before = copy.deepcopy(loop.encoder.state_dict())
    with pytest.raises(RuntimeError, match=rf"rejected 4 steps in a row \(limit=4\): {MASKED_TOO_LATE}"):
        loop.step(True)
    assert all(torch.equal(before[name], x) for name, x in loop.encoder.state_dict().items())


def test_it_need_not_give_up() -> None:
    default, never = Loop(), Loop(limit=None)
    for _ in range(99):
        default.guard.step(torch.tensor(False))
    with pytest.raises(RuntimeError, match="rejected 100 steps in a row"):
        default.guard.step(torch.tensor(False))
    for _ in range(102):
        never.guard.step(torch.tensor(False))


def test_a_device_that_is_read_late(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The counts are copied, and read when the next copy starts."""
    monkeypatch.setattr(rejections, "at_once", lambda device: False)
    loop = Loop(limit=5)
    with CountSyncs() as counter:
        for step in range(9):
            loop.step(step in (1, 7))
    # The rejection of step 2 is in the copy of step 5, which step 10 reads; nothing is read before.
    assert not messages(caplog) and not counter.seen.keys() - {"_to_copy", "_local_scalar_dense"}
    loop.step()
    assert len(messages(caplog)) == 1 and loop.goals.branches == []
    loop.step(True)
    assert loop.guard.reason is not None and loop.guard.reason.startswith(MASKED_TOO_LATE)
    taken = 0
    with pytest.raises(RuntimeError, match=r"rejected 10 steps in a row \(limit=5\)"):
        for _ in range(20):
            loop.step(True)
            taken += 1
    assert taken == 13  # the copy of step 20 holds steps 11 to 20, and step 25 reads it


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [(0, ValueError, "limit must be at least 1, or None"), ("3", TypeError, "limit must be a whole number or None")],
)
def test_bad_limits_are_named(limit: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Loop(limit=limit)


def _worker(rank: int, folder: str) -> None:
    """Only the data of rank 1 are bad. Both ranks give up in the same step, with the goal that rank 1 has found."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    try:
        for late in (False, True):
            rejections.at_once = lambda device, late=late: not late  # type: ignore[assignment, misc]
            loop, steps = Loop(process_group=dist.group.WORLD, limit=3), 0
            try:
                for _ in range(20):
                    steps += 1
                    loop.step(rank == 1)
            except RuntimeError as error:
                assert MASKED_TOO_LATE in str(error) and "in a row (limit=3)" in str(error)
                Path(folder, f"{late}, {rank}").write_text(str(steps))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_up_together(tmp_path: Path) -> None:
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
    assert {path.name: path.read_text() for path in tmp_path.glob("*, *")} == {
        "False, 0": "3",
        "False, 1": "3",
        "True, 0": "9",
        "True, 1": "9",
    }
