"""A recorder of Triton's launches, and their compilation for a device that is absent."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tests.support.processes import ROOT
from tests.support.triton_device import BF16, DOUBLE, FLOAT, HALF

Launches = list[tuple[Any, tuple[Any, ...], dict[str, Any]]]  # kernel, arguments and keywords of each


def check_no_spills(module: str, least: int) -> None:
    """Run a test module as a script that compiles kernels, and check its output.

    It must print at least ``least`` lines, and spill no register.
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) >= least
    for line in lines:
        assert re.search(r"stack 0 local 0$", line), f"spills registers: {line}"


class Recorder:
    """A stand-in for a kernel that keeps the arguments of its launches."""

    def __init__(self, kernel: Any, launches: Launches) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def record(module: Any, names: Iterable[str], launches: Launches) -> None:
    """Replace kernels of a module by recorders that add to ``launches``."""
    for name in names:
        setattr(module, name, Recorder(getattr(module, name), launches))


def source(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the source that Triton's own launcher would compile for these arguments."""
    from triton.compiler import ASTSource

    names = {HALF: "fp16", BF16: "bf16", FLOAT: "fp32", DOUBLE: "fp64", torch.int64: "i64"}
    names.update({torch.uint8: "u8", torch.bool: "i1"})
    constants: dict[tuple[int, ...], Any] = {}
    hints: dict[tuple[int, ...], Any] = {}

    def describe(value: Any, path: tuple[int, ...], plain: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(describe(v, (*path, i), plain) for i, v in enumerate(value))
        if value is None or (isinstance(value, int) and value == 1 and not plain):
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp64"
        if isinstance(value, Tensor) or (value % 16 == 0 and not plain):
            hints[path] = [["tt.divisibility", 16]]
        return f"*{names[value.dtype]}" if isinstance(value, Tensor) else "i32"

    given = enumerate(zip(kernel.params, args, strict=False))
    signature = {p.name: describe(v, (i,), p.do_not_specialize) for i, (p, v) in given}
    for i, parameter in enumerate(kernel.params[len(args) :], len(args)):
        signature[parameter.name] = "constexpr"
        constants[(i,)] = kwargs[parameter.name]
    return ASTSource(kernel, signature, constants, hints)


def compile_all(launches: Launches, shown: tuple[str, ...]) -> None:
    """Print each distinct launch's registers, local memory and ``shown`` arguments."""
    import triton
    from triton.backends.compiler import GPUTarget

    seen = set()
    for kernel, args, kwargs in launches:
        options = {name: kwargs[name] for name in ("num_warps", "enable_fp_fusion")}
        asked = source(kernel, args, kwargs)
        if asked.hash() in seen:
            continue
        seen.add(asked.hash())
        built = triton.compile(asked, target=GPUTarget("cuda", 90, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True).stdout
        used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        shape = " ".join(f"{n}={kwargs[n]}" for n in shown if n in kwargs)
        print(f"{kernel.__name__} {shape}: {used['REG']} registers, stack {used['STACK']} local {used['LOCAL']}")
