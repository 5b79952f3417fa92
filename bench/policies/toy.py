"""The two-goal toy of CAGrad (Liu et al. 2021), from the five starts of Nash-MTL (Navon et al. 2022), as a picture."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.policies.faults import FAULTS
from bench.policies.problem import Anchor, Measure, Problem

STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
CENTRES = (7.0, -7.0)  # where each goal is best, along the first axis
SCALE = 0.1  # factor of the first goal, as in Nash-MTL
TINY = 5e-6
NEAR = 0.02  # deficits within which a point has reached the front
POINTS = 150  # points of a trajectory


def losses(point: Tensor) -> tuple[Tensor, Tensor]:
    """Return both losses of points [..., 2]."""
    x, y = point.unbind(-1)
    upper, lower = torch.tanh(y / 2).clamp(min=0), torch.tanh(-y / 2).clamp(min=0)
    valleys = ((-x - 7) / 2 - torch.tanh(-y), (-x + 3) / 2 + torch.tanh(-y) + 2)
    bowls = [((c - x) ** 2 + 0.1 * (-y - 8) ** 2) / 10 - 20 for c in CENTRES]
    pair = [upper * (v.abs().clamp(min=TINY).log() + 6) + lower * b for v, b in zip(valleys, bowls, strict=True)]
    return SCALE * pair[0], pair[1]


class Point(nn.Module):
    """Two parameters."""

    def __init__(self, start: tuple[float, float]) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor(start))


class Toy(Problem):
    """Two goals of two parameters; the seed is the number of the start.

    A goal's ideal is what it can reach alone, and its nadir is its value where the other is best.
    """

    title, family = "Toy", "toy"
    measure = Measure("gap", "deficit above the front", 3, larger=False)
    faults = ("none",)
    drifting, blocked = "first", "second"
    rate, steps = 1e-2, 3500
    anchors = {"first": Anchor(-20 * SCALE, -0.4 * SCALE), "second": Anchor(-20.0, -0.4)}  # noqa: RUF012
    model: Point

    def build(self, seed: int) -> None:
        self.model = Point(STARTS[seed])

    def batch(self) -> None:
        return None

    def values(self, inputs: None, draw: torch.Generator) -> dict[str, Tensor]:
        return dict(zip(self.anchors, losses(self.model.at), strict=True))

    def held_out(self, split: str) -> tuple[dict[str, float], dict[str, float]]:
        raw = self.values(None, self.draw)
        return self.named_deficits(raw), {"gap": gap(self.outside(raw))}


def front() -> Tensor:
    """Return deficits on the Pareto front, [n, 2]."""
    x = torch.linspace(CENTRES[1], CENTRES[0], 401)
    y = torch.linspace(-9, -7, 201)
    lowest = y[losses(torch.stack([torch.zeros_like(y), y], 1))[1].argmin()]
    pairs = zip(losses(torch.stack([x, lowest.expand_as(x)], 1)), Toy.anchors.values(), strict=True)
    return torch.stack([(loss - a.ideal) / (a.nadir - a.ideal) for loss, a in pairs], 1)


def gap(deficits: Tensor) -> float:
    """Return by how much the worse of two deficits is above the nearest point of the front, at least 0."""
    return max(0.0, float((deficits - front()).amax(1).min()))


def run(job: tuple[str, int, int | None]) -> dict[str, Any]:
    """Run an arm from a start; return its trajectory, the gap at its end, and whether it has reached the front."""
    from bench.policies.arms import ARMS

    torch.set_num_threads(1)
    name, start, steps = job
    problem, arm = Toy(start, FAULTS["none"], steps), ARMS[name].make("toy")
    arm.start(problem)
    path = []
    for step in range(problem.steps):
        if step % max(1, problem.steps // POINTS) == 0:
            path.append([round(x, 3) for x in problem.model.at.tolist()])
        arm.backward(problem, problem.raw())
        problem.update()
        arm.after(problem)
    found = gap(problem.outside(problem.raw()))
    return {"arm": name, "start": start, "path": path, "gap": round(found, 4), "reached": found <= NEAR}


def draw(runs: list[dict[str, Any]], to: Path) -> None:
    """Draw the trajectories of each arm over the mean of the two deficits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = list(dict.fromkeys(r["arm"] for r in runs))
    columns = min(6, len(arms))
    lines = -(-len(arms) // columns)
    axis = torch.linspace(-11, 11, 200)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    height = sum((x - a.ideal) / (a.nadir - a.ideal) for x, a in zip(losses(grid), Toy.anchors.values(), strict=True))
    figure, axes = plt.subplots(lines, columns, figsize=(2.6 * columns, 2.8 * lines), squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, arm in zip(axes.flat, arms, strict=False):
        ax.contour(axis, axis, height / 2, levels=18, colors="#c9cdd3", linewidths=0.6)
        ax.plot(CENTRES, [-8.2, -8.2], color="#1a7f37", lw=5, alpha=0.4)
        mine = [r for r in runs if r["arm"] == arm]
        for r in mine:
            x, y = zip(*r["path"], strict=True)
            colour = "#2a6fbb" if r["reached"] else "#c8401e"
            ax.plot(x, y, color=colour, lw=1.4)
            ax.plot(x[0], y[0], "o", color="#24292f", ms=4)
            ax.plot(x[-1], y[-1], "*", color=colour, ms=9)
        ax.set_title(f"{arm}: {sum(r['reached'] for r in mine)} of {len(mine)}", fontsize=9)
    figure.suptitle("From dots to stars; the green bar is the Pareto front", fontsize=10)
    figure.tight_layout()
    figure.savefig(to, dpi=100)
    plt.close(figure)


def study(to: Path, arms: list[str], workers: int, steps: int | None = None) -> None:
    """Run arms from all starts, and write ``to``.json and the picture ``to``.png."""
    from tqdm import tqdm

    jobs = [(name, start, steps) for name in arms for start in range(len(STARTS))]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        runs = list(tqdm(pool.imap(run, jobs), total=len(jobs), desc="toy", unit="run"))
    draw(runs, to.with_suffix(".png"))
    kept = [{key: value for key, value in r.items() if key != "path"} for r in runs]
    to.with_suffix(".json").write_text("[\n" + ",\n".join(map(json.dumps, kept)) + "\n]\n")


def section(to: Path) -> list[str]:
    """Return the paragraphs of the page, none where the toy was not run."""
    file = to.with_suffix(".json")
    if not file.exists():
        return []
    reached: dict[str, int] = {}
    for r in json.loads(file.read_text()):
        reached[r["arm"]] = reached.get(r["arm"], 0) + r["reached"]
    text = ", ".join(f"{arm} {count}" for arm, count in reached.items())
    return [
        "## The toy of two goals",
        f"Two goals of two parameters, of which the first is {SCALE:g} times as large, from {len(STARTS)} starts. "
        f"`python -m bench.policies --toy` makes the picture. Starts from which a rule has reached the front: {text}.",
        f"![trajectories of every rule]({to.name}.png)",
    ]
