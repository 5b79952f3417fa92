"""Test the callback for the Hugging Face Trainer on a tiny model: its logs, checkpoints, and refusals."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bomkern import Anchored, Calibrated, GoalSet, Policy

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from bomkern.integrations.transformers import GoalCallback  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SIZE, LENGTH, VOCABULARY = 16, 6, 20
EVERY_TWO = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1}


def goal_set(size: Policy | None = None) -> GoalSet:
    return GoalSet(tokens=Anchored(0.0, "baseline"), size=size or Calibrated(steps=3), spill=0.5)


def anchors(model: nn.Module) -> dict[str, Any]:
    return {"baseline": {"tokens": 3.0}}


class Model(nn.Module):
    """A BERT of two layers that predicts its own tokens. ``goals`` is a submodule, or hidden from torch in a tuple."""

    def __init__(self, goals: GoalSet, held: bool = True) -> None:
        super().__init__()
        config = transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=SIZE, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=SIZE, max_position_embeddings=LENGTH, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(SIZE, VOCABULARY)
        if held:
            self.goals = goals
        self.outside, self.explode = (goals,), -1

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        self.explode -= 1
        if self.explode == 0:
            raise RuntimeError("as planned")
        hidden = self.bert(input_ids=input_ids).last_hidden_state
        logits = self.head(hidden)
        tokens = nn.functional.cross_entropy(logits.transpose(1, 2), input_ids, reduction="none").mean(1)
        out = self.outside[0]({"tokens": tokens, "size": logits.square().mean((1, 2))})
        return {"loss": out.loss, "logits": logits}


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.rows = torch.randint(VOCABULARY, (64, LENGTH), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def trainer_of(model: nn.Module, folder: Path, steps: int, callback: GoalCallback | None = None, **options: Any) -> Any:
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, use_cpu=True,
        per_device_train_batch_size=options.pop("per_device_train_batch_size", 8), disable_tqdm=True,
        report_to=options.pop("report_to", []), save_strategy=options.pop("save_strategy", "no"),
        learning_rate=options.pop("learning_rate", 1e-2), logging_steps=options.pop("logging_steps", 4),
        lr_scheduler_type="constant", seed=0, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=args, train_dataset=Rows(), eval_dataset=Rows())
    if callback is not None:
        callback.add_to(trainer)
    return trainer


def begin(held: bool = True) -> tuple[Model, GoalCallback]:
    torch.manual_seed(1)
    goals = goal_set()
    return Model(goals, held), GoalCallback(goals, anchor=anchors, diagnose_at_end=False)


def assert_same_state(one: GoalSet, other: GoalSet) -> None:
    assert one.steps == other.steps and one.anchoring.waiting == other.anchoring.waiting
    for name in ("params", "policy_state", "average", "multipliers"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(one.history["raw"], other.history["raw"])


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Seen(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
    """A logger of ``report_to``, which is added before the callback under test."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


@pytest.mark.parametrize("given", ["by name", "as itself"])
def test_shares_and_levels_are_in_the_logs(given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    goals, seen = goal_set(), Seen()
    trainer = trainer_of(Model(goals), tmp_path, 10)
    trainer.add_callback(seen)
    GoalCallback("goals" if given == "by name" else goals, anchor=anchors).add_to(trainer)
    trainer.train()
    logs = [row for row in seen.logs if "loss" in row]
    assert len(logs) == 2 and goals.steps == 10
    raw = goals.history["raw"]
    assert logs[0]["goals/raw/tokens"] == pytest.approx(float(raw[:4, 0].mean()), rel=1e-5)
    assert logs[1]["goals/raw/size"] == pytest.approx(float(raw[4:8, 1].mean()), rel=1e-5)
    assert sum(logs[1][f"goals/share/{name}"] for name in goals.names) == pytest.approx(1)
    kept = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["goals/level/tokens"] for row in kept] == [row["goals/level/tokens"] for row in logs]
    assert goals.anchors()["tokens"][1] == pytest.approx(3.0)
    assert "steps 1 to 10: " in capsys.readouterr().out


