"""Chapter 14: only the decoder."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gpt import GPT2, summary
from gpt.models.attention import CausalSelfAttention, MultiHeadAttention, Positions
from gpt.models.linear import softmax
from gpt.models.transformer import FeedForward
from training.plots.panels import BarChart, Heatmap, Panel

DIRECTIONS = ("Michael", "Jordan", "basketball", "Chicago Bulls", "Phelps", "Barbara")
"""What a direction of the embedding space stands for."""


def directions() -> Tensor:
    """Return vectors_ND of length 1, all at right angles to each other, one for each of DIRECTIONS."""
    torch.manual_seed(0)
    columns = torch.linalg.qr(torch.randn(16, len(DIRECTIONS), dtype=torch.float64)).Q
    return columns.t()


def vector(*names: str) -> Tensor:
    """Return the embedding that encodes these names: the sum of their directions."""
    vectors_ND = directions()
    return sum((vectors_ND[DIRECTIONS.index(name)] for name in names), torch.zeros(16).double())


@torch.no_grad()
def store_of_facts() -> FeedForward:
    """Return a feed-forward layer that knows one fact, written by hand into its first neuron.

    Its row of `up` asks for Michael and for Jordan; the bias of -1 makes both necessary; its column
    of `down` writes what follows.
    """
    mlp = FeedForward(16, 4, nn.ReLU()).double()
    for parameter in mlp.parameters():
        nn.init.zeros_(parameter)
    mlp.up.weight[0] = vector("Michael", "Jordan")
    mlp.up.bias[0] = -1.0
    mlp.down.weight[:, 0] = vector("basketball", "Chicago Bulls")
    return mlp


@torch.no_grad()
def recall(*names: str) -> dict[str, float]:
    """Return the fact's neuron, and what the layer adds to these names, by direction."""
    mlp, x_D = store_of_facts(), vector(*names)
    added_D = mlp(x_D)
    written = {name: (added_D @ vector(name)).item() for name in DIRECTIONS[2:4]}
    return {"neuron": mlp.activation(mlp.up(x_D))[0].item(), **written}


WORDS = ["a", "fluffy", "blue", "creature", "roamed", "the", "verdant", "forest"]
ADJECTIVES, NOUNS = ("fluffy", "blue", "verdant"), ("creature", "forest")
FEATURES = ["noun", "adjective", "position", "one", *WORDS]
"""What each coordinate of a word's vector says; those of WORDS say how much of its meaning is there."""


def word_vectors() -> Tensor:
    """Return x_TD of WORDS, in the coordinates of FEATURES."""
    return torch.tensor(
        [
            [word in NOUNS, word in ADJECTIVES, position, 1, *(word == other for other in WORDS)]
            for position, word in enumerate(WORDS)
        ],
        dtype=torch.float64,
    )


@torch.no_grad()
def adjective_head() -> CausalSelfAttention:
    """Return an attention head, written by hand, in which nouns ask for the adjectives before them.

    A noun's query is 10 in the direction of adjectives and every other word's is -10; all prefer
    later keys. The value of an adjective is its meaning; other words have none to give.
    """
    width = len(FEATURES)
    head = CausalSelfAttention(width, heads=1, bias=False).double()
    for matrix in (head.query, head.key, head.value):
        nn.init.zeros_(matrix.weight)
    nn.init.eye_(head.output.weight)
    noun, adjective, position, one = range(4)
    scale = width**0.5  # undoes the division by sqrt(K)
    head.query.weight[0, noun] = 20 * scale
    head.query.weight[0, one] = -10 * scale
    head.key.weight[0, adjective] = 1
    head.query.weight[1, one] = scale
    head.key.weight[1, position] = 1
    for word in ADJECTIVES:
        meaning = FEATURES.index(word)
        head.value.weight[meaning, meaning] = 1
    return head


@torch.no_grad()
def contextualize() -> tuple[Tensor, Tensor, Tensor]:
    """Return weights_TS of the head over WORDS, x_TD before it, and x_TD after it."""
    x_TD, head = word_vectors(), adjective_head()
    positions = Positions(x_TD[None], None)
    weights_BHTS = head.attention_weights(x_TD[None], positions)
    return weights_BHTS[0, 0], x_TD, x_TD + head(x_TD[None], positions)[0]


@torch.no_grad()
def factored_values() -> tuple[float, int]:
    """Return how far attention is from sums of whole value matrices, and the rank of one of these.

    A head's whole value matrix is width x width: down to the head's width by its rows of `value`,
    up again by its columns of `output`. The ups side by side are the output matrix.
    """
    torch.manual_seed(0)
    width, heads, length = 48, 4, 10
    attention = CausalSelfAttention(width, heads, bias=False).double()
    x_BTD = torch.randn(1, length, width, dtype=torch.float64)
    positions = Positions(x_BTD[..., 0], None)
    weights_BHTS = attention.attention_weights(x_BTD, positions)
    whole = value_matrices(attention)
    summed_BTD = sum(
        (weights_BHTS[:, head] @ x_BTD @ whole[head].t() for head in range(heads)),
        torch.zeros_like(x_BTD),
    )
    distance = (summed_BTD - attention(x_BTD, positions)).abs().max().item()
    return distance, int(torch.linalg.matrix_rank(whole[0]))


