"""Histories written by hand, for the tests of the diagnosis and of the report."""

from __future__ import annotations

import torch
from torch import Tensor

from bomkern import (
    Anchored,
    Finding,
    History,
    diagnose,
)
from bomkern.diagnosis.run_view import Column
from bomkern.goals.constraint_info import describe
from bomkern.goals.policies import policy_of
from bomkern.goals.record import Layout

T = 400


def noise(size: float, rows: int = T, seed: int = 0) -> Tensor:
    return size * torch.randn(rows, generator=torch.Generator().manual_seed(seed))


def flat(value: float, rows: int = T, seed: int = 0) -> Tensor:
    return value + noise(0.03 * abs(value), rows, seed)


def slope(first: float, last: float, rows: int = T, seed: int = 0) -> Tensor:
    return torch.linspace(first, last, rows) + noise(0.03 * max(abs(first), abs(last)), rows, seed)


def written(
    raw: dict[str, Tensor],
    share: dict[str, Tensor | float],
    anchors: dict[str, tuple[Tensor | float, Tensor | float]] | None = None,
    constraints: dict[str, object] | None = None,
    highest: dict[str, Tensor] | None = None,
    most: float = 1.0,
    least: float = 0.0,
) -> History:
    """Return a history of these raw values and shares.

    A goal is anchored at (0, 1), and "goal.member" belongs to "goal".
    """
    columns = list(raw)
    goals = list(dict.fromkeys(column.split(".")[0] for column in columns))
    owner = [goals.index(column.split(".")[0]) for column in columns]
    rows = len(raw[columns[0]])
    given = {column: (constraints or {}).get(column, Anchored(0.0, 1.0)) for column in columns}
    described = [describe(policy_of(column, constraint)) for column, constraint in given.items()]
    layout = Layout(goals, columns, owner, described, most, least)

    def wide(value: Tensor | float) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float32).expand(rows)

    pairs = {column: (anchors or {}).get(column, (0.0, 1.0)) for column in columns}
    ideal = torch.stack([wide(pairs[c][0]) for c in columns], 1)
    scale = torch.stack([wide(pairs[c][1]) for c in columns], 1)
    values = torch.stack([wide(raw[c]) for c in columns], 1)
    away = [
        Column(c, 0, described[k]).distance(values[:, k], ideal[0, k].item(), scale[0, k].item())
        for k, c in enumerate(columns)
    ]
    single = torch.stack(away, 1).clamp(min=-1)
    deficit = torch.stack([single[:, [k for k, o in enumerate(owner) if o == g]].mean(1) for g in range(len(goals))], 1)
    shares = torch.stack([wide(share.get(goal, 0.0)) for goal in goals], 1)
    top = torch.stack([wide((highest or {}).get(c, values[:, k])) for k, c in enumerate(columns)], 1)
    finite = deficit.isfinite().all(1, keepdim=True).float()
    loss = deficit.amax(1, keepdim=True)
    return History.from_rows(
        layout, torch.cat([shares, torch.exp(-deficit), deficit, values, top, ideal, 1 / scale, loss, finite], 1)
    )


def only(history: History, kind: str, **options: object) -> Finding:
    """Return the only finding of a kind, which must exist."""
    found = [f for f in diagnose(history, **options) if f.kind == kind]  # type: ignore[arg-type]
    assert len(found) == 1, diagnose(history, **options)  # type: ignore[arg-type]
    return found[0]


def kinds(history: History, **options: object) -> list[str]:
    return [f.kind for f in diagnose(history, **options).faults]  # type: ignore[arg-type]


def locked(rows: int = T) -> History:
    return written(
        {"realism": flat(1.5, rows), "recon": flat(0.6, rows, 1), "kl": flat(0.3, rows, 2)},
        {"realism": 0.97, "recon": 0.03},
    )


def turns(period: int = 80) -> tuple[Tensor, Tensor]:
    """Return when the first of two goals that undo each other has the gradient, and its raw values."""
    first = (torch.arange(T) // (period // 2) % 2).float()
    wave = torch.cumsum(torch.where(first > 0, -0.01, 0.01), 0)
    return first, wave - wave.mean()


def clean(seed: int) -> History:
    """Return a history of four goals that improve together and trade the gradient, in correlated noise."""
    random_numbers = torch.Generator().manual_seed(seed)
    weather, noises = torch.zeros(4), []
    for _ in range(T):
        weather = 0.9 * weather + 0.04 * torch.randn(4, generator=random_numbers)
        noises.append(weather + 0.05 * torch.randn(4, generator=random_numbers))
    level = 0.1 + 0.9 * torch.exp(-torch.linspace(0, 4, T))
    raw = level[:, None] * torch.exp(torch.stack(noises))
    share = torch.softmax(10 * raw, 1)
    return written({n: raw[:, i] for i, n in enumerate("abcd")}, {n: share[:, i] for i, n in enumerate("abcd")})