def test_a_callback_behind_the_loggers_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    model, callback = begin()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "log"))
    trainer = trainer_of(model, tmp_path, 4, report_to=["tensorboard"])
    trainer.add_callback(callback)
    with caplog.at_level(logging.WARNING, "bomkern"):
        trainer.train()
    assert "tensorboard may not log the goals" in caplog.text and "add_to(trainer)" in caplog.text
    assert "goals/loss" in trainer.state.log_history[0]


@pytest.mark.parametrize("held", [True, False])
def test_a_run_goes_on_as_if_it_had_not_stopped(held: bool, tmp_path: Path) -> None:
    whole, callback = begin(held)
    trainer_of(whole, tmp_path / "whole", 4, callback).train()
    first, callback = begin(held)
    trainer_of(first, tmp_path / "run", 2, callback, **EVERY_TWO).train()
    assert (tmp_path / "run" / "checkpoint-2" / "goals.pt").is_file() is not held
    second, callback = begin(held)
    callback.anchor = None  # the checkpoint has the anchors
    trainer_of(second, tmp_path / "run", 4, callback).train(resume_from_checkpoint=True)
    assert_same_state(second.outside[0], whole.outside[0])
    assert torch.equal(second.head.weight, whole.head.weight)


def test_a_checkpoint_elsewhere_is_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, callback = begin(held=False)
    trainer_of(first, tmp_path / "old", 2, callback, **EVERY_TWO).train()
    folder = tmp_path / "old" / "checkpoint-2"
    other, callback = begin(held=False)
    torch.manual_seed(5)  # another run has a checkpoint of the same step where this one is looked for
    trainer_of(other, tmp_path / "new", 2, callback, learning_rate=2e-2, **EVERY_TWO).train()
    second, callback = begin(held=False)
    with pytest.raises(RuntimeError, match="resumed step 2 from an unknown folder: give the callback resume="):
        trainer_of(second, tmp_path / "new", 3, callback).train(resume_from_checkpoint=str(folder))
    third, callback = begin(held=False)
    callback.resume = folder
    trainer_of(third, tmp_path / "new", 3, callback).train(resume_from_checkpoint=str(folder))
    assert third.outside[0].steps == 3
    assert torch.equal(third.outside[0].history["raw"][:2], first.outside[0].history["raw"])
    (folder / "goals.pt").unlink()
    fourth, callback = begin(held=False)
    callback.resume = folder
    with caplog.at_level(logging.WARNING, "bomkern"):
        trainer_of(fourth, tmp_path / "new", 3, callback).train(resume_from_checkpoint=str(folder))
    assert "has no goals.pt: the goals start anew" in caplog.text and fourth.outside[0].steps == 1


@pytest.mark.parametrize("held", [True, False])
def test_evaluation_teaches_nothing(held: bool, tmp_path: Path) -> None:
    model, callback = begin(held)
    trainer = trainer_of(model, tmp_path, 4, callback, eval_strategy="steps", eval_steps=2)
    trainer.train()
    trainer.evaluate()
    assert model.outside[0].steps == 4
    assert not any("goals/loss" in row for row in trainer.state.log_history if "eval_loss" in row)


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    """Two micro-batches of 4 are one step of 8: weights, spill, history and logs."""
    runs = []
    for batch, accumulated in ((8, 1), (4, 2)):
        torch.manual_seed(1)
        model = Model(goal_set(Anchored(0.0, 0.5)))
        trainer = trainer_of(
            model, tmp_path, 4, GoalCallback("goals", anchor=anchors, diagnose_at_end=False), logging_steps=2,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated, optim="sgd", learning_rate=0.5,
        )  # fmt: skip
        trainer.train()
        runs.append((model, trainer.state.log_history[:2]))
    (whole, logs), (split, theirs) = runs
    assert split.goals.steps == whole.goals.steps == 4
    assert_close(split.head.weight, whole.head.weight)
    for name in ("average", "multipliers"):
        assert_close(getattr(split.goals, name), getattr(whole.goals, name))
    assert_close(split.goals.history["raw"], whole.goals.history["raw"])
    assert [row["goals/loss"] for row in theirs] == pytest.approx([row["goals/loss"] for row in logs], rel=1e-4)


