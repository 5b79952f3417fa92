"""Test a training step: rejected steps, and actions that a step must not take."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning_fabric")

import torch
from torch import Tensor

from bomkern import Lazy, lazy
from bomkern.common.torch_internals import TorchDispatchMode
from bomkern.train import loop, trainer
from bomkern.train.config import TrainError
from bomkern.train.networks import VAE, Discriminator
from bomkern.train.nine_goals import GOALS
from tests.support.training import assert_same, config, leaves, make_trainer

# Rejected steps.


def poison_image(run: trainer.Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def images() -> Tensor:
        image = torch.rand(4, 3, 32, 32)
        image[1, 0, 5, 5] = torch.nan
        return image

    monkeypatch.setattr(run, "images", images)


def poison_goal(name: str, value: float) -> Callable[[trainer.Trainer, pytest.MonkeyPatch], None]:
    def poison(run: trainer.Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
        true = trainer.raw_values

        def raw_values(*arguments: Any) -> list[Tensor | Lazy]:
            raw = true(*arguments)
            k, factor = GOALS.index(name), torch.tensor([1.0, value, 1.0, 1.0])
            if arguments[-1]:  # by rows: a row that the goal does not take is not seen
                factor = torch.full_like(factor, value)
            raw[k] = raw[k] * factor if isinstance(raw[k], Tensor) else lazy(torch.mul, raw[k], factor)
            return raw

        monkeypatch.setattr(trainer, "raw_values", raw_values)

    return poison


def poison_gradient(run: trainer.Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    next(run.vae.decoder.parameters()).register_hook(lambda gradient: gradient * torch.nan)


@pytest.mark.parametrize("scales", ["anchored", "auto"])
@pytest.mark.parametrize(
    "poison",
    [poison_image, poison_goal("consistency", torch.nan), poison_goal("realism", torch.inf), poison_gradient],
    ids=["image", "nan-goal", "inf-goal", "gradient"],
)
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    monkeypatch: pytest.MonkeyPatch, poison: Callable[..., None], scales: str
) -> None:
    run = make_trainer(scales=scales, calibration_steps=3)
    run.advance()
    run.advance()
    before = leaves(run.state_dict())
    with monkeypatch.context() as patch:
        poison(run, patch)
        run.advance()
    after = leaves(run.state_dict())
    expected = {"/step": 3, "/goals/_extra_state//steps": 3, "/goals/monitor._extra_state//steps": 3}
    expected |= {"/goals/monitor._extra_state//counted": 3}
    expected |= {"/guard/rejected": 1, "/guard/rejected_in_a_row": 1}
    for name, value in expected.items():
        assert after.pop(name) == value
        before.pop(name)
    assert after.pop("/tally/blame").sum() >= 1
    before.pop("/tally/blame")
    # The history holds the step, with a loss that is not finite.
    for part, counted in {"rows": "counts", "fresh": "fresh_counts"}.items():
        name = f"/goals/monitor._extra_state//{part}"
        rows = after.pop(name)
        assert len(rows) == 3 and rows[2, -1] == 0 and torch.equal(rows[:2], before.pop(name))
        counts = after.pop(f"/goals/monitor._extra_state//{counted}")
        assert len(counts) == 3 and torch.equal(counts[:2], before.pop(f"/goals/monitor._extra_state//{counted}"))
    assert_same(before, after)
    if poison is not poison_gradient:  # the hook stays
        run.advance()
        assert run.guard.state_dict() == {"rejected": 1, "rejected_in_a_row": 0}
        assert not torch.equal(next(run.vae.parameters()), before["/vae/encoder.trunk.0.weight"])


@pytest.mark.usefixtures("plain")
def test_training_stops_after_50_rejected_steps_and_names_the_goal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_goal("cross_recon", torch.nan)(None, monkeypatch)  # type: ignore[arg-type]
    with pytest.raises(TrainError, match=r"cross_recon is not finite, .* 50 steps in a row"):
        loop.train(config(tmp_path, steps=200))


# Actions that a step must not take.


class Watch(TorchDispatchMode):
    """Count the operators that make the host wait for the device."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item", "equal", "unique", "index.Tensor")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(func).removeprefix("aten.")
        mask = name.startswith(("index.", "index_put")) and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if mask or name.split(".")[0] in self.waits:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scales", ["anchored", "auto"])
def test_no_host_sync_in_a_step(scales: str) -> None:
    run = make_trainer(scales=scales)
    run.goals.route = "never"  # as on a GPU, since routing chooses rows on the host
    run.advance()
    with Watch() as watch:
        float(torch.ones(1))
        assert watch.found == ["_local_scalar_dense.default"]  # the watch detects a wait
        watch.found.clear()
        run.advance()
    assert not watch.found


