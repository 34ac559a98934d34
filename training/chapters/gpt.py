"""Chapter 15: today's GPT."""

import functools
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gpt.models.attention import Positions, RMSNorm, RotarySelfAttention, rotary_table
from gpt.models.gpt import GPT, SwiGLU
from gpt.models.linear import gradient_step
from training.chapters.fitting import train
from training.plots.panels import Heatmap, Panel

NOUNS = {"cat": "chat", "dog": "chien", "book": "livre", "train": "train", "bird": "oiseau"}
ADJECTIVES = {"black": "noir", "white": "blanc", "green": "vert", "red": "rouge", "small": "petit"}
WORDS = ["<pad>", "a", "and", "=", "un", "et", "."]
WORDS += [word for pair in (*NOUNS.items(), *ADJECTIVES.items()) for word in pair]
VOCABULARY = list(dict.fromkeys(WORDS))
CONTEXT_LENGTH = 16
STEPS = 160
SOURCE = "a black cat and a red bird"


def pair(rng: random.Random) -> tuple[list[str], list[str]]:
    """Return one or two things in English, and in French, where most adjectives follow the noun."""
    english, french = [], []
    for _ in range(rng.randint(1, 2)):
        (noun, nom), (adjective, adjectif) = (
            rng.choice(list(words.items())) for words in (NOUNS, ADJECTIVES)
        )
        description = [adjectif, nom] if adjective == "small" else [nom, adjectif]
        english += ["and", "a", adjective, noun]
        french += ["et", "un", *description]
    return english[1:], [*french[1:], "."]


def encode(words: Sequence[str]) -> list[int]:
    """Return the number of each word."""
    return [VOCABULARY.index(word) for word in words]


