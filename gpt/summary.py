"""What a model is made of, from its shapes alone: on the `meta` device weights take no memory."""

import inspect
from typing import Any

import torch
from torch import nn

from gpt import CHAPTERS, GPT2, LanguageModel, Model
from gpt.models.attention import MultiHeadAttention

NANO = {"vocab_size": 4096, "context_length": 256}
"""What a model is given that asks for it; all else are its own defaults."""

GPT3 = {"vocab_size": 50_257, "context_length": 2048, "width": 12_288, "depth": 96, "heads": 96}
"""Brown et al. 2020: the GPT-2 architecture, 175 billion weights."""


def build_on_meta(model: type[Model], **given: Any) -> Model:  # noqa: ANN401 (a constructor's arguments)
    """The model without its weights; what is not given is nano size."""
    wanted = inspect.signature(model).parameters
    nano = {name: value for name, value in NANO.items() if name in wanted}
    with torch.device("meta"):
        return model(**{**nano, **given})


def count_by_kind(model: Model) -> dict[str, tuple[int, int]]:
    """(matrices, weights) of each kind: the name that a matrix has in its layer.

    Biases, norms and positions do not count. A head's query, key and value are matrices of
    their own; the heads' value matrices lead down to a head's width and, side by side, up
    again as the output matrix. An unembedding tied to the embedding counts again.
    """
    heads = {
        name: part.heads
        for name, part in model.named_modules()
        if isinstance(part, MultiHeadAttention)
    }
    found: dict[str, tuple[int, int]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        *path, kind, last = name.split(".") if "." in name else ("", name, "")
        if weight.ndim < 2 or kind == "position" or last == "bias":
            continue
        count = heads.get(".".join(path), 1) if kind in ("query", "key", "value") else 1
        matrices, weights = found.get(kind, (0, 0))
        found[kind] = matrices + count, weights + weight.numel()
    return found


def count_parameters(model: nn.Module) -> int:
    """All numbers that training moves, each once."""
    return sum(parameter.numel() for parameter in model.parameters())


def describe(model: Model) -> str:
    """A table of the model's weights by kind."""
    found = count_by_kind(model)
    matrices = sum(count for count, _ in found.values())
    total = sum(weights for _, weights in found.values())
    lines = [f"{'kind':<14}{'matrices':>10}{'weights':>20}"]
    lines += [f"{kind:<14}{count:>10,}{weights:>20,}" for kind, (count, weights) in found.items()]
    lines.append(f"{'together':<14}{matrices:>10,}{total:>20,}")
    lines.append(
        f"all parameters, each once, with biases, norms, positions: {count_parameters(model):,}"
    )
    return "\n".join(lines)


def build_gpt3() -> Model:
    """GPT-3's shapes."""
    return build_on_meta(GPT2, **GPT3)


def chapters_table() -> str:
    """The table of models: number, name, year, size at nano size, what it can, idea and paper."""
    lines = [f"{'':>2}  {'name':<12}{'year':<6}{'parameters':>11}  {'can':<19}idea, paper"]
    for name, model in CHAPTERS.items():
        can = "-"
        if issubclass(model, LanguageModel):
            can = "speak" + ", translate" * ("translation" in model.supported_tasks)
        size = count_parameters(build_on_meta(model))
        lines.append(
            f"{model.chapter:>2}  {name:<12}{model.year:<6}{size:>11,}  {can:<19}{model.idea}"
        )
        lines.append(f"{'':>52}  {model.paper}")
    return "\n".join(lines)
