"""Test that a model which holds a `GoalSet` is saved by every format, and made on the meta device."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from bomkern import Anchored, Calibrated, GoalSet, Group, Minimize, ShareGuard, Tracking, Upper
from bomkern.goals.monitor import ROWS
from bomkern.nn import MinGoalLoss

RULES: dict[str, dict[str, Any]] = {"plain": {}, "spill": {"spill": 0.5}, "guard": {"guard": ShareGuard(0.1, 0.3)}}
EACH = pytest.mark.parametrize("how", RULES.values(), ids=RULES)


class Model(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.net = nn.Linear(2, 4)
        self.goals = GoalSet(
            {"max": Calibrated(6), "tracking": Tracking(3.0), "moving": Anchored(0.0, "baseline", moving=True)},
            both=Group(a=Minimize(1.0), b=Upper(1.0, 0.5)),
            **how,
        )
        self.plain = MinGoalLoss([Minimize(2.0), Upper(1.0, 0.5)])


def train(model: Model, first: int, last: int) -> Model:
    for seed in range(first, last):
        a, b, c, d = torch.rand(4, 5, generator=torch.Generator().manual_seed(seed))
        model.goals({"max": a, "tracking": b, "moving": c, "both": {"a": d, "b": a}})
    return model


def trained(how: dict[str, Any], steps: int = 4) -> Model:
    model = Model(**how)
    model.goals.anchor(baseline={"moving": 0.75})
    return train(model, 0, steps)


def assert_goes_on(model: Model, again: Model) -> None:
    """Check that both have one state, and that it stays one in training."""
    steps = model.goals.steps
    for k in range(3):
        assert again.goals.steps == model.goals.steps == steps + k
        for name, x in model.named_buffers():
            if name not in ("goals.monitor.ring", "goals._average_before", "goals._multipliers_before"):
                assert torch.equal(x, again.get_buffer(name)), name
        for name, x in model.named_parameters():
            assert torch.equal(x, again.get_parameter(name)), name
        for part in ("raw", "share", "scale"):
            assert torch.equal(model.goals.history[part], again.goals.history[part])
        assert str(model) == str(again)
        assert torch.equal(model.goals.monitor.take(), again.goals.monitor.take())
        for each in (model, again):
            train(each, steps + k, steps + k + 1)


def by_torch(model: Model, again: Model, path: Path) -> None:
    torch.save(model.state_dict(), path / "state.pt")
    again.load_state_dict(torch.load(path / "state.pt", weights_only=True))


def by_pickle(model: Model, again: Model, path: Path) -> None:
    again.load_state_dict(pickle.loads(pickle.dumps(model.state_dict())))


def by_copy(model: Model, again: Model, path: Path) -> None:
    again.load_state_dict(copy.deepcopy(model).state_dict())


def by_safetensors(model: Model, again: Model, path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(model, path / "model.safetensors", metadata={"format": "pt"})
    assert safetensors.load_model(again, path / "model.safetensors") == (set(), [])


def by_safetensors_of_a_dict(model: Model, again: Model, path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    again.load_state_dict(safetensors.load(safetensors.save(dict(model.state_dict()))), assign=True)


def by_distributed_checkpoint(model: Model, again: Model, path: Path) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    checkpoint.save({"model": get_model_state_dict(model)}, checkpoint_id=path / "parts", no_dist=True)
    state = {"model": get_model_state_dict(again)}
    checkpoint.load(state, checkpoint_id=path / "parts", no_dist=True)
    set_model_state_dict(again, state["model"])


WAYS = [by_torch, by_pickle, by_copy, by_safetensors, by_safetensors_of_a_dict, by_distributed_checkpoint]
Way = Callable[[Model, Model, Path], None]


@EACH
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.filterwarnings("ignore:.*torch.distributed")
def test_a_saved_model_goes_on(way: Way, how: dict[str, Any], tmp_path: Path) -> None:
    model, again = trained(how), Model(**how)
    way(model, again, tmp_path)
    assert_goes_on(model, again)


def test_a_saved_state_holds_tensors_of_their_own_and_of_one_size() -> None:
    model = trained({"spill": 0.5}, 0)
    first = {name: x.shape for name, x in model.state_dict().items()}
    for steps in (3, ROWS, 2 * ROWS + 5):
        state = train(model, 0, steps).state_dict()
        assert all(type(x) is Tensor and x.is_contiguous() for x in state.values())
        assert {name: x.shape for name, x in state.items()} == first
        stored = [x.untyped_storage().data_ptr() for x in state.values()]
        assert len(set(stored)) == len(stored)


# The meta device.


def on_meta(how: dict[str, Any]) -> Model:
    with torch.device("meta"):
        return Model(**how)


@EACH
def test_a_model_on_meta_prints_and_is_copied(how: dict[str, Any]) -> None:
    model = on_meta(how)
    assert all(x.is_meta for x in (*model.parameters(), *model.buffers()))
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        table = str(each)
        assert "on meta" in table and "unknown" in table and "0 steps" in table and "Minimize(scale=2" in table
        assert set(each.state_dict()) == set(Model(**how).state_dict())
    with pytest.raises(ValueError, match=r"the raw values are on cpu, the GoalSet on meta: call its to_empty"):
        model.goals.anchor(baseline={"moving": 0.75})
        train(model, 0, 1)


def poisoned_empty(x: Tensor, **how: Any) -> Tensor:
    """Return what `torch.empty_like` may return."""
    x = torch.zeros_like(x, **how)
    return x.fill_(float("nan") if x.is_floating_point() else 1 << 40)


@EACH
@pytest.mark.parametrize("anchored", ["before", "after"])
def test_no_value_that_to_empty_leaves_is_used(
    how: dict[str, Any], anchored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, want = on_meta(how), trained(how, 0)
    if anchored == "before":
        model.goals.anchor(baseline={"moving": 0.75})
    monkeypatch.setattr(torch, "empty_like", poisoned_empty)
    model.to_empty(device="cpu")
    assert model.net.weight.isnan().all()
    model.net.load_state_dict(want.net.state_dict())
    if anchored == "after":
        model.goals.anchor(baseline={"moving": 0.75})
    assert_goes_on(want, model)


@EACH
def test_a_reset_forgets_all_steps(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP and others call `reset_parameters` of each module that holds parameters or buffers."""
    model, want = trained(how, ROWS + 3), trained(how, 0)
    model.net.load_state_dict(want.net.state_dict())
    monkeypatch.setattr(torch, "empty_like", poisoned_empty)
    for module in (model.goals, model.goals.monitor, model.plain):
        module.to_empty(device="cpu", recurse=False)
    for module in (model.goals, model.goals.monitor, model.plain):
        module.reset_parameters()
    assert_goes_on(want, model)