def batch(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return tokens_BT of pairs as one text, and targets_BT, of which only the French is scored."""
    rng = random.Random(seed)
    tokens_BT = torch.zeros(size, CONTEXT_LENGTH, dtype=torch.long)
    targets_BT = torch.full((size, CONTEXT_LENGTH), -100)
    for row in range(size):
        english, french = pair(rng)
        ids = torch.tensor(encode([*english, "=", *french]))
        tokens_BT[row, : len(ids) - 1] = ids[:-1]
        targets_BT[row, len(english) : len(ids) - 1] = ids[len(english) + 1 :]
    return tokens_BT, targets_BT


def untrained() -> GPT:
    """Return a GPT of two blocks with two heads each, in float64."""
    torch.manual_seed(0)
    return GPT(len(VOCABULARY), CONTEXT_LENGTH, width=32, depth=2, heads=2).double()


@functools.cache
def translator() -> GPT:
    """Return a small GPT that has learned to continue a sentence with its translation."""
    return train(untrained(), (batch(32, seed) for seed in range(STEPS)), rate=0.01).eval()


@torch.no_grad()
def continue_greedily(text: str) -> list[str]:
    """Return the most likely words after a text, up to the full stop."""
    words = text.split()
    while words[-1] != "." and len(words) < CONTEXT_LENGTH:
        logits_BTV = translator()(torch.tensor([encode(words)]))
        words.append(VOCABULARY[int(logits_BTV[0, -1].argmax())])
    return words[len(text.split()) :]


@torch.no_grad()
def share_translated() -> float:
    """Return the share of unseen scored words that are predicted right."""
    tokens_BT, targets_BT = batch(256, seed=STEPS)
    predictions_BT = translator()(tokens_BT).argmax(-1)
    scored_BT = targets_BT != -100
    return (predictions_BT == targets_BT)[scored_BT].double().mean().item()


def loss_of_one_step() -> tuple[float, float]:
    """Return the loss before and after one step of chapter 1's gradient descent, on one batch."""
    model, pairs = untrained(), batch(64, seed=0)
    before = gradient_step(model, 0.5, *pairs).item()
    return before, model.loss(*pairs).item()


@torch.no_grad()
def scores(x_TD: Tensor) -> Tensor:
    """Return scores_TS of a head of today's attention, with its first weights, between vectors."""
    length, width = x_TD.shape
    torch.manual_seed(0)
    attention = RotarySelfAttention(width, heads=1).double()
    cos_SK, sin_SK = rotary_table(length, width, 10_000.0)
    positions = Positions(x_TD[None, :, 0], None, (cos_SK.double(), sin_SK.double()))
    queries_BHTK, keys_BHTK = attention.queries_and_keys(x_TD[None], positions)
    return (queries_BHTK @ keys_BHTK.transpose(-1, -2) / width**0.5)[0, 0]


def rotary_scores() -> Tensor:
    """Return scores_TS of one and the same vector at 128 positions."""
    return scores(torch.ones(128, 16, dtype=torch.float64))


def largest_score(scale: float) -> float:
    """Return the largest score between ten random vectors of this scale."""
    x_TD = torch.randn(10, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return scores(scale * x_TD).abs().max().item()


@torch.no_grad()
def norms(mean: float) -> float:
    """Return how far RMSNorm is from LayerNorm on random vectors of this mean."""
    torch.manual_seed(0)
    x_BD = torch.randn(32, 64, dtype=torch.float64)
    x_BD = x_BD - x_BD.mean(-1, keepdim=True) + mean
    rms, layer = RMSNorm(64).double(), nn.LayerNorm(64, eps=1e-6).double()
    return (rms(x_BD) - layer(x_BD)).abs().max().item()


@torch.no_grad()
def rice_by_swiglu(cups: float, darkness: float) -> float:
    """Return chapter 2's law (2z + 2) x from a SwiGLU layer of two units, with weights by hand.

    silu(a) - silu(-a) = a, so two units whose gates are x and -x multiply x by anything.
    """
    layer = SwiGLU(3, 2).double()  # its inputs are x, z and 1
    layer.gate.weight.copy_(torch.tensor([[1.0, 0, 0], [-1, 0, 0]]))
    layer.up.weight.copy_(torch.tensor([[0.0, 2, 2], [0, 2, 2]]))
    layer.down.weight.copy_(torch.tensor([[1.0, -1], [0, 0], [0, 0]]))
    return layer(torch.tensor([cups, darkness, 1.0], dtype=torch.float64))[0].item()


@torch.no_grad()
def attention_of_translation() -> tuple[Tensor, list[str], list[str]]:
    """Return weights_HTS of the last block where it writes French, the words written, and those read."""
    french = continue_greedily(f"{SOURCE} =")
    read = [*SOURCE.split(), "=", *french[:-1]]
    maps = translator().xray(torch.tensor([encode(read)]))
    return maps[0].weights[0, -1][:, -len(french) :], french, read


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield "RMSNorm and LayerNorm, largest difference:"
    yield f"  vectors of mean 0: {norms(0):.1f}   of mean 3: {norms(3):.1f}"
    yield "A rotary score depends on the distance only:"
    for query, key in ((3, 1), (103, 101), (3, 2)):
        yield f"  query at {query:>3}, key at {key:>3}: {rotary_scores()[query, key].item():.3f}"
    yield "QK-norm: the largest score of vectors 1 and 1,000 times as long:"
    yield f"  {largest_score(1):.2f} and {largest_score(1000):.2f}; the bound is sqrt(16) = 4"
    yield "SwiGLU multiplies: chapter 2's law of rice by two units, 10 cups, far beyond any training:"
    for kind, darkness in (("white", 0.0), ("brown", 0.5)):
        yield f"  {kind} rice: {rice_by_swiglu(10, darkness):.0f} cups of water"
    before, after = loss_of_one_step()
    yield "One step of chapter 1's `gradient_step` on a GPT:"
    yield f"  loss {before:.2f}, then {after:.2f}"
    yield "A GPT of two blocks reads pairs as texts, English = French, and continues:"
    for source in (SOURCE, "a small dog and a green book"):
        yield f"  {source} = {' '.join(continue_greedily(f'{source} ='))}"
    yield f"Of the French words of 256 new pairs it predicts {share_translated():.0%}."


def attention() -> Sequence[Panel]:
    """Chapter 15: what each head of the last block looks at while it writes a translation."""
    weights_HTS, written, read = attention_of_translation()
    return [
        Heatmap(
            weights_TS,
            "looks at",
            "writes",
            written,
            read,
            title=f"last block, head {head}",
            colorbar_label="weight",
            max_value=1.0,
        )
        for head, weights_TS in enumerate(weights_HTS, 1)
    ]


FIGURES = (attention,)
