"""Test the Lightning callback: its logs, its part of a checkpoint, and its refusals."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bomkern import Anchored, GoalSet
from bomkern.integrations.lightning import GoalCallback

pl = pytest.importorskip("pytorch_lightning")
from pytorch_lightning.loggers import Logger  # noqa: E402
from pytorch_lightning.plugins import MixedPrecision  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


class Fake(Logger):
    """A logger of the trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, dict[str, float]]] = []

    name = version = "fake"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.calls.append((step, metrics))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def of_goals(self, prefix: str = "goals/") -> list[tuple[int, dict[str, float]]]:
        return [(at, values) for at, values in self.calls if f"{prefix}loss" in values]


class Model(pl.LightningModule):
    """A model with two goals of one linear layer.

    ``goals`` is a submodule, or hidden from torch in a tuple.
    """

    def __init__(self, goals: GoalSet, held: bool = True, explode: int | None = None) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.explode, self.modes = explode, []  # type: ignore[var-annotated]
        if held:
            self.goals = goals
        self.outside = (goals,)

    def loss(self, x: Tensor) -> Any:
        y = self.net(x)
        return self.outside[0]({"far": (y - 1).square().mean(1), "size": y.abs().mean(1)})

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = self.loss(batch[0]).loss
        return loss * float("inf") if index == self.explode else loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.modes.append(self.outside[0].training)
        self.log("held_out", self.loss(batch[0]).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def goal_set(**options: Any) -> GoalSet:
    return GoalSet(far=Anchored(0.0, "baseline"), size=Anchored(0.0, 2.0), spill=0.5, **options)


def loader() -> torch.utils.data.DataLoader[Any]:
    data = torch.utils.data.TensorDataset(torch.randn(80, 4, generator=torch.Generator().manual_seed(0)))
    return torch.utils.data.DataLoader(data, batch_size=8)  # 10 batches


def anchors(model: Model) -> dict[str, Any]:
    return {"baseline": {"far": 3.0}}


def fit(model: Model, callback: GoalCallback, steps: int, fake: Fake | bool = False, **options: Any) -> Any:
    resume = options.pop("resume", None)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[callback],
        logger=fake,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, loader(), loader(), ckpt_path=resume)
    return trainer


def assert_same_state(one: GoalSet, other: GoalSet) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, b[name]), name
    assert torch.equal(one.history["raw"], other.history["raw"]) and one.steps == other.steps
    assert one.anchoring.waiting == other.anchoring.waiting


@pytest.mark.parametrize("by_name", [True, False])
def test_thirty_steps(by_name: bool, capsys: pytest.CaptureFixture[str]) -> None:
    fake, goals = Fake(), goal_set()
    model = Model(goals)
    fit(model, GoalCallback("goals" if by_name else goals, log_every=8, anchor=anchors), 30, fake)
    calls = fake.of_goals()
    assert [at for at, _ in calls] == [7, 15, 23, 29] and goals.steps == 30
    raw = goals.history["raw"]
    assert calls[1][1]["goals/raw/far"] == pytest.approx(float(raw[8:16, 0].mean()), rel=1e-5)
    assert calls[3][1]["goals/raw/size"] == pytest.approx(float(raw[24:, 1].mean()), rel=1e-5)
    assert goals.anchors()["far"][1] == pytest.approx(3.0)
    assert "steps 1 to 30: the gradient went to" in capsys.readouterr().out
    assert set(model.modes) == {False}


