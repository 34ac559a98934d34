"""Pairs of sentences: every one learned once an epoch, all of them scored."""

import math

import numpy as np
import pytest
import sacrebleu
import torch
from torch import Tensor

from gpt import GPT, LanguageModel
from gpt.models.seq2seq import Seq2SeqAttention
from tokenizer import byte_tokenizer, train_bpe, train_words
from training.config import TrainingConfig
from training.data.corpus import CorpusWriter, TextChunk, open_corpus
from training.tasks.translation import Pairs, TranslationScore

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token
FEW = [
    ("one dog", "un chien"), ("two dogs", "deux chiens"), ("a cat", "un chat"),
    ("the cat sleeps", "le chat dort bien ici"), ("a man runs to the dog", "un homme court vers le chien"),
    ("she sees it", "elle le voit très bien"), ("a red hat", "un chapeau rouge"), ("it rains", "il pleut"),
]  # fmt: skip


def corpus_of(folder, tokenizer=TOKENIZER, **splits):
    folder.mkdir(exist_ok=True)
    writer = CorpusWriter(folder, tokenizer)
    for name, pairs in splits.items():
        writer.write(name, [TextChunk(source, True, target) for source, target in pairs])
    writer.close("pairs", ("en", "fr"))
    return open_corpus(folder, pairs=True)


@pytest.fixture
def few(tmp_path):
    return corpus_of(tmp_path, train=FEW, validation=FEW, test=FEW[:3])


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    random = np.random.default_rng(0)
    lengths = random.integers(1, 30, (1003, 2))
    pairs = [(f"{i} " + "s" * a, f"{i} " + "t" * b) for i, (a, b) in enumerate(lengths)]
    return corpus_of(tmp_path_factory.mktemp("many"), train=pairs, validation=pairs[:50])


def pairs_in(batch):
    """The texts of a batch, its padding checked."""
    source_BS, lengths_B, tokens_BT, targets_BT = batch
    assert {array.dtype for array in batch} == {np.dtype(np.int64)}
    assert source_BS.shape[1] == max(lengths_B)
    assert tokens_BT.shape == targets_BT.shape
    found = []
    for source, length, tokens, targets in zip(*batch, strict=True):
        assert not source[length:].any()
        end = targets.tolist().index(END)
        assert (targets[end + 1 :] == -100).all()
        assert not tokens[end + 1 :].any()
        assert tokens[0] == END
        assert (tokens[1 : end + 1] == targets[:end]).all()
        found.append((TOKENIZER.decode(source[:length]), TOKENIZER.decode(targets[:end])))
    assert (targets_BT[:, -1] != -100).any()
    return found


def test_a_batch_is_the_pairs_padded(few):
    task = Pairs(TrainingConfig(context_length=64, batch_size=8), few)
    assert sorted(pairs_in(task.batch(0))) == sorted(FEW)
    assert task.model_args == {"vocab_size": 257, "context_length": 64}
    assert task.sizes[1].startswith("train: 8 pairs, ")
    assert "en to fr" in task.description


@pytest.mark.parametrize("rows", [1, 7, 64, 2000])
def test_every_pair_once_an_epoch(many, rows):
    task = Pairs(TrainingConfig(context_length=96, batch_size=rows), many)
    assert task.epoch >= math.ceil(1003 / rows)
    for epoch in range(2):
        found = []
        for index in range(epoch * task.epoch, (epoch + 1) * task.epoch):
            batch = task.batch(index)
            assert rows - 2 <= len(batch[0]) <= rows or rows == 2000
            found += pairs_in(batch)
        assert len(found) == len(set(found)) == 1003


def test_a_batch_depends_on_seed_and_index_only(many):
    def batches(indices, seed=0):
        task = Pairs(TrainingConfig(context_length=96, batch_size=50, seed=seed), many)
        return {index: pairs_in(task.batch(index)) for index in indices}

    straight = batches(range(60))
    assert batches([59, 3, 25, 0]) == {index: straight[index] for index in (59, 3, 25, 0)}
    assert batches(range(3), seed=1) != {index: straight[index] for index in range(3)}
    assert len({tuple(pairs) for pairs in straight.values()}) == 60


def test_little_of_a_batch_is_padding(many):
    task = Pairs(TrainingConfig(context_length=96, batch_size=16), many)
    targets = np.concatenate([task.batch(index)[3].ravel() for index in range(task.epoch)])
    assert (targets == -100).mean() < 0.03
    lengths = [task.batch(index)[3].shape[1] for index in range(task.epoch)]
    assert np.abs(np.diff(lengths)).mean() > 3  # Not from the shortest to the longest.


