"""Measure routing: gradients, times, memory, each goal's own backward, and the overhead where it saves nothing."""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench.machine import resident, seconds
from bench.route.variants import VARIANTS, build
from bomkern import Anchored, GoalSet
from bomkern.train.nine_goals import GOALS, anchors

LOOK = 5e-6  # relative difference of the whole gradient above which it is compared with float64


def same_parameters(a: Any, b: Any) -> None:
    b.goals.params.copy_(a.goals.params)


def favour(run: Any, raw: Mapping[str, Tensor], k: int) -> None:
    """Set scales that give each goal's worst sample a deficit near 1, no two alike, and that of goal k a larger one."""
    highest = torch.stack([x.detach().amax() for x in raw.values()])
    wanted = torch.linspace(0.96, 1.04, len(highest), device=highest.device)  # rounding would decide a tie
    wanted[k] = 1.6
    ideal = run.goals.params[:, 0]
    run.goals.params[:, 1] = run.goals.params[:, 2] = wanted / (highest - ideal).abs().clamp(min=1e-6)


def compare(batch: int, reduction: str, steps: int, device: str, bar: tqdm[Any]) -> dict[str, Any]:
    """Compare routed with walked gradients of every parameter over training steps, each goal in turn the worst."""
    runs = {variant: build(variant, batch, reduction, device) for variant in ("walked", "branches", "rows")}
    names = [name for name, _ in runs["walked"].vae.named_parameters()]
    identical, overall, worst, owners = True, 0.0, (0.0, ""), set()
    errors: list[list[float]] = []  # errors of walked and rows against float64, at steps where the two differ
    for step in range(steps):
        lead = runs["walked"]
        favour(lead, lead.raw()[0], step % len(GOALS))
        for run in runs.values():
            same_parameters(lead, run)
        grads = {variant: run.gradients() for variant, run in runs.items()}
        owners |= set(lead.goals.history["share"][-1].nonzero().flatten().tolist())
        off2 = all2 = 0.0
        for name, want, branch, rows in zip(names, *grads.values(), strict=True):
            missing = want is None or not want.any()  # parameters of unreached branches alone have no gradient
            identical &= (branch is None and missing) or (branch is not None and torch.equal(branch, want))
            if not missing:
                off, size = float((want if rows is None else rows - want).norm()), float(want.norm())
                worst, off2, all2 = max(worst, (off / size, name)), off2 + off**2, all2 + size**2
            else:
                identical &= rows is None or not rows.any()
        overall = max(overall, (off2 / all2) ** 0.5)
        if off2 > LOOK**2 * all2:  # the difference may be the rounding of float32
            exact = build("branches", batch, reduction, device).double(lead).gradients()
            errors.append([_relative_error(grads[variant], exact) for variant in ("walked", "rows")])
        for p, g in zip(lead.vae.parameters(), grads["walked"], strict=True):
            p.grad = g
        lead.optimizers[0].step()
        lead.optimizers[0].zero_grad()
        for run in runs.values():
            run.vae.load_state_dict(lead.vae.state_dict())
            run.step += 1
        bar.update()
    return {
        "batch": batch, "reduction": reduction, "steps": steps, "identical": bool(identical), "rows_error": overall,
        "rows_worst": worst, "owners": len(owners), "errors": errors,
    }  # fmt: skip


def _relative_error(ours: Sequence[Tensor | None], exact: Sequence[Tensor | None]) -> float:
    """Return the relative error of the whole gradient."""
    pairs = [(torch.zeros_like(b) if a is None else a, b) for a, b in zip(ours, exact, strict=True) if b is not None]
    return (sum(float((a - b).norm()) ** 2 for a, b in pairs) / sum(float(b.norm()) ** 2 for _, b in pairs)) ** 0.5


def times(batch: int, reduction: str, rounds: int, start: Any, bar: tqdm[Any]) -> dict[str, Any]:
    """Return median seconds of a whole step for all variants in turn, after a check that their gradients agree."""
    device = start.config.device
    runs = {variant: build(variant, batch, reduction, device, [start]) for variant in VARIANTS}
    grads = {variant: run.gradients() for variant, run in runs.items()}
    for variant in VARIANTS[1:]:
        for ours, theirs in zip(grads[variant], grads["plain"], strict=True):
            ours, theirs = (torch.zeros(()) if g is None else g for g in (ours, theirs))
            assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-7, variant
    spent: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for i in range(rounds + 2):
        for variant, run in runs.items():
            took = seconds(run.advance)
            if i >= 2:
                spent[variant].append(took)
            bar.update()
    share = runs["rows"].goals.history["share"][-rounds:].mean(0).tolist()
    walked = runs["rows"].goals(runs["rows"].raw()[0]).walked
    return {
        "batch": batch, "reduction": reduction, "rounds": rounds,
        "seconds": {variant: statistics.median(times) for variant, times in spent.items()},
        "spread": {variant: [min(times), max(times)] for variant, times in spent.items()},
        "share": dict(zip(GOALS, share, strict=True)), "walked": walked,
    }  # fmt: skip


