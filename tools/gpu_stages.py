"""The stages of each call of tools/gpu.py, the most important first, each with its seconds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAKES = ROOT / "tests" / "support" / "gpu_tools"  # stand-ins for compute-sanitizer and ncu, for a dry run
PYTHON = sys.executable
sys.path.insert(0, str(ROOT))
from bench.cases import OPS  # noqa: E402

# The figures that most is asked of first, should the time run out.
BENCHES = ("total_correlation", *(op for op in OPS if op != "total_correlation"))
FAILED = 200  # tests that the third call runs again at most

Command = list[str]


@dataclass
class Call:
    """One call: its folder, the time its present stage has, and what earlier calls found.

    Attributes:
        environment: of every stage. stop_at: seconds since 1970 after which the present stage begins nothing new.
    """

    number: int
    work: Path
    dry: bool
    before: Sequence[Path] = ()
    stop_at: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        if self.dry:
            self.environment["PATH"] = f"{FAKES}{os.pathsep}{os.environ['PATH']}"
            self.environment["TRITON_INTERPRET"] = "1"
            self.environment["OMP_NUM_THREADS"] = "2"
        else:
            self.environment["BOMKERN_BUILD_CUDA"] = "1"  # nothing less will do

    @property
    def patience(self) -> int:
        """Return the factor on a stage's seconds: two busy cores are slower than a machine with a GPU."""
        return 4 if self.dry else 1

    def why_not(self) -> str | None:
        """Return why no stage can run, or None."""
        if absent := [str(path) for path in self.before if not path.is_file()]:
            return f"no such archive: {', '.join(absent)}"
        if self.dry:
            return None
        ask = "import torch, sys; sys.exit(not torch.cuda.is_available())"
        if subprocess.run([PYTHON, "-c", ask]).returncode:
            return f"{PYTHON} has no torch that can use a GPU; `make gpu DRY=1` needs none"
        return None

    def found_before(self, name: str) -> str:
        """Return the contents of the files of this name in earlier archives, joined."""
        texts = []
        for archive in self.before:
            with tarfile.open(archive) as tar:
                for entry in tar:
                    if entry.isfile() and Path(entry.name).name == name and (file := tar.extractfile(entry)):
                        texts.append(file.read().decode(errors="replace"))
        return "\n".join(texts)

    def tool(self, name: str) -> str | None:
        return str(FAKES / name) if self.dry else shutil.which(name)

    @cached_property
    def spread(self) -> Command:
        """Several processes, where pytest-xdist is."""
        with_xdist = subprocess.run([PYTHON, "-c", "import xdist"], capture_output=True).returncode == 0
        return ["-n", "2" if self.dry else "8", "--dist", "worksteal"] if with_xdist else []

    def pytest(self, *given: str, keep: str = "", most: int | None = None, spread: bool = True) -> Command:
        """Tests that stop in time, and whose failures are in a file as soon as they come."""
        command = [PYTHON, "-m", "pytest", *given, "-p", "no:cacheprovider", "-p", "tests.support.deadline", "-rf"]
        command += ["--tb=short", "--stop-at", f"{self.stop_at:.0f}", "--failures", str(self.work / "failed.txt")]
        command += ["-k", keep] if keep else []
        command += ["--at-most", str(most)] if most else []
        return command + (self.spread if spread else [])

    def pair(self, pair: str) -> str:
        """An implementation and device as the tests name them; those of a GPU have a stand-in in a dry run."""
        return pair if not self.dry else {"cuda-cuda": "cpu-cpu", "triton-cuda": "triton-cpu"}[pair]


@dataclass(frozen=True)
class Stage:
    """``command`` gives what to run, None for nothing, or why it cannot be; ``after`` sees to what it left.

    ``seconds`` are the stage's whatever the others take: those of a call have to fit into it.
    """

    name: str
    seconds: float
    command: Callable[[Call], Command | str | None]
    after: Callable[[Call], str] | None = None
    environment: dict[str, str] = field(default_factory=dict)


