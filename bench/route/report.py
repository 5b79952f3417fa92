"""The page that `bench/route/command.py` writes."""

from __future__ import annotations

from typing import Any

from bench.route.variants import SIZE, VARIANTS, WORDS


def page(results: dict[str, Any], picture: str) -> str:
    """Return the page, which shows the picture of this name."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    where = results.get("gpu", f"{results['threads']} threads")
    held = "memory that torch allocated" if "gpu" in results else "process's resident memory"
    return "\n".join([
        "# Routed backward", "",
        f"`{results['command']}` makes this page and the picture, with the trainer's networks and nine goals at {SIZE}",
        f"px, hard minimum, {where} ({versions}). Times are medians over steps of all",
        "variants in turn, from the same weights, after a check that each variant gives the same gradient.", "",
        f"![the graphs that backward walks]({picture})", "",
        "## The whole step", "", *_times(results), "",
        "## Memory", "",
        "*held*: bytes that the graph of the VAE's step keeps for backward. *peak*: the peak of the",
        f"{held} above its value before three steps.", "", *_memory(results), "",
        "## Gradients", "", *_gradients(results), "",
        "## Backward by bottleneck goal", "",
        f"Separate decodes, B = {_small(results)}, one goal the bottleneck of every sample: milliseconds of backward.",
        "",
        *_by_goal(results), "",
        "## Where it saves nothing", "", *_overhead(results), "",
    ])  # fmt: skip


def _times(results: dict[str, Any]) -> list[str]:
    head = "".join(f" B = {t['batch']}, {t['reduction']} |" for t in results["times"])
    rows = ["| |" + head, "|---|" + "---|" * len(results["times"])]
    for variant in VARIANTS:
        cells = []
        for t in results["times"]:
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
        for t in results["times"]:
            seconds = t["seconds"]
            part = (seconds[before] - seconds[after]) / (seconds["plain"] - seconds["rows"])
            cells.append(f" {part:.0%} |")
        rows.append(f"| *part of what is saved: {name}* |" + "".join(cells))
    rows.append(
        "| *backward of the images that is walked* |" + "".join(f" {t['walked']:.1%} |" for t in results["times"])
    )
    shares = [", ".join(f"{name} {s:.0%}" for name, s in sorted(t["share"].items(), key=lambda x: -x[1]) if s >= 0.01)
              for t in results["times"]]  # fmt: skip
    rows.append("| *who owned the samples* |" + "".join(f" {text} |" for text in shares))
    return rows


def _memory(results: dict[str, Any]) -> list[str]:
    cells = {(m["variant"], m["batch"], m["reduction"]): m for m in results["memory"]}
    columns = [(t["batch"], t["reduction"]) for t in results["times"]]
    rows = ["| MB, held / peak |" + "".join(f" B = {b}, {r} |" for b, r in columns), "|---|" + "---|" * len(columns)]
    for variant in VARIANTS:
        of_variant = [cells[variant, b, r] for b, r in columns]
        rows.append(f"| {variant} |" + "".join(f" {m['held'] / 1e6:.0f} / {m['peak'] / 1e6:.0f} |" for m in of_variant))
    return rows


def _gradients(results: dict[str, Any]) -> list[str]:
    lines = []
    for g in results["gradients"]:
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


def _by_goal(results: dict[str, Any]) -> list[str]:
    rows = ["| bottleneck | all graphs walked | its own alone | |", "|---|---|---|---|"]
    for name, spent in results["by_goal"].items():
        part = spent["always"] / spent["never"]
        rows.append(f"| {name} | {spent['never']:.0f} | {spent['always']:.0f} | {part:.0%} |")
    return rows


def _overhead(results: dict[str, Any]) -> list[str]:
    cost = results["for_nothing"]
    return [
        f"Every goal owns rows, B = {_small(results)}: routing adds {cost['added_us']:.1f} us to loss and backward of "
        f"nine values: {cost['added_us'] / cost['step_us']:.4%} of the step's {cost['step_us'] / 1e3:.0f} ms.",
        *_waits(results.get("waits", {})),
    ]


def _small(results: dict[str, Any]) -> int:
    """Return the smallest batch, at which everything is measured that is measured at one batch alone."""
    return int(min(t["batch"] for t in results["times"]))


def _waits(waits: dict[str, float]) -> list[str]:
    if not waits:
        return []
    by_batch = ", ".join(f"{us:.1f} us at B = {int(batch):,}" for batch, us in waits.items())
    return [
        "",
        f"Most of it is the host's wait for the shares: {by_batch}. Routing pays where the skipped branches take "
        "longer than that.",
    ]
