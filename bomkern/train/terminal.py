"""What `bomkern train` prints: the progress line, and the lines at the end of a run."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any

from bomkern.report.page import NOTHING, is_information

from . import recorder
from .nine_goals import GOALS


def progress(goals: Mapping[str, Mapping[str, float]], psnr: float | None) -> str:
    """Format the worst goal of the last steps with its deficit (0 ideal, 1 nadir), and the last held-out PSNR."""
    worst = max(goals, key=lambda name: goals[name]["deficit"])
    quality = "" if psnr is None else f", PSNR {psnr:.1f} dB"
    return f"worst {worst} {goals[worst]['deficit']:.2f}{quality}"


def report(summary: dict[str, Any], folder: str) -> str:
    """Format the summary for a terminal: a table, the worst finding, and what to take from it, open and try next."""
    rows = [
        "",
        f"{summary['steps']} steps, {summary['rejected_steps']} rejected"
        + (f", {summary['steps_per_second']:.2f} steps/s" if summary["steps_per_second"] else "")
        + (f" after a first one of {summary['first_seconds']:.0f} s" if summary["first_seconds"] else "")
        + (f", {1 - summary['walked']:.0%} of the images' backward saved" if summary["walked"] < 1 else ""),
        "",
        f"{'goal':<22} {'raw':>9} {'deficit':>9} {'share':>7} {'longest starvation':>19}",
    ]
    for name in GOALS:
        raw, deficit = summary["raw"].get(name, math.nan), summary["deficit"].get(name, math.nan)
        rows.append(
            f"{name:<22} {raw:>9.4g} {deficit:>9.3g} {summary['share'][name]:>7.1%} "
            f"{summary['longest_starvation'][name]:>13} steps"
        )
    return "\n".join([*rows, "", *_top_finding(summary["diagnosis"], folder), "", *_last_lines(summary, folder)])


def _last_lines(summary: dict[str, Any], folder: str) -> list[str]:
    """Return a line of what was learnt, one of what to open, and one of what to try next."""
    gain = summary["psnr"] - summary["baseline_psnr"]
    learnt = (
        f"held-out PSNR {summary['psnr']:.1f} dB, {abs(gain):.1f} dB {'above' if gain > 0 else 'BELOW'} each crop's "
        f"mean colour; SSIM {summary['ssim']:.2f} (mean colour {summary['baseline_ssim']:.2f})"
    )
    if deficits := summary["deficit"]:
        worst = max(deficits, key=lambda name: deficits[name])
        learnt += f"; worst goal {worst}, deficit {deficits[worst]:.2f} (0: its ideal, 1: its nadir)"
    quoted = shlex.quote(folder)
    longer = f"bomkern train --out {quoted} --resume --steps {2 * summary['steps']}"
    mine = "bomkern train --data FOLDER_OF_YOUR_IMAGES --out runs/own"
    return [
        f"learnt: {learnt}",
        f"open:   {folder}/{recorder.REPORT} (pictures, metrics and the checkpoint are beside it)",
        f"next:   {longer if summary['data'] else mine}",
    ]


def _top_finding(diagnosis: dict[str, Any] | None, folder: str) -> list[str]:
    """Format the worst finding in a few lines."""
    if diagnosis is None:
        return []
    faults = [finding for finding in diagnosis["findings"] if not is_information(finding["kind"])]
    if not faults:
        return [f"diagnosis: {diagnosis['note'] or NOTHING}"]
    top = faults[0]
    maybe = "perhaps " * (top["confidence"] < 0.5)  # right about half the time: bench/results/faults.json
    return [
        f"diagnosis: {' and '.join(top['goals']) or 'the run'}: {maybe}{top['kind']} ({top['confidence']:.0%} sure)",
        f"  {top['evidence']}",
        f"  -> {top['suggestion']}",
        *([f"  {len(faults) - 1} more: bomkern diagnose {folder}"] if len(faults) > 1 else []),
    ]
