"""Several processes on one run, as torchrun starts them: who this one is, and what they tell each other.

Each computes the gradient of its rows of a batch; the mean of the gradients is that of the whole
batch. All hold all of the model (DDP), or each a slice of every tensor (FSDP2, Zhao et al. 2023),
put together for as long as a layer is computed. What is printed and written is rank 0's affair.
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

from gpt.device import resolve_device, uses_bfloat16

# What sharding needs takes a second to import: a run without it does not.
if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

PATIENCE = timedelta(hours=2)
"""How long the others wait for one: rank 0 may be preparing the data, or scoring the model."""


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this is; what involves the others, all call together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """The rank among those of this machine."""

    @property
    def is_main_process(self) -> bool:
        """Whether it is this process that prints and writes."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """This process's own device; a ValueError says why it has none."""
        device = resolve_device(name)
        if self.size == 1 or device.type == "cpu":
            return device
        if device.type != "cuda" or device.index is not None:
            raise ValueError(
                f"--device {device} is one device and the processes are {self.size}: "
                "choose cuda, of which each takes its own, or cpu"
            )
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"each process needs its own cuda device, and there are "
                f"{torch.cuda.device_count()}: choose --nproc-per-node {torch.cuda.device_count()}"
            )
        return torch.device("cuda", self.local_rank)

    def local_rows(self, rows: int) -> slice:
        """This process's rows of so many."""
        return slice(rows * self.rank // self.size, rows * (self.rank + 1) // self.size)

    def all_reduce_max(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def barrier(self) -> None:
        """Go on when all have come here."""
        self.all_reduce_max(0)

    def all_reduce_mean(self, tensor: Tensor) -> Tensor:
        """The mean of the processes' tensors."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total / self.size

    def broadcast(self, value: Any) -> Any:  # noqa: ANN401 (anything that can be pickled)
        """What rank 0 says."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def gather(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """The tensors of every rank, for rank 0; the others get an empty list."""
        if self.size == 1:
            return [tensors]
        found: list[Any] = [None] * self.size if self.is_main_process else []
        own = {name: tensor.cpu() for name, tensor in tensors.items()}
        dist.gather_object(own, found if self.is_main_process else None)
        return found

    def gather_full(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors, each sharded one whole, for rank 0; the others get less."""
        found = {}
        for name, tensor in tensors.items():
            full = full_tensor(tensor)
            if self.is_main_process:
                found[name] = full.cpu() if is_sharded(tensor) else full
        return found

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """What one process of each machine does before the others: it leaves them what it found."""
        if self.local_rank:
            self.barrier()
        yield
        if not self.local_rank:
            self.barrier()


SINGLE_PROCESS = World()


def init_process_group(device: str) -> World:
    """The world that torchrun made of this process and others; without it, ALONE.

    All but rank 0 are silent from here on.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return SINGLE_PROCESS
    world = World(int(os.environ["RANK"]), size, int(os.environ["LOCAL_RANK"]))
    own = world.device(device)
    cuda = own.type == "cuda"
    if cuda:
        torch.cuda.set_device(own)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=_fresh_store(world),
        rank=world.rank,
        world_size=size,
        timeout=PATIENCE,
        device_id=own if cuda else None,
    )
    atexit.register(dist.destroy_process_group)
    if not world.is_main_process:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    return world


def _fresh_store(world: World) -> Store:
    """Where the processes find each other.

    torchrun's store outlives a lost worker, and the addresses of the dead are still in it. So
    each start has a part of its own; rank 0 numbers it, and answers only to who is there.
    """
    store, _, _ = next(rendezvous("env://"))
    if world.is_main_process:
        start = store.add("start", 1)
        for rank in range(1, world.size):
            store.set(f"{start}/welcome/{rank}", store.get(f"{start}/hello/{rank}"))
        return PrefixStore(f"{start}", store)
    name = uuid.uuid4().bytes
    while True:
        start = store.add("start", 0)
        store.set(f"{start}/hello/{world.rank}", name)
        welcome = f"{start}/welcome/{world.rank}"
        if store.check([welcome]) and store.get(welcome) == name:
            return PrefixStore(f"{start}", store)
        time.sleep(0.05)


def is_restartable() -> bool:
    """Whether torchrun starts all processes again when one is lost."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def wrap_ddp(objective: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An objective whose backward pass leaves the mean of all processes' gradients."""
    assert isinstance(objective, nn.Module)
    # Compiled in parts, so that sums could be sent early, a recomputed loss is refused.
    torch._dynamo.config.optimize_ddp = False
    wrapped = DistributedDataParallel(objective, gradient_as_bucket_view=True)
    wrapped.broadcast_buffers = False  # they are tables, the same everywhere
    return wrapped


def no_sync(objective: Callable[..., Tensor], parts: int) -> AbstractContextManager[None]:
    """Where gradients only add up while parts of the batch are left: the last sends the sum.

    Sharded ones are sent at once: otherwise each process would hold all of them.
    """
    if parts and isinstance(objective, DistributedDataParallel):
        return objective.no_sync()
    return nullcontext()


def apply_fsdp(objective: nn.Module, device: torch.device, precision: str) -> None:
    """Leave each process its slice of every parameter, on its device.

    They are put together for one element of a ModuleList at a time, that is for a layer; what
    belongs to none, for the whole step.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    # Nothing here changes the result of a layer in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    half = device.type == "cuda" and uses_bfloat16(device, precision)
    policy = MixedPrecisionPolicy(
        torch.bfloat16 if half else None, torch.float32, cast_forward_inputs=False
    )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layers = [
        layer
        for module in objective.modules()
        if isinstance(module, nn.ModuleList)
        for layer in module
    ]
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
        if hasattr(layer, "remember"):
            register_fsdp_forward_method(layer, "remember")
    fully_shard(objective, mesh=mesh, mp_policy=policy)


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether this process holds but a slice of it."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor whole, on every process; any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def sharded_like(tensor: Tensor, own: Tensor) -> Tensor:
    """A whole tensor as this process holds `own`: its slice, where that is sharded."""
    if not is_sharded(own):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None)


def each_whole(function: Callable[[Tensor], Tensor], tensors: Tensor) -> Tensor:
    """A function of N tensors, one by one along the first axis, also where they are sharded.

    Then each process takes some of the N whole, and gets back its slice of every result.
    """
    if not is_sharded(tensors):
        return function(tensors)
    from torch.distributed.tensor import DTensor, Shard

    some = tensors.redistribute(placements=[Shard(0)])
    found = DTensor.from_local(
        function(some.to_local()).contiguous(),
        some.device_mesh,
        some.placements,
        shape=some.shape,
        stride=some.stride(),
    )
    return found.redistribute(placements=tensors.placements)
