"""Test `bomkern train --compile`: the networks' compiled form, the step against the eager one, and refusals."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lightning_fabric")

import torch
from lightning_fabric import Fabric
from torch import Tensor

from bomkern import Lazy, cli, lazy
from bomkern.train import checkpoint, compiled_trainer, data, loop, recorder, trainer
from bomkern.train import features as see
from bomkern.train.config import Config, TrainError
from bomkern.train.networks import VAE, Pass, pass_of
from tests.support.training import assert_same, config, leaves, make_trainer


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use one backend for torch.compile."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=request.param))


def make_compiled(**changes: Any) -> compiled_trainer.CompiledTrainer:
    run = config(Path("unused"), compile=True, **changes)
    images = data.load(None, run.image_size).train
    return compiled_trainer.CompiledTrainer(run, Fabric(accelerator="cpu", devices=1), images)


# The compiled form, in float64.


@pytest.mark.parametrize(("batch", "size"), [(2, 32), (9, 32), (3, 64)])
def test_the_networks_are_the_same(batch: int, size: int) -> None:
    torch.manual_seed(0)
    vae = VAE(size, 6, 4, 8).double()
    image, view = torch.rand(2, batch, 3, size, size, dtype=torch.double)
    noise, shake = torch.randn(2, batch, 10, dtype=torch.double)
    want = Pass(*Lazy.tensors(vae(image, view, noise, shake)))
    mu, logvar = compiled_trainer.encode(vae.encoder, image)
    decode = functools.partial(compiled_trainer.decode, vae.decoder)
    other = lazy(functools.partial(compiled_trainer.structure_of, vae.encoder, 6), view)
    got = Pass(*Lazy.tensors(pass_of(mu, logvar, noise, shake, 6, decode, other)))
    weights = [torch.randn_like(x) for x in want]
    grads = [torch.autograd.grad(out, list(vae.parameters()), weights) for out in (got, want)]
    for a, b in zip((*got, *grads[0]), (*want, *grads[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "feature", [see.colour_distribution, functools.partial(see.dissimilarity, torch.rand(3, 3, 32, 32).double())]
)
def test_features_are_the_same(feature: Callable[[Tensor], Tensor]) -> None:
    image = torch.rand(3, 3, 32, 32, dtype=torch.double, requires_grad=True)
    found = []
    for fn in (feature, torch.compile(feature, fullgraph=True, backend="eager")):
        out = fn(image)
        found.append((out, *torch.autograd.grad(out.square().sum(), image)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


# The step.

RULES: dict[str, dict[str, Any]] = {
    "spill": {},
    "hard": {"spill": 0.0},
    "auto": {"scales": "auto", "calibration_steps": 2},
}

MORE = (("aot_eager", "hard"), ("aot_eager", "auto"), ("inductor", "spill"))


def gradient_of_step(run: trainer.Trainer, poisoned: bool, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Take a step and return its gradient as a vector; ``poisoned`` puts a NaN into one image."""
    found: list[Tensor] = []
    images, apply = run.images, run._apply

    def spoilt() -> Tensor:
        image = images()
        if poisoned:
            image[1, 0, 5, 5] = torch.nan
        return image

    def seen(finite: Tensor) -> Tensor:
        parameters = (*run.vae.parameters(), *run.discriminator.parameters())
        found.append(torch.cat([torch.zeros_like(p).ravel() if p.grad is None else p.grad.ravel() for p in parameters]))
        return apply(finite)

    with monkeypatch.context() as patch:
        patch.setattr(run, "images", spoilt)
        patch.setattr(run, "_apply", seen)
        run.advance()
    return found[0]


