"""The page that `bench/route/command.py` writes."""

from __future__ import annotations

from typing import Any

from bench.route.variants import SIZE, VARIANTS, WORDS


def page(found: dict[str, Any], picture: str) -> str:
    """The page, with the picture's name."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    where = found.get("gpu", f"{found['threads']} threads")
    held = "memory that torch allocated" if "gpu" in found else "process's resident memory"
    return "\n".join([
        "# Routed backward", "",
        f"`{found['command']}` makes this page and the picture: the trainer's networks and nine goals at {SIZE} px,",
        f"hard minimum, {where} ({versions}). Medians over steps of all variants in turn, from the",
        "same weights, each checked to give the same gradient first.", "",
        f"![the graphs that backward walks]({picture})", "",
        "## The whole step", "", *_times(found), "",
        "## Memory", "",
        "*held*: bytes that the graph of the VAE's step keeps for backward. *peak*: by how much three steps raise the",
        f"{held} above what it had before them.", "", *_memory(found), "",
        "## Gradients", "", *_gradients(found), "",
        "## Backward by bottleneck goal", "",
        f"Separate decodes, B = {_small(found)}, one goal the bottleneck of every sample: milliseconds of backward.",
        "",
        *_by_goal(found), "",
        "## Where it saves nothing", "", *_for_nothing(found), "",
    ])  # fmt: skip


def _times(found: dict[str, Any]) -> list[str]:
    head = "".join(f" B = {t['batch']}, {t['reduction']} |" for t in found["times"])
    rows = ["| |" + head, "|---|" + "---|" * len(found["times"])]
    for variant in VARIANTS:
        cells = []
        for t in found["times"]:
            seconds = t["seconds"]
            ratio = "" if variant == "plain" else f", {seconds['plain'] / seconds[variant]:.2f}x"
            cells.append(f" {1e3 * seconds[variant]:.0f} ms{ratio} |")
        rows.append(f"| {WORDS[variant]} |" + "".join(cells))
    for name, before, after in (
        ("fused, no syncs", "plain", "walked"),
        ("branches", "walked", "branches"),
        ("rows", "branches", "rows"),
    ):
        cells = []
        for t in found["times"]:
            seconds = t["seconds"]
            part = (seconds[before] - seconds[after]) / (seconds["plain"] - seconds["rows"])
            cells.append(f" {part:.0%} |")
        rows.append(f"| *part of what is saved: {name}* |" + "".join(cells))
    rows.append(
        "| *backward of the images that is walked* |" + "".join(f" {t['walked']:.1%} |" for t in found["times"])
    )
    shares = [", ".join(f"{name} {s:.0%}" for name, s in sorted(t["share"].items(), key=lambda x: -x[1]) if s >= 0.01)
              for t in found["times"]]  # fmt: skip
    rows.append("| *who owned the samples* |" + "".join(f" {text} |" for text in shares))
    return rows


def _memory(found: dict[str, Any]) -> list[str]:
    cells = {(m["variant"], m["batch"], m["reduction"]): m for m in found["memory"]}
    columns = [(t["batch"], t["reduction"]) for t in found["times"]]
    rows = ["| MB, held / peak |" + "".join(f" B = {b}, {r} |" for b, r in columns), "|---|" + "---|" * len(columns)]
    for variant in VARIANTS:
        found_here = [cells[variant, b, r] for b, r in columns]
        rows.append(f"| {variant} |" + "".join(f" {m['held'] / 1e6:.0f} / {m['peak'] / 1e6:.0f} |" for m in found_here))
    return rows


def _gradients(found: dict[str, Any]) -> list[str]:
    lines = []
    for g in found["gradients"]:
        same = "identical to the bit" if g["identical"] else "NOT identical"
        lines.append(
            f"- reduction {g['reduction']}, B = {g['batch']}, {g['steps']} training steps in which {g['owners']} of 9 "
            f"goals were the bottleneck: branch routing {same} in every parameter; row routing within "
            f"{g['rows_error']:.1e} of the whole gradient's norm, and in the parameter that is furthest off "
            f"({g['rows_worst'][1]}) within {g['rows_worst'][0]:.1e} of its own{_against_float64(g['errors'])}"
        )
    return lines


def _against_float64(errors: list[list[float]]) -> str:
    if not errors:
        return ""
    walked, rows = max(errors, key=lambda pair: pair[1])
    return (
        f". Steps with more than 5e-6: {len(errors)}, where the bottleneck is the difference of two decodes; there the "
        f"walked gradient itself is up to {walked:.1e} from float64's (which may give a near tie to another goal), the "
        f"routed one {rows:.1e}"
    )


def _by_goal(found: dict[str, Any]) -> list[str]:
    rows = ["| bottleneck | all graphs walked | its own alone | |", "|---|---|---|---|"]
    for name, spent in found["by_goal"].items():
        part = spent["always"] / spent["never"]
        rows.append(f"| {name} | {spent['never']:.0f} | {spent['always']:.0f} | {part:.0%} |")
    return rows


def _for_nothing(found: dict[str, Any]) -> list[str]:
    cost = found["for_nothing"]
    return [
        f"Every goal owns rows, B = {_small(found)}: routing adds {cost['added_us']:.1f} us to loss and backward of "
        f"nine values: {cost['added_us'] / cost['step_us']:.4%} of the step's {cost['step_us'] / 1e3:.0f} ms.",
        *_waits(found.get("waits", {})),
    ]


def _small(found: dict[str, Any]) -> int:
    """The smallest batch: what is measured at one is measured there."""
    return int(min(t["batch"] for t in found["times"]))


def _waits(waits: dict[str, float]) -> list[str]:
    if not waits:
        return []
    told = ", ".join(f"{us:.1f} us at B = {int(batch):,}" for batch, us in waits.items())
    return [
        "",
        f"Most of it is that the host waits until it knows the shares: {told}. Routing pays where the branches that "
        "are passed by take longer than that.",
    ]