def build(call: Call) -> Command:
    install = [PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", "."]
    return [*install, "--quiet", *(["--dry-run"] if call.dry else [])]


def info(call: Call) -> Command:
    return [PYTHON, "-m", "bomkern", "info"]


def quick_tests(pair: str, dry: str = "tests") -> Callable[[Call], Command]:
    """The quick tests of a pair; a dry run takes a few of those in ``dry``."""

    def command(call: Call) -> Command:
        seed = ["--hypothesis-seed=0"]  # one set of examples, the same every time
        where, most = (dry, 4) if call.dry else ("tests", None)
        return call.pytest(where, "-m", "not slow", *seed, keep=call.pair(pair), most=most)

    return command


def sanitized(tool: str) -> Callable[[Call], Command | str]:
    def command(call: Call) -> Command | str:
        path = call.tool("compute-sanitizer")
        if path is None:
            return "there is no compute-sanitizer here"
        told = subprocess.run([path, "--help"], capture_output=True, text=True).stdout
        only_ours = ["--kernel-name", "kns=bomkern"] if "--kernel-name" in told else ["--kernel-regex", "kns=bomkern"]
        files = [f"tests/ops/test_{op}.py" for op in OPS]
        keep = f"{call.pair('cuda-cuda')} and (oracle or layouts) and not 20000"
        tests = call.pytest(*files, keep=keep, most=8 if call.dry else 40, spread=False)
        return [path, "--tool", tool, "--error-exitcode", "1", *only_ours, *tests]

    return command


def profiled(call: Call) -> Command | str:
    ncu = call.tool("ncu")
    if ncu is None:
        return "there is no ncu here"
    ask = [PYTHON, "-m", "bench.kernels"]
    metrics = subprocess.run([*ask, "--metrics"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    flags = ["--profile-from-start", "off", "--clock-control", "none", "--csv", "--metrics", metrics]
    return [ncu, *flags, "--log-file", str(call.work / "ncu.csv"), *ask, *(["--device", "cpu"] if call.dry else [])]


def read_profile(call: Call) -> str:
    made = subprocess.run(
        [PYTHON, "-m", "bench.kernels", "--read", str(call.work / "ncu.csv")], capture_output=True, text=True, cwd=ROOT
    )
    if made.returncode or not json.loads(made.stdout):
        return "no kernel was profiled"
    (call.work / "kernels.json").write_text(made.stdout)
    return f"{len(json.loads(made.stdout))} launches"


def benched(keep: str, *names: str, dry: str, dry_name: str = "") -> Callable[[Call], Command]:
    """Benches by their names; a dry run takes the ``dry`` ones of one file, the first or ``dry_name``."""

    def command(call: Call) -> Command:
        files = [f"bench/ops/bench_{name}.py" for name in ([dry_name or names[0]] if call.dry else names)]
        kept = ["--benchmark-only", "--keep", str(call.work / "bench.jsonl"), *(["--trial"] if call.dry else [])]
        return call.pytest(*files, *kept, keep=f"{keep} and {dry}" if call.dry else keep, spread=False)

    return command


def report(call: Call) -> Command | str:
    made = call.work / "bench.jsonl"
    if not made.exists():
        return "nothing was measured"
    return [PYTHON, "-m", "bench.report", str(made), "--results", str(call.work / "results")]


def replayed(call: Call) -> Command:
    """A dry run has no graphs: it collects the tests, so that their names are right."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "cuda_graph" in path.read_text()]
    tests = call.pytest(*(str(path.relative_to(ROOT)) for path in files), keep="cuda_graph", spread=False)
    return [*tests, "--collect-only"] if call.dry else tests


def trained(*more: str) -> Callable[[Call], Command | None]:
    def command(call: Call) -> Command | None:
        if call.dry and more:
            return None  # the same run again, as a CPU is not asked to compile
        out = call.work.with_name(f"{call.work.name}-run{''.join(more)}")  # its pictures need not come home
        length = (
            ["--steps", "2", "--batch-size", "4", "--structure", "4", "--appearance", "4"]
            if call.dry
            else ["--steps", "200"]
        )
        where = ["--device", "cpu" if call.dry else "cuda", "--out", str(out), "--overwrite", *length]
        return [PYTHON, "-m", "bomkern", "train", *where, *more]

    return command


def routing_table(call: Call) -> Command | None:
    if call.dry:
        return None  # tests/bench/test_route.py runs it dry, on a quarter of the pixels
    return [PYTHON, "-m", "bench.route", "--device", "cuda", "--results", str(call.work / "results")]


def tuned(name: str, what: str, dry: str) -> Callable[[Call], Command]:
    """bench.tune, into a file of that name; a dry run turns the ``dry`` knobs."""

    def command(call: Call) -> Command:
        given = ["--stop-at", f"{call.stop_at:.0f}", "--json", str(call.work / f"{name}.json")]
        how = [dry, "--device", "cpu", "--quick"] if call.dry else [what]
        return [PYTHON, "-m", "bench.tune", *how, *given]

    return command


def again(call: Call) -> Command | None:
    """Run the tests that failed in earlier calls."""
    sys.path.insert(0, str(ROOT))
    from tests.support.deadline import failed_in

    names = failed_in(call.found_before("failed.txt"))
    return call.pytest(*names[:FAILED]) if names else None


# With the kernels that only bench/tune.py launches; the others are the same machine code without them.
TUNABLE = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -DBOMKERN_TUNE".strip()
BUILD = Stage("build", 120, build, environment={"NVCC_APPEND_FLAGS": TUNABLE})
ONE_COMPILED = "forward+backward-torch.compile-B512-D128]"  # of an op that Inductor has soon compiled
OURS_AND_EAGER = "not compile and not KeOps and not TorchJD"
CALLS: dict[int, tuple[Stage, ...]] = {
    1: (
        BUILD,
        Stage("info", 20, info),
        Stage("tests", 95, quick_tests("cuda-cuda")),
        Stage("memcheck", 45, sanitized("memcheck"), environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        Stage("racecheck", 45, sanitized("racecheck"), environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        Stage("ncu", 50, profiled, read_profile),
        Stage("benches", 140, benched(OURS_AND_EAGER, *BENCHES, dry="D16")),
        Stage("report", 20, report),
    ),
    2: (  # what the README calls unmeasured, and the first call leaves so
        BUILD,
        Stage(
            "triton", 70, quick_tests("triton-cuda", dry="tests/ops/test_gaussian_kl.py")
        ),  # the first call collects all
        Stage("compiled_peers", 70, benched("compile", *BENCHES, dry=ONE_COMPILED, dry_name="gaussian_kl")),
        Stage("loss_section", 25, benched("loss_section", "loss_section", dry="B64")),
        Stage("graphs", 45, replayed),
        Stage("train", 25, trained()),
        Stage("train_compiled", 70, trained("--compile")),
        Stage("whole_step", 40, benched("step", "step", dry="B64-plain")),
        Stage("routing_table", 50, routing_table),
        Stage("report", 20, report),
    ),
    3: (
        BUILD,
        Stage("again", 100, again),
        Stage("tune", 125, tuned("tune", "all", dry="gaussian_kl")),
        Stage("benches", 170, benched("not KeOps and not TorchJD", *BENCHES, dry="D16 and eager")),
        Stage("report", 20, report),
    ),
}
