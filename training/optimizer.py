"""The optimizers of a run and its learning-rate schedule: Muon for hidden matrices, AdamW for the rest.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest orthogonal matrix, so that
the matrix learns at the same speed in every direction. It suits matrices between hidden layers;
embeddings, the unembedding and vectors are left to AdamW (Loshchilov & Hutter 2019).
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from gpt.device import matmul_dtype
from gpt.models.base import Model
from gpt.models.linear import Linear, SigmaPi
from training.config import TrainingConfig
from training.distributed import map_full_tensors, shard_like

MOMENTUM_WARMUP_STEPS = 200
"""Steps over which Muon's momentum rises from 0.85 to 0.95: early gradients change direction quickly."""

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan's polynomial: small singular values grow fast, and all end between 0.7 and 1.2."""
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(update_NAB: Tensor, dtype: torch.dtype) -> Tensor:
    """Return approximately the nearest orthogonal matrix to each of N: all singular values near 1.

    It is computed in `dtype`; bfloat16 is precise enough.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    is_tall = update_NAB.shape[1] > update_NAB.shape[2]
    x_NAB = update_NAB.mT if is_tall else update_NAB
    norm_N11 = x_NAB.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    # Cast after the division: small gradients are zero in float16.
    x_NAB = torch.div(x_NAB, norm_N11, out=torch.empty_like(x_NAB, dtype=dtype))
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram_NAA = x_NAB @ x_NAB.mT
        gram_NAA = torch.baddbmm(gram_NAA, gram_NAA, gram_NAA, beta=b, alpha=c)
        x_NAB = torch.baddbmm(x_NAB, gram_NAA, x_NAB, beta=a)
    return x_NAB.mT if is_tall else x_NAB


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with Nesterov momentum and all matrices of one shape in a batch.

    torch's updates one matrix after another and always in bfloat16, which on a CPU without bfloat16
    units takes longer than the rest of a small model's step.

    Args:
        params: Groups of matrices with `lr` and decoupled `weight_decay`. The learning rate of a
            matrix with more rows than columns is `lr` times the root of their ratio.
        dtype: Data type to orthogonalize in.
    """

    def __init__(self, params: list[dict[str, Any]], dtype: torch.dtype = torch.float32) -> None:
        super().__init__(params, {"momentum": 0.95})
        self.orthogonalize = functools.partial(orthogonalize, dtype=dtype)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
                    if not self.state[matrix]:
                        self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
            for (rows, columns), matrices in by_shape.items():
                buffers = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
                gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                update_NAB = map_full_tensors(
                    self.orthogonalize,
                    torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"])),
                )
                lr = group["lr"] * max(1.0, rows / columns) ** 0.5
                if group["weight_decay"]:
                    torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, list(update_NAB), alpha=-lr)


