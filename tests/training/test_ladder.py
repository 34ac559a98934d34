"""The ladder: all rungs under one budget, resumed after a stop, in one table."""

import json
import os
import signal

import pytest

from gpt import MODELS
from tests.training.helpers import save_lower_case_tokenizer
from training.evaluation import ladder
from training.plots.curves import plot_ladder
from training.trainer import Stopped, Trainer

TOKENS = 2 * 4 * 32


@pytest.fixture
def config_fields(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "cache"))
    text = "".join(f"the cat {i % 7} saw the dog {i % 5} on the mat\n" for i in range(200))
    (tmp_path / "text.txt").write_text(text)
    return {
        "data": str(tmp_path / "text.txt"),
        "tokenizer": "bytes",
        "device": "cpu",
        "context_length": 32,
        "batch_size": 4,
    }


def run(config_fields, tmp_path, *names, train=Trainer.train, seconds=None, tokens=TOKENS):
    return ladder.run_ladder(tmp_path / "ladder", names, config_fields, tokens, seconds, train)


def test_every_language_model_is_a_rung_in_the_order_of_the_chapters():
    assert [preset.model for preset in ladder.select_rungs([]).values()] == list(MODELS)
    with pytest.raises(ValueError, match=r"no rung is named 'lsmt' \(did you mean lstm\?\)"):
        ladder.select_rungs(["lsmt"])


def test_rungs_are_scored_on_the_same_tokens_and_trained_once(config_fields, tmp_path, capsys):
    rows = run(config_fields, tmp_path, "softmax", "seq2seq")
    assert [row["rung"] for row in rows] == ["softmax", "seq2seq"]
    assert len({(row["tokens_scored"], row["context_length"], row["stride"]) for row in rows}) == 1
    assert {row["tokens"] for row in rows} == {TOKENS}
    assert all(row["seconds"] > 0 for row in rows)
    for row in rows:  # the server and its page read it from there
        last = (tmp_path / "ladder" / row["rung"] / "metrics.jsonl").read_text().splitlines()[-1]
        assert json.loads(last)["final_bits_per_byte"] == row["bits_per_byte"]

    def unexpected(trainer):
        raise AssertionError(f"{trainer.directory} is finished")

    capsys.readouterr()
    assert run(config_fields, tmp_path, "softmax", "seq2seq", train=unexpected) == rows
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds a ladder with other settings"):
        run(config_fields, tmp_path, "softmax", tokens=TOKENS * 2)

    table = ladder.format_table(rows)
    assert f"| 4 | softmax | 1990 | {rows[0]['parameters']:,} |" in table
    assert f"| {rows[1]['bits_per_byte']:.4f} |" in table
    assert rows[0]["sample"].splitlines()[0] in table
    plot_ladder(rows, tmp_path / "ladder.svg")
    svg = (tmp_path / "ladder.svg").read_text()
    assert "seq2seq" in svg
    assert "bits per byte" in svg


def test_rungs_of_a_tokenizer_that_loses_text_are_compared_by_loss(config_fields, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("The Cat saw the Dog\n" * 99)
    save_lower_case_tokenizer(tmp_path / "tokenizer.json")
    config_fields["tokenizer"] = str(tmp_path / "tokenizer.json")
    (row,) = run(config_fields, tmp_path, "softmax")
    assert row["bits_per_byte"] is None
    assert f"loss {row['loss']:.4f}\n" in capsys.readouterr().out
    table = ladder.format_table([row])
    assert f"| {row['loss']:.4f} |  |" in table
    assert "No bits per byte: the tokenizer loses text: '" in table
    plot_ladder([row], tmp_path / "ladder.svg")
    svg = (tmp_path / "ladder.svg").read_text()
    assert "nats per token" in svg
    assert "bits per byte" not in svg
    last = (tmp_path / "ladder" / "softmax" / "metrics.jsonl").read_text().splitlines()[-1]
    assert "final_loss" in last
    assert "final_bits_per_byte" not in last


def test_interrupted_rung_is_resumed(config_fields, tmp_path):
    def stop_after_one_step(trainer):
        train_step = trainer.train_step

        def interrupted_step(objective):
            os.kill(os.getpid(), signal.SIGTERM)
            return train_step(objective)

        trainer.train_step = interrupted_step
        trainer.train()

    with pytest.raises(Stopped):
        run(config_fields, tmp_path, "softmax", train=stop_after_one_step)
    steps = []

    def train(trainer):
        steps.append(trainer.step)
        trainer.train()

    (row,) = run(config_fields, tmp_path, "softmax", train=train)
    assert steps == [1]
    (uninterrupted,) = ladder.run_ladder(
        tmp_path / "other", ["softmax"], config_fields, TOKENS, None, Trainer.train
    )
    assert row["loss"] == uninterrupted["loss"]
    assert json.loads((tmp_path / "ladder" / "softmax" / "rung.json").read_text()) == row


def test_time_budget_gives_faster_models_more_steps(config_fields, tmp_path, monkeypatch):
    step_seconds = {"softmax": 0.5, "rnn": 2.0}
    monkeypatch.setattr(ladder, "seconds_per_step", lambda config, *_: step_seconds[config.preset])
    rows = run(config_fields, tmp_path, "softmax", "rnn", seconds=2.0)
    assert [row["steps"] for row in rows] == [4, 1]
