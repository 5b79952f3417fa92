"""Test several processes that train one model: launch, agreement, failures, and resuming with another number."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric")

import torch
import torch.distributed as dist
from torch import nn

from bomkern import History
from bomkern.train import checkpoint, loop, processes, recorder
from bomkern.train.config import Config, TrainError
from tests.support.processes import ROOT
from tests.support.training import SMALL, assert_same, config, leaves

LOG = ["--device", "cpu", "--log-every", "1"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
STARTED: list[subprocess.Popen[str]] = []


def start(out: Path, *arguments: str, change: str = "nothing", several: bool = True) -> subprocess.Popen[str]:
    """Run `tests.support.train_worker` in two processes or in one; its output goes into files beside ``out``."""
    command = [*(TORCHRUN if several else [sys.executable]), "-m", "tests.support.train_worker", change]
    says = [Path(f"{out}.{stream}").open("w") for stream in ("out", "err")]  # noqa: SIM115
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    small = [] if "--resume" in arguments else SMALL  # a resumed run has these settings in its checkpoint
    command += ["--out", str(out), *small, *LOG, *arguments]
    STARTED.append(subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=says[0], stderr=says[1]))
    return STARTED[-1]


def said(out: Path) -> str:
    return Path(f"{out}.err").read_text()


def finish(out: Path, *arguments: str, change: str = "nothing", several: bool = True) -> list[dict[str, float]]:
    """Run the worker to its end, and return its lines of metrics."""
    assert start(out, *arguments, change=change, several=several).wait(timeout=300) == 0, said(out)[-3000:]
    return recorder.read_lines(out / recorder.METRICS)


def until(out: Path, lines: int, run: subprocess.Popen[str]) -> None:
    """Wait until a run has logged ``lines`` lines."""
    deadline = time.monotonic() + 120
    while len(recorder.read_lines(out / recorder.METRICS)) < lines:
        assert run.poll() is None and time.monotonic() < deadline, said(out)[-3000:]
        time.sleep(0.05)


def workers(run: subprocess.Popen[str]) -> list[int]:
    """Return the process ids that a torchrun has started, by rank, or the process itself without torchrun."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            rank = re.search(r"(?:^|\0)RANK=(\d+)", (path / "environ").read_text())
        except OSError:
            continue
        if parent == run.pid and rank:
            found[int(rank[1])] = int(path.name)
    return [found[rank] for rank in sorted(found)] or [run.pid]


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    yield
    for run in STARTED:
        for process in workers(run) if run.poll() is None else ():
            os.kill(process, signal.SIGKILL)
        run.kill()
        run.wait()
    STARTED.clear()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set the variables that torchrun sets for the only process of a run."""
    for name, value in zip(processes.GIVEN, ("0", "1", "0", "localhost", "29400"), strict=True):
        monkeypatch.setenv(name, value)
    yield


@pytest.fixture
def group() -> Iterator[None]:
    """Start a process group with one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Arguments.


@pytest.mark.usefixtures("plain", "alone")
def test_torchrun_with_one_process_is_a_plain_run(tmp_path: Path) -> None:
    summary = loop.train(config(tmp_path, steps=2, strategy="fsdp"))
    assert summary["steps"] == 2 and summary["ranks"] == 1 and not dist.is_initialized()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 3}, "--devices 3: torchrun started 2 here; leave --devices out"),
        ({"device": "cuda:1"}, "--device cuda:1 is one GPU for 2 processes: say --device cuda"),
        ({"strategy": "dp"}, "--strategy must be one of auto, ddp, fsdp, got dp"),
    ],
)
@pytest.mark.usefixtures("alone")
def test_contradictions_with_torchrun(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainError, match=re.escape(message)):
        processes.launch(config(Path("unused"), **changes))


def test_one_gpu_is_not_two() -> None:
    with pytest.raises(TrainError, match="--device cuda:1 is one GPU for 2 processes"):
        processes.launch(config(Path("unused"), device="cuda:1", devices=2))


@pytest.mark.slow
def test_what_cannot_start_is_said_once(tmp_path: Path) -> None:
    for arguments, message in (
        (["--devices", "3"], "--devices 3: torchrun started 2 here; leave --devices out"),
        (["--data", str(tmp_path / "none")], "no such folder"),
    ):
        assert start(tmp_path / "run", *arguments).wait(timeout=120) != 0
        errors = re.findall("bomkern train: error: .*", said(tmp_path / "run"))
        assert len(errors) == 1 and message in errors[0], errors