def parameter_groups(model: Model) -> dict[str, list[nn.Parameter]]:
    """Return the model's parameters by kind; each is in one group.

    They are matrices, the weights of a line or of products (which are vectors, so not Muon's),
    embeddings, the unembedding, and other vectors: biases, norms, attention's score vector.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    regressions = {id(m.weight) for m in model.modules() if isinstance(m, Linear | SigmaPi)}
    names = ("matrices", "regression", "embeddings", "unembedding", "vectors")
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in names}
    for name, parameter in model.named_parameters():
        if id(parameter) in embeddings:
            groups["embeddings"].append(parameter)
        elif id(parameter) in regressions:
            groups["regression"].append(parameter)
        elif parameter.ndim < 2:
            groups["vectors"].append(parameter)
        else:
            is_unembedding = name.startswith("unembedding.")
            groups["unembedding" if is_unembedding else "matrices"].append(parameter)
    return groups


class _JointOptimizer(torch.optim.Optimizer):
    """Several optimizers as one: if a gradient overflows, `GradScaler` lets none of them step."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        super().__init__([group for each in optimizers for group in each.param_groups], {})
        self.optimizers, self.num_steps = optimizers, 0

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Let every optimizer step."""
        for optimizer in self.optimizers:
            optimizer.step()
        self.num_steps += 1


class Optimizers:
    """The optimizers of a run behind one `step`, with the learning-rate schedule and one state dict.

    Muon computes in `dtype`, by default that of matrix products. In float16 losses must be scaled by
    `scaler`, so that small gradients do not become zero; steps whose gradients overflow are skipped.
    """

    def __init__(
        self,
        model: Model,
        config: TrainingConfig,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.config = model, config
        dtype = dtype or matmul_dtype(device, config.precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.skipped_steps = 0
        """Steps skipped so far because a gradient was not finite."""
        rates = config.peak_learning_rates()
        lr_and_weight_decay = {
            "matrices": (rates["learning_rate"], config.weight_decay),
            "regression": (rates["learning_rate"], config.weight_decay),
            "embeddings": (rates["embedding_lr"], config.embedding_weight_decay),
            "unembedding": (rates["unembedding_lr"], config.embedding_weight_decay),
            "vectors": (rates["vector_lr"], 0.0),
        }
        groups: dict[str, dict[str, Any]] = {}
        for name, parameters in parameter_groups(model).items():
            lr, weight_decay = lr_and_weight_decay[name]
            if parameters:
                settings = {"lr": lr, "peak_lr": lr, "weight_decay": weight_decay}
                groups[name] = {"params": parameters, **settings}
        self.optimizers: list[torch.optim.Optimizer] = []
        if config.optimizer == "muon" and "matrices" in groups:
            self.optimizers.append(Muon([groups.pop("matrices")], dtype))
        if config.optimizer == "sgd":
            self.optimizers.append(torch.optim.SGD(list(groups.values())))
        elif groups:
            betas = config.beta1, config.beta2
            adamw = torch.optim.AdamW(list(groups.values()), betas=betas, eps=1e-10, fused=True)
            self.optimizers.append(adamw)
        self.joint_optimizer = _JointOptimizer(self.optimizers)

    def step(self, step: int) -> None:
        """Clip the gradients, set the learning rates of this step, update the weights, clear the gradients.

        Gradients are those of scaled losses. Only in float16 this waits for the device: it reads
        whether a gradient is not finite.
        """
        joint_optimizer, previous_steps = self.joint_optimizer, self.joint_optimizer.num_steps
        self.scaler.unscale_(joint_optimizer)
        if self.config.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        lr_fraction = lr_schedule(self.config, step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_fraction
                if group.get("momentum"):
                    group["momentum"] = 0.85 + 0.10 * min(1.0, step / MOMENTUM_WARMUP_STEPS)
        self.scaler.step(joint_optimizer)
        self.scaler.update()
        self.skipped_steps += joint_optimizer.num_steps == previous_steps
        joint_optimizer.zero_grad()

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied by: 1 but in float16."""
        return self.scaler.get_scale()

    def scaler_state(self) -> dict[str, float]:
        """Return the state of gradient scaling; empty but in float16."""
        if not self.scaler.is_enabled():
            return {}
        return {**self.scaler.state_dict(), "skipped_steps": self.skipped_steps}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        """Restore what `scaler_state` returned; nothing if the checkpoint's precision was another."""
        if state and self.scaler.is_enabled():
            self.skipped_steps = int(state["skipped_steps"])
            self.scaler.load_state_dict(state)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of all optimizers as flat tensors: <optimizer>.<parameter>.<name>."""
        return {
            f"{i}.{parameter}.{name}": value
            for i, optimizer in enumerate(self.optimizers)
            for parameter, state in optimizer.state_dict()["state"].items()
            for name, value in state.items()
            if value is not None
        }

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        for i, optimizer in enumerate(self.optimizers):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                optimizer_index, parameter_index, name = key.split(".", 2)
                if int(optimizer_index) == i:
                    parameter = parameters[int(parameter_index)]
                    like = parameter if value.shape == parameter.shape else value
                    state.setdefault(int(parameter_index), {})[name] = shard_like(value, like)
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def lr_schedule(config: TrainingConfig, step: int) -> float:
    """Return the learning rate of a step as a fraction of the peak: linear warmup, plateau, cooldown.

    The cooldown is linear, half a cosine (Loshchilov & Hutter 2017), or halves the rate at equal
    intervals, first at its start (Zaremba et al. 2014).
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    remaining = 1.0  # of the cooldown; above 1 before it starts
    if config.cooldown_fraction:
        remaining = (config.steps - step) / (config.steps * config.cooldown_fraction)
    if config.step_decays:
        halvings = max(0, math.floor(1 + config.step_decays * (1 - remaining)))
        return min(warmup, 0.5**halvings)
    decay = min(remaining, 1.0)
    if config.cosine_decay:
        decay = (1 - math.cos(math.pi * decay)) / 2
    return min(warmup, config.final_lr_fraction + (1 - config.final_lr_fraction) * decay)
