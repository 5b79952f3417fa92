"""The processes that train one model: who starts them, who speaks, and how what they hold in parts is put together."""

from __future__ import annotations

import atexit
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from bomkern.common.process_group import several_ranks

from .config import STRATEGIES, Config, TrainError

# How long a process waits for another. Rank 0 alone evaluates and draws, and a first step may compile.
TIMEOUT = timedelta(minutes=10)
PATIENCE = timedelta(seconds=5)  # with the words of rank 0
SAID = "bomkern: rank 0 has said it"
GIVEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells its processes

T = TypeVar("T")


class Lost(TrainError):
    """Another process is gone, or does not answer."""


def by_torchrun() -> bool:
    """Whether torchrun, or what sets the same environment, started this process."""
    return all(name in os.environ for name in GIVEN)


def join() -> None:
    """Enter the process group that torchrun describes, if it does; before anything can fail, so that all learn of it.

    Without naming a backend: gloo for tensors on the CPU, NCCL for those on a GPU.
    """
    if by_torchrun() and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        try:
            dist.init_process_group(timeout=TIMEOUT)
        except (RuntimeError, ValueError) as why:
            raise Lost(f"rank {os.environ['RANK']} met no others: {str(why).splitlines()[0]}") from why
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def say(text: str, why: Exception | None = None) -> None:
    """Print an error once. What all ranks know rank 0 prints, and the others see to it that it has before they end."""
    rank = dist.get_rank() if several_ranks() else 0
    if rank and not isinstance(why, (Lost, OSError)):
        _after_rank_0()
        return
    print(text, file=sys.stderr, flush=True)
    if rank == 0 and several_ranks():
        _after_rank_0(it=True)


def _after_rank_0(it: bool = False) -> None:
    """Wait until rank 0 calls this with ``it``. torchrun ends all processes when the first ends with an error."""
    if by_torchrun():  # which keeps the store
        with suppress(dist.DistError):
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, is_master=False, timeout=PATIENCE)
            if it:
                store.set(SAID, "")
            else:
                store.wait([SAID], PATIENCE)


def together(do: Callable[[], T]) -> T:
    """``do()`` on every rank; where it fails on one, all of them raise what the first of those says.

    Raises:
        TrainError: from the `TrainError` or OSError of a rank.
    """
    result, cause = None, None
    try:
        result = do()
    except (TrainError, OSError) as why:
        cause = why
    said = [None if cause is None else str(cause)]
    if several_ranks():
        said = [None] * dist.get_world_size()
        dist.all_gather_object(said, None if cause is None else str(cause))
    for message in said:
        if message is not None:
            raise TrainError(message) from cause
    return cast(T, result)


def from_rank_0(do: Callable[[], T]) -> T:
    """What ``do()`` returns, or raises, on rank 0, which alone calls it if there are others yet; on all ranks."""
    if not several_ranks():
        return do()
    found = [together(do if dist.get_rank() == 0 else lambda: None)]
    dist.broadcast_object_list(found)
    return cast(T, found[0])


@contextmanager
def watch() -> Iterator[None]:
    """Says in one line what a collective raises inside where another process is gone: `Lost`."""
    try:
        yield
    except RuntimeError as why:
        text = str(why)
        if several_ranks() and (isinstance(why, dist.DistError) or "gloo" in text or "NCCL" in text):
            heard = re.sub(r"^\[[^]]*\] ", "", text.splitlines()[0])  # without gloo's line of code
            raise Lost(
                f"rank {dist.get_rank()} stops: another process is gone, or did not answer within "
                f"{TIMEOUT.total_seconds():g} s ({heard.split('. ')[0]}); go on with --resume"
            ) from why
        raise


def launch(config: Config) -> Fabric:
    """Fabric for the device, strategy and precision of the config, in the processes that torchrun started, or its own.

    Raises:
        TrainError: a device that is not there, or a contradiction with torchrun.
    """
    fabric = together(lambda: _fabric(config))
    fabric.launch()
    if not fabric.is_global_zero:  # rank 0 says it for all
        logging.getLogger("bomkern").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
    return fabric


def _fabric(config: Config) -> Fabric:
    started = by_torchrun()
    devices = config.devices or 1  # processes on this machine
    if started:
        ranks = int(os.environ["WORLD_SIZE"])
        here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        if config.devices not in (None, here):
            raise TrainError(f"--devices {config.devices}: torchrun started {here} here; leave --devices out")
        devices = here
    else:
        ranks = devices
    kind, _, index = config.device.partition(":")
    if index and ranks > 1:
        raise TrainError(f"--device {config.device} is one GPU for {ranks} processes: say --device {kind}")
    if config.strategy not in STRATEGIES:
        raise TrainError(f"--strategy must be one of {', '.join(STRATEGIES)}, got {config.strategy}")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise TrainError(f"--device {config.device}: this PyTorch sees no CUDA device")
    precision: Any = config.precision
    try:
        return Fabric(
            accelerator=kind,
            devices=[int(index)] if index else devices,
            num_nodes=ranks // devices,
            strategy=_strategy(config.strategy, ranks),
            precision=precision,
            plugins=TorchElasticEnvironment() if started else None,
        )
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as why:  # more than there are, above all
        raise TrainError(f"--device {config.device}, {devices} processes: {str(why).splitlines()[0]}") from why


def _strategy(name: str, ranks: int) -> Any:
    """For Fabric. One process has nothing to share."""
    if ranks == 1:
        return "auto"
    if name == "fsdp":
        # Nothing is written into what the networks return, some of which are views.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        return ModelParallelStrategy(_shard, data_parallel_size=ranks, tensor_parallel_size=1, timeout=TIMEOUT)
    return DDPStrategy(timeout=TIMEOUT)


def _shard(module: nn.Module, mesh: Any) -> nn.Module:
    """FSDP2: each child's weights are gathered for its own forward and backward, and are sharded in between."""
    from torch.distributed.fsdp import fully_shard

    module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # it takes no other
    for part in (*module.children(), module):
        fully_shard(part, mesh=mesh["data_parallel"], reshard_after_forward=True)
    return module


def shards(fabric: Fabric) -> bool:
    """Whether the strategy shards weights."""
    return isinstance(fabric.strategy, ModelParallelStrategy)


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this rank has; any other tensor as it is."""
    return cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor


def whole(state: Any) -> Any:
    """A nested state with its sharded tensors put together, one by one, in host memory. All ranks must call it."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(whole, state))
    return state.full_tensor().cpu() if hasattr(state, "full_tensor") else state


def _laid_out(tensor: Any, own: Any) -> Any:
    """A whole tensor as ``own``, of the same shape, has its numbers: sharded, and in that order in memory."""
    if not isinstance(tensor, Tensor) or own is None or tensor.shape != own.shape:
        return tensor
    if hasattr(own, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        # Nothing is sent: every rank has read the whole.
        whole = tensor.to(own.device).contiguous()
        return distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)
    return torch.empty_like(own, dtype=tensor.dtype).copy_(tensor)


def load_module(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load whole tensors into a module that may be sharded."""
    own = module.state_dict()
    module.load_state_dict({name: _laid_out(tensor, own.get(name)) for name, tensor in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state of whole tensors into the optimizer of parameters that may be sharded.

    A fused step takes the state to lie in memory as its parameter does: channels last, but not where it was sharded.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parts = {i: {key: _laid_out(v, parameters[i]) for key, v in of.items()} for i, of in state["state"].items()}
    optimizer.load_state_dict({**state, "state": parts})
