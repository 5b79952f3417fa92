"""bench/results/README.md: what the benches measured, a part for each machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bench.cases import OPS
from bench.cases import named as named_case
from bench.report import growth, worst
from bench.report.tables import Lines, by_size, megabytes, memory, named, ratio, table, text, time
from bench.results import HERE, PREDICTIONS, Results, Row, Size

BOTH, FORWARD = "forward+backward", "forward"
DIRECTIONS = (BOTH, FORWARD, "backward")
CASES = {named_case(op, label): words for op, benches in OPS.items() for label, words in benches.cases.items()}
PARTS = ("networks", "statistics", "loss", "updates")
MISS = 1.5  # how far a prediction may be off
STEPS = {
    "bomkern lazy": "hard minimum, graphs for owned rows alone (`lazy`)",
    "bomkern routed": "hard minimum, branches without a share passed by",
    "bomkern": 'hard minimum, all graphs walked (`route="never"`)',
    "bomkern spill": "spill 1/2, every goal takes all rows",
    "bomkern default": "spill 1/2 with a budget of 2, the trainer's default: goals evaluated for their rows alone",
    "bomkern default, dearest first": "the same where the goals that decode most weigh most, the worst order for time",
    "bomkern default compiled": "the default, networks and goals of images by torch.compile",
    "plain": "hard minimum in plain PyTorch: eager statistics, stack, checks, `.item()`",
    "plain in blocks": "the same, total correlation by blocks of rows that backward computes again",
    "weighted sum": "sum of the anchored losses, eager statistics",
    "UPGrad": "TorchJD's UPGrad on the nine losses, eager statistics",
    "MGDA": "TorchJD's MGDA on the nine losses, eager statistics",
}


def head(results: Results) -> Lines:
    m = results.machine
    cuda = f", CUDA {m['cuda']}, driver {m['driver']}" if "cuda" in m else ""
    threads = f", {m['threads']} threads" if m["device"] == "cpu" else ""
    return [
        f"# {m['name']}{threads}",
        "",
        *text(
            f"`{results.command}`, {results.date[:10]}. bomkern {m['bomkern']}, torch {m['torch']}, Python "
            f"{m['python']}, {m['system']}, CPU kernels {m['simd']}{cuda}."
        ),
    ]


def times(results: Results) -> Lines:
    lines = ["## Time", ""]
    lines += text(
        "bomkern's time, and of each peer how many times that is: above 1x bomkern is the faster one. Where several "
        "kinds of data were measured, each figure is of the worst one for it: bomkern's longest time, and a peer's "
        "least ratio. The last lines name them. Forward is that of training, which keeps what its backward needs. "
        "`bomkern reference` is what serves where nothing was compiled.",
        "Pictures, memory, ceilings, growth and first calls are of each op's usual data, the first in its table below.",
        f"![time against batch size, for each peer]({results.stem}_time.png)",
    )
    for case, words in CASES.items():
        for direction in DIRECTIONS:
            if made := worst.by_size(results, case, direction):
                lines += [f"{words}, {direction.replace('+', ' and ')}:", "", *made]
    return lines


def regimes(results: Results) -> Lines:
    return worst.section(results, CASES)


def memories(results: Results) -> Lines:
    what = "torch's allocator" if results.machine["device"] == "cuda" else "resident, to some 0.3 MB"
    lines = ["## Memory", ""]
    lines += text(
        f"By how much it peaks above the inputs during one forward and backward, gradients included ({what}).",
        f"![memory against batch size, for each peer]({results.stem}_memory.png)",
    )
    for case, words in CASES.items():
        sizes = results.of(case, BOTH)
        if any(row.get("peak_bytes", 0) >= 1e6 for peers in sizes.values() for row in peers.values()):
            lines += [f"{words}:", "", *by_size(sizes, memory)]
    for size, peers in results.of("total_correlation", "peak memory").items():
        found, sized = peers["bomkern"]["peak_bytes"], dict(size)
        temporary = 4.0 * sized["B"] ** 2 * sized["D"]
        lines += text(
            f"`total_correlation` on the CPU at {named(size)} (`pytest bench/ -k peak_memory`): {megabytes(found)}; "
            f"the textbook's B x B x D temporary would be {megabytes(temporary)}."
        )
    return lines


def ceilings(results: Results) -> Lines:
    most = results.machine["ceilings"]
    words = []
    if most["bytes"]:
        words.append(f"a copy moved {most['bytes'] / 1e9:.1f} GB/s (bytes read and written)")
    if most["exponentials"]:
        words.append(f"an `exp2` in registers and nothing else gave {most['exponentials'] / 1e9:.1f} billion a second")
    if most["flops"]:
        words.append(f"the library's float32 matrix product {most['flops'] / 1e9:,.0f} GFLOP/s")
    if not words:
        return []
    lines = ["## How far from what the machine can do", ""]
    lines += text(
        f"In this run {', '.join(words)}: the ceilings. Below, forward and backward at the largest size, by count of "
        "the work that has to be done. What is read twice out of a cache can pass a copy's bandwidth, and gradients "
        "in fresh memory stay under it, for the system must zero its pages.",
        f"![share of the ceiling, for each peer]({results.stem}_ceilings.png)",
    )
    rows = []
    for case in CASES:
        if found := largest(results, case):
            size, peers = found
            shares = [_share(peers.get(peer, {})) for peer in ("bomkern", "torch.compile", "eager")]
            rows.append([case, named(size), _rate(peers["bomkern"]), *shares])
    return lines + table(["", "", "bomkern", "of the ceiling", "torch.compile", "eager"], rows)


def largest(results: Results, case: str) -> tuple[Size, dict[str, Row]] | None:
    """The case in both directions at its largest size that more than one peer could take."""
    sizes = [(size, peers) for size, peers in results.of(case, BOTH).items() if len(peers) > 1 and "bomkern" in peers]
    return max(sizes, key=lambda found: found[1]["bomkern"]["work"]) if sizes else None


def _share(row: Row) -> str:
    return f"{row['share']:.0%}" if row.get("share") else ""


def _rate(row: Row) -> str:
    unit = {"bytes": "GB/s", "exponentials": "billion exp/s", "flops": "GFLOP/s"}[row["unit"]]
    return f"{row['rate'] / 1e9:.3g} {unit}"


def grown(results: Results) -> Lines:
    lines = ["## How cost grows", ""]
    lines += text(
        "Exponents p of time and memory ~ size^p, forward and backward, by least squares on logarithms, with their "
        "standard errors. Where calls are short, what does not grow flattens p."
    )
    rows = [
        [line.case, f"{line.letter}, {line.fixed}", line.over, line.peer, _exponent(line.time), _exponent(line.memory)]
        for line in growth.exponents(results)
    ]
    return lines + table(["", "in", "from", "", "time", "memory"], rows)


def _exponent(found: growth.Fit | None) -> str:
    return f"{found[0]:.2f} (±{found[1]:.2f})" if found else ""


def steps(results: Results) -> Lines:
    if not (sizes := results.of("nine-goal step", "whole")):
        return []
    lines = ["## The whole step", ""]
    lines += text(
        "The trainer's nine-goal step at 64 px, networks, discriminator and updates included; every variant has "
        "the same networks and takes the same batch. The parts are timed apart, forward and backward, on a graph that"
        " is cut between them.",
        "Parts: `networks` are the VAE and the discriminator, `statistics` all that makes raw values of their outputs"
        " (of the latent code, and edges, colours and structural similarity of the images, which have no kernels of "
        "ours), `loss` the rule, `updates` the discriminator's own step and both optimisers.",
        f"![where the time of a step goes]({results.stem}_step.png)",
    )
    for size, peers in sizes.items():
        rows = []
        for name, row in peers.items():
            faster = ratio(plain["seconds"] / row["seconds"]) if (plain := plain_step(peers)) else ""
            rows.append([f"{name}: {STEPS[name]}", time(row["seconds"]), faster, *_parts(row, PARTS), memory(row)])
        lines += [f"{named(size)}:", "", *table(["", "a step", "plain / this", *PARTS, "memory"], rows)]
        if found := compiled_step(peers):
            eager, made = found
            lines += text(
                f"Compiled, the default step is {ratio(eager['seconds'] / made['seconds'])} as fast as it is eager; "
                f"its first call, which compiles, took {time(made['first_seconds'])}."
            )
    return lines


def compiled_step(peers: dict[str, Row]) -> tuple[Row, Row] | None:
    """The trainer's default step, and the same compiled, where both were measured."""
    eager, made = (peers.get(name) for name in ("bomkern default", "bomkern default compiled"))
    return (eager, made) if eager and made else None


