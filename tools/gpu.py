"""On a machine with a GPU: build for it, test, sanitize, profile and measure, in three calls, and pack what was found.

    make gpu                                        # the first call
    make gpu CALL=2 BEFORE=call1.tar.xz             # the second, which knows what the first found
    make gpu CALL=3 BEFORE="call1.tar.xz call2.tar.xz"
    make gpu CALL=1 DRY=1                           # every stage on a CPU, small, with stand-ins for the tools

Each call takes SECONDS (560) at most on a bare machine, with the python3 that has torch, and fetches nothing. A stage
has its seconds whatever those before it took, and beside them what those did not need. It knows when it has to stop:
tests and benches begin nothing new after that, and write what they have. After every stage, and last of all however the
call ends, ARCHIVE (build/gpu<call>.tar.xz) is written anew, at most 12 MB: logs, failures, what was measured and
profiled, and ``summary.txt``, which is to be read first.
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

SECONDS = 560.0  # of a call
START = 12.0  # seconds until the first stage, and between stages
MOST = 12_000_000  # bytes of the archive
LOG = 400_000  # bytes of a log that are packed at first: the beginning and the end
GRACE = 12.0  # seconds between the time at which a stage begins nothing new and its end
KILL = 6.0  # seconds that it has to write what it has after SIGTERM
PACKING = 12.0  # seconds kept for the archive
SHORT = 15.0  # of a stage: it is not begun with less


class Stopped(BaseException):
    """SIGTERM or SIGINT came."""


def _stop(number: int, frame: FrameType | None) -> None:
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    raise Stopped(signal.Signals(number).name)


def end(process: subprocess.Popen[bytes], patience: float = KILL) -> None:
    """Stop a process and all that it started: with SIGTERM, which lets it write what it has, then with SIGKILL."""
    for number, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
            process.wait(wait)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def run(call: Call, stage: Stage, until: float, kept: float = 0.0) -> str:
    """What became of a stage, in a line. Its output is in the folder of the call.

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
            told = "well" if status == 0 else f"FAILED: exit status {status}"
        except subprocess.TimeoutExpired:
            end(process)
            told = "CUT SHORT: it had not ended in time"
        except Stopped:
            end(process, 3.0)
            raise
        end(process)  # what it left running
    if stage.after and (more := stage.after(call)):
        told += f"; {more}"
    return f"{told}, {time.time() - begun:.0f} s"


def last_lines(log: Path, count: int = 6) -> list[str]:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return [f"    {line[:200]}" for line in lines[-count:]]


def cut(data: bytes, most: int) -> bytes:
    """The beginning and the end of a log, which have the command and the summary."""
    if len(data) <= most:
        return data
    return data[: most // 4] + b"\n... cut ...\n" + data[-(most * 3 // 4) :]


def pack(work: Path, archive: Path, most: int = MOST) -> list[str]:
    """Write everything in ``work`` into ``archive``; logs are cut until it is small enough. Returns what was left out.

    The archive is whole at every moment: a new one takes the place of the old one when it is written.
    """
    rank = {".txt": 0, ".jsonl": 1, ".json": 2, ".md": 3, ".csv": 4, ".log": 5}
    files = sorted((p for p in work.rglob("*") if p.is_file()), key=lambda p: (rank.get(p.suffix, 6), p.stat().st_size))
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
        left_out = [str(files.pop().relative_to(work))] if files else []  # the largest of the least needed
    else:
        left_out.append("and it is still too large")
    fresh.replace(archive)
    return left_out


def summary(call: Call, told: Sequence[tuple[str, str]], how: str) -> str:
    lines = [f"call {call.number}{' (dry run)' if call.dry else ''}: {how}", ""]
    for name, what in told:
        lines += [f"{name}: {what}", *last_lines(call.work / f"{name}.log"), ""]
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", type=int, choices=sorted(CALLS), default=1)
    parser.add_argument("--seconds", type=float, help=f"of the whole call ({SECONDS:g}; a dry run's 1,800)")
    parser.add_argument("--archive", type=Path, help="what is packed (build/gpu<call>.tar.xz)")
    parser.add_argument("--work", type=Path, help="where stages write (build/gpu<call>)")
    parser.add_argument("--before", type=Path, nargs="*", default=[], help="archives of the calls before")
    parser.add_argument("--only", nargs="*", default=[], metavar="STAGE", help="these stages alone")
    parser.add_argument("--dry", action="store_true", help="on the CPU, small, with stand-ins for what needs a GPU")
    asked = parser.parse_args(given)
    stages = CALLS[asked.call]
    if unknown := set(asked.only) - {stage.name for stage in stages}:
        parser.error(f"call {asked.call} has no stage {', '.join(sorted(unknown))}: {' '.join(s.name for s in stages)}")
    if asked.only:
        stages = tuple(stage for stage in stages if stage.name in asked.only)
    until = time.time() + (asked.seconds or (1800.0 if asked.dry else SECONDS)) - PACKING
    name = f"gpu{asked.call}{'-dry' if asked.dry else ''}"
    work = (asked.work or ROOT / "build" / name).resolve()
    archive = (asked.archive or ROOT / "build" / f"{name}.tar.xz").resolve()
    work.mkdir(parents=True, exist_ok=True)
    call = Call(asked.call, work, asked.dry, [path.resolve() for path in asked.before])
    if missing := call.why_not():
        print(f"make gpu: {missing}", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    told: list[tuple[str, str]] = []
    how, status = "all stages were gone through", 0
    try:
        for k, stage in enumerate(stages):
            what = run(call, stage, until, call.patience * sum(later.seconds for later in stages[k + 1 :]))
            told.append((stage.name, what))
            print(f"== {stage.name}: {what}", *last_lines(work / f"{stage.name}.log"), sep="\n", flush=True)
            (work / "summary.txt").write_text(summary(call, told, "cut off here"))
            pack(work, archive)
    except Stopped as why:
        how, status = f"stopped by {why}", 143
    except Exception as why:  # whatever it is, what was found comes home
        how, status = f"broke off: {type(why).__name__}: {why}", 1
    finally:
        (work / "summary.txt").write_text(summary(call, told, how))
        left_out = pack(work, archive)
    bad = [stage for stage, what in told if not what.startswith("well")]
    print(f"== {how}; not well: {' '.join(bad) or 'none'}; {archive} has {archive.stat().st_size:,} bytes")
    if left_out:
        print(f"== left out of it: {', '.join(left_out)}")
    return status or bool(bad)


if __name__ == "__main__":
    sys.exit(main())