def test_pairs_too_long_for_a_window_are_left_out_and_counted(few):
    fits = [pair for pair in FEW if max(len(pair[0]), len(pair[1].encode()) + 1) <= 12]
    task = Pairs(TrainingConfig(context_length=24, batch_size=8), few)
    assert sorted(pairs_in(task.batch(0))) == sorted(fits)
    assert f"{len(FEW) - len(fits)} pairs longer than half a window are left out" in task.sizes[1]
    model = GPT(257, 24, width=16, depth=1, heads=1)
    assert task.score(model, "validation").too_long == len(FEW) - len(fits)
    with pytest.raises(
        ValueError, match="none of the pairs of the train split fits into a window of 8"
    ):
        Pairs(TrainingConfig(context_length=8), few)


def test_any_two_pairs_of_a_window_fit_one_batch(tmp_path):
    long = [("a" * 16, "b"), ("a", "b" * 15)]
    task = Pairs(
        TrainingConfig(context_length=32, batch_size=2),
        corpus_of(tmp_path, train=long, validation=long),
    )
    batch = [torch.from_numpy(array) for array in task.batch(0)]
    assert len(batch[0]) == 2
    assert GPT(257, 32, width=16, depth=1, heads=1).loss(*batch).isfinite()


def test_what_it_refuses(few, tmp_path):
    with pytest.raises(ValueError, match="was prepared from en to fr: leave out --languages"):
        Pairs(TrainingConfig(context_length=64, languages="fr-en"), few)
    words = train_words(["un chien"], 300)
    lossy = corpus_of(tmp_path / "words", words, train=FEW, validation=FEW)
    with pytest.raises(ValueError, match="--tokenizer bpe or bytes"):
        Pairs(TrainingConfig(context_length=64), lossy)
    model = GPT(257, 64, width=16, depth=1, heads=1)
    with pytest.raises(ValueError, match="--num-beams must be at least 1, not 0"):
        Pairs(TrainingConfig(context_length=64), few).score(model, "test", beams=0)


