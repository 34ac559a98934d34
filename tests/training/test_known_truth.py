"""The language of known entropy: its documents, their exact probability, and it as a source of data."""

import dataclasses
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gpt import LanguageModel, State
from gpt.models import attention
from training.config import TrainingConfig
from training.data import known_truth
from training.data.known_truth import arcs, document_nll, generate_documents
from training.data.prepare import prepare_corpus
from training.data.sources import Source
from training.evaluation import ladder
from training.evaluation.evaluate import evaluate
from training.plots.curves import plot_ladder
from training.tasks import open_task
from training.trainer import Trainer

SYMBOLS = [*known_truth.NAMES, *known_truth.LETTERS, *"()[]{}"]
OPTIONS = {"data": "known-truth", "tokenizer": "characters", "device": "cpu"}


@pytest.fixture(autouse=True)
def small_splits(cache, monkeypatch):
    monkeypatch.setattr(known_truth, "SPLIT_SIZES", {"train": 400, "validation": 40})
    monkeypatch.setattr("training.data.prepare.SPLIT_SIZES", known_truth.SPLIT_SIZES)


def probability(text, is_whole=True):
    return math.exp(-document_nll(text, is_whole))


def all_paths(text):
    """The probability of a document, as the sum over all paths of hidden states."""
    paths = [(1.0, None)]
    for symbol in [*text, known_truth.END]:
        paths = [
            (p * arc.probability, arc.state)
            for p, state in paths
            for arc in arcs(state)
            if arc.symbol == symbol
        ]
    return sum(p for p, _ in paths)


def test_documents_repeat_their_name_and_close_their_brackets():
    documents = list(itertools.islice(generate_documents("seed"), 150))
    assert documents == list(itertools.islice(generate_documents("seed"), 150))
    assert documents != list(itertools.islice(generate_documents("other"), 150))
    for text in documents:
        assert set(re.findall("[A-Z]", text)) == {text[0]}
        brackets = re.sub(r"\w", "", text)
        while (shorter := re.sub(r"\(\)|\[\]|\{\}", "", brackets)) != brackets:
            brackets = shorter
        assert not brackets
    assert max(map(len, documents)) > 256 > np.median([len(text) for text in documents]) > 16


@pytest.mark.parametrize("text", ["A", "Aabc", "Bgfe(fg)B", "H[{a}]cb"])
def test_forward_algorithm_equals_the_sum_over_all_paths(text):
    assert probability(text) == pytest.approx(all_paths(text), rel=1e-12)


@pytest.mark.parametrize("text", ["", "C", "Cab", "Cab(", "Cab([{d"])
def test_probabilities_of_the_next_symbol_sum_to_one(text):
    following = sum(probability(text + symbol, is_whole=False) for symbol in SYMBOLS)
    assert following + probability(text) == pytest.approx(probability(text, is_whole=False))


@pytest.mark.parametrize("text", ["", "a", "AB", "A(]", "A)", "A(", "A(((("])
def test_what_is_not_in_the_language_has_probability_0(text):
    assert document_nll(text) == math.inf


class Oracle(LanguageModel):
    """Predicts the next token with its probability under the true source."""

    def __init__(self, task, context_length):
        super().__init__(task.tokenizer.vocab_size, context_length)
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.eos_token = task.tokenizer.eos_token
        self.symbols = {task.tokenizer.encode(s)[0]: s for s in SYMBOLS} | {self.eos_token: ""}

    def features(self, tokens_BT: Tensor, state: State | None = None) -> Tensor:
        logprobs_BTV = torch.full((*tokens_BT.shape, self.vocab_size), -torch.inf).double()
        for logprobs_TV, tokens_T in zip(logprobs_BTV, tokens_BT.tolist(), strict=True):
            after = {}
            for logprobs_V, token in zip(logprobs_TV, tokens_T, strict=True):
                if token == self.eos_token:
                    belief = {None: 1.0}
                else:
                    belief = after[self.symbols[token]]
                    total = sum(belief.values())
                    belief = {s: p / total for s, p in belief.items()}
                after = self.next_beliefs(belief)
                for token_after, symbol in self.symbols.items():
                    if symbol in after:
                        logprobs_V[token_after] = math.log(sum(after[symbol].values()))
        return logprobs_BTV

    def next_beliefs(self, belief):
        beliefs = {}
        for state, p in belief.items():
            for arc in arcs(state):
                of_symbol = beliefs.setdefault(arc.symbol, {})
                of_symbol[arc.state] = of_symbol.get(arc.state, 0.0) + p * arc.probability
        return beliefs

    def logits(self, features_BTD: Tensor) -> Tensor:
        return features_BTD + self.weight


