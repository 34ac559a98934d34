"""Fitting a small model to a table, exactly enough to read its weights."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from gpt.models.base import Model
from training.tasks.tables import (
    Rows,
)

ModelT = TypeVar("ModelT", bound=Model)


def fit(build: Callable[[], ModelT], rows: Rows, max_iter: int = 300, restarts: int = 1) -> ModelT:
    """Fit a model with L-BFGS from each of `restarts` seeds; return the one with the lowest loss."""
    x_BD, y_B = (tensor.double() for tensor in rows)
    fitted = []
    for seed in range(restarts):
        torch.manual_seed(seed)
        model = build().double()
        weights = model.parameters()
        optimizer = torch.optim.LBFGS(weights, max_iter=max_iter, line_search_fn="strong_wolfe")

        def closure(model: Model = model) -> float:
            model.zero_grad()
            loss = model.loss(x_BD, y_B)
            loss.backward()
            return loss.item()

        optimizer.step(closure)
        fitted.append((closure(), model))
    return min(fitted, key=lambda loss_and_model: loss_and_model[0])[1]


@torch.enable_grad()
def train(
    model: ModelT, batches: Iterable[Sequence[Tensor]], rate: float, weight_decay: float = 0.0
) -> ModelT:
    """Train a model with a step of AdamW on each batch. Return the model."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=weight_decay)
    for batch in batches:
        optimizer.zero_grad()
        model.loss(*batch).backward()
        optimizer.step()
    return model


@torch.no_grad()
def predict(model: Model, *columns: Tensor) -> Tensor:
    """Return a regression model's y_B for rows of these columns, which are broadcast."""
    return model(torch.stack(torch.broadcast_tensors(*columns), -1).double())
