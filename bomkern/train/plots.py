"""The pictures of a run folder: contact sheets of held-out crops. Curves are in its report."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from bomkern.common.files import write_atomically

from .evaluate import reconstruct
from .networks import VAE

COLUMNS = 10  # pictures in a row
REACH = 3.0  # half the range of a traversal, in standard deviations of the prior


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


def sheet(path: Path, title: str, rows: list[tuple[str, Tensor]], columns: Sequence[str] = ()) -> None:
    """Write a contact sheet: labelled rows of pictures [n, 3, S, S] on a white canvas."""
    side, count = rows[0][1].shape[-1], max(len(pictures) for _, pictures in rows)
    pitch = side + max(2, side // 16)
    canvas = np.ones((len(rows) * pitch, count * pitch, 3), np.float32)
    for r, (_, pictures) in enumerate(rows):
        for c, pixels in enumerate(pictures.clamp(0, 1).float().permute(0, 2, 3, 1).cpu().numpy()):
            canvas[r * pitch : r * pitch + side, c * pitch : c * pitch + side] = pixels
    figure = Figure(figsize=(1.7 + 0.95 * count, 0.6 + 0.95 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(canvas, interpolation="nearest")
    axes.set_title(title, fontsize=11)
    axes.set_yticks([r * pitch + side / 2 for r in range(len(rows))], [label for label, _ in rows], fontsize=9)
    axes.set_xticks([c * pitch + side / 2 for c in range(len(columns))], list(columns), fontsize=9)
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    _save(figure, path)


@torch.no_grad()
def contact_sheets(folder: Path, vae: VAE, images: Tensor, quality: dict[str, Any]) -> None:
    """Write `reconstructions.png`, `swaps.png` and `traversals.png` of held-out crops [n, 3, S, S]."""
    picks = torch.linspace(0, len(images) - 1, min(len(images), 2 * COLUMNS), device=images.device).round().long()
    rows: list[tuple[str, Tensor]] = []
    for part in images[picks].split(COLUMNS):
        rows += [("input", part), ("reconstruction", reconstruct(vae, part))]
    title = f"Held-out crops: {quality['psnr']:.1f} dB PSNR, {quality['ssim']:.2f} SSIM"
    sheet(folder / "reconstructions.png", f"{title} (mean colour {quality['baseline_psnr']:.1f} dB)", rows)

    source = images[picks[::2]]
    other = source.roll(len(source) // 2, 0)
    structure = vae.encoder(source)[0].split(vae.parts, dim=1)[0]
    appearance = vae.encoder(other)[0].split(vae.parts, dim=1)[1]
    swap = vae.decode(torch.cat([structure, appearance], dim=1))
    rows = [("structure source", source), ("appearance source", other), ("swap", swap)]
    sheet(folder / "swaps.png", "Structure of one held-out crop, appearance of another", rows)

    mu = vae.encoder(images)[0]
    spread, split = mu.var(0), vae.parts[0]
    reach = torch.linspace(-REACH, REACH, 9, device=images.device)
    # The crop with the highest contrast shows the effect of a latent best.
    start = mu[images.var((1, 2, 3)).argmax()]
    rows = []
    for part, first, last in (("structure", 0, split), ("appearance", split, len(start))):
        for latent in (spread[first:last].argsort(descending=True)[:4] + first).tolist():
            z = start.repeat(len(reach), 1)
            z[:, latent] = reach
            rows.append((f"{part} {latent - first}", vae.decode(z)))
    names = [f"{x:+.1f}" if x else "0" for x in reach.tolist()]
    sheet(folder / "traversals.png", "One latent moved, the others kept: the four most used of each part", rows, names)
