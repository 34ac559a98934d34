"""Small translators of chapters 11 to 13, trained on the generated sentence pairs, word by word."""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

from gpt.beam_search import translate
from gpt.models.encoder_decoder import EncoderDecoder
from training.data.toy_pairs import Pair, toy_pairs
from training.plots.panels import Heatmap
from training.tasks.translation import PairSplit

ModelT = TypeVar("ModelT", bound=EncoderDecoder)

EOS = 0
"""Starts and ends a sentence."""
MAX_WORDS = 30
"""Words of a sentence, with its end, at most."""
BATCH_SIZE = 64


@functools.cache
def vocabulary() -> list[str]:
    """Return the words of both languages; a word's index is its token."""
    pairs = (pair for split in toy_pairs().values() for pair in split)
    return ["<eos>", *sorted({word for pair in pairs for text in pair for word in text.split()})]


@functools.cache
def _token_of() -> dict[str, int]:
    return {word: token for token, word in enumerate(vocabulary())}


def encode(sentence: str) -> list[int]:
    """Return the tokens of a sentence."""
    return [_token_of()[word] for word in sentence.split()]


def decode(tokens: Sequence[int]) -> str:
    """Return the sentence of some tokens."""
    return " ".join(vocabulary()[token] for token in tokens)


def train(build: Callable[[int, int], ModelT], steps: int, learning_rate: float) -> ModelT:
    """Train a model, made from a vocabulary size and a context length, on the toy pairs.

    AdamW, with a learning rate that falls to zero.
    """
    sentences = [encode(text) for pair in toy_pairs()["train"] for text in pair]
    pairs = PairSplit(np.concatenate([[EOS, *tokens] for tokens in sentences]), EOS)
    order = pairs.sort_by_length(np.arange(len(pairs)))
    batches = np.array_split(order, len(order) // BATCH_SIZE)
    random = np.random.default_rng(0)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = build(len(vocabulary()), MAX_WORDS).double()
        optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.98))
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min((step + 1) / 20, 1 - step / steps)
            batch = map(torch.from_numpy, pairs.batch(batches[random.integers(len(batches))]))
            optimizer.zero_grad()
            model.loss(*batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model.eval()


def translate_sentences(model: EncoderDecoder, sentences: Sequence[str]) -> list[str]:
    """Return the translations of English sentences, the likeliest word at each step."""
    sources = [encode(sentence) for sentence in sentences]
    options = {"decoder_start_token": EOS, "eos_token": EOS, "max_tokens": MAX_WORDS}
    return [decode(tokens) for tokens in translate(model, sources, **options)]


def exact_matches(model: EncoderDecoder, pairs: Sequence[Pair]) -> float:
    """Return the share of pairs that a model translates without any difference."""
    translations = translate_sentences(model, [en for en, _ in pairs])
    equal = [output == fr for output, (_, fr) in zip(translations, pairs, strict=True)]
    return sum(equal) / len(equal)


@torch.no_grad()
def attention_over_source(
    model: EncoderDecoder, sentence: str, kind: str
) -> tuple[list[str], torch.Tensor]:
    """Return a model's translation and what it looks at: weights_LHTS of the kind, as it writes.

    The words of the translation are followed by its end. `kind` is the start of the name of one of
    the model's activation maps.
    """
    source, [translation] = encode(sentence), translate_sentences(model, [sentence])
    written = encode(translation)
    batch = torch.tensor([source]), torch.tensor([len(source)]), torch.tensor([[EOS, *written]])
    [activation] = [each for each in model.xray(*batch) if each.name.startswith(kind)]
    return [*translation.split(), "end"], activation.weights[0]


def attention_panel(
    sentence: str, words: Sequence[str], weights_TS: torch.Tensor, title: str = ""
) -> Heatmap:
    """Return a panel of attention weights: a row for each word that is written."""
    labels = [[f"{w:.1f}"[1:] if w < 0.95 else "1" for w in row] for row in weights_TS.tolist()]
    labels = [["" if label == ".0" else label for label in row] for row in labels]
    axes = "looks at", "when it writes"
    return Heatmap(weights_TS, *axes, list(words), sentence.split(), labels, title)
