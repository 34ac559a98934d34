"""Data-parallel and sharded training in several processes, started by torchrun.

Each process computes the gradients of its rows of a batch; their mean is the gradient of the batch.
Every process holds the whole model (DDP), or a shard of every parameter (FSDP2, Zhao et al. 2023),
which is gathered while a layer is computed. Only rank 0 prints and writes files.
"""

import atexit
import os
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from gpt.device import is_gpu, matmul_dtype, resolve_device

# FSDP's imports take a second, so only runs that use it import them.
if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

TIMEOUT = timedelta(hours=2)
"""Longest wait for another process: rank 0 may be preparing the data or scoring the model."""


@dataclass(frozen=True)
class World:
    """The processes of a run, and this one's rank. Collective methods must be called by all of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """The rank among the processes of this machine."""

    @property
    def is_main_process(self) -> bool:
        """Whether this process is rank 0, which prints and writes files."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """Return this process's device. Raises ValueError if there is none for it."""
        device = resolve_device(name)
        if self.size == 1 or device.type == "cpu":
            return device
        if not is_gpu(device) or device.index is not None:
            raise ValueError(
                f"--device {device} is one device and the processes are {self.size}: "
                "choose cuda, of which each takes its own, or cpu"
            )
        count = torch.accelerator.device_count()
        if self.local_rank >= count:
            raise ValueError(
                f"each process needs its own {device.type} device, and there are {count}: "
                f"choose --nproc-per-node {count}"
            )
        return torch.device(device.type, self.local_rank)

    def local_slice(self, batch_size: int) -> slice:
        """Return this process's rows of a batch."""
        return slice(batch_size * self.rank // self.size, batch_size * (self.rank + 1) // self.size)

    def all_reduce_max(self, number: int) -> int:
        """Return the largest of the processes' numbers."""
        maximum = torch.tensor(number)
        if self.size > 1:
            dist.all_reduce(maximum, dist.ReduceOp.MAX)
        return int(maximum)

    def barrier(self) -> None:
        """Wait until all processes have reached this call."""
        self.all_reduce_max(0)

    def all_reduce_mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of the processes' tensors."""
        if self.size > 1:
            dist.all_reduce(tensor := tensor.clone())
        return tensor / self.size

    def broadcast(self, value: Any) -> Any:  # noqa: ANN401 (anything that can be pickled)
        """Return rank 0's value."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def gather(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Return the tensors of every rank on rank 0, an empty list on the others."""
        if self.size == 1:
            return [tensors]
        gathered: list[Any] | None = [None] * self.size if self.is_main_process else None
        dist.gather_object({name: tensor.cpu() for name, tensor in tensors.items()}, gathered)
        return gathered or []

    def gather_full_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors, sharded ones in full, on rank 0, an empty dict on the others."""
        gathered = {}
        for name, tensor in tensors.items():
            full = full_tensor(tensor)
            if self.is_main_process:
                gathered[name] = full.cpu() if is_sharded(tensor) else full
        return gathered

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """Run the body on one process of each machine first, so that the others find what it cached."""
        if self.local_rank:
            self.barrier()
        yield
        if not self.local_rank:
            self.barrier()


SINGLE_PROCESS = World()
"""Training without torchrun."""


def init_process_group(device: str) -> World:
    """Join the process group that torchrun started; without torchrun, return SINGLE_PROCESS.

    Standard output of all ranks but 0 is discarded from here on.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return SINGLE_PROCESS
    world = World(int(os.environ["RANK"]), size, int(os.environ["LOCAL_RANK"]))
    own_device = world.device(device)
    backend, on_gpu = "gloo", is_gpu(own_device)
    if on_gpu:
        torch.accelerator.set_device_index(own_device.index)
        backend = f"cpu:gloo,{own_device.type}:{dist.get_default_backend_for_device(own_device)}"
    dist.init_process_group(
        backend,
        store=_rendezvous_store(world),
        rank=world.rank,
        world_size=size,
        timeout=TIMEOUT,
        device_id=own_device if on_gpu else None,
    )
    atexit.register(dist.destroy_process_group)
    if not world.is_main_process:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    return world


def _rendezvous_store(world: World) -> Store:
    """Return a key-value store that only the processes of this start share.

    torchrun's store survives a restart of its workers and still contains the addresses of dead
    ones. So each start gets a prefix, numbered by rank 0. Another rank takes the prefix only after
    rank 0 has echoed its unique id: a number without an echo is of an earlier start.
    """
    store, _, _ = next(rendezvous("env://"))
    if world.is_main_process:
        start = store.add("start", 1)
        for rank in range(1, world.size):
            store.set(f"{start}/echo/{rank}", store.get(f"{start}/id/{rank}"))
        return PrefixStore(f"{start}", store)
    unique_id = uuid.uuid4().bytes
    while True:
        start = store.add("start", 0)
        store.set(f"{start}/id/{world.rank}", unique_id)
        echo = f"{start}/echo/{world.rank}"
        if store.check([echo]) and store.get(echo) == unique_id:
            return PrefixStore(f"{start}", store)
        time.sleep(0.05)


def wrap_ddp(objective: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the objective in DDP: its backward pass averages gradients over all processes."""
    assert isinstance(objective, nn.Module)
    # DDP's optimizer splits the compiled graph to overlap communication, but rejects activation
    # checkpointing, which the loss uses.
    torch._dynamo.config.optimize_ddp = False
    ddp = DistributedDataParallel(objective, gradient_as_bucket_view=True)
    ddp.broadcast_buffers = False  # constant tables, the same on every process
    return ddp


def no_sync(objective: Callable[..., Tensor]) -> AbstractContextManager[None]:
    """Return a context in which DDP accumulates gradients without averaging them.

    FSDP averages after every backward pass: otherwise each process would hold all gradients.
    """
    return objective.no_sync() if isinstance(objective, DistributedDataParallel) else nullcontext()


def fsdp_layers(model: nn.Module) -> list[nn.Module]:
    """Return the modules that FSDP gathers one at a time: the elements of every ModuleList."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [layer for module_list in lists for layer in module_list]


def apply_fsdp(objective: nn.Module, device: torch.device, precision: str) -> None:
    """Shard every parameter over all processes, in place.

    Layers are gathered one at a time; all other parameters stay gathered for the whole step.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    # The warning is about in-place changes of a layer's output; there are none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    gathered_dtype = matmul_dtype(device, precision) if is_gpu(device) else None
    policy = MixedPrecisionPolicy(gathered_dtype, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in fsdp_layers(objective):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
        if hasattr(layer, "cross_keys_and_values"):
            register_fsdp_forward_method(layer, "cross_keys_and_values")
    fully_shard(objective, mesh=mesh, mp_policy=policy)


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether this process holds only a shard of the tensor."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor in full on every process, any other tensor unchanged."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a full tensor sharded as `other` is, or unchanged if `other` is not sharded."""
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def map_full_tensors(function: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
    """Apply a function to a stack of tensors, independently along the first axis.

    If the stack is sharded along another axis, each process computes some of the tensors in full,
    and the results are sharded as the stack was.
    """
    if not is_sharded(stack):
        return function(stack)
    from torch.distributed.tensor import DTensor, Shard

    full = stack.redistribute(placements=[Shard(0)])
    local = function(full.to_local()).contiguous()
    mesh, shape, stride = full.device_mesh, full.shape, full.stride()
    results = DTensor.from_local(local, mesh, full.placements, shape=shape, stride=stride)
    return results.redistribute(placements=stack.placements)
