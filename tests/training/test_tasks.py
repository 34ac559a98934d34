"""Which models can learn which tasks; and the tasks of text and word vectors."""

import dataclasses
import random

import pytest
import torch

from gpt.checkpoint import MODEL_CLASSES, build_model
from gpt.models.word2vec import Word2Vec
from tests.training.helpers import save_lower_case_tokenizer
from tokenizer import Tokenizer, byte_tokenizer, train_words
from training.config import TrainingConfig
from training.data.corpus import CorpusWriter, TextChunk, open_corpus
from training.presets import PRESETS
from training.tasks import TASKS, check_task
from training.tasks.text import Text, WordVectors


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_learn_its_task(name):
    check_task(PRESETS[name])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TrainingConfig(task="txt"), r"no task is named 'txt' \(did you mean text\?\)"),
        (
            TrainingConfig(model="word2vec"),
            "word2vec cannot learn the task text: its --task can be word-vectors",
        ),
        (TrainingConfig(task="word-vectors"), "the model gpt cannot learn the task word-vectors"),
        (
            TrainingConfig(model="linear"),
            "the model linear cannot learn the task text: its --task can be",
        ),
        (TrainingConfig(languages="en-fr"), "--languages has no meaning in the task text"),
        (
            TrainingConfig(model="word2vec", task="word-vectors", stateful=True),
            "--stateful has no meaning in the task word-vectors",
        ),
    ],
)
def test_unsuitable_tasks_and_options_are_rejected(config, message):
    with pytest.raises(ValueError, match=message):
        check_task(config)


def test_every_task_has_a_model():
    assert all(
        any(task.kind in model.supported_tasks for model in MODEL_CLASSES.values())
        for task in TASKS.values()
    )


@pytest.fixture
def corpus(tmp_path):
    """Animals are fed and tools are used, so that their words have different neighbors."""
    rng = random.Random(0)
    topics = (
        (["cat", "dog", "cow"], ["feeds", "strokes"]),
        (["saw", "axe", "nail"], ["uses", "buys"]),
    )
    texts = []
    for _ in range(400):
        nouns, verbs = rng.choice(topics)
        texts.append(f" she {rng.choice(verbs)} the {rng.choice(nouns)}\n")
    writer = CorpusWriter(tmp_path, train_words(texts, 40))
    writer.write("train", [TextChunk("".join(texts), True)])
    writer.write("validation", [TextChunk("".join(texts[:40]), True)])
    writer.close("animals and tools")
    return open_corpus(tmp_path)


CONFIG = TrainingConfig(
    model="word2vec",
    task="word-vectors",
    batch_size=8,
    context_length=32,
    device="cpu",
    precision="float32",
)