@pytest.mark.parametrize("told", [False, True])
def test_a_loss_that_is_not_divided_is_named(told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Takes(Model):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
            return super().forward(input_ids)

    torch.manual_seed(1)
    model = Takes(goal_set())
    if told:
        model.accepts_loss_kwargs = False  # type: ignore[assignment]
    callback = GoalCallback("goals", anchor=anchors, diagnose_at_end=False)
    with caplog.at_level(logging.WARNING, "bomkern"):
        trainer_of(model, tmp_path, 1, callback, gradient_accumulation_steps=2).train()
    assert ("does not divide the loss of Takes by its 2 micro-batches" in caplog.text) is not told


def test_the_last_step_of_an_epoch_may_be_shorter(tmp_path: Path) -> None:
    model, callback = begin()
    trainer_of(model, tmp_path, 4, callback, gradient_accumulation_steps=3).train()  # of 8 batches: 3, 3, 2, and 3
    assert model.goals.steps == 4 and len(model.goals.history["loss"]) == 4


def test_an_exception_amid_a_step_leaves_nothing_open(tmp_path: Path) -> None:
    model, callback = begin()
    model.explode = 4
    with pytest.raises(RuntimeError, match="as planned"):
        trainer_of(model, tmp_path, 3, callback, gradient_accumulation_steps=2).train()
    model.explode = -1
    trainer_of(model, tmp_path, 3, callback, gradient_accumulation_steps=2).train()
    assert model.goals.steps == 4  # one before the exception, and three


def test_a_skipped_step_is_taken_back(tmp_path: Path) -> None:
    """Accelerate's optimizer tells that the fp16 scaler skipped a step."""
    model, callback = begin()
    trainer = trainer_of(model, tmp_path, 6, callback)

    class Skips(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            type(optimizer).step_was_skipped = property(lambda _: state.global_step == 3)

    import accelerate.optimizer

    true = accelerate.optimizer.AcceleratedOptimizer.step_was_skipped
    trainer.add_callback(Skips())
    try:
        trainer.train()
    finally:
        accelerate.optimizer.AcceleratedOptimizer.step_was_skipped = true
    assert model.goals.history["finite"].tolist() == [1, 1, 0, 1, 1, 1]


def _rank(rank: int, folder: str, port: int) -> None:
    """Train on a rank of two, and save what must be the same on both."""
    torch.set_num_threads(1)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(1)
    group = torch.distributed.group.WORLD
    goals = GoalSet(tokens=Anchored(0.0, 3.0), size=Calibrated(steps=2), spill=0.5, process_group=group)
    model = Model(goals)
    trainer = trainer_of(
        model, Path(folder), 3, GoalCallback(goals, diagnose_at_end=False), ddp_backend="gloo",
        per_device_train_batch_size=4, gradient_accumulation_steps=2, optim="sgd", learning_rate=0.5,
    )  # fmt: skip
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    kept = {"weights": weights, "params": goals.params, "average": goals.average, "raw": goals.history["raw"]}
    torch.save(kept, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_agree(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (str(tmp_path), port), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert len(one["raw"]) == 3
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="goals must be a GoalSet or the name of an attribute, got Linear"):
        GoalCallback(nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="anchor must be a function of the model or None, got dict"):
        GoalCallback("goals", anchor={})  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="'goals' are looked up when the Trainer begins"):
        _ = GoalCallback("goals").goals
    with pytest.raises(TypeError, match="goals must name a GoalSet of Model: 'head' is Linear there"):
        trainer_of(Model(goal_set()), tmp_path, 1, GoalCallback("head")).train()
    with pytest.raises(RuntimeError, match="the nadir of tokens is not known yet"):
        trainer_of(Model(goal_set()), tmp_path, 1, GoalCallback("goals")).train()


def test_transformers_is_not_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, bomkern, bomkern.integrations; print('transformers' in sys.modules, 'accelerate' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout == "False False\n", done.stderr


def test_without_transformers_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['transformers'] = None; import bomkern.integrations.transformers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "pip install 'bomkern[hf]'" in done.stderr, done.stderr
