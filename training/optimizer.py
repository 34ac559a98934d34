"""What moves the weights, and how fast: Muon for hidden matrices, AdamW for all the rest.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest orthogonal matrix, so
that every direction of it learns at one speed. It suits matrices between hidden layers;
embeddings, the unembedding and vectors go to AdamW (Loshchilov & Hutter 2019).
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gpt.device import uses_bfloat16
from gpt.models.base import Model
from training.config import TrainingConfig
from training.distributed import each_whole, sharded_like

MOMENTUM_WARM_UP = 200
"""Steps over which Muon's momentum goes from 0.85 to 0.95: early gradients turn quickly."""


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Jordan's polynomial: it lifts small singular values fast, and leaves all between 0.7 and 1.2."""
ITERATIONS = 5


def orthogonal(update_NAB: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest orthogonal matrix to each of N, about: each singular value becomes about 1.

    Args:
        update_NAB: N matrices of one shape.
        dtype: To compute in: bfloat16 will do where it is fast.
    """
    a, b, c = NEWTON_SCHULZ
    tall = update_NAB.shape[1] > update_NAB.shape[2]
    x_NAB = (update_NAB.mT if tall else update_NAB).to(dtype)
    x_NAB = x_NAB / x_NAB.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram_NAA = x_NAB @ x_NAB.mT
        gram_NAA = torch.baddbmm(gram_NAA, gram_NAA, gram_NAA, beta=b, alpha=c)
        x_NAB = torch.baddbmm(x_NAB, gram_NAA, x_NAB, beta=a)
    return x_NAB.mT if tall else x_NAB


class Muon(torch.optim.Optimizer):
    """What `torch.optim.Muon` does, for all matrices of one shape at once.

    torch's goes through them one by one, and always in bfloat16, which on a CPU without it takes
    longer than the rest of a small model's step.

    Args:
        params: Groups of matrices.
        lr: Rate; a matrix that is taller than wide moves by the root of their ratio more.
        weight_decay: Decay, a share of the rate.
        momentum: Of the gradient, with Nesterov's look ahead.
        dtype: To compute in.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike.setdefault(matrix.shape, []).append(matrix)
            for (rows, columns), matrices in alike.items():
                moved_NAB = each_whole(
                    functools.partial(orthogonal, dtype=self.dtype),
                    torch.stack(self._look_ahead(matrices, group["momentum"])),
                )
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                if group["weight_decay"]:
                    torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, list(moved_NAB), alpha=-rate)

    def _look_ahead(self, matrices: list[Tensor], momentum: float) -> tuple[Tensor, ...]:
        """The gradients with their momentum, which is moved on."""
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        kept = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        torch._foreach_lerp_(kept, gradients, 1 - momentum)
        return torch._foreach_lerp(gradients, kept, momentum)


def parameter_groups(model: Model) -> dict[str, list[nn.Parameter]]:
    """The model's parameters by kind: embeddings, unembedding, matrices, vectors. Each is in one."""
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    kinds: dict[str, list[nn.Parameter]] = {
        "matrices": [],
        "embeddings": [],
        "unembedding": [],
        "vectors": [],
    }
    for name, parameter in model.named_parameters():
        if id(parameter) in embeddings:
            kinds["embeddings"].append(parameter)
        elif parameter.ndim < 2:
            kinds["vectors"].append(parameter)
        elif name.startswith("unembedding."):
            kinds["unembedding"].append(parameter)
        else:
            kinds["matrices"].append(parameter)
    return kinds


class Optimizers:
    """Every optimizer of a run behind one step: rates follow the schedule, state can be saved.

    Args:
        model: Whose weights are moved.
        run: Its settings.
        device: Where the weights are.
        half: Whether matrix products are in bfloat16; when None, as the run and the device have it.
    """

    def __init__(
        self, model: Model, run: TrainingConfig, device: torch.device, half: bool | None = None
    ) -> None:
        half = uses_bfloat16(device, run.precision) if half is None else half
        self.run = run
        self.model = model
        rates = {
            "matrices": run.learning_rate,
            "embeddings": run.embedding_lr,
            "unembedding": run.unembedding_lr,
            "vectors": run.vector_lr,
        }
        decays = {
            "matrices": run.weight_decay,
            "embeddings": run.embedding_weight_decay,
            "unembedding": run.embedding_weight_decay,
            "vectors": 0.0,
        }
        by_kind: dict[str, dict[str, Any]] = {
            kind: {"params": parameters, "lr": rates[kind], "weight_decay": decays[kind]}
            for kind, parameters in parameter_groups(model).items()
            if parameters
        }
        self.all: list[torch.optim.Optimizer] = []
        if run.optimizer == "muon" and "matrices" in by_kind:
            dtype = torch.bfloat16 if half else torch.float32
            self.all.append(Muon([by_kind.pop("matrices")], dtype=dtype))
        if run.optimizer == "sgd":
            self.all.append(torch.optim.SGD(list(by_kind.values())))
        elif by_kind:
            self.all.append(
                torch.optim.AdamW(
                    list(by_kind.values()),
                    betas=(run.beta1, run.beta2),
                    eps=1e-10,
                    fused=device.type in ("cpu", "cuda"),
                )
            )
        for group in self._groups():
            group["peak"] = group["lr"]

    def _groups(self) -> Iterator[dict[str, Any]]:
        for optimizer in self.all:
            yield from optimizer.param_groups

    def step(self, index: int) -> None:
        """Clip, set the rates of step `index`, move the weights, drop the gradients."""
        if self.run.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.run.grad_clip)
        share = lr_schedule(self.run, index)
        for group in self._groups():
            group["lr"] = group["peak"] * share
            if group.get("momentum"):
                group["momentum"] = 0.85 + 0.10 * min(1.0, index / MOMENTUM_WARM_UP)
        for optimizer in self.all:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """All state as flat tensors: <optimizer>.<parameter>.<name>."""
        return {
            f"{number}.{parameter}.{name}": value
            for number, optimizer in enumerate(self.all)
            for parameter, values in optimizer.state_dict()["state"].items()
            for name, value in values.items()
            if value is not None
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` gave."""
        for number, optimizer in enumerate(self.all):
            owners = [owner for group in optimizer.param_groups for owner in group["params"]]
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                of, parameter, name = key.split(".", 2)
                if int(of) == number:
                    owner = owners[int(parameter)]
                    like = owner if value.shape == owner.shape else value
                    state.setdefault(int(parameter), {})[name] = sharded_like(value, like)
            whole = optimizer.state_dict()
            optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})


def lr_schedule(run: TrainingConfig, index: int) -> float:
    """The share of the peak rate at step `index`: a linear warm-up, a plateau, a cool-down.

    The cool-down is linear, or half a cosine (Loshchilov & Hutter 2017), or halves the rate at
    equal distances, first where it begins (Zaremba et al. 2014).
    """
    warm = (index + 1) / run.warmup_steps if run.warmup_steps else 1.0
    cool = (
        (run.steps - index) / (run.steps * run.cooldown_fraction) if run.cooldown_fraction else 1.0
    )
    if run.step_decays:
        return min(warm, 0.5 ** math.floor(1 + run.step_decays * (1 - cool))) if cool <= 1 else warm
    if run.cosine_decay:
        cool = (1 - math.cos(math.pi * min(cool, 1.0))) / 2
    return min(warm, 1.0, run.final_lr_fraction + (1 - run.final_lr_fraction) * min(cool, 1.0))