def test_two_callbacks_and_no_diagnosis(capsys: pytest.CaptureFixture[str]) -> None:
    fake, goals, other = Fake(), goal_set(), goal_set()
    model = Model(goals)
    model.judge = nn.ModuleDict({"goals": other})
    callbacks = [
        GoalCallback("goals", anchor=anchors, diagnose_at_end=False),
        GoalCallback("judge.goals", anchor=anchors, diagnose_at_end=False, prefix="judge/"),
    ]
    other.anchor(baseline={"far": 5.0})
    other({"far": torch.ones(3), "size": torch.ones(3)})
    trainer = pl.Trainer(
        max_steps=3, accelerator="cpu", callbacks=callbacks, logger=fake, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, loader())
    assert len(fake.of_goals()) == 1 and not fake.of_goals("judge/")  # the other GoalSet made no step
    assert other.anchors()["far"][1] == pytest.approx(5.0)  # no policy waited for anchors, so none were requested
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("held", [True, False])
def test_a_run_goes_on_as_if_it_had_not_stopped(held: bool, tmp_path: Path) -> None:
    """A resumed run equals an uninterrupted one.

    The checkpoint holds the GoalSet once: in the module's part or in the callback's.
    """

    def begin() -> tuple[Model, GoalCallback]:
        torch.manual_seed(1)
        goals = goal_set()
        return Model(goals, held), GoalCallback(goals, anchor=anchors, diagnose_at_end=False)

    whole, callback = begin()
    fit(whole, callback, 30)
    first, callback = begin()
    fit(first, callback, 20).save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert ("goals.params" in saved["state_dict"]) is held
    assert ("GoalCallback(far, size)" in saved["callbacks"]) is not held
    second, callback = begin()
    callback.anchor = None  # the checkpoint has the anchors
    fit(second, callback, 20, resume=tmp_path / "last.ckpt")
    assert_same_state(second.outside[0], first.outside[0])
    third, callback = begin()
    callback.anchor = None
    fit(third, callback, 30, resume=tmp_path / "last.ckpt")
    assert_same_state(third.outside[0], whole.outside[0])
    assert torch.equal(third.net.weight, whole.net.weight)
    assert set(whole.modes) == {False} and whole.outside[0].training  # validation left no record


def test_a_step_that_the_scaler_rejects_is_taken_back() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model = Model(goal_set(), explode=4)
    callback = GoalCallback("goals", anchor=anchors, diagnose_at_end=False)
    fit(model, callback, 10, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    assert scaler.get_scale() == 4.0
    assert model.goals.history["finite"].tolist() == [1] * 4 + [0] + [1] * 5


def test_without_anchors_the_goal_set_says_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match="the nadir of far is not known yet"):
        fit(Model(goal_set()), GoalCallback("goals"), 3)


def test_wrong_arguments_of_the_callback_are_named() -> None:
    with pytest.raises(TypeError, match="goals must be a GoalSet or the name of an attribute, got Linear"):
        GoalCallback(nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="log_every must be at least 1, got 0"):
        GoalCallback("goals", log_every=0)
    with pytest.raises(TypeError, match="log_every must be a whole number, got float"):
        GoalCallback("goals", log_every=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="anchor must be a function of the LightningModule or None, got dict"):
        GoalCallback("goals", anchor={})  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="'goals' are looked up when the trainer starts"):
        _ = GoalCallback("goals").goals
    with pytest.raises(TypeError, match="goals must name a GoalSet of Model: 'goal' is no such attribute"):
        fit(Model(goal_set()), GoalCallback("goal"), 1)
    with pytest.raises(TypeError, match="goals must name a GoalSet of Model: 'net' is Linear there"):
        fit(Model(goal_set()), GoalCallback("net"), 1)
    with pytest.raises(TypeError, match=r"anchor must return a mapping of GoalSet.anchor's arguments, got NoneType"):
        fit(Model(goal_set()), GoalCallback("goals", anchor=lambda model: None), 1)  # type: ignore[arg-type,return-value]


def test_it_is_a_callback_that_copies_and_can_be_derived_from() -> None:
    class Own(GoalCallback, pl.Callback):
        pass

    one = GoalCallback("goals", log_every=3)
    assert isinstance(one, GoalCallback) and isinstance(one, pl.Callback)
    for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert type(other) is type(one) and other.log_every == 3
    assert type(Own("goals")) is Own and copy.copy(Own("goals", log_every=2)).log_every == 2