def plain_step(peers: dict[str, Row]) -> Row | None:
    """The step in plain PyTorch; where its B x B x D temporaries did not fit, the one that makes them in blocks."""
    return peers.get("plain") or peers.get("plain in blocks")


def _parts(row: Row, parts: Sequence[str]) -> Lines:
    return [time(row["parts"][part]) if "parts" in row else "" for part in parts]


def section(results: Results) -> Lines:
    if not (sizes := results.of("loss section", BOTH)):
        return []
    how = "as the driver saw them"
    if results.machine["device"] == "cpu":
        how = "counted on the CPU: operators, each a launch or more on a GPU, and reads that would wait for one"
    lines = ["## The loss section", ""]
    lines += text(
        "From nine raw values to their gradients, against the code that one writes: scores, stack, `isnan().any()`, "
        f"min, log, `.item()` for a log (bench/loss_section.py). Launches and host syncs are {how}."
    )
    rows = [
        [named(size), peer, time(row["seconds"]), str(row["launches"]), str(row["syncs"])]
        for size, peers in sizes.items()
        for peer, row in peers.items()
    ]
    words = {"bomkern": "`GoalSet`, with its history", "eager": "plain PyTorch"}
    rows = [[cell if k != 1 else words[cell] for k, cell in enumerate(row)] for row in rows]
    return lines + table(["", "", "time", "launches", "syncs"], rows)


