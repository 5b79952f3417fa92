"""Plant faults in training: kill runs, truncate or damage checkpoints, fill the disk.

    python -m tests.faults [--kills 20] [--offsets 50]

The script plants each fault as often as asked and writes tests/results/faults.json. tests/train/test_faults.py plants
each a few times.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bomkern.train import checkpoint, loop, recorder
from bomkern.train.config import TrainError
from tests.support.training import config, leaves

RESULTS = Path(__file__).resolve().parent / "results" / "faults.json"
ENDLESS = 10**6  # more steps than any run reaches before it is killed
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.faults"])  # makes runs start quickly


def run(out: Path, limit: int | None = None, **changes: Any) -> dict[str, Any]:
    """Train a small run; ``limit`` bounds the bytes of a file, as a full disk does."""
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    how = {"checkpoint_every": 1, "eval_every": 1000, **changes}
    return loop.train(config(out, **how), {"steps", "resume", "checkpoint_every"})


def plain() -> None:
    """Disable pictures and use one thread in this process."""
    from bomkern.train import plots

    plots.contact_sheets = lambda *_: None
    torch.set_num_threads(1)


def _quiet(out: Path, errors: Any, changes: dict[str, Any]) -> None:
    plain()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hides the progress bar
    try:
        run(out, **changes)
    except (TrainError, OSError) as why:
        errors.put(f"{type(why).__name__}: {why}")


def start(out: Path, **changes: Any) -> tuple[Any, Any]:
    """Start a run in its own process. Return the process and a queue for its error message."""
    errors = _processes.SimpleQueue()
    process = _processes.Process(target=_quiet, args=(out, errors, changes))
    process.start()
    return process, errors


def last_words(process: Any, errors: Any) -> str:
    """Wait for a run to end, and return its error message, or ""."""
    process.join()
    return "" if errors.empty() else errors.get()


def finish(process: Any, errors: Any, code: int = 0) -> None:
    """Wait for a run to end, and check that it exits with ``code`` and no error message."""
    said = last_words(process, errors)
    assert process.exitcode == code and not said, f"the run ended with {process.exitcode}: {said or 'no word'}"


def state(out: Path) -> dict[str, Any]:
    """Return the state from which a run resumes, by path."""
    found = leaves(checkpoint.load(out / recorder.CHECKPOINT))
    return {name: value for name, value in found.items() if not name.startswith("/config")}


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Return whether two states are bitwise equal, NaN included."""
    return a.keys() == b.keys() and all(
        torch.equal(x.nan_to_num(-1.5), b[name].nan_to_num(-1.5)) if isinstance(x, torch.Tensor) else x == b[name]
        for name, x in a.items()
    )


def kills(folder: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Kill a run ``count`` times at random moments, resume it each time, and compare it with an undisturbed run.

    Returns:
        kills, the steps of the checkpoints, and whether the final states are bitwise equal.
    """
    rng = random.Random(seed)
    broken, straight = folder / "broken", folder / "straight"
    path, reached, first = broken / recorder.CHECKPOINT, [], _first_step(folder / "measured")
    for _ in range(count):
        process, errors = start(broken, steps=ENDLESS, resume=_can_resume(path), overwrite=False)
        _wait_for_writes(process, path, rng.choice((0, 0, 1)))
        time.sleep(rng.uniform(0, 1.5 * first))
        os.kill(process.pid, signal.SIGKILL)
        finish(process, errors, -signal.SIGKILL)
        if _can_resume(path):  # a kill between two renames leaves the previous checkpoint alone
            reached.append(checkpoint.load(path)["step"])
        elif broken.exists():
            _clear(broken)  # a run killed before its first checkpoint has nothing to resume from
    steps = max(reached, default=0) + 2
    for out in (broken, straight):
        finish(*start(out, steps=steps, resume=out == broken and _can_resume(path)))
    written = [line["step"] for out in (straight, broken) for line in recorder.read_lines(out / recorder.METRICS)]
    same_lines = written[: len(written) // 2] == written[len(written) // 2 :]
    return {"kills": count, "steps": reached, "equal": equal(state(straight), state(broken)) and same_lines}


def _first_step(out: Path) -> float:
    """Return the seconds from a run's start to its first checkpoint, with the fork server already running."""
    for _ in range(2):  # the first run starts the server
        begun = time.perf_counter()
        finish(*start(out, steps=1, overwrite=True))
    return time.perf_counter() - begun


def _can_resume(path: Path) -> bool:
    return path.exists() or checkpoint.before(path).exists()


def _wait_for_writes(process: Any, path: Path, count: int) -> None:
    """Wait until ``path`` has been written ``count`` more times, or the process has ended."""
    for _ in range(count):
        before = path.stat().st_mtime_ns if path.exists() else 0
        while process.is_alive() and (path.stat().st_mtime_ns if path.exists() else 0) == before:
            time.sleep(0.005)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def damaged(folder: Path, offsets: int, seed: int = 0) -> dict[str, Any]:
    """Truncate a checkpoint at random places, and flip random bytes of it.

    The loader must refuse it, or read the same state as before.

    Returns:
        how many files were truncated, and how many of them were refused; how many bytes were flipped, and how many of
        those files were refused or read unchanged.
    """
    rng, out = random.Random(seed), folder / "damaged"
    if not out.exists():
        run(out, steps=2)
    path = out / recorder.CHECKPOINT
    whole, last, older = path.read_bytes(), state(out), leaves(checkpoint.load(checkpoint.before(path)))
    older = {name: value for name, value in older.items() if not name.startswith("/config")}
    found = {"cut": offsets, "refused": 0, "flipped": offsets, "survived": 0}
    log = logging.getLogger("bomkern")
    level = log.level
    log.setLevel(logging.ERROR)  # hides the warning about which checkpoint is used
    try:
        for _ in range(offsets):
            path.write_bytes(whole[: rng.randrange(len(whole))])
            found["refused"] += equal(state(out), older)
            place = rng.randrange(len(whole))
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :])
            read = state(out)
            found["survived"] += equal(read, older) or equal(read, last)
    finally:
        log.setLevel(level)
        path.write_bytes(whole)
    return found


def full_disk(folder: Path) -> dict[str, Any]:
    """Fill the disk: the run must stop with a one-line error, and resume from the previous checkpoint later."""
    out = folder / "full"
    run(out, steps=2)
    size = (out / recorder.CHECKPOINT).stat().st_size
    said = last_words(*start(out, resume=True, steps=4, limit=size // 2))
    kept = checkpoint.load(out / recorder.CHECKPOINT)["step"]
    left = [path.name for path in out.glob(".*tmp")]
    return {"said": said, "kept": kept, "left": left, "steps": run(out, resume=True, steps=4)["steps"]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Plant faults in training.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--offsets", type=int, default=50)
    asked = parser.parse_args()
    plain()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {
            "command": f"python -m tests.faults --kills {asked.kills} --offsets {asked.offsets}",
            "kills": kills(folder, asked.kills),
            "damaged": damaged(folder, asked.offsets),
            "full_disk": full_disk(folder),
        }
    found["full_disk"].pop("said")  # the message names the folder
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
