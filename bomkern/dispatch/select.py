"""Which implementation serves a call, and why not another."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import reference
from ..common.checks import check_goals, check_latents, check_matrices, check_rows, check_views
from ..common.decorators import constant
from ..common.torch_internals import under_transform
from . import double_backward as double_backward  # registers what second derivatives need
from . import schemas
from .routing import gated
from .transforms import loop_under_vmap, refuse_under_vmap, refuse_vmap_of_record, through

IMPLS = ("cpu", "cuda", "triton", "reference")  # best first
Single = Literal["total_correlation", "gaussian_kl", "consistency_variance", "covariance_penalty"]  # of one result
Several = Literal["min_goal", "active_units", "latent_statistics"]


# pip keeps the wheel that it built from an archive, and would take it again whatever compiler and torch are there now.
AGAIN = "reinstall bomkern: pip install --force-reinstall --no-deps --no-cache-dir"


def _why_not_compiled() -> str:
    """The sentence that setup.py left beside the Python files."""
    try:
        return Path(__file__).parents[1].joinpath("_not_compiled.txt").read_text().strip()
    except OSError:
        return "install a C++ compiler."


def _load() -> tuple[ModuleType | None, str]:
    """The compiled extension, or None and why."""
    try:
        module = importlib.import_module("bomkern._C")
    except ModuleNotFoundError:
        return None, f"bomkern was installed without its compiled kernels: {_why_not_compiled()} Then {AGAIN}"
    except ImportError as error:
        return None, f"the compiled kernels do not load ({error}); {AGAIN}"
    built, here = module.build()["torch"].split("+")[0], torch.__version__.split("+")[0]
    if built.split(".")[:2] != here.split(".")[:2]:
        return None, f"bomkern was built for torch {built}, this is {here}; {AGAIN}"
    return module, ""


extension, missing = _load()
for _name in schemas.OPS:
    (refuse_under_vmap if _name == "goal_set_keep" else loop_under_vmap)(_name, schemas._library)
schemas._library.impl("goal_set_keep", reference.goal_set_keep, "CompositeExplicitAutograd")  # where none is compiled


def _has_kernel(op: str, key: str) -> bool:
    try:
        for name in schemas.OPS:
            if name.split(".")[0].removesuffix("_backward").removesuffix("_keep") == op:
                torch.library.get_kernel(f"bomkern::{name}", key)
    except RuntimeError:
        return False
    return True


def why_not(op: str, impl: str, device: str) -> str | None:
    """None where ``impl`` can serve ``op`` on this type of device, else the reason in one sentence."""
    if impl == "reference":
        return None
    if impl == "triton":
        from . import triton

        return triton.why_not(device) if hasattr(triton, op) else f"{op} has no Triton kernel"
    if device != impl:
        return f"the input is on {device}; move it to {impl}"
    if extension is None:
        return missing
    if not _has_kernel(op, impl.upper()):
        return extension.build()["no_cuda_because"] if impl == "cuda" else f"{op} has no {impl} kernel"
    return None


def _min_goal() -> Callable[..., Any]:
    plain, with_stats = torch.ops.bomkern.min_goal.default, torch.ops.bomkern.min_goal.stats

    def serve(goals: Any, params: Any, curves: Any, reduction: int, stats: bool, route: int = 0) -> Any:
        try:
            return (with_stats if stats else plain)(goals, params, curves, reduction, route)
        except RuntimeError:
            check_goals(goals)  # what the dispatcher turned away before our own checks saw it, by name
            raise

    return serve


def _routed_min_goal(serve: Callable[..., Any]) -> Callable[..., Any]:
    def routed(goals: Any, params: Any, curves: Any, reduction: int, stats: bool, route: int = 0) -> Any:
        if not route:
            return serve(goals, params, curves, reduction, stats)
        out = gated(lambda given: serve(given, params, curves, reduction, True), goals, route, range(len(goals)), -3)
        return out if stats else out[:1]

    return routed


def _routed_goal_set(serve: Callable[..., Any]) -> Callable[..., Any]:
    def routed(goals: Any, params: Any, curves: Any, groups: Any, *arguments: Any, route: int = 0) -> Any:
        if not route:
            return serve(goals, params, curves, groups, *arguments)
        return gated(lambda given: serve(given, params, curves, groups, *arguments), goals, route, groups, 2)

    return routed


# Around an implementation in Python of an op whose branches can be left out; the compiled ones do it themselves.
_ROUTED = {"min_goal": _routed_min_goal, "goal_set": _routed_goal_set}


def _compiled(op: str, check: Callable[..., Any], results: int | slice = slice(None)) -> Callable[..., Any]:
    """The compiled op: of what it returns, ``results``. ``check`` names what the dispatcher turned away unnamed."""
    call = getattr(torch.ops.bomkern, op).default

    def serve(*arguments: Any, **options: Any) -> Any:
        try:
            returned = call(*arguments, **options)
        except RuntimeError:
            check(*arguments)
            raise
        return returned[results] if isinstance(returned, tuple) else returned

    return serve


# How each op's compiled implementation is called with the reference's arguments.
_COMPILED: dict[str, Callable[[], Callable[..., Any]]] = {
    "min_goal": _min_goal,
    "goal_set": lambda: _compiled("goal_set", lambda goals, *_: check_goals(goals), slice(3)),
    "total_correlation": lambda: _compiled(
        "total_correlation",
        lambda z, mu, logvar, size, stratified, first=None: check_rows(z, mu, logvar, first),
        0,
    ),
    "gaussian_kl": lambda: _compiled("gaussian_kl", lambda mu, logvar, *_: check_matrices(mu=mu, logvar=logvar)),
    "consistency_variance": lambda: _compiled("consistency_variance", check_views),
    "active_units": lambda: _compiled("active_units", lambda mu, *_: check_matrices(2, mu=mu), slice(2)),
    "latent_statistics": lambda: _compiled(
        "latent_statistics", lambda z, mu, logvar, *_: check_latents(z, mu, logvar, least=2), slice(9)
    ),
    "covariance_penalty": lambda: _compiled("covariance_penalty", lambda z, *_: check_matrices(2, z=z), 0),
}
OPS = tuple(_COMPILED)


def _server(op: str, impl: str) -> Callable[..., Any]:
    if impl not in ("reference", "triton"):
        return _COMPILED[op]()
    if impl == "triton":
        from . import triton

        serve = getattr(triton, op)
    else:
        serve = getattr(reference, op)
    return _ROUTED[op](serve) if op in _ROUTED else serve


_chosen: dict[tuple[str, str, str | None], str] = {}
_servers: dict[str, Callable[..., Any]] = {}


@constant
def choose(op: str, device: str, impl: str | None) -> str:
    """What serves ``op`` on this type of device: the best, or the one ``impl`` names; a key of `_servers`.

    Raises:
        ValueError: there is no such implementation.
        RuntimeError: it cannot serve here; the message says why.
    """
    key = _chosen.get((op, device, impl))
    if key is not None:
        return key
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, or None, got {impl!r}")
    if impl is None:
        best = next(name for name in IMPLS if why_not(op, name, device) is None)
    elif reason := why_not(op, impl, device):
        raise RuntimeError(f"impl={impl!r} cannot serve {op} here: {reason}")
    else:
        best = impl
    key = _chosen[op, device, impl] = f"{op} {best}"
    if key not in _servers:
        # All at once: a graph that is being traced sees the table as it was when it first looked something up.
        all_of_it = [(one, name) for one in OPS for name in IMPLS if why_not(one, name, device) is None]
        _servers.update({f"{one} {name}": _server(one, name) for one, name in all_of_it})
    return key


_keeps: dict[tuple[str, str | None], bool] = {}


@constant
def _compiled_keeps(device: str, impl: str | None) -> bool:
    key = device, impl
    if key not in _keeps:
        compiled = device in ("cpu", "cuda") and impl in (None, device)
        _keeps[key] = compiled and why_not("goal_set", device, device) is None
    return _keeps[key]


def keeper(device: str, impl: str | None) -> Callable[..., None]:
    """What keeps the record of a step of goal_set, see `reference.goal_set_keep`."""
    if under_transform() and not torch.compiler.is_compiling():
        refuse_vmap_of_record()
        return torch.ops.bomkern.goal_set_keep.default  # which sees plain tensors
    return torch.ops.bomkern.goal_set_keep.default if _compiled_keeps(device, impl) else reference.goal_set_keep


@overload
def resolve(op: Single, device: str, impl: str | None) -> Callable[..., Tensor]: ...
@overload
def resolve(op: Literal["goal_set"], device: str, impl: str | None) -> Callable[..., tuple[Tensor, Tensor, Tensor]]: ...
@overload
def resolve(op: Several, device: str, impl: str | None) -> Callable[..., tuple[Tensor, ...]]: ...
def resolve(op: str, device: str, impl: str | None) -> Callable[..., Any]:
    """The function that serves; `choose` says which."""
    key = choose(op, device, impl)
    if under_transform() and not key.endswith("reference"):
        if not torch.compiler.is_compiling():
            return partial(through, op, _servers[key], _server(op, "reference"))
        if key.endswith("triton"):
            raise RuntimeError(
                f"impl='triton' cannot serve {op} in a compiled torch.func transform: use impl='reference'"
            )
    return _servers[key]
