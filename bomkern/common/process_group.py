"""A batch that several processes share: what each has of it is put together here, with gradient.

The gradient of a rank's part is that of the sum of all ranks' losses, so that what DistributedDataParallel then makes
of it, the mean over the ranks, is that of their mean, as torch.nn.SyncBatchNorm has it. All ranks must call backward
through the same graph, as each waits for the others there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .host_copy import capturing

# The names of torch 2.13, and before; neither where torch was built without distributed.
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))


class _Gather(torch.autograd.Function):
    """[n] of each rank to [W n]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = x.new_empty(dist.get_world_size(group) * len(x))
        _all_gather(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Scatter.apply(grad.contiguous(), ctx.group), None


class _Scatter(torch.autograd.Function):
    """[W n] of each rank, added up, to each its [n]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = x.new_empty(len(x) // dist.get_world_size(group))
        _reduce_scatter(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(grad.contiguous(), ctx.group), None


class _Total(torch.autograd.Function):
    """The sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Total.apply(grad, ctx.group), None


class _Shared(torch.autograd.Function):
    """A number that all ranks know, whose gradient is ``weight`` times that of a rank's own."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, known: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return known.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None


class Ranks:
    """The processes of a group, or this one alone: then everything is its own, and nothing is sent.

    Args:
        group: a `torch.distributed.ProcessGroup`, or None.

    Attributes:
        size: W. rank: of this process.

    Raises:
        TypeError: ``group`` is something else.
        ValueError: this process is not in it.
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
        """[W, ...]: x of every rank, of one shape on all."""
        if self.group is None:
            return x[None]
        every: Tensor = _Gather.apply(x.contiguous().view(-1), self.group)
        return every.view(self.size, *x.shape)

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks."""
        return x if self.group is None else _Total.apply(x, self.group)

    def shared(self, own: Tensor, known: Tensor, weight: float | Tensor) -> Tensor:
        """``known``, the same on all ranks, with ``weight`` times the gradient of ``own``; no communication."""
        given = weight.to(own) if isinstance(weight, Tensor) else own.new_full((), weight)
        shared: Tensor = _Shared.apply(own, known.detach(), given)
        return shared

    def check_shape(self, name: str, x: Tensor) -> None:
        """That x has one shape on all ranks. Asked once for each shape: it waits for the device, so in no capture.

        Raises:
            ValueError: it has not; on every rank that asks.
        """
        if self.group is None or torch.compiler.is_compiling() or tuple(x.shape) in self._seen or capturing(x.device):
            return
        shapes = self.gather(torch.tensor(x.shape, dtype=torch.int64, device=x.device)).tolist()
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(
                f"{name} must have the same shape on all ranks of process_group, got "
                + ", ".join(f"{shape} on rank {rank}" for rank, shape in enumerate(shapes))
            )
        self._seen.add(tuple(x.shape))

    def __deepcopy__(self, memo: object) -> Ranks:
        return self  # a group is not copied

    def __reduce__(self) -> tuple[type[Ranks], tuple[()]]:
        return Ranks, ()  # nor does it outlive its processes: what is loaded from a file is alone


ALONE = Ranks()
_ranks: dict[Any, Ranks] = {}


def ranks_of(group: Any) -> Ranks:
    """The same `Ranks` for the same group."""
    if group is None:
        return ALONE
    if not isinstance(group, dist.ProcessGroup):
        return Ranks(group)  # which says why not
    found = _ranks.get(group)
    if found is None:
        found = _ranks[group] = Ranks(group)
    return found


def several_ranks() -> bool:
    """Whether this process is one of several: what one rank leaves out, another may wait for."""
    group = torch.distributed
    return group.is_available() and group.is_initialized() and group.get_world_size() > 1
