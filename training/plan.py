"""What a run will take, said before anything is trained: memory of a card, operations, tokens, time.

One step of the run is taken with tensors that have a shape and no contents (torch's
`FakeTensorMode`): the model's own loss, autograd's own graph, the run's own optimizers. What each
of them keeps is counted, so every model that trains can be planned and no formula knows one. A
test holds the counts against real steps.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import finalize

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt import LanguageModel, Model
from gpt.device import GPUSpec, find_gpu_spec, resolve_device, uses_bfloat16
from gpt.models.attention import RMSNorm
from gpt.summary import count_by_kind, count_parameters, describe
from training.config import TrainingConfig, new_model
from training.optimizer import Optimizers
from training.progress import format_duration
from training.tasks import TASKS, check
from training.tasks.text import Text
from training.trainer import Objective

USABLE = 0.9
"""Of a card's memory: CUDA and the exchange between cards take some, gaps between tensors too."""
GIB = 2**30


class TensorMemoryTracker(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, each storage once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 (whatever the operation gives)
        """Run the operation, and note what it made."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return made

    def count(self, tensor: Tensor) -> None:
        """Add a tensor's storage, if it is new, for as long as it lives."""
        storage = tensor.untyped_storage()
        if id(storage) not in self.sizes:
            self.sizes[id(storage)] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            finalize(storage, self._freed, id(storage))

    def _freed(self, storage: int) -> None:
        self.now -= self.sizes.pop(storage)


class CardKernels(TorchFunctionMode):
    """What a card computes in one kernel and a CPU in several keeps no more than on the card."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 (whatever the operation gives)
        """Run the operation, or its stand-in."""
        kwargs = kwargs or {}
        if func is F.rms_norm and kwargs["weight"] is not None:
            x, weight = args[0], kwargs["weight"]
            # In float32 under autocast, as on the card.
            wide = torch.float32 if torch.is_autocast_enabled("cpu") else x.dtype
            return _RMSNorm.apply(x.to(wide), weight.to(wide))  # type: ignore[no-untyped-call]
        if func is F.dropout and kwargs["p"] and kwargs["training"]:
            return torch.native_dropout(args[0], kwargs["p"], True)[0]
        if func is F.scaled_dot_product_attention:
            kwargs = kwargs | {"dropout_p": 0.0}  # not in a CPU's fused kernel
        return func(*args, **kwargs)


class _RMSNorm(torch.autograd.Function):
    """The shapes of the fused kernel: it keeps its input and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # noqa: ANN401 (torch's own)
        ctx.save_for_backward(x, weight, x[..., :1].clone())
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        _, weight, _ = ctx.saved_tensors
        return torch.empty_like(grad), torch.empty_like(weight)


@dataclass(frozen=True)
class Memory:
    """Bytes on one card, by kind."""

    weights: int
    """With the tables that belong to them."""
    gradients: int
    optimizer: int
    gathered: int
    """Of what is sharded, the part that is whole for a moment."""
    activations: int
    """Kept from a micro-batch for its backward pass, up to the logits."""
    loss: int
    """The logits, as many as the loss makes at once, and what the backward pass makes for a moment."""
    update: int
    """What the optimizers make for a moment, when the activations are gone."""
    validation: int
    """The first card's copy of all weights, where they are sharded; also when the activations are gone."""

    @property
    def together(self) -> int:
        """The most there is at once."""
        kept = self.weights + self.gradients + self.optimizer
        step = self.gathered + self.activations + self.loss
        return kept + max(step, self.update, self.validation)


def measure(run: TrainingConfig, rows: int, bfloat16: bool, card: bool, shards: int = 1) -> Memory:
    """The memory of one step of a run, taken with fake tensors.

    Args:
        run: The run.
        rows: Rows of a micro-batch.
        bfloat16: Whether matrix products are in bfloat16, else in float32.
        card: Whether a card computes it, else this CPU.
        shards: Cards among which weights, gradients and the optimizers' state are divided.
    """
    task = TASKS[run.task]
    given = task.expected_model_args(run)
    arrays = [torch.from_numpy(array) for array in task.largest_batch(run, rows)]
    kernels = CardKernels() if card else contextlib.nullcontext()
    with FakeTensorMode() as fake, TensorMemoryTracker() as live, kernels:
        batch = [fake.from_tensor(array) for array in arrays]
        for tensor in batch:
            live.count(tensor)
        model = new_model(run, given).train()
        if card:
            use_fused_norms(model)
        gradients, whole = (shared(model.parameters(), cards) for cards in (shards, 1))
        weights = gradients + shared(model.buffers(), 1)
        optimizers = Optimizers(model, run, torch.device("cpu"), bfloat16)
        update = 0
        for index in range(2):  # the first makes the state
            give_gradients(model)
            live.peak = before = live.now
            optimizers.step(index)
            update = live.peak - before
        optimizer = shared(optimizers.state_dict().values(), shards)
        if shards > 1 and bfloat16 and card:
            halve(model)  # as they are gathered
        give_gradients(model)
        kept = live.now
        carried = None
        if run.stateful:
            assert isinstance(model, LanguageModel)
            carried = model.init_state(rows, run.context_length)
        noted = note_at_loss(model, lambda: live.now - kept)
        live.peak = live.now
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = Objective(model)(*batch, state=carried)
        noted.append(live.now - kept)  # of a model without logits
        loss.backward()
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        gathered=gathered(model) if shards > 1 else 0,
        activations=noted[0],
        loss=live.peak - kept - noted[0],
        update=update // shards,
        validation=whole if shards > 1 else 0,
    )