def value_matrices(attention: MultiHeadAttention) -> list[Tensor]:
    """Return the whole value matrix of each head: its up times its down."""
    downs = attention.value.weight.chunk(attention.heads, dim=0)
    ups = attention.output.weight.chunk(attention.heads, dim=1)
    return [up @ down for up, down in zip(ups, downs, strict=True)]


def small_gpt2() -> GPT2:
    """Return a GPT-2 with its first weights, in float64, with larger matrices, so that all parts matter."""
    torch.manual_seed(0)
    model = GPT2(vocab_size=20, context_length=8, width=32, depth=2, heads=2).double()
    for block in model.blocks:
        for parameter in block.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.2)
    return model.eval()


@torch.no_grad()
def prefixes_apart() -> float:
    """Return how far the logits after each prefix of 8 tokens are from those of one pass over all."""
    model = small_gpt2()
    tokens_BT = torch.arange(8).unsqueeze(0)
    together_BTV = model(tokens_BT)
    apart = [model(tokens_BT[:, :stop])[:, -1] for stop in range(1, 9)]
    return (together_BTV - torch.stack(apart, dim=1)).abs().max().item()


@torch.no_grad()
def distance_of_one_word(first: list[int], second: list[int], position: int) -> tuple[float, float]:
    """Return how far the word at a position of two texts is apart, before and after the blocks."""
    model = small_gpt2()
    before, after = (
        [of(torch.tensor([ids]))[0, position] for ids in (first, second)]
        for of in (model.embedding, model.features)
    )
    return (before[0] - before[1]).norm().item(), (after[0] - after[1]).norm().item()


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield "One head of attention, written by hand: nouns ask for the adjectives before them."
    weights_TS, before_TD, after_TD = contextualize()
    for noun, adjectives in (("creature", ("fluffy", "blue")), ("forest", ("verdant",))):
        row = WORDS.index(noun)
        looks = ", ".join(f"{word} {weights_TS[row, WORDS.index(word)]:.2f}" for word in adjectives)
        yield f"  {noun} looks at {looks}"
        for name, x_TD in (("E ", before_TD), ("E'", after_TD)):
            parts = (
                f"{word} {x_TD[row, FEATURES.index(word)]:.2f}" for word in (noun, *adjectives)
            )
            yield f"    {name} = {', '.join(parts)}"
    distance, rank = factored_values()
    exact = "equal to 1e-12" if distance < 1e-12 else "different"
    yield f"Value matrices of 48 x 48, stored as 12 x 48 and 48 x 12 (rank {rank}): {exact}"
    yield "A feed-forward layer knows one fact, written by hand into one neuron:"
    for person in ("Michael Jordan", "Michael Phelps", "Barbara Jordan", "Barbara Phelps"):
        fact = recall(*person.split())
        yield (
            f"  {person:<16}neuron {fact['neuron']:.0f}, adds {fact['basketball']:.0f} basketball, "
            f"{fact['Chicago Bulls']:.0f} Chicago Bulls"
        )
    yield "The last vector gives logits, the logits probabilities of the next token:"
    logits_V = torch.tensor([0.0, 0.7, 1.95])
    shares = ", ".join(f"{p:.1f}" for p in softmax(logits_V).tolist())
    yield f"  softmax({', '.join(f'{z:g}' for z in logits_V.tolist())}) = ({shares})"
    together = "equal to 1e-12" if prefixes_apart() < 1e-12 else "different"
    yield f"Eight prefixes, one pass or eight: {together}"
    yield "One word in two texts, distance of its vectors before and after two blocks:"
    before, after = distance_of_one_word([1, 5, 2], [1, 5, 3], position=1)
    yield f'  "the model walked", "the model makes":      {before:.1f}, {after:.1f}'
    before, after = distance_of_one_word([1, 4, 5], [1, 6, 5], position=2)
    yield f'  "the fashion model", "the language model":  {before:.1f}, {after:.1f}'
    yield "GPT-3:"
    kinds = summary.count_by_kind(summary.build_gpt3())
    total = tuple(sum(column) for column in zip(*kinds.values(), strict=True))
    for kind, (matrices, weights) in {**kinds, "total": total}.items():
        yield f"  {kind:<12}{matrices:>7,} matrices{weights:>18,} weights"


def gpt3() -> Sequence[Panel]:
    """Chapter 14: the parameters of GPT-3 by kind."""
    kinds = summary.count_by_kind(summary.build_gpt3())
    total = sum(weights for _, weights in kinds.values())
    billions = [weights / 1e9 for _, weights in kinds.values()]
    labels = [f"{count:.2f} ({count * 1e9 / total:.1%})" for count in billions]
    return [BarChart("billion weights", list(kinds), billions, labels, f"GPT-3: {total:,} weights")]


def creature() -> Sequence[Panel]:
    """Chapter 14: the attention of a head written by hand, and what it changes."""
    weights_TS, _, after_TD = contextualize()
    start = FEATURES.index(WORDS[0])
    return [
        Heatmap(
            weights_TS,
            "looks at",
            "the word",
            WORDS,
            WORDS,
            title="attention",
            colorbar_label="weight",
        ),
        Heatmap(
            after_TD[:, start:],
            "contains the meaning of",
            "the word",
            WORDS,
            WORDS,
            title="vectors after it",
            colorbar_label="share",
        ),
    ]


FIGURES = (creature, gpt3)
