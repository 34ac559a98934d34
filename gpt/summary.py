"""Parameter counts of models, computed on the `meta` device, where weights take no memory."""

import inspect
from typing import Any

import torch
from torch import nn

from gpt import GPT2, Model
from gpt.models.attention import MultiHeadAttention

NANO = {"vocab_size": 4096, "context_length": 256}
"""Constructor arguments without defaults: those of the nano presets."""


def build_on_meta(model: type[Model], **kwargs: Any) -> Model:  # noqa: ANN401 (constructor arguments)
    """Build a model without allocating weights. Arguments default to NANO, then to the model's."""
    parameters = inspect.signature(model).parameters
    nano = {name: value for name, value in NANO.items() if name in parameters}
    with torch.device("meta"):
        return model(**{**nano, **kwargs})


def count_by_kind(model: Model) -> dict[str, tuple[int, int]]:
    """Return (matrices, weights) of each kind of matrix, named as in its layer.

    Biases, norms and position embeddings are not counted. Query, key and value matrices are counted
    per head; `output` is one matrix, the heads' projections from their width back to D side by
    side. A tied unembedding is counted again.
    """
    attention = {
        name: {"query": module.heads, "key": module.kv_heads, "value": module.kv_heads}
        for name, module in model.named_modules()
        if isinstance(module, MultiHeadAttention)
    }
    counts: dict[str, tuple[int, int]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        *path, kind, last = name.split(".") if "." in name else ("", name, "")
        if weight.ndim < 2 or kind == "position" or last == "bias":
            continue
        per_head = attention.get(".".join(path), {}).get(kind, 1)
        matrices, weights = counts.get(kind, (0, 0))
        counts[kind] = matrices + per_head, weights + weight.numel()
    return counts


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def describe(model: Model) -> str:
    """Return a table of the model's weights by kind."""
    counts = count_by_kind(model)
    matrices = sum(count for count, _ in counts.values())
    total = sum(weights for _, weights in counts.values())
    lines = [f"{'kind':<14}{'matrices':>10}{'weights':>20}"]
    lines += [f"{kind:<14}{count:>10,}{weights:>20,}" for kind, (count, weights) in counts.items()]
    lines.append(f"{'total':<14}{matrices:>10,}{total:>20,}")
    lines.append(
        f"all parameters, tied ones once, with biases, norms, positions: {count_parameters(model):,}"
    )
    return "\n".join(lines)


def build_gpt3() -> Model:
    """Build GPT-3 without allocating its 175 billion weights: GPT-2, but larger (Brown et al. 2020)."""
    return build_on_meta(
        GPT2, vocab_size=50_257, context_length=2048, width=12_288, depth=96, heads=96
    )
