"""The loss section of a step in plain PyTorch: scores, stack, checks, minimum, log, and numbers to log."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Anchors = Mapping[str, tuple[float, float]]  # ideal and nadir of each goal


def plain_loss(raw: Mapping[str, Tensor], anchors: Anchors, log: dict[str, float], reduction: str = "mean") -> Tensor:
    """Return ``-log(min over goals of score)`` of raw values, [B] each; write mean scores and the loss to ``log``.

    Raises:
        ValueError: a raw value or the loss is not finite.
    """
    scores = []
    for name, (ideal, nadir) in anchors.items():
        if torch.isnan(raw[name]).any() or torch.isinf(raw[name]).any():
            raise ValueError(f"{name} is not finite")
        scores.append(torch.exp(-(raw[name] - ideal) / (nadir - ideal)))
    stacked = torch.stack(scores, 1)
    for k, name in enumerate(anchors):
        log[name] = stacked[:, k].mean().item()
    loss = -torch.log(stacked.min()) if reduction == "min" else -torch.log(stacked.amin(1)).mean()
    if torch.isnan(loss).any() or torch.isinf(loss).any():
        raise ValueError("the loss is not finite")
    log["loss"] = loss.item()
    return loss