def test_nothing_is_decoded_twice() -> None:
    run = make_trainer(budget=0)
    sizes: dict[str, list[int]] = {"encoder": [], "decoder": [], "discriminator": []}
    run.vae.encoder.register_forward_pre_hook(lambda _, x: sizes["encoder"].append(len(x[0])))
    run.vae.decoder.register_forward_pre_hook(lambda _, x: sizes["decoder"].append(len(x[0])))
    run.discriminator.register_forward_pre_hook(lambda _, x: sizes["discriminator"].append(len(x[0])))
    run.advance()
    # Encoder: image and view. Decoder: reconstruction, swap and two perturbed. Judge: reconstruction, then both.
    assert sizes == {"encoder": [4, 4], "decoder": [16], "discriminator": [4, 8]}


def test_a_budget_decodes_the_rows_that_goals_take() -> None:
    run = make_trainer(batch_size=16, spill=0.5, budget=1.0)
    run.advance()  # the first use evaluates all rows too
    order = [GOALS.index(name) for name in ("cross_recon", "kl_divergence", "reconstruction", "realism", "consistency")]
    order += [k for k in range(9) if k not in order]
    weights = run.goals.spill.weights(9)
    run.goals.multipliers[order] = weights
    rows = [math.ceil(float(16 * w) - 1e-4) for w in weights]
    sizes: dict[str, list[int]] = {"encoder": [], "decoder": [], "discriminator": []}
    run.vae.encoder.register_forward_pre_hook(lambda _, x: sizes["encoder"].append(len(x[0])))
    run.vae.decoder.register_forward_pre_hook(lambda _, x: sizes["decoder"].append(len(x[0])))
    run.discriminator.register_forward_pre_hook(lambda _, x: sizes["discriminator"].append(len(x[0])))
    run.advance()
    least = rows[-1]  # the two perturbed images, which behavioral_separation alone needs
    swap, recon, realism, view = rows[0], rows[2], rows[3], rows[4]
    # The discriminator sees the reconstructions that realism took, and then those that were made, with all photographs.
    assert sizes == {
        "encoder": [16, view],
        "decoder": [swap + recon + 2 * least],
        "discriminator": [realism, 16 + recon],
    }


def test_each_goal_reaches_what_it_should() -> None:
    run = make_trainer()
    image = run.images()
    noise, shake, view, order = run._noise()
    out = run.vae(image, trainer.see.photometric(image, view), noise, shake)
    raw = Lazy.tensors(trainer.raw_values(out, image, lazy(run.discriminator, out.recon), order, run.trivial))
    assert len(raw) == 9 and all(value.shape == (4,) for value in raw)
    encoder, decoder = run.vae.encoder.head.weight, run.vae.decoder.out.weight
    for name, value in zip(GOALS, raw, strict=True):
        reached = torch.autograd.grad(value.sum(), [encoder, decoder], retain_graph=True, allow_unused=True)
        sees_images = name in ("behavioral_separation", "reconstruction", "cross_recon", "realism")
        assert reached[0] is not None and reached[0].abs().sum() > 0, name
        assert (reached[1] is not None) == sees_images, name


def test_rows_are_independent() -> None:
    vae, judge = VAE(32, 6, 4, 16).double(), Discriminator(8).double()
    image, z = torch.rand(2, 3, 32, 32).double(), torch.randn(2, 10).double()
    for network, x in ((vae.encoder, image), (vae.decode, z), (judge, image)):
        together = network(x)
        together = together if isinstance(together, Tensor) else torch.cat(together, 1)
        for row in range(2):
            alone = network(x[row : row + 1])
            alone = alone if isinstance(alone, Tensor) else torch.cat(alone, 1)
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-12, atol=1e-12)


def test_auto_scales_are_the_largest_values_seen() -> None:
    run = make_trainer(scales="auto", calibration_steps=2)
    slopes = []
    for _ in range(4):
        run.advance()
        slopes.append(run.goals.params.clone())
    highest = run.goals.history["highest"]
    torch.testing.assert_close(slopes[0][:, 1], 1 / highest[0])
    torch.testing.assert_close(slopes[1][:, 1], 1 / highest[:2].amax(0))
    assert torch.equal(slopes[1], slopes[3]) and slopes[3][:, 0].abs().max() == 0


def test_seeds_decide() -> None:
    runs = [make_trainer(seed=seed) for seed in (1, 1, 2)]
    for run in runs:
        run.advance()
    a, b, c = (leaves(run.vae.state_dict()) for run in runs)
    assert_same(a, b)
    assert any(not torch.equal(a[name], c[name]) for name in a)
