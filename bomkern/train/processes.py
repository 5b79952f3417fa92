"""The processes that train one model: start them, report their errors, and gather and load sharded state."""

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

# Longest wait of a process for another. Rank 0 alone evaluates and draws, and a first step may compile.
TIMEOUT = timedelta(minutes=10)
PRINT_TIMEOUT = timedelta(seconds=5)
PRINTED = "bomkern: rank 0 has printed the error"
GIVEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets for its processes

T = TypeVar("T")


class Lost(TrainError):
    """Raised if another process has ended, or does not answer."""


def by_torchrun() -> bool:
    """Return whether torchrun, or a launcher that sets the same environment, started this process."""
    return all(name in os.environ for name in GIVEN)


def join() -> None:
    """Enter the process group that torchrun describes, if there is one.

    Call it before anything that can fail, so that all ranks learn of an error. No backend is named: gloo serves tensors
    on the CPU, NCCL those on a GPU.
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
    """Print an error once. Rank 0 prints an error that all ranks have; the others wait for it before they exit."""
    rank = dist.get_rank() if several_ranks() else 0
    if rank and not isinstance(why, (Lost, OSError)):
        _wait_for_rank_0()
        return
    print(text, file=sys.stderr, flush=True)
    if rank == 0 and several_ranks():
        _tell_others()


# torchrun ends all processes as soon as one exits with an error, so rank 0 must have printed the error before. A
# barrier would wait for `TIMEOUT` if a rank is still in another collective; torchrun's store answers in any state.
def _store() -> dist.TCPStore:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=PRINT_TIMEOUT)


def _tell_others() -> None:
    if by_torchrun():
        with suppress(dist.DistError):
            _store().set(PRINTED, "")


def _wait_for_rank_0() -> None:
    if by_torchrun():
        with suppress(dist.DistError):
            _store().wait([PRINTED], PRINT_TIMEOUT)


def together(do: Callable[[], T]) -> T:
    """Return ``do()`` of every rank. If it fails on some ranks, all ranks raise the error of the first of them.

    Raises:
        TrainError: a rank had a `TrainError` or OSError.
    """
    result, cause = None, None
    try:
        result = do()
    except (TrainError, OSError) as why:
        cause = why
    messages = [None if cause is None else str(cause)]
    if several_ranks():
        messages = [None] * dist.get_world_size()
        dist.all_gather_object(messages, None if cause is None else str(cause))
    for message in messages:
        if message is not None:
            raise TrainError(message) from cause
    return cast(T, result)


def from_rank_0(do: Callable[[], T]) -> T:
    """Return ``do()`` of rank 0 on all ranks, or raise its error. Without a process group, each process calls it."""
    if not several_ranks():
        return do()
    result = [together(do if dist.get_rank() == 0 else lambda: None)]
    dist.broadcast_object_list(result)
    return cast(T, result[0])


@contextmanager
def watch() -> Iterator[None]:
    """Turn the error of a collective that lost another process into `Lost`, with a message of one line."""
    try:
        yield
    except RuntimeError as why:
        text = str(why)
        if several_ranks() and (isinstance(why, dist.DistError) or "gloo" in text or "NCCL" in text):
            reason = re.sub(r"^\[[^]]*\] ", "", text.splitlines()[0])  # without the line of gloo's source
            raise Lost(
                f"rank {dist.get_rank()} stops: another process is gone, or did not answer within "
                f"{TIMEOUT.total_seconds():g} s ({reason.split('. ')[0]}); go on with --resume"
            ) from why
        raise


def launch(config: Config) -> Fabric:
    """Launch Fabric with the config's device, strategy and precision, in torchrun's processes or in ones of its own.

    Raises:
        TrainError: the device does not exist, or the config contradicts torchrun.
    """
    fabric = together(lambda: _fabric(config))
    fabric.launch()
    if not fabric.is_global_zero:  # rank 0 logs the warnings for all
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
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as why:  # mostly too many devices
        raise TrainError(f"--device {config.device}, {devices} processes: {str(why).splitlines()[0]}") from why


def _strategy(name: str, ranks: int) -> Any:
    """Return the strategy for Fabric; one process needs none."""
    if ranks == 1:
        return "auto"
    if name == "fsdp":
        # FSDP2 warns about outputs that are views; nothing here writes into them.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        return ModelParallelStrategy(_shard, data_parallel_size=ranks, tensor_parallel_size=1, timeout=TIMEOUT)
    return DDPStrategy(timeout=TIMEOUT)


def _shard(module: nn.Module, mesh: Any) -> nn.Module:
    """Shard a module by FSDP2: the weights of each child are gathered for its own forward and backward alone."""
    from torch.distributed.fsdp import fully_shard

    module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 takes no other
    for part in (*module.children(), module):
        fully_shard(part, mesh=mesh["data_parallel"], reshard_after_forward=True)
    return module


def shards(fabric: Fabric) -> bool:
    """Return whether the strategy shards weights."""
    return isinstance(fabric.strategy, ModelParallelStrategy)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, and any other tensor as it is."""
    return cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor


def whole(state: Any) -> Any:
    """Return a nested state with its sharded tensors gathered in host memory. All ranks must call it."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(whole, state))
    return state.full_tensor().cpu() if hasattr(state, "full_tensor") else state


def _laid_out(tensor: Any, own: Any) -> Any:
    """Return a whole tensor with the sharding and strides of ``own``, if both have the same shape."""
    if not isinstance(tensor, Tensor) or own is None or tensor.shape != own.shape:
        return tensor
    if hasattr(own, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        # Every rank has read the whole tensor, so nothing is sent.
        whole = tensor.to(own.device).contiguous()
        return distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)
    return torch.empty_like(own, dtype=tensor.dtype).copy_(tensor)


def load_module(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load whole tensors into a module that may be sharded."""
    own = module.state_dict()
    module.load_state_dict({name: _laid_out(tensor, own.get(name)) for name, tensor in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state of whole tensors into the optimizer of parameters that may be sharded.

    A fused step assumes that the state has the strides of its parameter: channels last, unless that is sharded.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parts = {i: {key: _laid_out(v, parameters[i]) for key, v in of.items()} for i, of in state["state"].items()}
    optimizer.load_state_dict({**state, "state": parts})