class Parrot(LanguageModel):
    """Writes the source; likelier than not, so that its loss is known."""

    def __init__(self, context: int) -> None:
        super().__init__(257, context)
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def start(self, source_BS: Tensor, lengths_B: Tensor) -> dict[str, Tensor]:
        text_BS = torch.full((len(source_BS), self.context_length), END)
        for text_S, source_S, length in zip(text_BS, source_BS, lengths_B.tolist(), strict=True):
            text_S[:length] = source_S[:length]
        return {"text": text_BS, "position": torch.zeros(len(source_BS), dtype=torch.long)}

    def features(self, tokens_BT: Tensor, state=None) -> Tensor:
        assert state is not None
        next_B1 = state["text"].gather(1, state["position"].unsqueeze(1))
        state["position"] += 1
        return next_B1.unsqueeze(-1)

    def predictions(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        source_BS, lengths_B, tokens_BT, targets_BT = batch
        state = self.start(source_BS, lengths_B)
        return state["text"][:, : tokens_BT.shape[1]].unsqueeze(-1), targets_BT

    def logits(self, features_BTD: Tensor) -> Tensor:
        return torch.log1p(torch.nn.functional.one_hot(features_BTD.squeeze(-1), 257) * 255.0)


def test_every_figure_of_a_score_by_a_second_computation(tmp_path):
    """The translations are known: they are the sources."""
    random = np.random.default_rng(1)
    words = ["the", "a", "dog", "cat", "runs", "sees", "big", "red", "in", "on", "near", "of"]
    pairs = []
    for _ in range(90):
        source = random.choice(words, random.integers(4, 14)).tolist()
        target = [word if random.random() < 0.8 else "not" for word in source]
        pairs.append((" ".join(source) + ".", " ".join(target) + "."))
    task = Pairs(
        TrainingConfig(context_length=200),
        corpus_of(tmp_path, train=pairs, validation=pairs, test=pairs),
    )
    score = task.score(Parrot(200), "test")
    sources, references = ([pair[side] for pair in pairs] for side in (0, 1))
    assert score.translations == sources
    bleu = sacrebleu.corpus_bleu(sources, [references])
    assert 20 < bleu.score < 90
    assert score.bleu == bleu.score
    assert score.chrf == sacrebleu.corpus_chrf(sources, [references]).score
    assert "tok:13a" in score.bleu_signature
    assert sacrebleu.__version__ in score.bleu_signature

    # The parrot gives its token half of the probability, each other one 1/512.
    right = total = 0
    for source, target in pairs:
        written, wanted = [*source.encode(), *[END] * 99], [*target.encode(), END]
        total += len(wanted)
        right += sum(a == b for a, b in zip(written, wanted, strict=False))
    nats = math.log(2) * right + math.log(512) * (total - right)
    assert score.tokens == total
    assert score.loss == pytest.approx(nats / total, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(nats / total), rel=1e-5)
    assert task.validate(Parrot(200)) == pytest.approx(score.loss, rel=1e-6)

    counts = np.array([len(source.split()) for source in sources])
    assert [bucket.name for bucket in score.buckets] == ["short", "middle", "long"]
    assert sum(bucket.pairs for bucket in score.buckets) == 90
    assert score.buckets[0].longest < score.buckets[1].shortest
    assert score.buckets[1].longest < score.buckets[2].shortest
    for bucket in score.buckets:
        which = np.flatnonzero((counts >= bucket.shortest) & (counts <= bucket.longest))
        assert len(which) == bucket.pairs
        assert 20 <= bucket.pairs <= 40
        some, others = ([texts[i] for i in which] for texts in (sources, references))
        assert bucket.bleu == sacrebleu.corpus_bleu(some, [others]).score


def test_a_limit_takes_the_first_pairs(few):
    score = Pairs(TrainingConfig(context_length=64), few).score(Parrot(64), "validation", limit=2)
    assert score.translations == ["one dog", "two dogs"]
    assert score.pairs == 2
    assert score.tokens == len("un chien") + len("deux chiens") + 2


def test_sources_of_one_length_make_one_bucket(tmp_path):
    pairs = [("two words", "deux mots")] * 5
    task = Pairs(
        TrainingConfig(context_length=64), corpus_of(tmp_path, train=pairs, validation=pairs)
    )
    (bucket,) = task.score(Parrot(64), "validation").buckets
    assert (bucket.shortest, bucket.longest, bucket.pairs) == (2, 2, 5)


def test_a_sample_shows_source_translation_and_reference(few):
    task = Pairs(TrainingConfig(context_length=64), few)
    lines = [line.split(": ", 1) for line in task.sample(Parrot(64), 5).splitlines()]
    assert [(name.strip(), text) for name, text in lines] == [
        ("en", "one dog"), ("model", "one d"), ("fr", "un chien"),
        ("en", FEW[4][0]), ("model", FEW[4][0][:5]), ("fr", FEW[4][1]),
    ]  # fmt: skip
    assert task.sample(Parrot(64), 0) == ""


@pytest.mark.parametrize(
    "model",
    [
        lambda: GPT(300, 64, width=48, depth=2, heads=2),
        lambda: Seq2SeqAttention(300, 64, width=48),
    ],
    ids=["gpt", "attention"],
)
def test_what_is_learned_by_heart_is_translated_without_a_fault(tmp_path, model):
    torch.manual_seed(0)
    tokenizer = train_bpe([text for pair in FEW * 2 for text in pair], 300)
    corpus = corpus_of(tmp_path, tokenizer, train=FEW, validation=FEW, test=FEW[:3])
    task, model = Pairs(TrainingConfig(context_length=64, batch_size=8), corpus), model()
    assert task.score(model, "validation").bleu < 20
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for index in range(60):
        loss = model.loss(*map(torch.from_numpy, task.batch(index)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert task.validate(model) < 0.1
    assert model.training
    for beams in (1, 3):
        score = task.score(model, "validation", beams=beams)
        assert score.translations == [target for _, target in FEW]
        assert score.bleu == pytest.approx(100)
        assert score.chrf == pytest.approx(100)
        assert score.beams == beams
    assert task.score(model, "test").translations == [target for _, target in FEW[:3]]
    assert task.format_loss(0.5) == "validation loss 0.5000, perplexity 1.65"


def test_a_report_says_its_figures_and_settings(few):
    score: TranslationScore = Pairs(TrainingConfig(context_length=64), few).score(
        Parrot(64), "validation", beams=2
    )
    found = score.to_json()
    assert found["bleu"] == score.bleu
    assert found["loss"] == score.loss
    assert found["buckets"][0]["pairs"] == score.buckets[0].pairs
    assert "translations" not in found
    table = score.table()
    assert f"BLEU             {score.bleu:.2f}  nrefs:1|case:mixed" in table
    assert "en-fr, beams 2; 8 pairs" in table
    assert " words, " in table
