"""`info`: describe the build, and the implementations that can serve each op on each device."""

from __future__ import annotations

import platform
import warnings
from typing import Any

import torch

from .._version import __version__
from ..common import torch_internals
from .extension import extension, missing
from .schemas import OPS
from .select import IMPLS, why_not


class Info(dict[str, Any]):
    """The result of `bomkern.info`: a dict that prints as a table."""

    def __str__(self) -> str:
        build = self["build"]
        lines = [f"bomkern {self['version']}, torch {self['torch']}, Python {self['python']}"]
        if build:
            lines.append(f"built with {build['compiler']} for torch {build['torch']}")
            alone = build["no_openmp_because"]
            threads = f"one thread: {alone}" if alone else f"{self['threads']} threads"
            lines.append(f"CPU: {build['simd']}; this CPU runs {build['simd_here']}, on {threads}")
            cuda = f"CUDA {build['cuda']} for {build['cuda_architectures']}" if build["cuda"] else "no CUDA kernels"
            remark = build["no_cuda_because"] or build["cuda_remark"]
            lines.append(cuda + (f": {remark}" if remark else ""))
        else:
            lines.append(f"not compiled: {self['not_compiled_because']}")
        lines.extend(self["torch_lacks"])
        for op, devices in self["ops"].items():
            for device, impls in devices.items():
                best = next(name for name, reason in impls.items() if reason is None)
                lines.append(f"{op} on {device}: {best}")
                lines.extend(f"    {name:<10} {reason or 'ready'}" for name, reason in impls.items())
        return "\n".join(lines)


def info() -> Info:
    """Describe the build, and which implementations can serve each op on each device; ``print`` shows it as a table.

    Returns:
        A dict: ``version``, ``torch``, ``python``, ``threads``, ``build`` (compiler, torch, cuda, cuda_architectures,
        cuda_remark, no_cuda_because, no_openmp_because, simd, simd_here; empty if not compiled),
        ``not_compiled_because``, ``torch_lacks`` (a line for each private name that bomkern needs and this torch lacks,
        with its users and the effect of its absence), and ``ops``: op -> device -> impl -> None if it can serve, else
        the reason. Implementations are listed best first.
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return Info(
        version=__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        threads=torch.get_num_threads(),
        build=extension.build() if extension else {},
        not_compiled_because=missing,
        torch_lacks=torch_internals.describe(torch_internals.missing()),
        ops={op: {d: {name: why_not(op, name, d) for name in IMPLS} for d in devices} for op in OPS},
    )


def warn_if_not_compiled() -> None:
    """Warn that the reference serves every op if the compiled extension is missing."""
    if extension is None:
        warnings.warn(f"{missing}. Until then the slow reference serves every op.", RuntimeWarning, stacklevel=3)