def small(results: Results) -> Lines:
    """Return the host time of one call, and the time that the module adds."""
    lines = ["## Small calls", ""]
    for peers in results.of("host time of min_goal_loss", FORWARD).values():
        told = ", ".join(f"`{peer}` {time(row['seconds'])}" for peer, row in peers.items())
        lines += text(f"One forward call on a [64, 9] tensor: {told}.")
    for peers in results.of("GoalSet step", BOTH).values():
        seconds = {name: row["seconds"] for name, row in peers.items()}
        first = next(iter(seconds.values()))
        lines += ["What the module adds, forward and backward of nine goals, B = 64:", ""]
        rows = [[name, time(spent), f"{1e6 * (spent - first):+.0f} us"] for name, spent in seconds.items()]
        lines += table(["", "", "more than the first"], rows)
    return lines


def launches(results: Results) -> Lines:
    if results.machine["device"] != "cuda":
        return []
    lines = ["## Launches", ""]
    lines += text(
        "Microseconds of a call forward and backward: of the host, between two events, and between events when a CUDA "
        "graph of it is replayed."
    )
    names = ("host_us", "event_us", "graph_us")
    rows = [
        [case, named(size), peer, *(f"{row[n]:.1f}" if row.get(n) else "" for n in names), str(row.get("launches", ""))]
        for case in CASES
        for size, peers in results.of(case, BOTH).items()
        for peer, row in peers.items()
    ]
    return lines + table(["", "", "", "host", "events", "graph", "launches"], rows)


def kernels(results: Results) -> Lines:
    """Return the table of Nsight Compute's figures for each launch (bench/kernels.py)."""
    path = results.folder / f"{results.stem}_kernels.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    lines = ["## Kernels", ""]
    lines += text(
        "By Nsight Compute, every launch of each op forward and backward at one large size, by CUDA and then by Triton "
        "(bench/kernels.py): time, throughput of the multiprocessors and of the memory in percent of their peaks, and "
        "occupancy."
    )
    names = ("us", "sm", "dram", "occupancy")
    rows = [[f"`{launch['kernel']}`", *(f"{launch.get(name, 0):.1f}" for name in names)] for launch in found]
    return lines + table(["", "us", "SM %", "DRAM %", "occupancy %"], rows)


