"""Differentiable collectives over the processes that share a batch.

Each rank's part receives the gradient of the sum of all ranks' losses. DistributedDataParallel then averages over the
ranks, which gives the gradient of the mean loss, as for torch.nn.SyncBatchNorm. All ranks must call backward through
the same graph, because each waits there for the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .host_copy import capturing

# The name in torch 2.13, then the older one; None if torch was built without distributed.
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))


def _result(out: Tensor) -> Tensor:
    """Return a result of a collective, copied in compiled code: torch 2.11 gives the result itself a gradient of 0."""
    return out.clone() if torch.compiler.is_compiling() else out


class _Gather(torch.autograd.Function):
    """Concatenate each rank's [n] to [W n]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = x.new_empty(dist.get_world_size(group) * len(x))
        _all_gather(out, x, group=group)
        return _result(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Scatter.apply(grad.contiguous(), ctx.group), None


class _Scatter(torch.autograd.Function):
    """Sum each rank's [W n] and return this rank's [n] of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = x.new_empty(len(x) // dist.get_world_size(group))
        _reduce_scatter(out, x, group=group)
        return _result(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(grad.contiguous(), ctx.group), None


class _Total(torch.autograd.Function):
    """Sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=group)
        return _result(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Total.apply(grad, ctx.group), None


class _Shared(torch.autograd.Function):
    """Return a value known to all ranks, and pass ``weight`` times its gradient to this rank's own value."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, known: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return known.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None


class Ranks:
    """The processes of a group, or this process alone, which then communicates nothing.

    Args:
        group: a `torch.distributed.ProcessGroup`, or None.

    Attributes:
        size: W, the number of processes.
        rank: rank of this process in the group.

    Raises:
        TypeError: ``group`` is anything else.
        ValueError: this process is not in the group.
    """

    def __init__(self, group: Any = None) -> None:
        self.group, self.size, self.rank = None, 1, 0
        self._seen: set[tuple[int, ...]] = set()
        if group is None:
            return
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("process_group must be a group that this process is a member of")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"process_group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}"
            )
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.group = group if self.size > 1 else None

    def gather(self, x: Tensor) -> Tensor:
        """Return [W, ...], the x of every rank; all must have one shape."""
        if self.group is None:
            return x[None]
        gathered: Tensor = _Gather.apply(x.contiguous().view(-1), self.group)
        return gathered.view(self.size, *x.shape)

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of x over the ranks."""
        return x if self.group is None else _Total.apply(x, self.group)

    def shared(self, own: Tensor, known: Tensor, weight: float | Tensor) -> Tensor:
        """Return ``known``, the same on all ranks, with ``weight`` times the gradient of ``own``; no communication."""
        factor = weight.to(own) if isinstance(weight, Tensor) else own.new_full((), weight)
        shared: Tensor = _Shared.apply(own, known.detach(), factor)
        return shared

    def check_shape(self, name: str, x: Tensor) -> None:
        """Check that x has one shape on all ranks, once for each shape.

        The check waits for the device, so it is skipped while a CUDA graph is captured.

        Raises:
            ValueError: shapes differ; raised on every rank.
        """
        if self.group is None or torch.compiler.is_compiling() or tuple(x.shape) in self._seen or capturing(x.device):
            return
        shapes = self.gather(torch.tensor(x.shape, dtype=torch.int64, device=x.device)).tolist()
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(
                f"{name} must have the same shape on all ranks of process_group, got "
                + ", ".join(f"{shape} on rank {rank}" for rank, shape in enumerate(shapes))
                + ": drop_last=True leaves out a smaller last batch"
            )
        self._seen.add(tuple(x.shape))

    def __deepcopy__(self, memo: object) -> Ranks:
        return self  # a process group cannot be copied

    def __reduce__(self) -> tuple[type[Ranks], tuple[()]]:
        return Ranks, ()  # a group does not outlive its processes: a pickled one loads as a single process


ALONE = Ranks()
_ranks: dict[Any, Ranks] = {}


def ranks_of(group: Any) -> Ranks:
    """Return the `Ranks` of a group, the same object for the same group."""
    if group is None:
        return ALONE
    if not isinstance(group, dist.ProcessGroup):
        return Ranks(group)  # raises
    ranks = _ranks.get(group)
    if ranks is None:
        ranks = _ranks[group] = Ranks(group)
    return ranks


def several_ranks() -> bool:
    """Return whether this process is one of several, which may wait for a collective that it leaves out."""
    group = torch.distributed
    return group.is_available() and group.is_initialized() and group.get_world_size() > 1
