"""`GoalCallback`: use a `bomkern.GoalSet` in the Trainer of Hugging Face's ``transformers``."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..common.files import load_plain, write_atomically
from ..diagnosis.diagnose import diagnose
from ..goals.goal_set import GoalSet
from .loggers import log_goals
from .trainer_goals import Anchor, check_arguments, find_goals, supply_anchors

try:
    from accelerate.utils import extract_model_from_parallel
    from transformers import TrainerCallback
except ImportError as why:
    raise ImportError("GoalCallback needs transformers and accelerate: pip install 'bomkern[hf]'") from why

log = logging.getLogger("bomkern")
STATE = "trainer_state.json"  # the Trainer's own file in a checkpoint


class GoalCallback(TrainerCallback):
    """Anchor, log, save and diagnose the `GoalSet` that a Trainer's model or ``compute_loss`` trains with.

    - Before training, if goals wait for anchors, the callback calls ``anchor`` and passes the result to
      `GoalSet.anchor`.
    - Whenever the Trainer logs its loss, the values of `log_goals` are added to its logs and to ``state.log_history``,
      as means over the steps since the last log. Loggers of ``report_to`` come before the callbacks that a Trainer is
      given, so use `add_to`. With several processes, the samples of rank zero are logged.
    - With ``gradient_accumulation_steps`` the micro-batches of a step count as one step of the GoalSet.
    - A GoalSet that is a submodule of the model is saved with it. Any other is moved to the Trainer's device, saved in
      each checkpoint's folder as ``goals.pt``, and loaded from there when the Trainer resumes.
    - A step that the fp16 scaler rejects is taken back in the GoalSet too (`GoalSet.accept`).
    - At the end rank zero prints the findings of `diagnose`.

    Args:
        goals: a GoalSet, or the name of an attribute of the model that holds one ("goals", "loss.goals").
        anchor: takes the model, on its device, and returns the arguments of `GoalSet.anchor` in a mapping. It is called
            on every rank, and must return the same on all.
        diagnose_at_end: whether to print the findings.
        prefix: prefix of the names in the logs, to distinguish two GoalSets. It also names the file in checkpoints.
        resume: the folder of the checkpoint, if the Trainer resumes from one outside its ``output_dir``.

    Raises:
        TypeError: an argument is invalid; the message names it.

    Example:
        >>> trainer = Trainer(model=model, args=args, train_dataset=data)
        >>> GoalCallback("goals", anchor=lambda model: {"baseline": model.trivial()}).add_to(trainer)
        >>> trainer.train()
    """

    def __init__(
        self,
        goals: GoalSet | str,
        *,
        anchor: Anchor | None = None,
        diagnose_at_end: bool = True,
        prefix: str = "goals/",
        resume: str | os.PathLike[str] | None = None,
    ) -> None:
        check_arguments(goals, anchor, "model")
        self.given, self.anchor, self.diagnose_at_end, self.prefix, self.resume = (
            goals, anchor, diagnose_at_end, prefix, resume,
        )  # fmt: skip
        self._goals = goals if isinstance(goals, GoalSet) else None
        self._held = False  # whether the model has the GoalSet among its modules
        self._first = False  # whether `add_to` put this callback before the loggers

    def add_to(self, trainer: Any) -> GoalCallback:
        """Add this callback to a Trainer, before its loggers, so that they log the goals too. Returns the callback."""
        trainer.add_callback(self)
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop())
        self._first = True
        return self

    @property
    def goals(self) -> GoalSet:
        """The GoalSet. One that was given by name is known once the Trainer trains."""
        if self._goals is None:
            raise RuntimeError(f"goals {self.given!r} are looked up when the Trainer begins to train, which it has not")
        return self._goals

    @property
    def file(self) -> str:
        """The name of the file in a checkpoint's folder, which differs between callbacks with different prefixes."""
        name = "".join(c if c.isalnum() else "_" for c in self.prefix.strip("/"))
        return f"{name or 'goals'}.pt"

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        inner = extract_model_from_parallel(model)  # without FSDP's wrapper
        self._goals = find_goals(self.given, inner)
        self._held = any(module is self._goals for module in inner.modules())
        self._discard()
        if not self._held:
            self._goals.to(args.device)
            if state.global_step:
                self._load(args, state)
        supply_anchors(self._goals, self.anchor, inner)
        if not state.is_world_process_zero:
            return
        if args.gradient_accumulation_steps > 1 and _takes_loss_arguments(inner):
            log.warning(
                "GoalCallback: the Trainer does not divide the loss of %s by its %d micro-batches, because forward "
                "takes **kwargs: set accepts_loss_kwargs = False on the model, unless its loss uses num_items_in_batch",
                type(inner).__name__,
                args.gradient_accumulation_steps,
            )
        if args.report_to and not self._first:
            log.warning(
                "GoalCallback: %s may not log the goals, because they come before it in the Trainer: call "
                "GoalCallback(...).add_to(trainer) in place of callbacks=[...]",
                " and ".join(args.report_to),
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.gradient_accumulation_steps > 1:
            self.goals.begin_micro_batch(last=False)  # which one is the last is known after it

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.gradient_accumulation_steps > 1:
            self.goals.end_micro_batch()
            self.goals.end_step()

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if getattr(optimizer, "step_was_skipped", False):  # Accelerate has read this from the scaler already
            self.goals.accept(torch.zeros((), dtype=torch.bool, device=self.goals.params.device))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs or self._goals is None:  # an evaluation's logs, or a summary
            return
        values = log_goals(self._goals, _Nowhere(), state.global_step, self.prefix)
        logs.update(values)
        if state.log_history and "loss" in state.log_history[-1]:  # a copy of the logs
            state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._discard()
        if self.diagnose_at_end and state.is_world_process_zero:
            print(diagnose(self.goals.history))

    def _discard(self) -> None:
        """Forget micro-batches after which no optimizer stepped, as an exception leaves them."""
        self.goals.end_micro_batch()
        self.goals.discard()

    # Checkpoints.

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._held or not args.should_save:
            return
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if folder.is_dir():
            state_dict = self.goals.state_dict()
            write_atomically(folder / self.file, lambda file: torch.save(state_dict, file))
        else:  # the Trainer's search for hyperparameters has folders of its own
            log.warning("GoalCallback: the goals are not saved, because there is no folder %s", folder)

    def _load(self, args: Any, state: Any) -> None:
        """Load the state of the goals from the checkpoint that the Trainer has resumed from."""
        folder = Path(self.resume) if self.resume is not None else self._resumed(args, state)
        if (folder / self.file).is_file():
            self.goals.load_state_dict(load_plain(folder / self.file))
        else:
            log.warning("GoalCallback: %s has no %s: the goals start anew", folder, self.file)

    def _resumed(self, args: Any, state: Any) -> Path:
        """Return the folder whose saved state is that of the Trainer, which does not tell where it comes from."""
        folders = [Path(args.output_dir, f"checkpoint-{state.global_step}")]
        if isinstance(args.resume_from_checkpoint, (str, os.PathLike)):
            folders.insert(0, Path(args.resume_from_checkpoint))
        for folder in folders:
            if (folder / STATE).is_file():
                saved = json.loads((folder / STATE).read_text(encoding="utf-8"))
                # As text: a value may be NaN, which does not equal itself.
                if json.dumps(saved["log_history"]) == json.dumps(state.log_history):
                    return folder
        raise RuntimeError(
            f"GoalCallback: the Trainer resumed step {state.global_step} from an unknown folder: give the callback "
            "resume=, the folder of the checkpoint"
        )


def _takes_loss_arguments(model: Any) -> bool:
    """Return whether the Trainer believes that the model divides its loss by ``num_items_in_batch`` itself."""
    if hasattr(model, "accepts_loss_kwargs"):
        return bool(model.accepts_loss_kwargs)
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


class _Nowhere:
    """A `Logger` for values that are only returned."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        pass