def predicted(results: Results) -> Lines:
    """Return the predictions for this GPU beside the measured times; an empty table for any other GPU."""
    if results.machine["device"] != "cuda" or not PREDICTIONS.exists():
        return []
    told = json.loads(PREDICTIONS.read_text())
    if told["gpu"] not in results.machine["name"]:
        return []
    rows, missed, out = [], 0, 0
    for entry in told["entries"]:
        size, found = tuple(entry["size"].items()), device_us(results, entry)
        if found is None:
            out += 1
            continue
        off = found / entry["predicted_us"]
        miss = not 1 / MISS <= off <= MISS
        missed += miss
        what = f"{entry['case']}, {entry['direction'].replace('+', ' and ')}"
        figures = [f"{us:.3g}" for us in (entry["floor_us"], entry["predicted_us"], found)]
        rows.append([what, named(size), *figures, f"**{off:.2f}x**" if miss else f"{off:.2f}x"])
        rows[-1].append(entry["because"] if miss else "")
    if not rows:
        return []
    lines = ["## Predicted, and measured", ""]
    lines += text(
        f"Microseconds of our CUDA kernels. The floor is a count; the prediction was written on {told['made']}, before "
        f"one had run, with its reason (`{told['command']}`, bench/results/predictions.json). Measured: between two "
        "events when a graph of the calls is replayed; backward is both directions less forward, the bench's loss "
        f"included. In bold: more than {MISS}x off, {missed} of {len(rows)}, each a finding. {out} were not measured."
    )
    return lines + table(["", "", "floor", "predicted", "measured", "measured / predicted", "it was to be"], rows)


def device_us(results: Results, entry: Row) -> float | None:
    """Return the device time of the CUDA implementation, where it was measured in the usual regime."""

    def took(direction: str) -> float | None:
        row = results.of(entry["case"], direction).get(tuple(entry["size"].items()), {}).get("bomkern", {})
        return (row.get("graph_us") or row.get("event_us")) if row.get("impl") == "cuda" else None

    if entry["direction"] != "backward":
        return took(entry["direction"])
    both, forward = took(BOTH), took(FORWARD)
    return both - forward if both and forward and both > forward else None


def first_calls(results: Results) -> Lines:
    lines = ["## The first call", ""]
    lines += text(
        "Kept out of every figure above: the slowest first call forward and backward, with what was compiled for it by "
        "a torch.compile that has compiled nothing before; it is given each size anew, as is fastest."
    )
    rows = []
    for case in CASES:
        firsts = [
            {peer: row.get("first_seconds") for peer, row in found.items()} for found in results.of(case, BOTH).values()
        ]
        slowest = [max((first[name] for first in firsts if first.get(name)), default=None) for name in COMPILERS]
        rows.append([case, *("" if x is None else time(x) for x in slowest)])
    return lines + table(["", *COMPILERS], rows)


COMPILERS = ("bomkern", "torch.compile")
SECTIONS = (
    *(head, times, regimes, memories, ceilings, grown, steps, section, small, launches, predicted, kernels),
    first_calls,
)


OTHERS = {"policies.md": "rules compared", "route.md": "backward, routed"}


def page(all_results: Sequence[Results], folder: Path = HERE) -> str:
    """All of it, for a page in ``folder``."""
    lines = ["# What the benches measured", ""]
    lines += text(
        "Written by `python -m bench.report`; every figure is from the `.json` beside it. Medians over rounds, peers "
        "side by side in one run on one machine, each result checked against the reference in float64 before it is "
        "timed. On a shared machine a ratio moves by a fifth from run to run.",
    )
    if others := [f"[{words}]({name})" for name, words in OTHERS.items() if (folder / name).exists()]:
        lines += text(f"Other pages: {', '.join(others)}.")
    if not any(results.machine["device"] == "cuda" for results in all_results):
        lines += text("Not measured on a GPU yet: `make gpu` adds its part to this page.")
    for results in all_results:
        lines += [line for part in SECTIONS for line in part(results)]
    return "\n".join(lines).rstrip() + "\n"
