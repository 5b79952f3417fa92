"""Run many small steps through every op, and check for memory growth, leaked handles and drift between implementations.

    python -m tests.endurance [--steps 20000] [--device cpu]

The script trains a small VAE by the best implementation here and writes tests/results/endurance.json. Every 97th batch
holds a NaN, which StepGuard has to reject. Resident memory (less the heap's free blocks), open file handles and threads
are counted 200 times a run. Their slopes in the second half of the run count, when histories are full. Every other
implementation, and the reference in float64, get the same op inputs. The script compares values and gradients at 200
steps, and the GoalSets' state at every step.
"""

from __future__ import annotations

import argparse
import json
import platform
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import bomkern
from bench.machine import live_bytes
from bomkern import Anchored, Calibrated, Fixed, GoalSet, Group, ShareGuard, StepGuard, Tracking, Upper
from bomkern.dispatch import select

RESULTS = Path(__file__).resolve().parent / "results" / "endurance.json"
BATCH, SIZE, LATENTS = 32, 16, 4
POISON = 97  # one of so many batches holds a NaN
UNIT = (1.0, 1.0)  # threshold and temperature; surely active units would have gradients of pure rounding
LOOKS, PARTS = 200, 5
LEARNT = ("params", "policy_state", "average", "multipliers", "guard_share")
Values = dict[str, Tensor]


class Latents(NamedTuple):
    """The inputs of the ops, [BATCH, LATENTS] each."""

    z: Tensor
    mu: Tensor
    logvar: Tensor
    view: Tensor


class Small(nn.Module):
    """A linear VAE for two views of a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(SIZE, 2 * LATENTS), nn.Linear(LATENTS, SIZE)

    def forward(self, x: Tensor, view: Tensor, noise: Tensor) -> tuple[Tensor, Latents]:
        mu, logvar = self.encoder(x).chunk(2, 1)
        z = mu + noise * (logvar / 2).exp()
        return self.decoder(z), Latents(z, mu, logvar, self.encoder(view).chunk(2, 1)[0])


def statistics(given: Latents, impl: str) -> Values:
    """Return the value of every op that makes a goal, by one implementation; [BATCH], [LATENTS] or 0-dim each."""
    z, mu, logvar, view = given
    active, effective = bomkern.active_units(mu, *UNIT, impl=impl)
    made = {
        "gaussian_kl": bomkern.gaussian_kl(mu, logvar, 2, 0.3, impl=impl),
        "consistency_variance": bomkern.consistency_variance([mu, view], impl=impl),
        "covariance_penalty": bomkern.covariance_penalty(z, True, impl=impl),
        "total_correlation": bomkern.total_correlation(z, mu, logvar, 50_000, impl=impl),
        "active_units": active,
        "effective_units": effective,
    }
    every = bomkern.latent_statistics(z, mu, logvar, *UNIT, impl=impl)._asdict()
    return made | {f"latent_statistics.{name}": value for name, value in every.items()}


def goal_set(impl: str) -> GoalSet:
    """Return a GoalSet with every policy, spill and a guard."""
    return GoalSet(
        recon=Anchored(0.0, 2.0),
        kl=Tracking(),
        correlation=Calibrated(50, 0.9),
        consistency=Anchored(0.0, 0.5, moving=True),
        shape=Group(covariance=Upper(0.2, 0.2), units=Fixed(bomkern.Lower(3.0, 1.0))),
        spill=0.5,
        guard=ShareGuard(),
        impl=impl,
    )


def goals_of(recon: Tensor, made: Values) -> dict[str, Any]:
    """Return the raw values for the GoalSet."""
    return {
        "recon": recon,
        "kl": made["gaussian_kl"],
        "correlation": made["total_correlation"],
        "consistency": made["consistency_variance"],
        "shape": {"covariance": made["covariance_penalty"], "units": made["active_units"]},
    }


def copied(raw: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: copied(v, dtype) if isinstance(v, dict) else v.detach().to(dtype) for k, v in raw.items()}


def apart(a: Tensor, b: Tensor) -> float:
    """Return the greatest difference, relative to the greatest magnitude in ``b``."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def values_and_gradients(given: Latents, impl: str, dtype: torch.dtype) -> Values:
    """Return every op's value, and the gradient of the sum of its squares."""
    given = Latents(*(x.detach().to(dtype).requires_grad_() for x in given))
    found = {}
    for name, value in statistics(given, impl).items():
        grads = torch.autograd.grad(value.square().sum(), given, allow_unused=True, retain_graph=True)
        found[name] = value.detach()
        found[f"{name}, gradient"] = torch.cat(
            [torch.zeros_like(x) if g is None else g for x, g in zip(given, grads, strict=True)]
        )
    return found


