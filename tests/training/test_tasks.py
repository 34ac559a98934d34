"""What is learned, and by whom: tasks and models that do not fit are told apart at the door."""

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
from training.tasks import TASKS, check
from training.tasks.text import Text, Vectors


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_its_task(name):
    check(PRESETS[name])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (TrainingConfig(task="txt"), r"no task is named 'txt' \(did you mean text\?\)"),
        (
            TrainingConfig(model="word2vec"),
            "word2vec cannot learn the task text: its --task can be vectors",
        ),
        (TrainingConfig(task="word-vectors"), "the model gpt cannot learn the task word-vectors"),
        (
            TrainingConfig(model="linear"),
            "the model linear cannot learn the task text: its --task can be",
        ),
        (
            TrainingConfig(model="word2vec", task="word-vectors", stateful=True),
            "--stateful has no meaning in the task word-vectors",
        ),
    ],
)
def test_what_does_not_fit_is_said(run, message):
    with pytest.raises(ValueError, match=message):
        check(run)


def test_every_task_can_be_learned_by_some_model():
    assert all(
        any(task.kind in model.supported_tasks for model in MODEL_CLASSES.values())
        for task in TASKS.values()
    )


@pytest.fixture
def corpus(tmp_path):
    """Animals are fed and tools are used, so the two keep different company."""
    chance = random.Random(0)
    kinds = (
        (["cat", "dog", "cow"], ["feeds", "strokes"]),
        (["saw", "axe", "nail"], ["uses", "buys"]),
    )
    texts = []
    for _ in range(400):
        things, verbs = chance.choice(kinds)
        texts.append(f" she {chance.choice(verbs)} the {chance.choice(things)}\n")
    writer = CorpusWriter(tmp_path, train_words(texts, 40))
    writer.write("train", [TextChunk("".join(texts), True)])
    writer.write("validation", [TextChunk("".join(texts[:40]), True)])
    writer.close("animals and tools")
    return open_corpus(tmp_path)


RUN = TrainingConfig(
    model="word2vec",
    task="word-vectors",
    batch_size=8,
    context_length=32,
    device="cpu",
    precision="float32",
)


def test_vectors_are_judged_by_the_company_they_keep(corpus):
    task = Vectors(RUN, corpus)
    torch.manual_seed(0)
    model = build_model(
        "word2vec", {"vocab_size": task.model_args["vocab_size"], "width": 8, "window": 2}
    )
    assert isinstance(model, Word2Vec)
    before = task.validate(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for step in range(60):
        optimizer.zero_grad()
        model.loss(*map(torch.from_numpy, task.batch(step))).backward()
        optimizer.step()
    assert task.validate(model) < before
    assert task.validate(model) == task.validate(model)
    assert "perplexity" not in task.format_loss(0.5)
    lines = dict(line.split(": ") for line in task.sample(model, 5).splitlines())
    assert len(lines) == 5
    assert all(word not in others.split(", ") for word, others in lines.items())
    report = task.score(model, "validation")
    assert report.to_json()["loss"] == pytest.approx(report.loss)
    assert f"{report.neighbours:.4f}" in report.table()


def test_bits_per_byte_are_not_given_where_words_were_lost(corpus, tmp_path_factory):
    run = dataclasses.replace(RUN, task="text", model="softmax", precision="float32")
    model = build_model(
        "softmax", {"vocab_size": corpus.tokenizer.vocabulary, "context_length": 32}
    )
    whole = Text(run, corpus).score(model, "validation")
    assert "bits_per_byte" in whole.to_json()
    assert "bits per byte" in whole.table()

    writer = CorpusWriter(folder := tmp_path_factory.mktemp("lossy"), corpus.tokenizer)
    writer.write("validation", [TextChunk(" she feeds the crocodile\n", True)])
    writer.close("an animal that was never seen")
    lossy = Text(run, open_corpus(folder), to_train=False).score(model, "validation")
    assert "bits_per_byte" not in lossy.to_json()
    assert "bits per byte" not in lossy.table()
    assert lossy.to_json()["word_perplexity"] > 1