def test_word_vectors_learn_from_neighboring_words(corpus):
    task = WordVectors(CONFIG, corpus)
    torch.manual_seed(0)
    model = build_model(
        "word2vec", {"vocab_size": task.model_args["vocab_size"], "width": 8, "window": 2}
    )
    assert isinstance(model, Word2Vec)
    initial_loss = task.validate(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for step in range(60):
        optimizer.zero_grad()
        model.loss(*map(torch.from_numpy, task.batch(step))).backward()
        optimizer.step()
    assert task.validate(model) < initial_loss
    assert task.validate(model) == task.validate(model)
    assert "perplexity" not in task.format_loss(0.5)
    lines = dict(line.split(": ") for line in task.sample(model, 5).splitlines())
    assert len(lines) == 5
    assert all(word not in neighbors.split(", ") for word, neighbors in lines.items())
    score = task.score(model, "validation")
    assert score.to_json()["loss"] == pytest.approx(score.loss)
    assert f"{score.adjacent_cosine:.4f}" in score.table()


def test_prepared_tokens_refuse_options_about_text(corpus):
    data = str(corpus.directory)
    config = TrainingConfig(data=data)
    assert Text.expected_model_args(config)["vocab_size"] == corpus.tokenizer.vocab_size
    assert Text.expected_model_args(dataclasses.replace(config, tokenizer=data, vocab_size=corpus.tokenizer.vocab_size))  # fmt: skip
    # The preset's tokenizer was not asked for.
    assert Text.expected_model_args(dataclasses.replace(PRESETS["shakespeare"], data=data))
    for name, value in {
        "tokenizer": "bytes",
        "vocab_size": 100,
        "data_limit": 5,
        "text_column": "text",
        "data_split": "train",
        "data_config": "en",
        "streaming": True,
    }.items():
        option = name.replace("_", "-")
        with pytest.raises(ValueError, match=f"prepared tokens.*: leave out --{option}, or"):
            Text.expected_model_args(dataclasses.replace(config, **{name: value}))
    with pytest.raises(ValueError, match="leave out --tokenizer"):
        Text.expected_model_args(dataclasses.replace(config, tokenizer="words"))


def test_the_tokenizer_of_prepared_tokens_and_what_it_loses_are_told(corpus, tmp_path_factory):
    config = dataclasses.replace(CONFIG, task="text", data=str(corpus.directory))
    notes = Text(config, corpus).sizes
    assert f"tokenizer: that of the data, {corpus.tokenizer.vocab_size} ids" in notes
    assert "unknown" not in "".join(notes)
    save_lower_case_tokenizer(tmp_path_factory.getbasetemp() / "tokenizer.json")
    tokenizer = Tokenizer.load(tmp_path_factory.getbasetemp() / "tokenizer.json")
    for text, note in (
        ("A cat", "no bits per byte of validation: the tokenizer loses text: 'A cat' becomes"),
        ("a cat", "the tokenizer loses other text than this: capital letters ('HELLO' becomes"),
    ):
        writer = CorpusWriter(folder := tmp_path_factory.mktemp("lossy"), tokenizer)
        writer.write("train", [TextChunk("a cat\n" * 99, True)])
        writer.write("validation", [TextChunk(text, True)])
        writer.close("a cat")
        assert note in Text(CONFIG, open_corpus(folder)).sizes[-1]


def test_a_split_without_a_token_to_predict_is_refused(tmp_path):
    writer = CorpusWriter(tmp_path, byte_tokenizer())
    writer.write("train", [TextChunk("a cat\n" * 99, True)])
    writer.write("validation", [TextChunk("", True)])
    writer.close("nothing to validate on")
    message = "the validation split has no token to predict"
    with pytest.raises(ValueError, match=message):
        Text(CONFIG, open_corpus(tmp_path))
    model = build_model("softmax", {"vocab_size": 257, "context_length": 32})
    config = dataclasses.replace(CONFIG, task="text", model="softmax")
    for stateful in (False, True):
        config = dataclasses.replace(config, stateful=stateful)
        with pytest.raises(ValueError, match=message):
            Text(config, open_corpus(tmp_path), for_training=False).score(model, "validation")


def test_no_bits_per_byte_if_words_were_replaced_by_unk(corpus, tmp_path_factory):
    config = dataclasses.replace(CONFIG, task="text", model="softmax")
    model = build_model(
        "softmax", {"vocab_size": corpus.tokenizer.vocab_size, "context_length": 32}
    )
    lossless = Text(config, corpus).score(model, "validation")
    assert "bits_per_byte" in lossless.to_json()
    assert "bits per byte" in lossless.table()

    writer = CorpusWriter(folder := tmp_path_factory.mktemp("lossy"), corpus.tokenizer)
    writer.write("validation", [TextChunk(" she feeds the crocodile\n", True)])
    writer.close("an unknown word")
    lossy = Text(config, open_corpus(folder), for_training=False).score(model, "validation")
    assert "bits_per_byte" not in lossy.to_json()
    assert "bits per byte" not in lossy.table()
    assert lossy.to_json()["word_perplexity"] > 1
    assert lossy.to_json()["unknown_tokens"] == 1
    assert "5 tokens (1 unknown)" in lossy.table()
    assert "' crocodile" in lossy.table() or "the crocodile" in lossy.table()
