"""Chapter 12: look back at every encoder state."""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

from gpt.models.seq2seq import Seq2SeqAttention
from training.chapters.encoder_decoder import (
    LENGTHS,
    SENTENCES,
    matches_by_length,
    trained_seq2seq,
)
from training.chapters.toy_translation import (
    attention_over_source,
    attention_panel,
    encode,
    train,
)
from training.plots.panels import BLUE, GREY, LinePlot, Panel, Series

SCORES = torch.tensor([0.31, 0.85, 0.24])
"""How well "I", "love" and "cats" match what the decoder needs before it writes "J'aime"."""
ALIGNED = "I love cats", "We do not see the black cat"
VERBS = {"love": "aiment", "like": "aiment", "see": "voient", "hear": "entendent"}
"""English verbs, and their French forms after ils."""


@functools.cache
def trained_attention() -> Seq2SeqAttention:
    """Return a translator that looks back at every encoder state."""
    return train(lambda *sizes: Seq2SeqAttention(*sizes, width=64), 400, 0.01)


@torch.no_grad()
def verb_states(model: Seq2SeqAttention) -> dict[str, torch.Tensor]:
    """Return the encoder's state at each of the verbs, after "They" and before "cats"."""
    sources = [encode(f"They {verb} cats") for verb in VERBS]
    lengths_B = torch.full((len(sources),), 3)
    states_BD = model.encode(torch.tensor(sources), lengths_B)["memory"][:, 1]
    return dict(zip(VERBS, states_BD, strict=True))


@torch.no_grad()
def written_by(model: Seq2SeqAttention, state_D: torch.Tensor, word: str) -> float:
    """Return the cosine between what an encoder state adds to the features and a word's output vector.

    `readout` takes the decoder's state, the context and the last word; the context's columns bring
    encoder states into the space of the output vectors.
    """
    width = model.width
    added_D = model.readout.weight[:, width : 3 * width] @ state_D
    return F.cosine_similarity(added_D, model.unembedding.weight[encode(word)[0]], dim=0).item()


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield "I love cats: before it writes J'aime, the decoder scores the three encoder states."
    weights = SCORES.softmax(0).tolist()
    for word, score, weight in zip(("I", "love", "cats"), SCORES.tolist(), weights, strict=True):
        yield f"  {word:<5} score {score:.2f}   weight {weight:.2f}"
    model = trained_attention()
    yield "A trained model, and what it looks at most for each word that it writes:"
    for sentence in SENTENCES:
        words, weights_LHTS = attention_over_source(model, sentence, "alignment")
        looked_at = [sentence.split()[index] for index in weights_LHTS[0, 0].argmax(dim=-1)]
        pairs = zip(words[:-1], looked_at[:-1], strict=True)
        yield "  " + ", ".join(f"{word} ({source})" for word, source in pairs)
    yield "Sentences without an error, by length:    one vector   attention"
    shares = matches_by_length(trained_seq2seq()), matches_by_length(model)
    for name in LENGTHS:
        one_vector, attention = (each[name] for each in shares)
        yield f"  {name:<40} {one_vector:9.0%}   {attention:9.0%}"
    yield "Similar meanings, similar states: cosines of the encoder's states at"
    states = verb_states(model)
    for other in ("like", "see", "hear"):
        cosine = F.cosine_similarity(states["love"], states[other], dim=0).item()
        yield f"  love and {other:<5} {cosine:5.2f}"
    yield "What the state at a verb makes the model write: cosines with output words"
    french = list(dict.fromkeys(VERBS.values()))
    yield f"  {'':<5} {''.join(f'{word:>11}' for word in french)}"
    for verb, state in states.items():
        cosines = (written_by(model, state, word) for word in french)
        yield f"  {verb:<5} {''.join(f'{cosine:11.2f}' for cosine in cosines)}"


def alignment() -> Sequence[Panel]:
    """Chapter 12: how much each source word mattered to each word of a translation."""
    panels = []
    for sentence in ALIGNED:
        words, weights_LHTS = attention_over_source(trained_attention(), sentence, "alignment")
        panels.append(attention_panel(sentence, words, weights_LHTS[0, 0]))
    return panels


def bottleneck() -> Sequence[Panel]:
    """Chapter 12: translations without an error by sentence length, with and without attention."""
    middles = torch.tensor([sum(borders) / 2 for borders in LENGTHS.values()])
    series = [
        Series(
            middles,
            torch.tensor([100 * share for share in shares.values()]),
            color,
            label,
            label_index=1,
            label_offset=(8, 8),
        )
        for shares, color, label in (
            (matches_by_length(trained_attention()), BLUE, "attention"),
            (matches_by_length(trained_seq2seq()), GREY, "one vector"),
        )
    ]
    return [LinePlot("words (middle of the group)", "translated without an error (%)", series)]


FIGURES: Sequence[Callable[[], Sequence[Panel]]] = (alignment, bottleneck)