def use_fused_norms(model: Model) -> None:
    """Have norms call what they call on a card."""
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.forward = module.fused  # type: ignore[method-assign]


def note_at_loss(model: Model, value: Callable[[], int]) -> list[int]:
    """A list to which `value()` is added when the model has all that logits are made from, if it makes any."""
    noted: list[int] = []
    if isinstance(model, LanguageModel):
        mean_nll = model.mean_nll

        def noting(features_BTD: Tensor, targets_BT: Tensor) -> Tensor:
            noted.append(value())
            return mean_nll(features_BTD, targets_BT)

        model.mean_nll = noting  # type: ignore[method-assign]
    return noted


def give_gradients(model: Model) -> None:
    """As all micro-batches of a step but the first find them."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def halve(model: Model) -> None:
    """Parameters in bfloat16, a tied one still one (`Module.to` refuses fake tensors)."""
    halves: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            half = nn.Parameter(parameter.detach().to(torch.bfloat16))
            setattr(module, name, halves.setdefault(parameter, half))


def shared(tensors: Iterable[Tensor], cards: int) -> int:
    """Bytes of one card's part, where the first axis of every tensor is divided."""
    return sum(
        math.ceil(len(tensor) / cards) * tensor[:1].nbytes if tensor.ndim else tensor.nbytes
        for tensor in tensors
    )


def gathered(model: Model) -> int:
    """Bytes of what is whole on every card for a moment, where all is divided.

    Of the largest layer the weights, the gradient, and the weights of the one that comes next;
    of what is in no layer, weights and gradient. A gradient is in float32 as it is sent.
    """
    layers = [
        sum(parameter.numel() for parameter in layer.parameters())
        for modules in model.modules()
        if isinstance(modules, nn.ModuleList)
        for layer in modules
    ]
    alone, largest = count_parameters(model) - sum(layers), max(layers, default=0)
    width = next(model.parameters()).itemsize
    return (2 * width + 4) * largest + (width + 4) * alone