def test_either_package_and_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    class Callback:
        pass

    package = types.ModuleType("lightning.pytorch")
    package.Callback = Callback  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightning.pytorch", package)
    both = GoalCallback("goals")
    assert isinstance(both, Callback) and isinstance(both, pl.Callback)
    monkeypatch.delitem(sys.modules, "pytorch_lightning")
    one = GoalCallback("goals")
    assert isinstance(one, Callback) and not isinstance(one, pl.Callback)
    monkeypatch.delitem(sys.modules, "lightning.pytorch")
    monkeypatch.setattr("bomkern.integrations.lightning.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="GoalCallback needs PyTorch Lightning: pip install"):
        GoalCallback("goals")


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, bomkern, bomkern.integrations.lightning as own\n"
        "names = 'lightning', 'pytorch_lightning', 'wandb', 'mlflow', 'tensorboard'\n"
        "assert not [name for name in names if name in sys.modules], sys.modules\n"
        "print(own.GoalCallback('goals').log_every)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout == "50\n", done.stderr


class Whole(Model):
    """A model whose step is a whole batch, or the micro-batches of one; its optimizer can be L-BFGS."""

    def __init__(self, goals: GoalSet, lbfgs: bool = False, **options: Any) -> None:
        super().__init__(goals, **options)
        self.lbfgs, self.calls = lbfgs, 0

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.calls += 1
        return super().training_step(batch, index)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), max_iter=5) if self.lbfgs else super().configure_optimizers()


def data(size: int) -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(loader().dataset, batch_size=size)


class Unknown(torch.utils.data.IterableDataset[Any]):
    """The same samples, without a length."""

    def __iter__(self) -> Any:
        return iter(loader().dataset)


def accumulated(model: Model, samples: Any, callback: GoalCallback | None = None, **options: Any) -> GoalSet:
    callback = callback or GoalCallback("goals", anchor=anchors, diagnose_at_end=False)
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=2, **options,
    )  # fmt: skip
    trainer.fit(model, samples, options.get("val_check_interval") and loader())
    return model.outside[0]


def test_accumulated_batches_are_one_step() -> None:
    """Micro-batches of 4, two a step, are batches of 8; also with a loader without a length, and with validation."""
    found = []
    for samples, options in (
        (data(8), {}),
        (data(4), {"accumulate_grad_batches": 2, "val_check_interval": 5}),
        (torch.utils.data.DataLoader(Unknown(), batch_size=4), {"accumulate_grad_batches": 2}),
    ):
        torch.manual_seed(1)
        model = Whole(goal_set())
        found.append((accumulated(model, samples, **options), model.net.weight.detach()))
    (whole, weight), *others = found
    assert whole.steps == 20
    for goals, other in others:
        assert goals.steps == 20
        torch.testing.assert_close(other, weight)
        torch.testing.assert_close(goals.multipliers, whole.multipliers)
        for part in ("raw", "deficit", "share", "loss"):
            torch.testing.assert_close(goals.history[part], whole.history[part])


@pytest.mark.parametrize("sized", [True, False])
def test_the_last_batches_of_an_epoch_are_a_step(sized: bool) -> None:
    """The trainer steps after 4, 8 and 10 batches of an epoch."""
    samples = data(8) if sized else torch.utils.data.DataLoader(Unknown(), batch_size=8)
    goals = accumulated(Whole(goal_set()), samples, accumulate_grad_batches=4)
    assert goals.steps == len(goals.history) == 6 and goals.part is None


def test_an_accumulated_step_that_the_scaler_rejects_is_taken_back_whole() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model = Whole(goal_set(), explode=5)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    goals = accumulated(model, data(8), accumulate_grad_batches=4, plugins=plugins)
    assert goals.history["finite"].tolist() == [1, 0, 1] * 2


@pytest.mark.parametrize("batches", [1, 2])
def test_the_evaluations_of_l_bfgs_are_one_step(batches: int) -> None:
    model = Whole(goal_set(), lbfgs=True)
    goals = accumulated(model, data(8), accumulate_grad_batches=batches)
    assert goals.steps == len(goals.history) == 20 / batches and goals.part is None
    assert model.calls > 30


def test_a_run_that_stops_in_the_middle_leaves_no_step_open() -> None:
    class Fails(Whole):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            loss = super().training_step(batch, index)
            if index == 5:
                raise ZeroDivisionError
            return loss

    model = Fails(goal_set())
    with pytest.raises(ZeroDivisionError):
        accumulated(model, data(8), accumulate_grad_batches=4)
    assert model.goals.part is None and model.goals.steps == 1