# Runs of several processes.


def test_the_command_of_the_docs(tmp_path: Path) -> None:
    command = re.search(r"^torchrun (.*)$", (ROOT / "docs" / "trainer.md").read_text(), re.MULTILINE)
    assert command
    arguments = shlex.split(command[1], comments=True)
    run = [sys.executable, "-m", "torch.distributed.run", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("held-out PSNR") == done.stdout.count("learnt: ") == 1
    out = tmp_path / arguments[arguments.index("--out") + 1]
    summary = json.loads((out / recorder.SUMMARY).read_text())
    assert summary["ranks"] == 2 and summary["rejected_steps"] == 0
    steps = int(arguments[arguments.index("--steps") + 1])
    assert [line["step"] for line in recorder.read_lines(out / recorder.METRICS)] == list(range(10, steps + 1, 10))
    # the run saved once, so it has no previous checkpoint
    own = {*recorder.OWN} - {recorder.PAYOFF, checkpoint.before(Path(recorder.CHECKPOINT)).name}
    assert own <= {path.name for path in out.iterdir()}
    assert "Warning" not in done.stderr and "deprecated" not in done.stderr


@pytest.fixture
def in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make one process swap and permute each half of its samples, as two processes do with their own samples."""
    roll, argsort = torch.Tensor.roll, torch.Tensor.argsort

    def roll_halves(x: torch.Tensor, shift: int, dim: int) -> torch.Tensor:
        return torch.cat([roll(half, shift, dim) for half in x.chunk(2)]) if shift == -1 else roll(x, shift, dim)

    def argsort_halves(x: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat([argsort(half, dim) + i * len(half) for i, half in enumerate(x.chunk(2))])

    monkeypatch.setattr(torch.Tensor, "roll", roll_halves)
    monkeypatch.setattr(torch.Tensor, "argsort", argsort_halves)


@pytest.mark.slow
@pytest.mark.usefixtures("plain", "in_halves")
def test_any_strategy_and_number_of_processes_computes_the_same(tmp_path: Path) -> None:
    """One process with eight samples and two with four compute the same, and resume each other's checkpoints.

    A budget would draw other rows on each rank; that FSDP2 trains with one too is shown at the end.
    """
    states, losses = {}, {}
    for chain in ("single", "auto", "fsdp", "fsdp ddp single", "single fsdp"):
        out, parts = tmp_path / chain, chain.split()
        for i, strategy in enumerate(parts, 1):
            steps, again = 6 * i // len(parts), i > 1
            if strategy == "single":
                size = {"structure": 4, "appearance": 4, "width": 32, "batch_size": 8, "budget": 0.0}
                run = config(out, steps=steps, log_every=1, resume=again, **size)
                loop.train(run, {"steps", "resume", "devices", "strategy"})
            else:
                finish(out, "--strategy", strategy, "--steps", str(steps), "--budget", "0", *["--resume"] * again)
        lines = recorder.read_lines(out / recorder.METRICS)
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        losses[chain] = [line["loss"] for line in lines]
        state = checkpoint.load(out / recorder.CHECKPOINT)
        assert state["total"] == 8
        states[chain] = leaves({name: state[name] for name in ("average", "discriminator", "optimizers")})
    for chain, state in states.items():
        assert losses[chain] == pytest.approx(losses["single"], rel=1e-4), chain
        assert state.keys() == states["single"].keys()
        for name, value in states["single"].items():
            torch.testing.assert_close(state[name], value, rtol=1e-2, atol=1e-4, msg=chain + name)
    finish(tmp_path / "budget", "--strategy", "fsdp", "--steps", "2", "--log-every", "1")
    assert all(line["walked"] < 1 for line in recorder.read_lines(tmp_path / "budget" / recorder.METRICS))


@pytest.mark.slow
def test_who_is_at_fault_is_agreed_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert start(out, "--steps", "100", change="bad").wait(timeout=120) != 0
    errors = re.findall("bomkern train: error: .*", said(out))
    assert len(errors) == 1 and "consistency is not finite" in errors[0] and "50 steps in a row" in errors[0]


# Killed processes.


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_killed_run_goes_on_in_another_number_of_processes(tmp_path: Path, before: int, after: int) -> None:
    out = tmp_path / "run"
    batch = ["--batch-size", str(8 // before)]
    run = start(out, "--steps", "100000", "--checkpoint-every", "3", *batch, several=before == 2)
    until(out, 8, run)
    killed = workers(run)
    assert len(killed) == before
    for process in killed:
        os.kill(process, signal.SIGKILL)
    assert run.wait(timeout=120) != 0
    reached = checkpoint.load(out / recorder.CHECKPOINT)["step"]
    assert reached >= 6
    devices = ["--devices", "1"] if after == 1 else []
    lines = finish(out, "--resume", "--steps", str(reached + 5), *devices, several=after == 2)
    assert [line["step"] for line in lines] == [*range(1, reached + 6)]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert len(History.load(out / recorder.HISTORY)) == reached + 5
    summary = json.loads((out / recorder.SUMMARY).read_text())
    assert summary["ranks"] == after and summary["samples_per_step"] == 8


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "silent"])
def test_one_process_that_is_lost_stops_the_others(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"
    run = start(out, "--steps", "100000", change="impatient")
    until(out, 3, run)
    lost = workers(run)[1]
    os.kill(lost, number)
    deadline = time.monotonic() + 120  # includes the 20 s timeout of a silent process
    while number == signal.SIGSTOP and "rank 0 stops: another process is gone" not in said(out):
        assert time.monotonic() < deadline, said(out)[-3000:]
        time.sleep(0.1)
    if number == signal.SIGSTOP:
        os.kill(lost, signal.SIGKILL)  # torchrun would kill it half a minute later
    assert run.wait(timeout=60) != 0
    assert "bomkern train: error: " in said(out) or number == signal.SIGKILL  # torchrun may stop the process first
    assert "RuntimeError" not in said(out)


@pytest.mark.slow
def test_a_signal_to_torchrun_leaves_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = start(out, "--steps", "100000")
    until(out, 2, run)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) != 0
    assert said(out).count("by SIGTERM; go on with: bomkern train") == 1
    assert checkpoint.load(out / recorder.CHECKPOINT)["step"] >= 2


# Saved and merged state.


def test_how_many_samples_a_step_takes_is_kept() -> None:
    assert loop.total_steps(Config(epochs=2.5), 100, 16) == 16 and loop.total_steps(Config(steps=7), 100, 16) == 7
    assert [loop.shared(24, n) for n in (1, 2, 3, 4, 6)] == [24] * 5
    for n in (5, 8):
        with pytest.raises(TrainError, match=rf"24 samples a step, which {n} .* go on in 1, 2, 3, 4 or 6$"):
            loop.shared(24, n)
    with pytest.raises(TrainError, match=r"go on in 1$"):
        loop.shared(5, 5)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.usefixtures("group")
def test_what_is_sharded_is_saved_whole_and_loaded_in_parts() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))

    def make(seed: int, sharded: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        net: nn.Module = nn.Sequential(nn.Conv2d(3, 5, 2), nn.Flatten(), nn.Linear(5, 1))
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if sharded:
            processes._shard(net, mesh)
        return net, torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        net(torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    plain, sharded, again = make(0, False), make(1, True), make(2, False)
    step(*plain)
    processes.load_module(sharded[0], plain[0].state_dict())
    processes.load_optimizer(sharded[1], copy.deepcopy(plain[1].state_dict()))  # torch would share the state's tensors
    assert all(isinstance(p, DTensor) for p in sharded[0].parameters())
    state = [processes.whole(part.state_dict()) for part in sharded]
    assert_same(leaves(state), leaves([part.state_dict() for part in plain]))
    processes.load_module(again[0], state[0])
    processes.load_optimizer(again[1], copy.deepcopy(state[1]))
    for pair in (plain, sharded, again):
        step(*pair)
    for other in (sharded, again):
        after = leaves([processes.whole(part.state_dict()) for part in other])
        for name, value in leaves([part.state_dict() for part in plain]).items():
            torch.testing.assert_close(after[name], value, msg=name)
    shards_left = processes.local(next(iter(sharded[0].parameters())))
    assert not isinstance(shards_left, DTensor) and processes.local(state[0]["0.weight"]) is state[0]["0.weight"]


def test_what_fails_on_one_rank_is_raised() -> None:
    def full() -> None:
        raise OSError("no space left")

    with pytest.raises(TrainError, match="no space left"):
        processes.together(full)
    assert processes.together(lambda: 3) == 3
    with pytest.raises(RuntimeError, match="gloo"), processes.watch():  # a single process has no process to watch
        raise RuntimeError("gloo")
