"""What moves the weights, and how fast: Muon for hidden matrices, AdamW for all the rest.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest orthogonal matrix, so
that every direction of it learns at one speed. It suits matrices between hidden layers;
embeddings, the unembedding and vectors go to AdamW (Loshchilov & Hutter 2019).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gpt.model import Model
from training.presets import Run

MOMENTUM_WARM_UP = 200
"""Steps over which Muon's momentum goes from 0.85 to 0.95: early gradients turn quickly."""


def groups(model: Model) -> dict[str, list[nn.Parameter]]:
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
    """Every optimizer of a run behind one step: rates follow the schedule, state can be saved."""

    def __init__(self, model: Model, run: Run, device: torch.device) -> None:
        self.run = run
        self.model = model
        rates = {
            "matrices": run.learning_rate,
            "embeddings": run.embedding_rate,
            "unembedding": run.unembedding_rate,
            "vectors": run.vector_rate,
        }
        by_kind: dict[str, dict[str, Any]] = {
            kind: {"params": parameters, "lr": rates[kind], "weight_decay": 0.0}
            for kind, parameters in groups(model).items()
            if parameters
        }
        self.all: list[torch.optim.Optimizer] = []
        if "matrices" in by_kind:
            by_kind["matrices"]["weight_decay"] = run.weight_decay
            if run.optimizer == "muon":
                self.all.append(torch.optim.Muon([by_kind.pop("matrices")]))
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
        if self.run.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.run.clip)
        share = schedule(self.run, index)
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
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                owner, parameter, name = key.split(".", 2)
                if int(owner) == number:
                    state.setdefault(int(parameter), {})[name] = value
            whole = optimizer.state_dict()
            optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})


def schedule(run: Run, index: int) -> float:
    """The share of the peak rate at step `index`: a linear warm-up, a plateau, a cool-down.

    The cool-down is linear, or halves the rate at equal distances, first where it begins
    (Zaremba et al. 2014).
    """
    warm = (index + 1) / run.warm_up if run.warm_up else 1.0
    cool = (run.steps - index) / (run.steps * run.cool_down) if run.cool_down else 1.0
    if run.halvings:
        return min(warm, 0.5 ** math.floor(1 + run.halvings * (1 - cool))) if cool <= 1 else warm
    return min(warm, 1.0, run.final_rate + (1 - run.final_rate) * min(cool, 1.0))
