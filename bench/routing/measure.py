"""What routing is measured by: gradients, times, memory, each goal's own backward, and what it costs for nothing."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench.machine import resident
from bomkern import Anchored, GoalSet
from bomkern.train.goals import GOALS, anchors

from .variants import VARIANTS, build

STEPS = 50  # of the comparison of gradients
LOOK = 5e-6  # a difference of the whole gradient, relative, from which on float64 is asked
WARM = 40  # steps before anything is timed


def same_parameters(a: Any, b: Any) -> None:
    b.goals.params.copy_(a.goals.params)


def favour(run: Any, raw: Mapping[str, Tensor], k: int) -> None:
    """Scales at which the worst sample of each goal is about as badly off, no two alike, and that of goal k worse."""
    held = torch.stack([x.detach().amax() for x in raw.values()])
    wanted = torch.linspace(0.96, 1.04, len(held), device=held.device)  # a tie would be anyone's, by rounding
    wanted[k] = 1.6
    ideal = run.goals.params[:, 0]
    run.goals.params[:, 1] = run.goals.params[:, 2] = wanted / (held - ideal).abs().clamp(min=1e-6)


def compare(batch: int, reduction: str, bar: tqdm[Any]) -> dict[str, Any]:
    """Gradients of every parameter over 50 training steps, each goal in turn the worst: routed against walked."""
    runs = {variant: build(variant, batch, reduction) for variant in ("walked", "branches", "rows")}
    names = [name for name, _ in runs["walked"].vae.named_parameters()]
    identical, overall, worst, owners = True, 0.0, (0.0, ""), set()
    errors: list[list[float]] = []  # of walked and rows against float64, where they differ
    for step in range(STEPS):
        lead = runs["walked"]
        favour(lead, lead.raw()[0], step % len(GOALS))
        for run in runs.values():
            same_parameters(lead, run)
        grads = {variant: run.gradients() for variant, run in runs.items()}
        owners |= set(lead.goals.history["share"][-1].nonzero().flatten().tolist())
        off2 = all2 = 0.0
        for name, want, branch, rows in zip(names, *grads.values(), strict=True):
            missing = want is None or not want.any()  # what only unreached branches hold has no gradient at all
            identical &= (branch is None and missing) or (branch is not None and torch.equal(branch, want))
            if not missing:
                off, size = float((want if rows is None else rows - want).norm()), float(want.norm())
                worst, off2, all2 = max(worst, (off / size, name)), off2 + off**2, all2 + size**2
            else:
                identical &= rows is None or not rows.any()
        overall = max(overall, (off2 / all2) ** 0.5)
        if off2 > LOOK**2 * all2:  # is that what float32 does to this gradient anyway?
            exact = build("branches", batch, reduction).double(lead).gradients()
            errors.append([_distance(grads[variant], exact) for variant in ("walked", "rows")])
        for p, g in zip(lead.vae.parameters(), grads["walked"], strict=True):
            p.grad = g
        lead.optimizers[0].step()
        lead.optimizers[0].zero_grad()
        for run in runs.values():
            run.vae.load_state_dict(lead.vae.state_dict())
            run.step += 1
        bar.update()
    return {
        "batch": batch, "reduction": reduction, "steps": STEPS, "identical": bool(identical), "rows_error": overall,
        "rows_worst": worst, "owners": len(owners), "errors": errors,
    }  # fmt: skip


def _distance(ours: Sequence[Tensor | None], exact: Sequence[Tensor | None]) -> float:
    """Of the whole gradient, relative."""
    pairs = [(torch.zeros_like(b) if a is None else a, b) for a, b in zip(ours, exact, strict=True) if b is not None]
    return (sum(float((a - b).norm()) ** 2 for a, b in pairs) / sum(float(b.norm()) ** 2 for _, b in pairs)) ** 0.5


def times(batch: int, reduction: str, rounds: int, start: Any, bar: tqdm[Any]) -> dict[str, Any]:
    """Median seconds of a whole step, in turn, after a check that all variants have the same gradient."""
    runs = {variant: build(variant, batch, reduction, [start]) for variant in VARIANTS}
    grads = {variant: run.gradients() for variant, run in runs.items()}
    for variant in VARIANTS[1:]:
        for ours, theirs in zip(grads[variant], grads["plain"], strict=True):
            ours, theirs = (torch.zeros(()) if g is None else g for g in (ours, theirs))
            assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-7, variant
    spent: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for i in range(rounds + 2):
        for variant, run in runs.items():
            begun = time.perf_counter()
            run.advance()
            if i >= 2:
                spent[variant].append(time.perf_counter() - begun)
            bar.update()
    share = runs["rows"].goals.history["share"][-rounds:].mean(0).tolist()
    walked = runs["rows"].goals(runs["rows"].raw()[0]).walked
    return {
        "batch": batch, "reduction": reduction, "rounds": rounds,
        "seconds": {variant: statistics.median(found) for variant, found in spent.items()},
        "spread": {variant: [min(found), max(found)] for variant, found in spent.items()},
        "share": dict(zip(GOALS, share, strict=True)), "walked": walked,
    }  # fmt: skip


def held_by(run: Any) -> int:
    """Bytes that a step's graph holds when backward starts: each storage once."""
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x, torch.nn.Parameter):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        raw = run.raw()[0]
        # Held until the sum is taken, so that no address is used twice.
        out = run.loss(raw) if hasattr(run, "log") else run.goals(raw)
    assert out is not None
    return sum(seen.values())


