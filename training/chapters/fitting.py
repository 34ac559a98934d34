"""Fitting a small model to a table, exactly enough to read its weights."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from gpt.models.base import Model
from training.tasks.tables import Rows

ModelT = TypeVar("ModelT", bound=Model)


def fit(build: Callable[[], ModelT], rows: Rows, max_iter: int = 300, restarts: int = 1) -> ModelT:
    """Fit a model with L-BFGS from each of `restarts` seeds; return the one with the lowest loss."""
    fitted = fit_each(build, rows, max_iter, restarts)
    return min(fitted, key=lambda loss_and_model: loss_and_model[0])[1]


def fit_each(
    build: Callable[[], ModelT], rows: Rows, max_iter: int = 300, restarts: int = 1
) -> list[tuple[float, ModelT]]:
    """Fit a model with L-BFGS from each of `restarts` seeds; return each loss and model."""
    x_BD, y_B = (t.double() if t.is_floating_point() else t for t in rows)
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
    return fitted


@torch.no_grad()
def predict(model: Model, *columns: Tensor) -> Tensor:
    """Return a regression model's y_B for rows of these columns, which are broadcast."""
    return model(torch.stack(torch.broadcast_tensors(*columns), -1).double())


def fit_many(
    build: Callable[[], ModelT], x_NBD: Tensor, y_NB: Tensor, steps: int, rate: float
) -> list[ModelT]:
    """Fit N models, from seeds 0 to N - 1, to N tables at once with Adam and a falling rate.

    L-BFGS needs fewer steps, but where a loss has no single minimum a rounding error may lead it to
    another one. These steps end where they end on every machine.
    """
    models: list[ModelT] = []
    for seed in range(len(x_NBD)):
        torch.manual_seed(seed)
        models.append(build().to(x_NBD.dtype))
    parameters, _ = stack_module_state(list[nn.Module](models))
    optimizer = torch.optim.Adam(parameters.values(), rate, fused=True)
    predict_N = vmap(lambda parameters, x_BD: functional_call(models[0], parameters, (x_BD,)))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        ((predict_N(parameters, x_NBD) - y_NB) ** 2).mean(-1).sum().backward()
        optimizer.step()
    for index, model in enumerate(models):
        model.load_state_dict({name: stacked[index] for name, stacked in parameters.items()})
    return models
