"""All private names of torch that bomkern uses. For a new torch read this package, and csrc/torch_internals.h for C++.

A name is private if it has a leading underscore, or if torch calls it internal or experimental. No file of bomkern/ or
kernels/ outside this package uses such a name (tests/dispatch/test_torch_internals.py). `registry.NEEDED` lists them
all, and `missing` returns those that the installed torch lacks. A missing name never stops the import. A feature that
needs it takes another path or, if there is none, raises `NotImplementedError`.

This package imports torch alone, so that tools/next_torch.py can run it before bomkern is built.
"""

from .modules import FullPrecisionBuffers, buffers_of, children_of
from .optimizers import (
    SteppedByScaler,
    already_unscaled,
    flag_non_finite,
    forget_scaler,
    from_scaler,
    innermost,
    inside_scaler,
    step_unless,
    takes_found_inf,
)
from .processors import cpu_has_amx_fp16
from .registry import Internal, describe, missing
from .tensors import pack_hook, sparse_values, tree_flatten, tree_unflatten, write_count
from .tracing import (
    TorchDispatchMode,
    dispatch_modes,
    inside_dispatch_mode,
    is_legacy_batched,
    mark_constant,
    mark_rows_dynamic,
    mark_static_address,
    outside_modes,
    traced_by_python,
    under_transform,
    under_vmap,
)

__all__ = [
    "FullPrecisionBuffers",
    "Internal",
    "SteppedByScaler",
    "TorchDispatchMode",
    "already_unscaled",
    "buffers_of",
    "children_of",
    "cpu_has_amx_fp16",
    "describe",
    "dispatch_modes",
    "flag_non_finite",
    "forget_scaler",
    "from_scaler",
    "innermost",
    "inside_dispatch_mode",
    "inside_scaler",
    "is_legacy_batched",
    "mark_constant",
    "mark_rows_dynamic",
    "mark_static_address",
    "missing",
    "outside_modes",
    "pack_hook",
    "sparse_values",
    "step_unless",
    "takes_found_inf",
    "traced_by_python",
    "tree_flatten",
    "tree_unflatten",
    "under_transform",
    "under_vmap",
    "write_count",
]
