"""metrics.jsonl and generated text, whatever characters a sample holds."""

import json

import pytest

from training.config import TrainingConfig
from training.progress import MetricsLogger, format_loss, printable, read_metrics
from training.tracking import Trackers


def metrics_logger(directory, resume_step):
    return MetricsLogger(directory, resume_step, Trackers(TrainingConfig(), directory, resume_step))


SAMPLE = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven\r\neight\n"


def test_a_sample_may_hold_any_line_separator(tmp_path):
    logger = metrics_logger(tmp_path, 0)
    logger.log(2, validation_loss=1.5, sample=SAMPLE)
    logger.log(4, loss=1.25)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert read_metrics(tmp_path) == [
        {"step": 2, "validation_loss": 1.5, "sample": SAMPLE},
        {"step": 4, "loss": 1.25},
    ]
    metrics_logger(tmp_path, 4)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_later_lines_the_final_score_and_incomplete_ones_are_removed_on_resume(tmp_path):
    lines = [{"step": 1, "loss": 2.0}, {"step": 3, "loss": 1.0}, {"step": 1, "final_loss": 1.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '[1]\n{"loss": 1}\n{"step": 1, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    metrics_logger(tmp_path, 2)
    assert read_metrics(tmp_path) == lines[:1]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("déjà\tvu\r\nline\n", "déjà\tvu\r\nline\n"),
        ("\x1b[2J\x07\b\x7f\x9b31m", r"\x1b[2J\x07\x08\x7f\x9b31m"),
        ("over\rwritten\0", r"over\rwritten\x00"),
        ("a\x0b\x0c\x1c\x85\u2028\u2029b", r"a\x0b\x0c\x1c\x85\u2028\u2029b"),
    ],
)
def test_control_characters_do_not_reach_the_terminal(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("loss", "text"),
    [(1.23456, "1.2346"), (3.17e-11, "3.17e-11"), (0.0, "0"), (2e30, "2e+30")],
)
def test_small_losses_are_not_rounded_to_zero(loss, text):
    assert format_loss(loss) == text