def graph_bytes(run: Any) -> int:
    """Return the bytes that a step's graph holds when backward starts, with each storage counted once."""
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x, torch.nn.Parameter):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        raw = run.raw()[0]
        # The result keeps all storages alive until the sum is taken, so that no address is reused.
        out = run.loss(raw) if hasattr(run, "log") else run.goals(raw)
    assert out is not None
    return sum(sizes.values())


def memory(variant: str, batch: int, reduction: str, device: str) -> dict[str, int]:
    """Return the bytes held by the graph, and the increase of peak memory over some steps.

    On a CPU a separate process measures, because a process never returns all of its resident memory.
    """
    if device != "cpu":
        return memory_here(variant, batch, reduction, device)
    command = [sys.executable, "-m", "bench.route", "--memory", variant, str(batch), reduction]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


def memory_here(variant: str, batch: int, reduction: str, device: str = "cpu") -> dict[str, int]:
    run = build(variant, batch, reduction, device)
    gpu = device != "cpu"
    before = torch.cuda.memory_allocated() if gpu else resident("VmRSS")
    run.gradients()  # the setup of the first use does not count
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    for _ in range(3):
        run.advance()
    peak = torch.cuda.max_memory_allocated() if gpu else resident("VmHWM")
    return {"held": graph_bytes(run), "peak": peak - before}


def by_goal(batch: int, repeats: int, start: Any, bar: tqdm[Any]) -> dict[str, dict[str, float]]:
    """Return milliseconds of backward with each goal as the only bottleneck: all graphs walked, and its own alone."""
    device = start.config.device
    run = build("plain", batch, "mean", device, [start])
    run.discriminator.requires_grad_(False)
    milliseconds = {}
    for k, name in enumerate(GOALS):
        spent: dict[str, list[float]] = {"never": [], "always": []}
        for _ in range(repeats):
            for route in spent:
                goals = GoalSet({n: Anchored(*pair) for n, pair in anchors(batch).items()}, route=route).to(device)
                goals.params[k, 1:3] = 1e4
                loss = goals(run.raw()[0]).loss
                spent[route].append(seconds(loss.backward))
                run.optimizers[0].zero_grad()
                bar.update()
        milliseconds[name] = {route: 1e3 * statistics.median(times) for route, times in spent.items()}
    return milliseconds


def added(batch: int, device: str, rounds: int, bar: tqdm[Any]) -> float:
    """Return the microseconds that routing adds to loss and backward, timed alone, where every goal owns rows.

    On a GPU most of it is the host's wait for the shares.
    """
    raw = {name: torch.rand(batch, device=device).add_(0.1).requires_grad_() for name in GOALS}
    with torch.no_grad():
        for k, x in enumerate(raw.values()):
            x[k :: len(GOALS)] += 1
    policies = {name: Anchored(0.0, 1.0) for name in GOALS}
    sets = {route: GoalSet(policies, route=route).to(device) for route in ("never", "always")}
    spent: dict[str, list[float]] = {route: [] for route in sets}

    def hundred(goals: GoalSet) -> None:
        for _ in range(100):
            goals(raw).loss.backward()

    for _ in range(rounds):
        for route, goals in sets.items():
            spent[route].append(seconds(functools.partial(hundred, goals)) / 100)
        bar.update()
    assert all(share > 0 for share in sets["always"].history["share"][-1].tolist())
    alone = {route: statistics.median(times) for route, times in spent.items()}
    return 1e6 * (alone["always"] - alone["never"])


def overhead(batch: int, rounds: int, start: Any, bar: tqdm[Any]) -> dict[str, float]:
    """Return the time that routing adds and the time of a step, in microseconds."""
    run = build("walked", batch, "mean", start.config.device, [start])
    step = [seconds(run.advance) for _ in range(4)]
    return {
        "added_us": added(batch, start.config.device, rounds, bar),
        "step_us": 1e6 * statistics.median(step[1:]),
    }
