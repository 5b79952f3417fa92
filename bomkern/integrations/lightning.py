"""`GoalCallback`: use a `bomkern.GoalSet` in a Trainer of ``lightning.pytorch`` or ``pytorch_lightning``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..common.checks import check_whole
from ..diagnosis.diagnose import diagnose
from ..goals.goal_set import GoalSet
from .loggers import log_goals

PACKAGES = ("lightning.pytorch", "pytorch_lightning")  # two copies of the same code, with unrelated classes


class GoalCallback:
    """Anchor, log, save and diagnose the `GoalSet` that a LightningModule trains with.

    - Before training, if goals wait for anchors, the callback calls ``anchor`` and passes the result to
      `GoalSet.anchor`.
    - Every ``log_every`` steps of the GoalSet, and at the end, `log_goals` writes to all loggers of the trainer. Each
      write waits for a GPU once. With several processes, the samples of rank zero are logged.
    - A GoalSet that is a submodule of the LightningModule is saved with it. Any other is saved in the callback's part
      of the checkpoint, moved to the trainer's device, and put into eval mode while the trainer validates.
    - With "16-mixed" precision, a step that the GradScaler rejects is taken back in the GoalSet too
      (`GoalSet.accept`), without a host sync. Other precisions reject no step. `StepGuard` is for your own training
      loops.
    - With automatic optimization, batches that the trainer accumulates are one step of the GoalSet
      (`GoalSet.accumulate`), and so are the evaluations of L-BFGS (`GoalSet.one_step`). In manual optimization use
      these contexts yourself.
    - At the end rank zero prints the findings of `diagnose`.

    Args:
        goals: a GoalSet, or the name of an attribute of the LightningModule that holds one ("goals", "loss.goals").
        log_every: steps between two writes to the loggers, at least 1.
        anchor: takes the LightningModule, on its device, and returns the arguments of `GoalSet.anchor` in a mapping.
            It is called before the sanity check, on every rank, and must return the same on all.
        diagnose_at_end: whether to print the findings.
        prefix: prefix of the names in the loggers, to distinguish two GoalSets.

    Raises:
        ImportError: neither package is installed.
        TypeError, ValueError: an argument is invalid; the message names it.

    Example:
        >>> trainer = Trainer(callbacks=[GoalCallback("goals", anchor=lambda module: {"baseline": module.trivial()})])
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> GoalCallback:
        kind: Any = cls  # mypy believes that a class is not hashable
        return object.__new__(_joined(kind, tuple(base for base in _bases() if not issubclass(cls, base))))

    def __init__(
        self,
        goals: GoalSet | str,
        *,
        log_every: int = 50,
        anchor: Callable[[Any], Mapping[str, Any]] | None = None,
        diagnose_at_end: bool = True,
        prefix: str = "goals/",
    ) -> None:
        if not isinstance(goals, (GoalSet, str)):
            raise TypeError(f"goals must be a GoalSet or the name of an attribute, got {type(goals).__name__}")
        log_every = check_whole("log_every", log_every)
        if anchor is not None and not callable(anchor):
            raise TypeError(f"anchor must be a function of the LightningModule or None, got {type(anchor).__name__}")
        self.given, self.log_every, self.anchor = goals, log_every, anchor
        self.diagnose_at_end, self.prefix = diagnose_at_end, prefix
        self._goals = goals if isinstance(goals, GoalSet) else None
        self._held = False  # whether the LightningModule has the GoalSet among its modules
        self._was_training = True
        self._logged = 0  # steps of the GoalSet at the last write
        self._scale: Tensor | None = None  # the scale of the GradScaler before the optimizer's step
        self._closure: AbstractContextManager[None] | None = None  # around the batches of a step of L-BFGS

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (getattr(type(self), "_plain", type(self)),), self.__dict__.copy()

    @property
    def goals(self) -> GoalSet:
        """The GoalSet. One that was given by name is known once the trainer has started."""
        if self._goals is None:
            raise RuntimeError(f"goals {self.given!r} are looked up when the trainer starts, which it has not")
        return self._goals

    @property
    def state_key(self) -> str:
        """The callback's name in a checkpoint, which differs between callbacks with different goals."""
        names = self.given if isinstance(self.given, str) else ", ".join(self.given.names)
        return f"GoalCallback({names})"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if isinstance(self.given, str):
            try:
                attribute = attrgetter(self.given)(pl_module)
            except AttributeError:
                attribute = None
            if not isinstance(attribute, GoalSet):
                got = f"{type(attribute).__name__} there" if attribute is not None else "no such attribute"
                raise TypeError(f"goals must name a GoalSet of {type(pl_module).__name__}: {self.given!r} is {got}")
            self._goals = attribute
        self._held = any(module is self._goals for module in pl_module.modules())

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not self._held:
            self.goals.to(trainer.strategy.root_device)
        if self.goals.anchoring.waiting and self.anchor is not None:
            sources = self.anchor(pl_module)
            if not isinstance(sources, Mapping):
                raise TypeError(
                    f"anchor must return a mapping of GoalSet.anchor's arguments, got {type(sources).__name__}"
                )
            self.goals.anchor(**sources)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._logged = self.goals.steps

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not pl_module.automatic_optimization:
            return
        if self._closure is None and any(isinstance(x, torch.optim.LBFGS) for x in trainer.optimizers):
            self._closure = self.goals.one_step()
            self._closure.__enter__()
        if trainer.accumulate_grad_batches > 1:
            self.goals.begin_micro_batch(last=self._steps_now(trainer, batch_idx))

    @staticmethod
    def _steps_now(trainer: Any, batch_idx: int) -> bool:
        """Return whether the optimizer steps after this batch, as far as is known before it."""
        accumulates = getattr(trainer.fit_loop, "_should_accumulate", None)
        return not accumulates() if accumulates else (batch_idx + 1) % trainer.accumulate_grad_batches == 0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        # A loader of unknown length tells only now that this is its last batch. DeepSpeed comes here in every batch.
        if self._closure is None and not getattr(trainer.strategy, "handles_gradient_accumulation", False):
            self.goals.end_step()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled() and self._scale is None:
            # The scale shrinks if the step is rejected, which can be read without a sync.
            self._scale = None if scaler._scale is None else scaler._scale.clone()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._leave(trainer.accumulate_grad_batches == 1 or self.goals.micro.last is not False)
        if self._scale is not None:
            self.goals.accept((trainer.precision_plugin.scaler._scale >= self._scale).reshape(()))
            self._scale = None
        if self.goals.steps - self._logged >= self.log_every:
            self._log(trainer, 0)

    def _leave(self, stepped: bool) -> None:
        """End what `on_train_batch_start` began."""
        self.goals.end_micro_batch()
        if self._closure is not None and stepped:
            self._closure.__exit__(None, None, None)
            self._closure = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._goals is not None:
            self._goals.discard()
            self._leave(True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.goals.discard()  # batches after which no optimizer stepped
        self._leave(True)
        if self.goals.steps > self._logged:
            self._log(trainer, 1)
        if self.diagnose_at_end and trainer.is_global_zero:
            print(diagnose(self.goals.history))

    def _log(self, trainer: Any, counted: int) -> None:
        """Write to the loggers. ``counted``: 1 if the trainer's count of steps includes the last batch, else 0."""
        self._logged = self.goals.steps
        if trainer.is_global_zero and trainer.loggers:
            # The step under which Lightning logs its own values of this batch; its steps start at 0.
            step = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)
            log_goals(self.goals, _All(trainer.loggers), max(0, step - counted), self.prefix)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if not self._held:
            self._was_training = self.goals.training
            self.goals.eval()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not self._held:
            self.goals.train(self._was_training)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the GoalSet, or {} if the LightningModule's state holds it."""
        return {} if self._held or self._goals is None else {"goals": self._goals.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "goals" in state_dict and not self._held:
            self.goals.load_state_dict(state_dict["goals"])


class _All:
    """All loggers of the trainer as one."""

    def __init__(self, loggers: list[Any]) -> None:
        self.loggers = loggers

    def log(self, values: Mapping[str, float], step: int) -> None:
        for logger in self.loggers:
            logger.log_metrics(dict(values), step=step)


def _bases() -> list[type]:
    """Return ``Callback`` of each package that is loaded, or of the first that is installed if none is."""
    loaded = [sys.modules[name] for name in PACKAGES if name in sys.modules]
    if not loaded:
        installed = [name for name in PACKAGES if find_spec(name.partition(".")[0])]
        if not installed:
            raise ImportError("GoalCallback needs PyTorch Lightning: pip install pytorch-lightning, or lightning")
        loaded = [import_module(installed[0])]
    return [package.Callback for package in loaded]


@functools.cache
def _joined(cls: type, bases: tuple[type, ...]) -> type:
    """Return the class with Lightning's Callback as a base, which is not known when the class is defined."""
    if not bases:
        return cls
    joined: type = type(cls.__name__, (cls, *bases), {"_plain": cls, "__module__": cls.__module__})
    return joined


def _remake(cls: Any) -> Any:
    """Make an empty callback for a pickle or a deep copy to fill."""
    return cls.__new__(cls)
