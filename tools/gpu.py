"""Build, test, sanitize, profile and measure on a machine with a GPU, in three calls, and pack the results.

    make gpu                                        # the first call
    make gpu CALL=2 BEFORE=call1.tar.xz             # the second, which reads the results of the first
    make gpu CALL=3 BEFORE="call1.tar.xz call2.tar.xz"
    make gpu CALL=1 DRY=1                           # every stage on a CPU, small, with stand-ins for the tools

Each call takes at most SECONDS (560) on a bare machine, uses the python3 that has torch, and downloads nothing. A stage
always has its own seconds, and those that earlier stages did not use. It gets the time at which it has to stop: after
it, tests and benches begin nothing new and write their results. After every stage, and at the end however the call
ends, ARCHIVE (build/gpu<call>.tar.xz) is written again. Its at most 12 MB hold logs, failures, measurements, profiles
and ``summary.txt``, which is to be read first.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_stages import CALLS, ROOT, Call, Stage

SECONDS = 560.0  # most seconds of a call
START = 12.0  # seconds before the first stage and between stages
MOST = 12_000_000  # most bytes of the archive
LOG = 400_000  # most bytes of a log at the first attempt to pack: its beginning and its end
GRACE = 12.0  # seconds of a stage, before its end, in which it begins nothing new
KILL = 6.0  # seconds that a stage has to write its results after SIGTERM
PACKING = 12.0  # seconds reserved for the archive
SHORT = 15.0  # a stage is not begun with fewer seconds


class Stopped(BaseException):
    """The process received SIGTERM or SIGINT."""


def _stop(number: int, frame: FrameType | None) -> None:
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    raise Stopped(signal.Signals(number).name)


def end(process: subprocess.Popen[bytes], patience: float = KILL) -> None:
    """Stop a process and all its children with SIGTERM, which lets them write their results, then with SIGKILL."""
    for number, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
            process.wait(wait)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def run(call: Call, stage: Stage, until: float, kept: float = 0.0) -> str:
    """Run a stage, and return a line about its outcome. Its output is in the folder of the call.

    Args:
        until: seconds since 1970 at which the call's stages end. kept: seconds before that for the stages to come.
    """
    log = call.work / f"{stage.name}.log"
    begun = time.time()
    hard = min(until, max(until - kept, begun + stage.seconds * call.patience))
    if hard - begun < SHORT:
        return "not begun: no time left"
    call.stop_at = max(begun + 1.0, hard - GRACE)
    try:
        command = stage.command(call)
    except (OSError, ValueError) as why:
        return f"not begun: {why}"
    if command is None:
        return "well: there was nothing to do"
    if isinstance(command, str):
        return f"not begun: {command}"
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
            env={**os.environ, **call.environment, **stage.environment, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            status = process.wait(max(0.0, hard - KILL - time.time()))
            outcome = "well" if status == 0 else f"FAILED: exit status {status}"
        except subprocess.TimeoutExpired:
            end(process)
            outcome = "CUT SHORT: it had not ended in time"
        except Stopped:
            end(process, 3.0)
            raise
        end(process)  # stops processes that the stage left running
    if stage.after and (more := stage.after(call)):
        outcome += f"; {more}"
    return f"{outcome}, {time.time() - begun:.0f} s"


def last_lines(log: Path, count: int = 6) -> list[str]:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return [f"    {line[:200]}" for line in lines[-count:]]


def cut(data: bytes, most: int) -> bytes:
    """Return the beginning and the end of a log, which hold the command and the summary."""
    if len(data) <= most:
        return data
    return data[: most // 4] + b"\n... cut ...\n" + data[-(most * 3 // 4) :]


def pack(work: Path, archive: Path, most: int = MOST) -> list[str]:
    """Pack ``work`` into ``archive``, with logs cut until it is small enough, and return the files left out.

    The archive is complete at every moment: a finished new one replaces the old one.
    """
    order = {".txt": 0, ".jsonl": 1, ".json": 2, ".md": 3, ".csv": 4, ".log": 5}
    files = [p for p in work.rglob("*") if p.is_file()]
    files.sort(key=lambda p: (order.get(p.suffix, 6), p.stat().st_size))
    archive.parent.mkdir(parents=True, exist_ok=True)
    fresh = archive.with_name(archive.name + ".new")
    left_out: list[str] = []
    for limit in (LOG, LOG // 8, LOG // 64):
        with tarfile.open(fresh, "w:xz", preset=1) as tar:
            for path in files:
                if path in (archive, fresh):
                    continue
                data = path.read_bytes()
                data = cut(data, limit) if path.suffix in (".log", ".csv") else data
                entry = tarfile.TarInfo(f"{work.name}/{path.relative_to(work)}")
                entry.size, entry.mtime = len(data), int(path.stat().st_mtime)
                tar.addfile(entry, io.BytesIO(data))
        if fresh.stat().st_size <= most:
            break
        left_out = [str(files.pop().relative_to(work))] if files else []  # the largest of the least important kind
    else:
        left_out.append("and it is still too large")
    fresh.replace(archive)
    return left_out


def summary(call: Call, outcomes: Sequence[tuple[str, str]], how: str) -> str:
    lines = [f"call {call.number}{' (dry run)' if call.dry else ''}: {how}", ""]
    for name, outcome in outcomes:
        lines += [f"{name}: {outcome}", *last_lines(call.work / f"{name}.log"), ""]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", type=int, choices=sorted(CALLS), default=1)
    parser.add_argument("--seconds", type=float, help=f"seconds of the whole call ({SECONDS:g}; 1,800 for a dry run)")
    parser.add_argument("--archive", type=Path, help="archive to write (build/gpu<call>.tar.xz)")
    parser.add_argument("--work", type=Path, help="folder that stages write to (build/gpu<call>)")
    parser.add_argument("--before", type=Path, nargs="*", default=[], help="archives of earlier calls")
    parser.add_argument("--only", nargs="*", default=[], metavar="STAGE", help="run these stages alone")
    parser.add_argument(
        "--dry", action="store_true", help="run on the CPU, small, with stand-ins for tools that need a GPU"
    )
    args = parser.parse_args(argv)
    stages = CALLS[args.call]
    if unknown := set(args.only) - {stage.name for stage in stages}:
        parser.error(f"call {args.call} has no stage {', '.join(sorted(unknown))}: {' '.join(s.name for s in stages)}")
    if args.only:
        stages = tuple(stage for stage in stages if stage.name in args.only)
    until = time.time() + (args.seconds or (1800.0 if args.dry else SECONDS)) - PACKING
    name = f"gpu{args.call}{'-dry' if args.dry else ''}"
    work = (args.work or ROOT / "build" / name).resolve()
    archive = (args.archive or ROOT / "build" / f"{name}.tar.xz").resolve()
    work.mkdir(parents=True, exist_ok=True)
    call = Call(args.call, work, args.dry, [path.resolve() for path in args.before])
    if missing := call.why_not():
        print(f"make gpu: {missing}", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    outcomes: list[tuple[str, str]] = []
    how, status = "all stages were run", 0
    try:
        for k, stage in enumerate(stages):
            outcome = run(call, stage, until, call.patience * sum(later.seconds for later in stages[k + 1 :]))
            outcomes.append((stage.name, outcome))
            print(f"== {stage.name}: {outcome}", *last_lines(work / f"{stage.name}.log"), sep="\n", flush=True)
            (work / "summary.txt").write_text(summary(call, outcomes, "cut off here"))
            pack(work, archive)
    except Stopped as why:
        how, status = f"stopped by {why}", 143
    except Exception as why:  # the results so far are packed whatever the error
        how, status = f"broke off: {type(why).__name__}: {why}", 1
    finally:
        (work / "summary.txt").write_text(summary(call, outcomes, how))
        left_out = pack(work, archive)
    bad = [stage for stage, outcome in outcomes if not outcome.startswith("well")]
    print(f"== {how}; not well: {' '.join(bad) or 'none'}; {archive} has {archive.stat().st_size:,} bytes")
    if left_out:
        print(f"== left out of it: {', '.join(left_out)}")
    return status or bool(bad)


if __name__ == "__main__":
    sys.exit(main())
