"""Small texts and sentence pairs, and a fresh interpreter, for the tests of training data."""

import json
import os
import subprocess
import sys
from pathlib import Path

STORY = "".join(f"Chapter {i}.\n\n  It was {'very ' * (i % 7)}late.\nThe end.\n" for i in range(40))
ROWS = [f"Row {i}, she said:\n“{'ha ' * (i % 5)}ha”" for i in range(200)]
PAIRS = [(f"{i} dogs{' run' * (i % 4)}.", f"{i} chiens{' courent' * (i % 4)}.") for i in range(200)]


def text_lines(texts, column="text"):
    """JSON lines with a text each."""
    return "".join(json.dumps({column: text}) + "\n" for text in texts)


def pair_lines(pairs, languages=("en", "fr")):
    """JSON lines with a sentence pair each."""
    rows = ({"translation": dict(zip(languages, pair, strict=True)), "id": 1} for pair in pairs)
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_pairs_task(folder, name, pairs):
    """Write a task of lm-eval in BLiMP's form, of pairs with a sentence_good and a sentence_bad.

    The wrong sentence comes first: of equal log-likelihoods the harness takes the first.
    """
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "pairs.jsonl")},
            "cache_dir": str(folder),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "target_delimiter": "",
        "doc_to_choice": "{{[sentence_bad, sentence_good]}}",
        "doc_to_target": 1,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))


def run_python(code, **environment):
    """What a new interpreter prints; it must not write to stderr."""
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
        cwd=Path(__file__).parents[1],
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    return process.stdout