@pytest.mark.parametrize(
    ("by", "rule"),
    [("aot_eager", "spill"), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
    indirect=["by"],
)
def test_a_compiled_step_is_the_eager_one(by: None, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, goals, history and counters match the eager step.

    A step that is not finite changes nothing. Each step starts at the same weights, because Adam amplifies rounding in
    gradients near 0.
    """
    ours, theirs = make_compiled(**RULES[rule]), make_trainer(**RULES[rule])
    for k in range(4):
        got, want = (gradient_of_step(run, k == 2, monkeypatch) for run in (ours, theirs))
        assert bool(got.isfinite().all()) == bool(want.isfinite().all()) == (k != 2)
        assert k == 2 or (got - want).norm() < 1e-4 * want.norm()
        for name in ("vae", "discriminator"):
            getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] < 24
    state, expected = (leaves([run.goals.state_dict(), run.tally.state_dict()]) for run in (ours, theirs))
    assert state.keys() == expected.keys() and int(ours.guard.rejected) == 1
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name], rtol=2e-3, atol=1e-4, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["aot_eager"], indirect=True)
def test_no_order_of_the_goals_compiles_again(by: None) -> None:
    """After each goal has been at each position once, no number of rows compiles another graph."""
    run = make_compiled(batch_size=40)
    graphs = torch._dynamo.utils.counters["stats"]
    weights = run.goals.spill.weights(9)
    for shift in range(9):
        run.goals.multipliers.copy_(weights.roll(shift))
        run.advance()
    known = graphs["unique_graphs"]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        run.goals.multipliers.copy_(weights[torch.randperm(9, generator=generator)])
        run.advance()
    assert graphs["unique_graphs"] == known < 9 * 14  # positions, functions


@pytest.mark.slow
@pytest.mark.parametrize("by", ["aot_eager"], indirect=True)
def test_bf16(by: None) -> None:
    ours, theirs = (make(precision="bf16-mixed") for make in (make_compiled, make_trainer))
    (a, judge_a), (b, judge_b) = ours._walk(), theirs._walk()
    torch.testing.assert_close(a["raw"], b["raw"], rtol=0.05, atol=0.05)
    torch.testing.assert_close(judge_a, judge_b, rtol=0.02, atol=0.02)
    for p, q in zip(ours.vae.parameters(), theirs.vae.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert torch.cosine_similarity(p.grad.ravel(), q.grad.ravel(), 0) > 0.9


@pytest.mark.slow
def test_a_compiled_run_resumes_to_the_bit(tmp_path: Path) -> None:
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    summary = loop.train(config(straight, steps=4, compile=True, probe=1))
    assert summary["compile"] and summary["first_seconds"] > 0 and summary["steps_per_second"] > 0
    loop.train(config(parts, steps=2, compile=True, probe=1))
    loop.train(Config(out=str(parts), steps=4, resume=True), {"out", "steps", "resume"})
    a, b = (leaves(checkpoint.load(out / recorder.CHECKPOINT)) for out in (straight, parts))
    for name in ("/config/out", "/config/steps", "/config/resume"):
        a.pop(name), b.pop(name)
    assert_same(a, b)


# Refusals.


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "launch", lambda config: SimpleNamespace(world_size=2, is_global_zero=True))
    with pytest.raises(TrainError, match="--compile works in one process, not in 2"):
        loop.train(config(tmp_path / "run", compile=True))
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_compiled_is_one_line() -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("No working C++ compiler found\nand many lines more")

    run = make_compiled()
    run._encode = broken
    with pytest.raises(TrainError) as why:
        run.advance()
    assert (
        str(why.value) == "--compile: this step cannot be compiled here (RuntimeError: No working C++ compiler found)"
    )
    run.first_seconds = 1.0  # an error in a later step does not come from the compiler
    with pytest.raises(RuntimeError):
        run.advance()


class Started(Exception):
    """Raised when a run is launched."""


@pytest.mark.parametrize("asked", [["--compile"], ["--no-compile"], []])
def test_a_resumed_run_may_change_it(asked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def launch(config: Config) -> None:
        raise Started(config.compile)

    monkeypatch.setattr(checkpoint, "load", lambda path: {"config": config(tmp_path, compile=True).to_dict()})
    monkeypatch.setattr(loop, "launch", launch)
    with pytest.raises(Started, match=str("--no-compile" not in asked)):
        cli.main(["train", "--out", str(tmp_path), "--resume", *asked])
