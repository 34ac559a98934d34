"""Several sources mixed by weight: how they are named, what is drawn, and what is scored."""

import dataclasses
import json
from fractions import Fraction

import numpy as np
import pytest
import torch

from gpt.checkpoint import build_model
from tests.training.helpers import read_log
from tests.training.test_trainer import TINY, assert_resumed_equals_uninterrupted
from tokenizer import byte_tokenizer, train_words
from training.config import TrainingConfig
from training.data.corpus import CorpusWriter, Part, ShuffledWindows, TextChunk, open_corpus
from training.data.mixture import MixedWindows, Mixture, join_data_options, parse_data
from training.distributed import World
from training.tasks.text import Text, WordVectors, load_texts
from training.tasks.translation import Translation

pytestmark = pytest.mark.usefixtures("cache")

WEIGHTS = (["0.7", "0.3"], ["1/3", "2/3"], ["0.5", "0.25", "0.15", "0.1"], ["0.99", "0.01"], ["1"])


def shares_of(data):
    return [(source.data, source.share) for source in parse_data(data)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("a.txt:0.7 b.txt:0.3", [("a.txt", "7/10"), ("b.txt", "3/10")]),
        ("a:7 b:3", [("a", "7/10"), ("b", "3/10")]),
        ("a/b:1e-1 c/d:.3", [("a/b", "1/4"), ("c/d", "3/4")]),
        (r"C:\a\b.txt:1 D:\c.txt:1", [(r"C:\a\b.txt", "1/2"), (r"D:\c.txt", "1/2")]),
        ("'my text.txt:1' x:2024.txt:3", [("my text.txt", "1/4"), ("x:2024.txt", "3/4")]),
        ("a.txt:0.7", [("a.txt", "1")]),
        *((name, [(name, "1")]) for name in ("stdlib", "owner/name", r"C:\a.txt", "it's.txt", "a b", "")),
    ],
)  # fmt: skip
def test_sources_and_their_shares(data, expected):
    assert shares_of(data) == [(name, Fraction(share)) for name, share in expected]


def test_a_file_that_exists_is_one_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:1 b:2").touch()
    (tmp_path / "a:0.5").touch()
    assert shares_of("a:1 b:2") == [("a:1 b:2", 1)]
    assert shares_of("a:0.5") == [("a:0.5", 1)]
    assert shares_of("a:0.5:1 c:1") == [("a:0.5", Fraction(1, 2)), ("c", Fraction(1, 2))]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a:0.7 b", "b: no such file, or no weight: .*--data a.txt:0.7 --data b.txt:0.3"),
        ("a:0 b:1", "a:0: a weight must be a number above 0, not 0: .*leave it out"),
        ("a:1 b:-0.5", "b:-0.5: a weight must be a number above 0"),
        ("a:nan b:1", "above 0, not nan"),
        ("a:inf b:1", "above 0, not inf"),
        ("a:1e999999999 b:1", "above 0, not 1e999999999"),
        ("a:1 b:1 a:2", "a is in --data twice: give it once"),
        ("./.:1 .:1", r"\. is in --data twice"),
    ],
)
def test_weights_that_say_nothing_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        parse_data(data)


def test_several_data_options_become_one():
    joined = join_data_options(["train", "--data", "a b:1", "--steps", "2", "--data=c:3"])
    assert joined == ["train", "--data", "'a b:1' c:3", "--steps", "2"]
    assert shares_of(joined[2]) == [("a b", Fraction(1, 4)), ("c", Fraction(3, 4))]
    for alone in (
        ["train"],
        ["train", "--data", "a b"],
        ["train", "--data=x"],
        ["train", "--data"],
    ):
        assert join_data_options(alone) == alone
    with pytest.raises(ValueError, match=r"a\.txt: no such file, or no weight"):
        join_data_options(["--data", "a.txt", "--data", "b.txt"])


def mixed_windows(weights, length=1000, context_length=4, batch_size=10, seed=0):
    """Windows of texts whose tokens tell which text and which place they are from."""
    texts = [np.arange(length, dtype=np.uint32) + 10_000 * i for i in range(len(weights))]
    windows = [ShuffledWindows(text, context_length, batch_size, seed) for text in texts]
    return MixedWindows(windows, [Fraction(weight) for weight in weights])


