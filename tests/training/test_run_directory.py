"""Files of a run directory: run.json, and the embedding of another run."""

import dataclasses
import json
import os

import pytest
import torch

from gpt.checkpoint import load_tensors
from tests.training.helpers import make_trainer, write_corpus
from tokenizer import train_words
from training.config import TrainingConfig
from training.distributed import World
from training.presets import PRESETS
from training.run_directory import (
    load_init_embedding,
    load_training_config,
    new_run_directory,
    run_lock,
    save_training_config,
)
from training.tasks.text import WordVectors

TINY = TrainingConfig(
    model_args={"width": 16, "depth": 1, "heads": 2},
    steps=4,
    batch_size=4,
    context_length=16,
    device="cpu",
)


def test_run_json_holds_the_whole_config(tmp_path):
    for config in (TINY, *PRESETS.values()):
        save_training_config(config, tmp_path, {"parameters": 1})
        as_json = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
        assert dataclasses.asdict(load_training_config(tmp_path)) == as_json


def test_init_embedding_copies_the_embedding_of_another_run(tmp_path):
    (tmp_path / "corpus").mkdir()
    corpus = write_corpus(tmp_path / "corpus")
    word2vec = dataclasses.replace(
        TINY, model="word2vec", task="word-vectors", model_args={"width": 16}
    )
    make_trainer(word2vec, tmp_path / "words", corpus, WordVectors).train()
    corpus.tokenizer.save(tmp_path / "words" / "tokenizer.json")
    tensors = load_tensors(tmp_path / "words" / "model.safetensors")

    config = dataclasses.replace(TINY, init_embedding=str(tmp_path / "words"))
    trainer = make_trainer(config, tmp_path / "gpt", corpus)
    load_init_embedding(trainer)
    assert torch.equal(trainer.model.embedding.weight, tensors["embedding.weight"])

    wide = dataclasses.replace(config, model_args={"width": 32, "depth": 1, "heads": 1})
    with pytest.raises(ValueError, match=r"the shape \[257, 16\], this model's \[257, 32\]"):
        load_init_embedding(make_trainer(wide, tmp_path / "wide", corpus))
    train_words(["other words"], 9).save(tmp_path / "words" / "tokenizer.json")
    with pytest.raises(ValueError, match="another tokenizer"):
        load_init_embedding(trainer)


def test_runs_that_begin_in_one_second_have_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda pattern: "20261129-120000")
    with new_run_directory(None, "tiny") as first, new_run_directory(None, "tiny") as second:
        (first / "run.json").touch()
    names = [path.name for path in (first, second)]
    assert names == ["tiny-20261129-120000", "tiny-20261129-120000-2"]
    assert [path.name for path in first.parent.iterdir()] == names[:1]  # an empty one is removed


def test_a_run_is_locked_by_one_process(tmp_path):
    with run_lock(tmp_path):
        holder = f"is being trained by process {os.getpid()} on .*: wait until it has ended"
        with pytest.raises(ValueError, match=holder), run_lock(tmp_path):
            pass
        with run_lock(tmp_path, World(1, 2)):  # only the main process of torchrun's takes it
            pass
    assert not list(tmp_path.iterdir())
    (tmp_path / ".lock").write_text("process 1 on a machine that lost its power")
    with run_lock(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