@pytest.mark.parametrize("tokenizer", ["characters", "bytes"])
def test_the_true_source_is_scored_at_the_exact_entropy(tokenizer):
    task = open_task(TrainingConfig(data="known-truth", tokenizer=tokenizer))
    split = task.parts[0].corpus.splits["validation"]
    truth = task.entropy("validation")
    score = evaluate(Oracle(task, len(split.tokens)), split.tokens).score(1, 1)
    assert score.tokens == len(split.tokens) - 1 > 2000
    assert score.loss == pytest.approx(truth.nats_per_token, abs=1e-6)
    assert 0.01 < truth.standard_error < 0.1
    row = {"rung": "oracle", "tokens_scored": score.tokens, "loss": score.loss}
    assert ladder.find_leaks([row | {"truth": truth.nats_per_token}]) == []
    assert f"the truth: {truth.nats_per_token:.4f} nats per validation token" in task.sizes


def test_entropy_of_the_text_does_not_depend_on_the_tokens():
    totals = []
    for tokenizer in ("characters", "bpe"):
        task = open_task(TrainingConfig(data="known-truth", tokenizer=tokenizer, vocab_size=300))
        scored = len(task.parts[0].corpus.splits["validation"].tokens) - 1
        totals.append(task.entropy("validation").nats_per_token * scored)
    assert totals[0] == pytest.approx(totals[1], rel=1e-12)


def test_chance_is_no_leak():
    row = {"rung": "gpt", "tokens_scored": 1000, "truth": 1.6, "loss": 1.59}  # 10 nats in all
    assert ladder.find_leaks([row]) == []
    assert ladder.find_leaks([row | {"loss": 1.58}]) == ["gpt"]


def test_a_look_ahead_in_the_mask_falls_below_the_truth(monkeypatch, tmp_path):
    class LeakyPositions(attention.Positions):
        def __init__(self, tokens_BT, state, rotary=None):
            super().__init__(tokens_BT, state, rotary)
            if state is None:
                self.mask_B1TS = torch.ones(2 * tokens_BT.shape[1:]).tril(1).bool()

    small = {"width": 32, "depth": 2, "heads": 2}
    preset = dataclasses.replace(ladder.RUNG_PRESETS["gpt"], model_args=small)
    monkeypatch.setitem(ladder.RUNG_PRESETS, "gpt", preset)
    fields = OPTIONS | {"context_length": 32}
    rows = {}
    for name, tokens in {"honest": 5000, "leaky": 28_000}.items():
        if name == "leaky":
            monkeypatch.setattr("gpt.models.gpt.Positions", LeakyPositions)
        rows[name] = ladder.run_ladder(
            tmp_path / name, ["gpt"], fields, tokens, None, Trainer.train
        )
    assert ladder.find_leaks(rows["honest"]) == []
    assert ladder.find_leaks(rows["leaky"]) == ["gpt"]
    (row,) = rows["honest"]
    assert row["truth"] < row["loss"]
    table = ladder.format_table([row])
    gap = row["loss"] - row["truth"]
    assert f"| {row['bits_per_byte']:.4f} | +{gap:.4f} (+{gap / row['truth']:.1%}) |" in table
    assert f"The truth is {row['truth']:.4f} nats per token" in table
    assert json.loads((tmp_path / "honest" / "gpt" / "rung.json").read_text()) == row
    plot_ladder([row], tmp_path / "ladder.svg")
    assert "the truth" in (tmp_path / "ladder.svg").read_text()


def test_the_corpus_is_cached(cache):
    first = prepare_corpus(Source("known-truth"), "bytes", 0)
    assert {
        name: split.documents for name, split in first.splits.items()
    } == known_truth.SPLIT_SIZES
    assert first.description.startswith("known-truth: documents of a hidden Markov model")
    assert prepare_corpus(Source("known-truth"), "bytes", 0).directory == first.directory


@pytest.mark.parametrize(
    ("options", "sentence_pairs", "message"),
    [
        ({}, True, "known-truth: no column 'translation' of sentence pairs"),
        ({"column": "body"}, False, "known-truth has no column 'body' of strings"),
        ({"config": "small"}, False, "--data-config is only for hub datasets"),
    ],
)
def test_options_that_do_not_apply_are_errors(options, sentence_pairs, message):
    with pytest.raises(ValueError, match=message):
        prepare_corpus(Source("known-truth", **options), "bytes", 0, sentence_pairs=sentence_pairs)