@pytest.mark.parametrize("weights", WEIGHTS, ids=" ".join)
def test_shares_of_the_draws_are_the_weights(weights):
    mixed = mixed_windows(weights)
    counts = np.zeros(len(weights), int)
    for number in range(1000):
        text, earlier = mixed.draw(number)
        assert earlier == counts[text]  # each text's windows are used in their order, none twice
        counts[text] += 1
        off = counts - (number + 1) * np.array([float(Fraction(weight)) for weight in weights])
        assert abs(off).max() <= 1
    drawn = [batch // 10_000 for k in range(100) for batch in mixed.batch(k)[0][:, 0]]
    assert np.bincount(drawn, minlength=len(weights)).tolist() == counts.tolist()
    assert counts / 1000 == pytest.approx(
        [float(Fraction(weight)) for weight in weights], abs=0.001
    )


def test_shares_are_exact_after_very_many_draws():
    mixed = mixed_windows(["0.7", "0.3"])
    assert mixed.draw(10**30)[1] == 7 * 10**29


def test_batches_depend_on_seed_and_index_only():
    mixed = mixed_windows(["0.6", "0.4"])
    batches = [mixed.batch(k) for k in range(60)]
    resumed = mixed_windows(["0.6", "0.4"])
    for k in (59, 0, 31, 7):
        for arrays in zip(resumed.batch(k), batches[k], strict=True):
            assert (arrays[0] == arrays[1]).all()
    assert all((targets == tokens + 1).all() for tokens, targets in batches)
    assert not (mixed_windows(["0.6", "0.4"], seed=1).batch(0)[0] == batches[0][0]).all()
    # An epoch of a text has each of its windows once: 248 windows in the first 413 draws.
    starts = [start for tokens, _ in batches for start in tokens[:, 0] if start < 10_000]
    assert len(set(starts[:248])) == 248


def test_ranks_see_disjoint_rows_of_every_batch():
    tokens, _ = mixed_windows(["0.7", "0.3"]).batch(0)
    rows = [set(tokens[World(rank, 3).local_slice(10)][:, 0].tolist()) for rank in range(3)]
    assert sum(map(len, rows)) == len(set.union(*rows)) == 10
    assert all(any(start >= 10_000 for start in part) for part in rows)


def write(folder, letters, num_lines, tokenizer=None):
    writer = CorpusWriter(folder, tokenizer or byte_tokenizer())
    rng = np.random.default_rng(num_lines)
    for split, count in (("train", num_lines), ("validation", num_lines // 5)):
        lines = [" ".join(rng.choice(list(letters), 12)) + "\n" for _ in range(count)]
        writer.write(split, [TextChunk(line, True) for line in lines])
    writer.close(f"lines of {letters}")
    return open_corpus(folder)


@pytest.fixture
def mixture(tmp_path):
    folders = {name: tmp_path / name for name in ("ab", "cdef")}
    for folder in folders.values():
        folder.mkdir()
    corpora = [write(folders["ab"], "ab", 100), write(folders["cdef"], "cdef", 300)]
    shares = Fraction(3, 4), Fraction(1, 4)
    parts = map(Part, folders, shares, corpora)
    return Mixture(tuple(parts), Fraction(1))


@pytest.mark.parametrize("stop_step", [3, 8])
def test_a_resumed_run_on_a_mixture_equals_an_undisturbed_one(mixture, tmp_path, stop_step):
    task = Text(TINY, mixture)
    assert_resumed_equals_uninterrupted(TINY, task, stop_step, tmp_path)
    line = next(line for line in read_log(tmp_path / "resumed") if "validation_losses" in line)
    ab, cdef = (line["validation_losses"][name] for name in ("ab", "cdef"))
    assert line["validation_loss"] == pytest.approx(0.75 * ab + 0.25 * cdef)
    task.source_losses = line["validation_losses"]
    assert f"(ab {ab:.4f}; cdef {cdef:.4f})" in task.format_loss(line["validation_loss"])


def test_each_source_is_scored_and_the_mixture_is_their_mean(mixture):
    config = dataclasses.replace(TINY, model="softmax", model_args={}, precision="float32")
    task = Text(config, mixture)
    assert len(task.calibration_tokens) == sum(
        len(part.corpus.splits["validation"].tokens) for part in mixture.parts
    )
    torch.manual_seed(0)
    model = build_model("softmax", {"vocab_size": 257, "context_length": 16})
    score = task.score(model, "validation", final=True)
    alone = [Text(config, part.corpus).score(model, "validation") for part in mixture.parts]
    loss = 0.75 * alone[0].loss + 0.25 * alone[1].loss
    assert score.loss == pytest.approx(loss)
    tokens_per_byte = sum(s * x.bytes / x.tokens for s, x in zip((0.75, 0.25), alone, strict=True))
    report = score.to_json()
    assert report["bits_per_byte"] == pytest.approx(loss / np.log(2) / tokens_per_byte)
    assert report["sources"]["cdef"]["share"] == 0.25
    assert report["sources"]["cdef"]["loss"] == pytest.approx(alone[1].loss)
    assert report["sources"]["ab"]["compressors"]
    json.dumps(report)
    assert f"25.00% cdef\n  loss             {alone[1].loss:.4f}" in score.table()
    assert f"bits per byte    {report['bits_per_byte']:.4f}" in score.table().split("75.00%")[0]


def test_what_is_told_of_a_mixture(mixture):
    task = Text(dataclasses.replace(TINY, steps=100), mixture)
    assert task.description == "mixture by weight of tokens: 75.00% ab, 25.00% cdef"
    # 100 steps of 4 windows of 16, three quarters of them from 2,500 tokens.
    assert task.sizes[0] == "75.00% lines of ab; its training split is read 1.9 times"
    typed = dataclasses.replace(mixture, weights_sum=Fraction(4)).description
    assert typed.endswith("25.00% cdef (weights divided by their sum, 4)")
    other = dataclasses.replace(mixture, parts=mixture.parts[::-1])
    assert len({mixture.fingerprint, other.fingerprint, mixture.parts[0].corpus.fingerprint}) == 3


def test_what_a_mixture_cannot_do_is_refused(mixture, tmp_path):
    stateful = dataclasses.replace(TINY, stateful=True, gradient_accumulation_steps=1)
    with pytest.raises(ValueError, match="--stateful reads one text from its start to its end"):
        Text(stateful, mixture)
    with pytest.raises(
        ValueError, match=r"^ab: the training split has .* a smaller --context-length"
    ):
        Text(dataclasses.replace(TINY, context_length=3000), mixture)
    data = f"{tmp_path / 'ab'}:1 {tmp_path / 'cdef'}:1"
    with pytest.raises(ValueError, match="a mixture is of text"):
        Translation.open(TrainingConfig(task="translation", data=data), None, True)


def test_word_vectors_of_a_mixture(tmp_path):
    tokenizer = train_words([f" {letter}" for letter in "abcdef"] + ["\n"], 20)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    corpora = (
        write(tmp_path / "one", "ab", 60, tokenizer),
        write(tmp_path / "two", "cd", 90, tokenizer),
    )
    parts = tuple(map(Part, ("one", "two"), (Fraction(2, 3), Fraction(1, 3)), corpora))
    config = TrainingConfig(
        model="word2vec", task="word-vectors", batch_size=3, context_length=8, precision="float32"
    )
    model = build_model("word2vec", {"vocab_size": tokenizer.vocab_size, "width": 8, "window": 2})
    task = WordVectors(config, Mixture(parts, Fraction(1)))
    scores = [WordVectors(config, corpus).score(model, "validation") for corpus in corpora]
    score = task.score(model, "validation")
    assert score.loss == pytest.approx(2 / 3 * scores[0].loss + 1 / 3 * scores[1].loss)
    assert score.pairs == scores[0].pairs + scores[1].pairs
    assert task.validate(model) > 0


def test_one_tokenizer_is_trained_on_the_mixture_by_its_shares(tmp_path, monkeypatch):
    monkeypatch.setattr("training.data.prepare.MAX_TOKENIZER_BYTES", 1000)
    (tmp_path / "a.txt").write_text("ab " * 2000)
    (tmp_path / "c.txt").write_text("cd " * 2000)
    config = TrainingConfig(
        data=f"{tmp_path / 'a.txt'}:0.9 {tmp_path / 'c.txt'}:0.1", tokenizer="words", vocab_size=3
    )
    seen = []
    train = dict.fromkeys(
        ["words"], lambda texts, size: seen.extend(texts) or train_words(seen, size)
    )
    monkeypatch.setattr("training.data.prepare.TOKENIZER_TRAINERS", train)
    mixture = load_texts(config, None, True)
    text = "".join(seen)
    assert (text.count("ab"), text.count("cd")) == (300, 33)
    assert len({part.corpus.tokenizer.fingerprint for part in mixture.parts}) == 1
    assert load_texts(config, None, True).fingerprint == mixture.fingerprint
    assert load_texts(config, mixture.tokenizer, True).fingerprint == mixture.fingerprint
    assert len(seen) == 2  # it was trained once


def test_text_is_mixed_with_prepared_tokens_by_their_tokenizer(tmp_path):
    (tmp_path / "ab").mkdir()
    tokenizer = train_words([" a b c\n"], 20)
    write(tmp_path / "ab", "ab", 50, tokenizer)
    (tmp_path / "c.txt").write_text("a b c\n" * 90)
    config = TrainingConfig(data=f"{tmp_path / 'ab'}:1 {tmp_path / 'c.txt'}:1")
    assert Text.expected_model_args(config)["vocab_size"] == tokenizer.vocab_size
    mixture = load_texts(config, None, True)
    assert mixture.parts[1].corpus.tokenizer.fingerprint == tokenizer.fingerprint
    with pytest.raises(ValueError, match=r"ab holds prepared tokens.*leave out --tokenizer"):
        Text.expected_model_args(dataclasses.replace(config, tokenizer="bytes"))
    with pytest.raises(ValueError, match="another tokenizer than the one given"):
        load_texts(config, byte_tokenizer(), True)
