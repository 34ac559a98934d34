"""A tiny corpus, trainers on it, and what they wrote."""

import dataclasses
import json
import random

import torch

from gpt.checkpoint import FORMAT, save_config, save_tensors, unique_state_dict
from tokenizer import byte_tokenizer
from training.data.corpus import CorpusWriter, TextChunk, open_corpus
from training.distributed import SINGLE_PROCESS
from training.tasks.text import Text
from training.trainer import Trainer

WORDS = ["the", "a", "cat", "dog", "mat", "sat", "ran", "on", "and", "saw", "that", "too"]


def write_corpus(folder):
    """Write and open a corpus of lines of a few random words."""
    rng = random.Random(0)
    writer = CorpusWriter(folder, byte_tokenizer())
    for split, num_lines in (("train", 200), ("validation", 20)):
        lines = [" ".join(rng.choices(WORDS, k=12)) + "\n" for _ in range(num_lines)]
        writer.write(split, [TextChunk(line, True) for line in lines])
    writer.close("cats and dogs")
    return open_corpus(folder)


def save_lower_case_tokenizer(path):
    """Write the tokenizer.json of a byte tokenizer that loses capital letters."""
    byte_tokenizer().save(path)
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(content | {"normalizer": {"type": "Lowercase"}}), "utf-8")


def make_trainer(config, directory, corpus, task_class=Text, world=SINGLE_PROCESS):
    if world.is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
    world.barrier()
    return Trainer(config, directory, task_class(config, corpus), torch.device("cpu"), world)


def read_log(directory):
    """Return the lines of metrics.jsonl without values that depend on the clock."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k != "seconds" and not k.endswith("_per_second")}
        for line in lines
    ]


def save_run(directory, model, model_args, config, tokenizer):
    """Write the run directory of a model that was not trained."""
    directory.mkdir(parents=True)
    save_config(directory, config.model, model_args)
    save_tensors(directory / "model.safetensors", unique_state_dict(model))
    tokenizer.save(directory / "tokenizer.json")
    content = {"format": FORMAT, "config": dataclasses.asdict(config)}
    (directory / "run.json").write_text(json.dumps(content), "utf-8")