def slope(counts: list[tuple[int, int]]) -> float:
    """Return the least-squares slope per step over the second half."""
    rest = torch.tensor(counts[len(counts) // 2 :], dtype=torch.float64)
    steps, values = (rest - rest.mean(0)).T
    return float((steps @ values) / (steps @ steps))


def handles() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


class Run:
    """One training run, the GoalSets that follow it, and the counts."""

    def __init__(self, steps: int, device: str) -> None:
        self.steps, self.device = steps, torch.device(device)
        self.impls = [impl for impl in select.IMPLS if select.why_not("goal_set", impl, self.device.type) is None]
        torch.manual_seed(0)
        self.mixing = torch.randn(LATENTS, SIZE, device=device)
        self.model = Small().to(device)
        self.goals = {impl: goal_set(impl).to(device) for impl in self.impls}
        self.exact = goal_set("reference").to(device).double()
        self.guard = StepGuard(
            torch.optim.Adam(self.model.parameters(), 1e-3, fused=True), goals=self.goals[self.impls[0]]
        )
        self.errors: dict[str, dict[str, list[float]]] = {impl: {} for impl in self.impls}
        self.learnt = dict.fromkeys(self.impls, 0.0)
        self.counts: dict[str, list[tuple[int, int]]] = {"resident": [], "device": [], "handles": [], "threads": []}
        self.planted = 0

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        causes = torch.randn(BATCH, LATENTS, device=self.device)
        x, view = (causes @ self.mixing + 0.3 * torch.randn(BATCH, SIZE, device=self.device) for _ in range(2))
        if step % POISON == POISON - 1:
            x[step % BATCH, 3] = torch.nan
            self.planted += 1
        return x, view, torch.randn(BATCH, LATENTS, device=self.device)

    def step(self, step: int, look: bool) -> None:
        best, *others = self.impls
        x, view, noise = self.batch(step)
        decoded, latents = self.model(x, view, noise)
        raw = goals_of((decoded - x).square().mean(1), statistics(latents, best))
        out = self.goals[best](raw)
        plain = bomkern.min_goal_loss([raw["recon"], raw["kl"]], [Upper(1.0, 1.0), Upper(8.0, 4.0)], impl=best)
        (out.loss + 0.1 * plain).backward()
        taken = self.guard.step(out.finite)
        self.guard.zero_grad()
        for goals, dtype in (*((self.goals[impl], torch.float32) for impl in others), (self.exact, torch.float64)):
            goals(copied(raw, dtype))
            goals.accept(taken)
        if look and step % POISON != POISON - 1:
            self.look(step, latents)

    def look(self, step: int, latents: Latents) -> None:
        exact = values_and_gradients(latents, "reference", torch.float64)
        for impl in self.impls:
            for name, value in values_and_gradients(latents, impl, torch.float32).items():
                worst = self.errors[impl].setdefault(name, [0.0] * PARTS)  # one maximum for each fifth of the run
                part = step * PARTS // self.steps
                worst[part] = max(worst[part], apart(value, exact[name]))
            self.learnt[impl] = max(apart(getattr(self.goals[impl], k), getattr(self.exact, k)) for k in LEARNT)
        count = {"resident": live_bytes(), "handles": handles(), "threads": threading.active_count()}
        if self.device.type == "cuda":
            count["device"] = torch.cuda.memory_allocated()
        for name, number in count.items():
            self.counts[name].append((step, number))

    def found(self, seconds: float, command: str) -> dict[str, Any]:
        return {
            "command": command,
            "steps": self.steps,
            "seconds": round(seconds),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else platform.machine(),
            "planted": self.planted,
            "rejected": int(self.guard.rejected),
            "first": {name: counts[0][1] for name, counts in self.counts.items() if counts},
            "last": {name: counts[-1][1] for name, counts in self.counts.items() if counts},
            "slope_a_step": {name: slope(counts) for name, counts in self.counts.items() if counts},
            "learnt_apart": self.learnt,
            "errors": {"values": "the greatest of each fifth of the run, of the greatest number", **self.errors},
        }


def run(steps: int, device: str = "cpu", progress: bool = False) -> dict[str, Any]:
    every, begin, it = max(1, steps // LOOKS), time.monotonic(), Run(steps, device)
    for step in range(steps):
        it.step(step, look=step % every == every - 1)
        if progress and step % (every * 20) == every * 20 - 1:
            print(f"step {step + 1:,}: {live_bytes() / 2**20:.1f} MiB, {handles()} handles", flush=True)
    return it.found(time.monotonic() - begin, f"python -m tests.endurance --steps {steps}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.endurance", description="Train for long in small steps.")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = run(asked.steps, asked.device, progress=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
