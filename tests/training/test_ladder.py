"""The ladder: every rung under one budget, stopped and gone on with, in one table."""

import dataclasses
import json
import signal

import pytest

from gpt import MODELS
from training.evaluation import ladder
from training.plots.plot import plot_ladder
from training.trainer import Stopped, Trainer

TOKENS = 2 * 4 * 32


@pytest.fixture
def common(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "cache"))
    text = "".join(f"the cat {i % 7} saw the dog {i % 5} on the mat\n" for i in range(200))
    (tmp_path / "text.txt").write_text(text)
    small = {"context_length": 32, "batch_size": 4}
    return {"data": str(tmp_path / "text.txt"), "tokenizer": "bytes", "device": "cpu", **small}


def climb(common, tmp_path, *names, train=Trainer.train, seconds=None, tokens=TOKENS):
    return ladder.run_ladder(tmp_path / "ladder", names, common, tokens, seconds, train)


def test_a_rung_for_every_model_that_speaks_the_last_the_gpt():
    assert [run.model for run in ladder.rungs([]).values()] == list(MODELS)
    with pytest.raises(ValueError, match=r"no rung is named 'lsmt' \(did you mean lstm\?\)"):
        ladder.rungs(["lsmt"])


def test_all_are_scored_on_the_same_tokens_and_done_once(common, tmp_path, capsys):
    rows = climb(common, tmp_path, "softmax", "seq2seq")
    assert [row["rung"] for row in rows] == ["softmax", "seq2seq"]
    assert len({(row["scored"], row["context_length"], row["stride"]) for row in rows}) == 1
    assert {row["tokens"] for row in rows} == {TOKENS}
    assert all(row["seconds"] > 0 for row in rows)
    for row in rows:  # where the server and its page find it
        last = (tmp_path / "ladder" / row["rung"] / "metrics.jsonl").read_text().splitlines()[-1]
        assert json.loads(last)["final_bits_per_byte"] == row["bits_per_byte"]

    def never(trainer):
        raise AssertionError(f"{trainer.directory} is done")

    capsys.readouterr()
    assert climb(common, tmp_path, "softmax", "seq2seq", train=never) == rows
    assert "done before" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds a ladder with other settings"):
        climb(common, tmp_path, "softmax", tokens=TOKENS * 2)

    text = ladder.table(rows)
    assert f"| 4 | softmax | 1990 | {rows[0]['parameters']:,} |" in text
    assert f"| {rows[1]['bits_per_byte']:.4f} |" in text
    assert rows[0]["sample"].splitlines()[0] in text
    plot_ladder(rows, tmp_path / "ladder.svg")
    drawn = (tmp_path / "ladder.svg").read_text()
    assert "seq2seq" in drawn
    assert "bits per byte" in drawn


def test_a_stopped_rung_is_gone_on_with(common, tmp_path):
    def stop_after_one(trainer):
        step = trainer.advance

        def advance(objective):
            trainer.signals.received = signal.SIGTERM
            return step(objective)

        trainer.advance = advance
        trainer.train()

    with pytest.raises(Stopped):
        climb(common, tmp_path, "softmax", train=stop_after_one)
    steps = []

    def train(trainer):
        steps.append(trainer.step)
        trainer.train()

    (row,) = climb(common, tmp_path, "softmax", train=train)
    assert steps == [1]
    (straight,) = ladder.run_ladder(
        tmp_path / "other", ["softmax"], common, TOKENS, None, Trainer.train
    )
    assert row["loss"] == straight["loss"]
    assert json.loads((tmp_path / "ladder" / "softmax" / "rung.json").read_text()) == row


def test_a_budget_in_seconds_gives_the_faster_more_steps(common, tmp_path, monkeypatch):
    speeds = {"softmax": 0.5, "rnn": 2.0}
    monkeypatch.setattr(ladder, "seconds_per_step", lambda run: speeds[run.preset])
    rows = climb(common, tmp_path, "softmax", "rnn", seconds=2.0)
    assert [row["steps"] for row in rows] == [4, 1]


def test_the_speed_of_a_rung_is_measured(common):
    run = ladder.rungs(["softmax"])["softmax"]
    assert 0 < ladder.seconds_per_step(dataclasses.replace(run, **common)) < 60