def memory(variant: str, batch: int, reduction: str) -> dict[str, int]:
    """Of a process of its own: bytes held by the graph, and by how much steps raise the most memory it ever had."""
    command = [sys.executable, "-m", "bench.route", "--memory", variant, str(batch), reduction]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory_here(variant: str, batch: int, reduction: str) -> dict[str, int]:
    run = build(variant, batch, reduction)
    before = resident("VmRSS")
    run.gradients()  # what is set up, or tried, on first use is not a step's
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins again
    for _ in range(3):
        run.advance()
    return {"held": held_by(run), "peak": resident("VmHWM") - before}


def by_goal(batch: int, repeats: int, start: Any, bar: tqdm[Any]) -> dict[str, dict[str, float]]:
    """Milliseconds of backward with each goal as everyone's bottleneck: all graphs walked, and its own alone."""
    run = build("plain", batch, "mean", [start])
    run.discriminator.requires_grad_(False)
    found = {}
    for k, name in enumerate(GOALS):
        spent: dict[str, list[float]] = {"never": [], "always": []}
        for _ in range(repeats):
            for route in spent:
                goals = GoalSet({n: Anchored(*pair) for n, pair in anchors(batch).items()}, route=route)
                goals.params[k, 1:3] = 1e4
                loss = goals(run.raw()[0]).loss
                begun = time.perf_counter()
                loss.backward()
                spent[route].append(time.perf_counter() - begun)
                run.optimizers[0].zero_grad()
                bar.update()
        found[name] = {route: 1e3 * statistics.median(times) for route, times in spent.items()}
    return found


def for_nothing(batch: int, start: Any, bar: tqdm[Any]) -> dict[str, float]:
    """Microseconds that routing adds to loss and backward where every goal owns rows, alone, and a step's own time."""
    raw = {name: torch.rand(batch).add_(0.1).requires_grad_() for name in GOALS}
    with torch.no_grad():
        for k, x in enumerate(raw.values()):
            x[k :: len(GOALS)] += 1
    sets = {route: GoalSet({name: Anchored(0.0, 1.0) for name in GOALS}, route=route) for route in ("never", "always")}
    spent: dict[str, list[float]] = {route: [] for route in sets}
    for _ in range(60):
        for route, goals in sets.items():
            begun = time.perf_counter()
            for _ in range(100):
                goals(raw).loss.backward()
            spent[route].append((time.perf_counter() - begun) / 100)
        bar.update()
    assert all(share > 0 for share in sets["always"].history["share"][-1].tolist())
    alone = {route: statistics.median(found) for route, found in spent.items()}
    run = build("walked", batch, "mean", [start])
    step = []
    for _ in range(4):
        begun = time.perf_counter()
        run.advance()
        step.append(time.perf_counter() - begun)
    return {"added_us": 1e6 * (alone["always"] - alone["never"]), "step_us": 1e6 * statistics.median(step[1:])}
