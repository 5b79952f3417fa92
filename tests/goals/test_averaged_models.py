"""Test `torch.optim.swa_utils.AveragedModel` of a model that holds a GoalSet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from bomkern import Anchored, Calibrated, GoalSet

AVERAGES: dict[str, dict[str, Any]] = {
    "swa": {},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "own": {"avg_fn": lambda averaged, new, count: averaged + (new - averaged) / (count + 1)},
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.goals = GoalSet(recon=Anchored(0.0, 1.0), size=Calibrated(steps=5), spill=0.5)

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.net(x))
        return self.goals({"recon": (y - x).square().mean(1), "size": y.abs().mean(1)})


def trained(steps: int, **average: Any) -> tuple[Model, AveragedModel]:
    torch.manual_seed(0)
    model = Model()
    averaged = AveragedModel(model, **average)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).loss.backward()
        optimizer.step()
        averaged.update_parameters(model)
    return model, averaged


@pytest.mark.parametrize("average", AVERAGES)
def test_anchors_are_copied_and_weights_averaged(average: str) -> None:
    model, averaged = trained(12, **AVERAGES[average])
    assert not torch.equal(averaged.module.net.weight, model.net.weight)
    mine, copy = dict(model.goals.named_buffers()), dict(averaged.module.goals.named_buffers())
    for name, value in mine.items():
        assert torch.equal(copy[name], value), name
        assert copy[name].data_ptr() != value.data_ptr(), name
    before = {name: value.clone() for name, value in copy.items()}
    averaged.eval()(torch.randn(8, 4))
    assert all(torch.equal(copy[name], value) for name, value in before.items())
    x = torch.randn(8, 4)
    model.eval()
    model.net.load_state_dict(averaged.module.net.state_dict())  # batch norm's buffers are copied already
    model.norm.load_state_dict(averaged.module.norm.state_dict())
    assert torch.equal(averaged(x).loss, model(x).loss)


@pytest.mark.parametrize("steps", [12, 200])  # the second is more than the ring on the device holds
def test_a_saved_average_goes_on(steps: int) -> None:
    model, averaged = trained(steps)
    other = AveragedModel(Model())
    other.load_state_dict(averaged.state_dict())
    goals = other.module.goals
    assert goals.steps == steps and goals.anchors() == model.goals.anchors()
    other(torch.full((8, 4), 100.0))  # after its last step, `Calibrated` learns nothing
    assert goals.steps == steps + 1 and goals.anchors() == model.goals.anchors()


def test_updating_batch_norm_teaches_nothing() -> None:
    model, averaged = trained(3)
    update_bn([torch.full((8, 4), 100.0), torch.randn(8, 4)], averaged)
    assert averaged.module.goals.anchors() == model.goals.anchors()
    assert len(averaged.module.goals.history) == 3