@dataclass(frozen=True)
class Hardware:
    """Where a run is to be trained."""

    cards: int
    card: str
    """The name of each."""
    sheet: GPUSpec
    """What is known of it."""
    is_card: bool
    """Or else this machine's CPU."""
    bfloat16: bool
    """Whether matrix products are in bfloat16, else in float32."""

    def holds(self, memory: Memory) -> bool | None:
        """Whether a card has so much memory; None where that is not known."""
        room = self.sheet.memory
        return None if room is None else memory.together <= USABLE * room

    def measure(self, run: TrainingConfig, rows: int) -> Memory:
        """The memory of each card."""
        shards = self.cards if run.fsdp else 1
        return measure(run, rows, self.bfloat16, self.is_card, shards)


def resolve_hardware(run: TrainingConfig, cards: int, card: str | None) -> Hardware:
    """The cards of that name, or this machine's own device without one."""
    if card is not None:
        if run.device != "auto":
            raise ValueError("--gpu and --device both say where: leave out one of them")
        return Hardware(cards, card, find_gpu_spec(card), True, run.precision != "float32")
    device = resolve_device(run.device)
    bfloat16 = uses_bfloat16(device, run.precision)
    if device.type != "cuda":
        return Hardware(cards, device.type, GPUSpec(None, None), False, bfloat16)
    name = torch.cuda.get_device_name(device)
    memory = torch.cuda.get_device_properties(device).total_memory
    return Hardware(cards, name, GPUSpec(memory, find_gpu_spec(name).flops), True, bfloat16)


