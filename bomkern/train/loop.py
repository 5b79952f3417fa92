"""A run from start to end: folder, data, steps, metrics, checkpoints, pictures, summary."""

from __future__ import annotations

import json
import logging
import math
import signal
import statistics
import threading
import time
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning_fabric import Fabric
from tqdm import tqdm

import bomkern
from bomkern.common.files import write_atomically
from bomkern.report import diagnose_folder

from . import checkpoint, evaluate, processes, recorder, terminal
from .config import LEAST_BATCH, REDUCTIONS, SCALES, Config, TrainError
from .data import Crops, Data, DataError, load, to_float
from .networks import VAE
from .nine_goals import GOALS, anchors
from .processes import launch
from .trainer import REJECTED_IN_A_ROW, Trainer

DEFAULT_STEPS = 1000
log = logging.getLogger("bomkern")


class Interrupted(Exception):
    """A signal stopped the training, which has saved a checkpoint."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped at step {step} by {signal.Signals(number).name}")
        self.number, self.step = number, step


class Stop:
    """Turn the first SIGINT or SIGTERM into a flag that the loop reads between steps; the second acts as usual."""

    def __init__(self) -> None:
        self.asked = 0
        numbers = (signal.SIGINT, signal.SIGTERM)
        in_main = threading.current_thread() is threading.main_thread()  # other threads may not handle signals
        self.old = {number: signal.signal(number, self._note) for number in numbers} if in_main else {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        self.restore()

    def restore(self) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)


def total_steps(config: Config, crops: int, samples: int) -> int:
    """Return the steps of a run. An epoch is as many samples as crops fit side by side into the training regions."""
    if config.epochs is not None:
        return max(1, math.ceil(config.epochs * crops / samples))
    return config.steps if config.steps is not None else DEFAULT_STEPS


def shared(total: int, processes: int) -> int:
    """Return the samples per step of a resumed run, after checking that so many processes can share them."""
    fits = [n for n in range(1, total // LEAST_BATCH + 1) if total % n == 0]
    if processes not in fits:
        raise TrainError(
            f"the run takes {total} samples a step, which {processes} processes cannot share evenly, {LEAST_BATCH} or "
            f"more each: go on in {', '.join(map(str, fits[:-1]))}{' or ' * (len(fits) > 1)}{fits[-1]}"
        )
    return total


def serving(device: str, impl: str | None) -> str:
    """Return the implementation of every op on this type of device: ``impl``, or else the best one of the loss."""
    ops = bomkern.info()["ops"].values()
    reasons = [op.get(device, {}) for op in ops]
    if impl is None:
        return next((name for name, reason in reasons[0].items() if reason is None), "reference")
    for reason in (by_impl[impl] for by_impl in reasons if by_impl.get(impl)):
        raise TrainError(f"--impl {impl} cannot serve on {device}: {reason}")
    return impl


def train(config: Config, given: set[str] | None = None) -> dict[str, Any]:
    """Run, or continue, a training run and return its summary; see the README for what the run folder holds.

    Args:
        config: the run.
        given: names of the settings that the user gave. A resumed run takes the others from its checkpoint.

    Raises:
        TrainError: the run cannot start or go on; the message is one line.
        Interrupted: a signal stopped the run after a checkpoint was saved.
    """
    processes.join()
    with processes.watch():
        resolved, stored = processes.from_rank_0(lambda: _resolve(config, given if given is not None else set()))
        return _run(resolved, launch(resolved), stored)


def _resolve(config: Config, given: set[str]) -> tuple[Config, dict[str, Any] | None]:
    """Return the checked settings, and the checkpoint that a resumed run starts from."""
    stored = None
    if config.resume:
        stored = checkpoint.load(Path(config.out) / recorder.CHECKPOINT)
        config = config.merged(stored["config"], given)
        if processes.by_torchrun() and "devices" not in given:
            config.devices = None  # torchrun decides the number of processes
    if config.scales not in SCALES or config.reduction not in REDUCTIONS:
        raise TrainError(f"unknown --scales {config.scales} or --reduction {config.reduction}")
    if config.scales == "probed" and not config.probe:
        raise TrainError("--scales probed takes its anchors from short runs: say how long with --probe STEPS")
    if config.temperature and config.spill_ratio:
        raise TrainError(f"--temperature {config.temperature:g} and --spill {config.spill_ratio} exclude each other")
    return config, stored


def _prepare(config: Config, fabric: Fabric) -> tuple[str, Data]:
    """Return the implementation and the images; rank 0 also makes the run folder."""
    if config.compile and fabric.world_size > 1:
        raise TrainError(f"--compile works in one process, not in {fabric.world_size}")
    impl = serving(fabric.device.type, config.impl)
    try:
        data = load(Path(config.data) if config.data else None, config.image_size)
    except DataError as why:
        raise TrainError(str(why)) from why
    if fabric.is_global_zero:
        if data.skipped:
            fabric.print(f"skipped {len(data.skipped)} files of {config.data}:", *data.skipped, sep="\n  ")
        recorder.prepare(Path(config.out), config.overwrite, config.resume)
    return impl, data


def _run(config: Config, fabric: Fabric, stored: dict[str, Any] | None) -> dict[str, Any]:
    """Train in the launched processes and return the summary, empty on all ranks but rank 0."""
    folder, chief = Path(config.out), fabric.is_global_zero
    impl, data = processes.together(lambda: _prepare(config, fabric))
    trainer = _trainer(config, fabric, data.train, shared(stored["total"], fabric.world_size) if stored else None)
    if stored:
        trainer.load_state_dict(stored)
    steps = total_steps(config, len(data.train), trainer.total)
    if trainer.step > steps:
        raise TrainError(f"the run in {folder} is at step {trainer.step} already: ask for more than {steps} steps")
    if chief:
        recorder.write_json(folder / recorder.CONFIG, {**config.to_dict(), "total_steps": steps, "images": data.names})
    if config.probe and not stored:
        payoff = _probe(trainer, steps)
        if chief:
            recorder.write_json(folder / recorder.PAYOFF, payoff.to_dict())
            fabric.print(f"probe: {payoff.cost()}")
    images = to_float(data.held_out.grid(evaluate.HELD_OUT_CROPS), trainer.device)
    metrics, stop = recorder.Recorder(folder, trainer.step, chief), Stop()
    try:
        speed = _steps(trainer, steps, images, metrics, stop, folder)
    finally:
        stop.restore()
        metrics.close()
    average = trainer.averaged()
    return _finish(trainer, average, images, folder, speed, impl) if chief else {}


def _trainer(config: Config, fabric: Fabric, crops: Crops, total: int | None) -> Trainer:
    if not config.compile:
        return Trainer(config, fabric, crops, total)
    from .compiled_trainer import CompiledTrainer

    fabric.print("compiling: the first step takes a minute or more")
    return CompiledTrainer(config, fabric, crops, total)


def _probe(trainer: Trainer, training: int | None = None) -> bomkern.Payoff:
    """Measure the payoff table, the same on all ranks, and set the anchors that depend on it."""
    config, chief, usual = trainer.config, trainer.fabric.is_global_zero, anchors(trainer.total)
    bounds = {name: anchor.ideal for name, anchor in usual.items()}
    trainer.partial = trainer.fabric.world_size > 1 and not trainer.sharded
    try:
        payoff = bomkern.probe(
            trainer.advance, trainer.goals, config.probe, progress=chief, bounds=bounds, training=training
        )
    except ValueError as why:
        raise TrainError(f"--probe {config.probe}: {why}") from why
    finally:
        trainer.partial = False
    ideals, nadirs = payoff.anchors("ideal"), payoff.anchors("nadir")
    results = zip(GOALS, payoff.table.diagonal().tolist(), payoff.table.amin(0).tolist(), strict=True)
    late = [name for name, own, least in results if own > least]
    if late and chief:
        log.warning("--probe %s is short: %s got further when another goal was trained", config.probe, ", ".join(late))
    for name, anchor in usual.items():
        worst = ideals[name] >= nadirs[name]  # a zero scale would take all the gradient
        if worst or name in payoff.unmoved:
            ideals[name], nadirs[name] = anchor
            if chief and config.scales == "probed":
                reason = "came out worst when trained alone" if worst else "was moved by no run"
                log.warning("%s %s: it keeps its anchors %g and %g", name, reason, *anchor)
    trainer.goals.anchor(probe=payoff._replace(ideals=tuple(ideals.values()), nadirs=tuple(nadirs.values())))
    return payoff


def _steps(
    trainer: Trainer, steps: int, images: torch.Tensor, metrics: recorder.Recorder, stop: Stop, folder: Path
) -> float | None:
    """Train up to ``steps``; return the steps per second without evaluation, checkpoints and compilation."""
    config, fabric = trainer.config, trainer.fabric
    chief, first = fabric.is_global_zero, trainer.step
    paused_seconds = 0.0  # in evaluation and checkpoints
    psnr: float | None = None
    begun = time.perf_counter()
    bar = tqdm(total=steps, initial=first, disable=not chief, unit="step", mininterval=0.5, dynamic_ncols=True)
    with bar:
        while trainer.step < steps:
            trainer.advance()
            bar.update()
            n = trainer.step
            logs, evaluates = n % config.log_every == 0, n % config.eval_every == 0
            if logs or n % REJECTED_IN_A_ROW == 0:
                _check(trainer)
            line: dict[str, Any] = {"step": n}
            if logs and (window := trainer.window()):
                line |= window
                bar.set_postfix_str(terminal.progress(window["goals"], psnr))
            paused = time.perf_counter()
            if evaluates:
                trainer.remeasure(images)
                average = trainer.averaged()
                line |= evaluate.quality(average, images) if chief else {}
                psnr = line.get("psnr")
            if len(line) > 1:
                metrics.line(line)
            asked = stop.asked if fabric.world_size == 1 or logs else 0
            if fabric.world_size > 1 and logs:  # every rank must leave at the same step
                most: Any = fabric.all_reduce(torch.tensor(float(asked), device=trainer.device), reduce_op="max")
                asked = int(most)
            if asked or n == steps or n % config.checkpoint_every == 0:
                _save(trainer, folder)
            paused_seconds += time.perf_counter() - paused
            if asked:
                raise Interrupted(asked, n)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    seconds = time.perf_counter() - begun - paused_seconds - trainer.first_seconds
    # After the checkpoint, which keeps the open window for a run that goes on.
    if steps % config.log_every and (window := trainer.window()):
        metrics.line({"step": steps, **window, "partial": True})
    timed = steps - first - (trainer.first_seconds > 0)
    return timed / seconds if timed > 0 else None


def _save(trainer: Trainer, folder: Path) -> None:
    """Save the checkpoint and the history on rank 0; sharded weights are gathered first."""
    chief = trainer.fabric.is_global_zero
    state = processes.whole(trainer.state_dict()) if chief or trainer.sharded else {}

    def write() -> None:
        for name in ("vae", "discriminator"):
            if not all(weight.isfinite().all() for weight in state[name].values()):
                raise TrainError(f"a weight of the {name} is not finite at step {trainer.step}: it is not saved")
        checkpoint.save(folder / recorder.CHECKPOINT, state)
        write_atomically(folder / recorder.HISTORY, trainer.goals.history.save)

    processes.together(write if chief else lambda: None)


def _check(trainer: Trainer) -> None:
    goal = trainer.stuck()
    if goal:
        raise TrainError(
            f"{goal} is not finite, or its gradient is not: {REJECTED_IN_A_ROW} steps in a row were rejected, the last "
            f"at step {trainer.step}; the weights are those of the last good step. Try a smaller --lr or another --seed"
        )


def _probe_updates(config: Config, folder: Path) -> int:
    """Return the number of updates of the probe before the first step."""
    path = folder / recorder.PAYOFF
    if not config.probe or not path.is_file():
        return 0 if isinstance(config.probe, str) else config.probe * len(GOALS)
    return int(json.loads(path.read_text())["updates"])


def _finish(
    trainer: Trainer, average: VAE, images: torch.Tensor, folder: Path, speed: float | None, impl: str
) -> dict[str, Any]:
    """Evaluate, write the pictures and the summary, and return the summary."""
    from . import plots

    quality = {**evaluate.quality(average, images), **evaluate.baseline(images)}
    totals = trainer.tally.totals()
    lines = [line for line in recorder.read_lines(folder / recorder.METRICS) if "goals" in line]
    last = lines[-1]["goals"] if lines else {}
    config = trainer.config
    summary = {
        **quality,
        "steps": trainer.step,
        "steps_per_second": speed,
        **totals,
        "rejected_steps": int(trainer.guard.rejected),
        "walked": statistics.fmean(line.get("walked", 1.0) for line in lines) if lines else 1.0,
        "raw": {name: last[name]["raw"] for name in last},
        "level": {name: last[name]["level"] for name in last},
        "constraints": {name: {"ideal": i, "scale": s} for name, (i, s) in trainer.goals.anchors().items()},
        "deficit": {name: last[name]["deficit"] for name in last},
        "held_out_crops": len(images),
        "data": config.data,
        "scales": config.scales,
        "reduction": config.reduction,
        "temperature": config.temperature,
        "spill": config.spill_ratio,
        "budget": config.row_budget or 0.0,
        "probe_updates": _probe_updates(config, folder),
        "seed": config.seed,
        "impl": impl,
        "compile": config.compile,
        "first_seconds": trainer.first_seconds,
        "device": str(trainer.device),
        "ranks": trainer.fabric.world_size,
        "samples_per_step": trainer.total,
        "threads": torch.get_num_threads(),
        "versions": recorder.versions(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        plots.contact_sheets(folder, average, images, quality)
    summary["diagnosis"] = _diagnosis(trainer, folder)
    recorder.write_json(folder / recorder.SUMMARY, summary)
    return summary


def _diagnosis(trainer: Trainer, folder: Path) -> dict[str, Any] | None:
    """Return the findings of `bomkern diagnose` and write its report; a failure only logs a warning."""
    try:
        write_atomically(folder / recorder.HISTORY, trainer.goals.history.save)
        return diagnose_folder(folder)[0].to_dict()
    except Exception as why:
        reason = " ".join(f"{type(why).__name__}: {why}".split())
        log.warning("the run is complete, but its diagnosis failed: %s", reason)
        return None
