"""Chapter 13: attention without recurrence."""

from collections.abc import Iterator, Sequence
from fractions import Fraction

import torch

from gpt.models.attention import attention_weights
from gpt.models.transformer import sinusoids
from training.plots.panels import Heatmap, Panel


def mask() -> Sequence[Panel]:
    """Chapter 13: the causal mask under equal scores, and sinusoidal positions."""
    text = ["I", "eat", "bread", "and", "jam"]
    equal_BHTK = torch.zeros(1, 1, len(text), 8)
    causal_TS = torch.ones(len(text), len(text), dtype=torch.bool).tril()
    weights = attention_weights(equal_BHTK, equal_BHTK, causal_TS)[0, 0]
    labels = [
        [str(Fraction(weight).limit_denominator(9)) for weight in row] for row in weights.tolist()
    ]
    title = "equal scores behind the mask"
    positions = Heatmap(
        sinusoids(48, 32), "unit", "position", title="positions", colorbar_label="sine or cosine"
    )
    return [Heatmap(weights, "looks at", "the word", text, text, labels, title), positions]


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield from ()


FIGURES = (mask,)