@dataclass(frozen=True)
class Plan:
    """A run in a place, and what it will take."""

    run: TrainingConfig
    place: Hardware
    mfu: float
    """Share of the card's peak at which the model's operations are expected."""
    rows: int
    """Rows of a micro-batch."""
    memory: Memory
    model: Model
    """Its shapes."""

    @property
    def tokens(self) -> int | None:
        """Tokens of the whole run; None where the rows are not all of one length."""
        if not issubclass(TASKS[self.run.task], Text):
            return None
        return self.run.steps * self.run.batch_size * self.run.context_length

    @property
    def tokens_per_second(self) -> float | None:
        """Of all cards together; None where the peak is not known: it is of products in bfloat16."""
        peak, flops = self.place.sheet.flops, self.model.flops_per_token(self.run.context_length)
        if not (self.tokens and peak and flops and self.place.bfloat16):
            return None
        return self.place.cards * self.mfu * peak / flops

    @property
    def remedy(self) -> str | None:
        """The options that make it fit where it does not."""
        if self.place.holds(self.memory) is not False:
            return None
        for shard in dict.fromkeys((self.run.fsdp, self.place.cards > 1)):
            run = dataclasses.replace(self.run, fsdp=shard)
            parts = [n for n in range(1, self.rows + 1) if self.rows % n == 0]
            if run.stateful:
                parts = [1]  # such a batch is taken at once
            elif not self.place.holds(self.place.measure(run, 1)):
                continue
            for n in parts:
                if self.place.holds(self.place.measure(run, self.rows // n)):
                    options = [
                        f"--gradient-accumulation-steps {run.gradient_accumulation_steps * n}"
                    ] * (n > 1)
                    return " ".join(options + ["--fsdp"] * (shard and not self.run.fsdp))
        return "more cards with --fsdp, or a smaller model"

    def to_json(self) -> dict[str, Any]:
        """Every figure by name; None is not known."""
        tokens, speed, count = self.tokens, self.tokens_per_second, count_parameters(self.model)
        return {
            "preset": self.run.preset,
            "model": self.run.model,
            "parameters": count,
            "weights_by_kind": {
                kind: weights for kind, (_, weights) in count_by_kind(self.model).items()
            },
            "cards": self.place.cards,
            "card": self.place.card,
            "card_memory": self.place.sheet.memory,
            "card_flops": self.place.sheet.flops,
            "precision": "bfloat16" if self.place.bfloat16 else "float32",
            "fsdp": self.run.fsdp,
            "gradient_accumulation_steps": self.run.gradient_accumulation_steps,
            "rows": self.rows,
            "memory": {**dataclasses.asdict(self.memory), "together": self.memory.together},
            "fits": self.place.holds(self.memory),
            "remedy": self.remedy,
            "steps": self.run.steps,
            "tokens": tokens,
            "tokens_per_parameter": tokens and tokens / count,
            "flops_per_token": tokens and self.model.flops_per_token(self.run.context_length),
            "mfu": self.mfu,
            "tokens_per_second": speed,
            "seconds": tokens / speed if tokens and speed else None,
        }

    def table(self) -> str:
        """The figures in lines, their units and settings with them."""
        run, place, count = self.run, self.place, count_parameters(self.model)
        cards = f"{place.cards} x {place.card}"
        lines = [f"preset {run.preset}: {run.model} on {cards}", describe(self.model), ""]
        lines += [
            f"batch: {run.batch_size:,} rows = {place.cards} x {run.gradient_accumulation_steps} micro-batches of {self.rows:,}, "
            f"in {'bfloat16' if place.bfloat16 else 'float32'}",
            f"memory of each, GiB{', sharded' if run.fsdp else ''}:",
        ]
        notes = {
            "activations": "kept from a micro-batch for its backward pass",
            "loss": "logits, and what the backward pass makes for a moment",
            "gathered": "what is whole for a moment",
            "update": "made by the optimizers, when the activations are gone",
            "validation": "all weights on the first card, when the activations are gone",
        }
        for name, size in dataclasses.asdict(self.memory).items():
            if size:
                lines.append(f"  {name:<12}{size / GIB:>9.3f}  {notes.get(name, '')}".rstrip())
        lines.append(f"  {'together':<12}{self.memory.together / GIB:>9.3f}  {self._verdict()}")
        lines.append("time:")
        if self.tokens is None:
            return "\n".join([*lines, "  unknown: rows are not all of one length"])
        flops, speed = self.model.flops_per_token(run.context_length), self.tokens_per_second
        peak = place.sheet.flops
        lines += [
            f"  {self.tokens:,} tokens in {run.steps:,} steps, {self.tokens / count:,.1f} a parameter",
            f"  {flops / 1e9:,.3f} GFLOP a token, {flops * self.tokens:.2e} FLOP together",
            f"  {cards} at {self.mfu:.0%} of "
            + (f"{peak / 1e12:,.0f} TFLOP/s: " if peak else "an unknown peak: ")
            + (
                f"{speed:,.0f} tokens/s, {format_duration(self.tokens / speed)}"
                if speed
                else "unknown"
            ),
        ]
        return "\n".join(lines)

    def _verdict(self) -> str:
        room = self.place.sheet.memory
        if room is None:
            return "of unknown memory"
        of = f"of {USABLE:.0%} of {room / GIB:.1f}:"
        return f"{of} too much: {self.remedy}" if self.remedy else f"{of} fits"


def plan(run: TrainingConfig, num_gpus: int, gpu: str | None, mfu: float) -> Plan:
    """What a run will take on so many cards; a ValueError says what does not fit together.

    Args:
        run: The run.
        num_gpus: How many.
        gpu: The name of each; this machine's own device if None.
        mfu: Share of the card's peak at which the model's operations are expected.
    """
    check(run)
    if num_gpus < 1:
        raise ValueError(f"--num-gpus must be at least 1, not {num_gpus}")
    if not 0 < mfu <= 1:
        raise ValueError(f"--mfu must be above 0 and at most 1, not {mfu}")
    rows, rest = divmod(run.batch_size, num_gpus * run.gradient_accumulation_steps)
    if rest:
        raise ValueError(
            f"--batch-size {run.batch_size} cannot be divided among --num-gpus {num_gpus}, in --gradient-accumulation-steps "
            f"{run.gradient_accumulation_steps} equal parts each: choose a multiple of {num_gpus * run.gradient_accumulation_steps}"
        )
    given = TASKS[run.task].expected_model_args(run)
    with torch.device("meta"):
        model = new_model(run, given)
    place = resolve_hardware(run, num_gpus, gpu)
    return Plan(run, place, mfu, rows, place.measure(run, rows), model)