@EACH
@pytest.mark.parametrize("assign", [True, False])
def test_a_model_on_meta_loads_what_was_saved(how: dict[str, Any], assign: bool) -> None:
    model, again = trained(how), on_meta(how)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    if not assign:
        again.to_empty(device="cpu")
    again.load_state_dict(state, assign=assign)
    assert not any(x.is_meta for x in again.buffers())
    assert_goes_on(model, again)


def test_other_goals_are_assigned_by_name() -> None:
    one = GoalSet(a=Calibrated(9), b=Calibrated(9))
    one({"a": torch.full((2,), 4.0), "b": torch.full((2,), 2.0)})
    with torch.device("meta"):
        two = GoalSet(c=Calibrated(3), b=Calibrated(9), a=Calibrated(9))
    two.load_state_dict(one.state_dict(), assign=True)
    assert two.anchors() == {"c": (0.0, 1.0), "b": (0.0, 2.0), "a": (0.0, 4.0)} and two.steps == 1
    for _ in range(5):
        two({name: torch.full((2,), 8.0) for name in "abc"})
    assert two.anchors() == {"c": (0.0, 8.0), "b": (0.0, 8.0), "a": (0.0, 8.0)} and len(two.history) == 6


@pytest.fixture
def group() -> Iterator[None]:
    """Start a process group with one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@EACH
@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_a_sharded_model_on_meta_loads_a_whole_state(how: dict[str, Any]) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def shard(model: Model) -> Model:
        fully_shard(model.net, mesh=init_device_mesh("cpu", (1,)))
        return model

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
    model, again, want = shard(trained(how)), shard(on_meta(how)), trained(how)
    want.net.load_state_dict({name: x.full_tensor() for name, x in model.net.state_dict().items()})
    again.to_empty(device="cpu")
    set_model_state_dict(again, get_model_state_dict(model, options=whole), options=whole)
    again.net, plain = nn.Linear(2, 4), {name: x.full_tensor() for name, x in again.net.state_dict().items()}
    again.net.load_state_dict(plain)
    assert_goes_on(want, again)
