"""Faults in training, planted on purpose: runs that are killed, checkpoints that are cut short or damaged, full disks.

    python -m tests.faults [--kills 20] [--offsets 50]

does each as often as asked and writes tests/results/faults.json; tests/train/test_faults.py does each a few times.
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
ENDLESS = 10**6  # steps: a run of so many has not ended when it is killed, however late that is
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.faults"])  # so that a run starts in no time


def run(out: Path, limit: int | None = None, **changes: Any) -> dict[str, Any]:
    """A small run; ``limit``: bytes that a file may have, as on a disk that is full."""
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    how = {"checkpoint_every": 1, "eval_every": 1000, **changes}
    return loop.train(config(out, **how), {"steps", "resume", "checkpoint_every"})


def plain() -> None:
    """From here on this process draws no pictures, and has one thread."""
    from bomkern.train import plots

    plots.contact_sheets = lambda *_: None
    torch.set_num_threads(1)


def _quiet(out: Path, errors: Any, changes: dict[str, Any]) -> None:
    plain()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the progress bar
    try:
        run(out, **changes)
    except (TrainError, OSError) as why:
        errors.put(f"{type(why).__name__}: {why}")


def start(out: Path, **changes: Any) -> tuple[Any, Any]:
    """A run in a process of its own, and a queue with its last words."""
    errors = _processes.SimpleQueue()
    process = _processes.Process(target=_quiet, args=(out, errors, changes))
    process.start()
    return process, errors


def last_words(process: Any, errors: Any) -> str:
    """Waits for a run to end; the error it ended with, or nothing."""
    process.join()
    return "" if errors.empty() else errors.get()


def finish(process: Any, errors: Any, code: int = 0) -> None:
    """Waits for a run to end, with ``code`` and without a word."""
    said = last_words(process, errors)
    assert process.exitcode == code and not said, f"the run ended with {process.exitcode}: {said or 'no word'}"


def state(out: Path) -> dict[str, Any]:
    """All that a run will go on from, by path."""
    found = leaves(checkpoint.load(out / recorder.CHECKPOINT))
    return {name: value for name, value in found.items() if not name.startswith("/config")}


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """To the bit, NaN included."""
    return a.keys() == b.keys() and all(
        torch.equal(x.nan_to_num(-1.5), b[name].nan_to_num(-1.5)) if isinstance(x, torch.Tensor) else x == b[name]
        for name, x in a.items()
    )


def kills(folder: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Kills a run ``count`` times at random moments, goes on each time, and compares its end with a run left alone.

    Returns:
        kills, the steps that checkpoints were at, and whether the end is equal to the bit.
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
        if path.exists():
            reached.append(checkpoint.load(path)["step"])
        elif not _can_resume(path) and broken.exists():
            _clear(broken)  # killed before the first checkpoint: a resume has nothing to go on from
    steps = max(reached, default=0) + 2
    for out in (broken, straight):
        finish(*start(out, steps=steps, resume=out == broken and _can_resume(path)))
    written = [line["step"] for out in (straight, broken) for line in recorder.read_lines(out / recorder.METRICS)]
    same_lines = written[: len(written) // 2] == written[len(written) // 2 :]
    return {"kills": count, "steps": reached, "equal": equal(state(straight), state(broken)) and same_lines}


def _first_step(out: Path) -> float:
    """The seconds from the start of a run to its first checkpoint, when the server of processes is there already."""
    for _ in range(2):  # the first of them starts the server
        begun = time.perf_counter()
        finish(*start(out, steps=1, overwrite=True))
    return time.perf_counter() - begun


def _can_resume(path: Path) -> bool:
    return path.exists() or checkpoint.before(path).exists()


def _wait_for_writes(process: Any, path: Path, count: int) -> None:
    """Until ``path`` has been written so many times more, or the process is over."""
    for _ in range(count):
        before = path.stat().st_mtime_ns if path.exists() else 0
        while process.is_alive() and (path.stat().st_mtime_ns if path.exists() else 0) == before:
            time.sleep(0.005)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def damaged(folder: Path, offsets: int, seed: int = 0) -> dict[str, Any]:
    """Cuts a checkpoint short at random places, and flips random bytes of it; it must be refused, or be what it was.

    Returns:
        how many were cut and how many of those refused; how many bytes flipped, and how many of those were refused or
        changed nothing that is read.
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
    log.setLevel(logging.ERROR)  # which of the two is taken is warned of each time
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
    """A run whose checkpoint no longer fits stops in one line, and goes on from the one before when there is room."""
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
    found["full_disk"].pop("said")  # which names the folder
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
