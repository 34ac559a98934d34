"""Which models can learn which tasks; and the tasks of text and word vectors."""

import dataclasses
import random

import pytest
import torch

from gpt.checkpoint import MODEL_CLASSES, build_model
from gpt.models.word2vec import Word2Vec
from tokenizer import train_words
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
