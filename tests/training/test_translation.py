"""The translation task: batches of sentence pairs, and the scores of translations."""

import math

import numpy as np
import pytest
import sacrebleu
import torch
from torch import Tensor

from gpt import GPT, LanguageModel
from gpt.models.seq2seq import Seq2SeqAttention
from tests.training.helpers import save_lower_case_tokenizer
from tokenizer import Tokenizer, byte_tokenizer, train_bpe, train_words
from training.config import TrainingConfig
from training.data.corpus import CorpusWriter, TextChunk, open_corpus
from training.tasks.translation import Translation, TranslationScore

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token
PAIRS = [
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
    return open_corpus(folder, sentence_pairs=True)


def test_a_tokenizer_that_loses_text_is_refused(tmp_path):
    save_lower_case_tokenizer(tmp_path / "tokenizer.json")
    pairs = [("A dog", "Un chien")]
    corpus = corpus_of(
        tmp_path / "pairs", Tokenizer.load(tmp_path), train=pairs * 9, validation=pairs
    )
    with pytest.raises(ValueError, match="loses no text: 'A dog' becomes 'a dog'"):
        Translation(TrainingConfig(task="translation"), corpus)


@pytest.fixture
def small(tmp_path):
    return corpus_of(tmp_path, train=PAIRS, validation=PAIRS, test=PAIRS[:3])


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    random = np.random.default_rng(0)
    lengths = random.integers(1, 30, (1003, 2))
    pairs = [(f"{i} " + "s" * a, f"{i} " + "t" * b) for i, (a, b) in enumerate(lengths)]
    return corpus_of(tmp_path_factory.mktemp("large"), train=pairs, validation=pairs[:50])


def pairs_in(batch):
    """The sentence pairs of a batch, after a check of its padding."""
    source_BS, lengths_B, tokens_BT, targets_BT = batch
    assert {array.dtype for array in batch} == {np.dtype(np.int64)}
    assert source_BS.shape[1] == max(lengths_B)
    assert tokens_BT.shape == targets_BT.shape
    found = []
    for source, length, tokens, targets in zip(*batch, strict=True):
        assert not source[length:].any()
        end = targets.tolist().index(EOS)
        assert (targets[end + 1 :] == -100).all()
        assert not tokens[end + 1 :].any()
        assert tokens[0] == EOS
        assert (tokens[1 : end + 1] == targets[:end]).all()
        found.append((TOKENIZER.decode(source[:length]), TOKENIZER.decode(targets[:end])))
    assert (targets_BT[:, -1] != -100).any()
    return found


def test_batch_is_padded_pairs(small):
    task = Translation(TrainingConfig(context_length=64, batch_size=8), small)
    assert sorted(pairs_in(task.batch(0))) == sorted(PAIRS)
    assert task.model_args == {"vocab_size": 257, "context_length": 64}
    assert task.sizes[1].startswith("train: 8 pairs, ")
    assert "en to fr" in task.description


@pytest.mark.parametrize("batch_size", [1, 7, 64, 2000])
def test_each_epoch_has_every_pair_once(large, batch_size):
    task = Translation(TrainingConfig(context_length=96, batch_size=batch_size), large)
    assert task.batches_per_epoch >= math.ceil(1003 / batch_size)
    for epoch in range(2):
        found = []
        for index in range(epoch * task.batches_per_epoch, (epoch + 1) * task.batches_per_epoch):
            batch = task.batch(index)
            assert batch_size - 2 <= len(batch[0]) <= batch_size or batch_size == 2000
            found += pairs_in(batch)
        assert len(found) == len(set(found)) == 1003


def test_batch_depends_on_seed_and_index_only(large):
    def batches(indices, seed=0):
        task = Translation(TrainingConfig(context_length=96, batch_size=50, seed=seed), large)
        return {index: pairs_in(task.batch(index)) for index in indices}

    expected = batches(range(60))
    assert batches([59, 3, 25, 0]) == {index: expected[index] for index in (59, 3, 25, 0)}
    assert batches(range(3), seed=1) != {index: expected[index] for index in range(3)}
    assert len({tuple(pairs) for pairs in expected.values()}) == 60


def test_batches_have_little_padding_and_vary_in_length(large):
    task = Translation(TrainingConfig(context_length=96, batch_size=16), large)
    targets = np.concatenate(
        [task.batch(index)[3].ravel() for index in range(task.batches_per_epoch)]
    )
    assert (targets == -100).mean() < 0.03
    lengths = [task.batch(index)[3].shape[1] for index in range(task.batches_per_epoch)]
    assert np.abs(np.diff(lengths)).mean() > 3  # not sorted by length


def test_too_long_pairs_are_left_out_and_counted(small):
    usable = [pair for pair in PAIRS if max(len(pair[0]), len(pair[1].encode()) + 1) <= 12]
    task = Translation(TrainingConfig(context_length=24, batch_size=8), small)
    assert sorted(pairs_in(task.batch(0))) == sorted(usable)
    assert (
        f"{len(PAIRS) - len(usable)} pairs longer than half a window are left out" in task.sizes[1]
    )
    model = GPT(257, 24, width=16, depth=1, heads=1)
    assert task.score(model, "validation").too_long == len(PAIRS) - len(usable)
    with pytest.raises(
        ValueError, match="none of the pairs of the train split fits into a window of 8"
    ):
        Translation(TrainingConfig(context_length=8), small)


def test_longest_source_and_longest_target_fit_in_one_batch(tmp_path):
    long = [("a" * 16, "b"), ("a", "b" * 15)]
    task = Translation(
        TrainingConfig(context_length=32, batch_size=2),
        corpus_of(tmp_path, train=long, validation=long),
    )
    batch = [torch.from_numpy(array) for array in task.batch(0)]
    assert len(batch[0]) == 2
    assert GPT(257, 32, width=16, depth=1, heads=1).loss(*batch).isfinite()


def test_invalid_options_are_rejected(small, tmp_path):
    with pytest.raises(ValueError, match="was prepared from en to fr: leave out --languages"):
        Translation(TrainingConfig(context_length=64, languages="fr-en"), small)
    words = train_words(["un chien"], 300)
    lossy = corpus_of(tmp_path / "words", words, train=PAIRS, validation=PAIRS)
    with pytest.raises(ValueError, match="--tokenizer bpe or bytes"):
        Translation(TrainingConfig(context_length=64), lossy)
    model = GPT(257, 64, width=16, depth=1, heads=1)
    with pytest.raises(ValueError, match="--num-beams must be at least 1, not 0"):
        Translation(TrainingConfig(context_length=64), small).score(model, "test", num_beams=0)
    for penalty in (-1, 11, math.nan):
        with pytest.raises(ValueError, match="--length-penalty must be between 0 and 10, not"):
            Translation(TrainingConfig(context_length=64), small).score(
                model, "test", num_beams=4, length_penalty=penalty
            )
    with pytest.raises(ValueError, match="add --num-beams 4"):
        Translation(TrainingConfig(context_length=64), small).score(
            model, "test", length_penalty=0.5
        )


class Copier(LanguageModel):
    """Copies the source; each token has probability 1/2, so that its loss is known."""

    def __init__(self, context: int) -> None:
        super().__init__(257, context)
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def encode_source(self, source_BS: Tensor, lengths_B: Tensor) -> dict[str, Tensor]:
        text_BS = torch.full((len(source_BS), self.context_length), EOS)
        for text_S, source_S, length in zip(text_BS, source_BS, lengths_B.tolist(), strict=True):
            text_S[:length] = source_S[:length]
        return {"text": text_BS, "position": torch.zeros(len(source_BS), dtype=torch.long)}

    def features(self, tokens_BT: Tensor, state=None) -> Tensor:
        assert state is not None
        next_B1 = state["text"].gather(1, state["position"].unsqueeze(1))
        state["position"] += 1
        return next_B1.unsqueeze(-1)

    def features_and_targets(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        source_BS, lengths_B, tokens_BT, targets_BT = batch
        state = self.encode_source(source_BS, lengths_B)
        return state["text"][:, : tokens_BT.shape[1]].unsqueeze(-1), targets_BT

    def logits(self, features_BTD: Tensor) -> Tensor:
        return torch.log1p(torch.nn.functional.one_hot(features_BTD.squeeze(-1), 257) * 255.0)


def test_score_equals_an_independent_computation(tmp_path):
    """The translations are known: they are the sources."""
    random = np.random.default_rng(1)
    words = ["the", "a", "dog", "cat", "runs", "sees", "big", "red", "in", "on", "near", "of"]
    pairs = []
    for _ in range(90):
        source = random.choice(words, random.integers(4, 14)).tolist()
        target = [word if random.random() < 0.8 else "not" for word in source]
        pairs.append((" ".join(source) + ".", " ".join(target) + "."))
    task = Translation(
        TrainingConfig(context_length=200),
        corpus_of(tmp_path, train=pairs, validation=pairs, test=pairs),
    )
    score = task.score(Copier(200), "test")
    sources, references = ([pair[side] for pair in pairs] for side in (0, 1))
    assert score.translations == sources
    bleu = sacrebleu.corpus_bleu(sources, [references])
    assert 20 < bleu.score < 90
    assert score.bleu == bleu.score
    assert score.chrf == sacrebleu.corpus_chrf(sources, [references]).score
    assert "tok:13a" in score.bleu_signature
    assert sacrebleu.__version__ in score.bleu_signature

    # The copier gives its token probability 1/2, and each other token 1/512.
    correct = total = 0
    for source, target in pairs:
        output, expected = [*source.encode(), *[EOS] * 99], [*target.encode(), EOS]
        total += len(expected)
        correct += sum(a == b for a, b in zip(output, expected, strict=False))
    nats = math.log(2) * correct + math.log(512) * (total - correct)
    assert score.tokens == total
    assert score.loss == pytest.approx(nats / total, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(nats / total), rel=1e-5)
    assert task.validate(Copier(200)) == pytest.approx(score.loss, rel=1e-6)

    counts = np.array([len(source.split()) for source in sources])
    assert [bucket.name for bucket in score.buckets] == ["short", "middle", "long"]
    assert sum(bucket.pairs for bucket in score.buckets) == 90
    assert score.buckets[0].longest < score.buckets[1].shortest
    assert score.buckets[1].longest < score.buckets[2].shortest
    for bucket in score.buckets:
        indices = np.flatnonzero((counts >= bucket.shortest) & (counts <= bucket.longest))
        assert len(indices) == bucket.pairs
        assert 20 <= bucket.pairs <= 40
        outputs, targets = ([texts[i] for i in indices] for texts in (sources, references))
        assert bucket.bleu == sacrebleu.corpus_bleu(outputs, [targets]).score


def test_limit_takes_the_first_pairs(small):
    score = Translation(TrainingConfig(context_length=64), small).score(
        Copier(64), "validation", limit=2
    )
    assert score.translations == ["one dog", "two dogs"]
    assert score.pairs == 2
    assert score.tokens == len("un chien") + len("deux chiens") + 2


def test_sources_of_equal_length_make_one_bucket(tmp_path):
    pairs = [("two words", "deux mots")] * 5
    task = Translation(
        TrainingConfig(context_length=64), corpus_of(tmp_path, train=pairs, validation=pairs)
    )
    (bucket,) = task.score(Copier(64), "validation").buckets
    assert (bucket.shortest, bucket.longest, bucket.pairs) == (2, 2, 5)


def test_sample_shows_source_translation_and_reference(small):
    task = Translation(TrainingConfig(context_length=64), small)
    lines = [line.split(": ", 1) for line in task.sample(Copier(64), 5).splitlines()]
    assert [(name.strip(), text) for name, text in lines] == [
        ("en", "one dog"), ("model", "one d"), ("fr", "un chien"),
        ("en", PAIRS[4][0]), ("model", PAIRS[4][0][:5]), ("fr", PAIRS[4][1]),
    ]  # fmt: skip
    assert task.sample(Copier(64), 0) == ""


@pytest.mark.parametrize(
    "model",
    [
        lambda: GPT(300, 64, width=48, depth=2, heads=2),
        lambda: Seq2SeqAttention(300, 64, width=48),
    ],
    ids=["gpt", "attention"],
)
def test_memorized_pairs_are_translated_exactly(tmp_path, model):
    torch.manual_seed(0)
    tokenizer = train_bpe([text for pair in PAIRS * 2 for text in pair], 300)
    corpus = corpus_of(tmp_path, tokenizer, train=PAIRS, validation=PAIRS, test=PAIRS[:3])
    task, model = Translation(TrainingConfig(context_length=64, batch_size=8), corpus), model()
    assert task.score(model, "validation").bleu < 20
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for index in range(60):
        loss = model.loss(*map(torch.from_numpy, task.batch(index)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert task.validate(model) < 0.1
    assert model.training
    for num_beams in (1, 3):
        score = task.score(model, "validation", num_beams=num_beams)
        assert score.translations == [target for _, target in PAIRS]
        assert score.bleu == pytest.approx(100)
        assert score.chrf == pytest.approx(100)
        assert score.num_beams == num_beams
    assert task.score(model, "test").translations == [target for _, target in PAIRS[:3]]
    assert task.format_loss(0.5) == "validation loss 0.5000, perplexity 1.65"


def test_score_reports_its_figures_and_settings(small):
    score: TranslationScore = Translation(TrainingConfig(context_length=64), small).score(
        Copier(64), "validation", num_beams=2
    )
    figures = score.to_json()
    assert figures["bleu"] == score.bleu
    assert figures["loss"] == score.loss
    assert figures["buckets"][0]["pairs"] == score.buckets[0].pairs
    assert "translations" not in figures
    table = score.table()
    assert f"BLEU             {score.bleu:.2f}  nrefs:1|case:mixed" in table
    assert "en-fr, 2 beams, length penalty 1; 8 pairs" in table
    assert " words, " in table
