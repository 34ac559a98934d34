"""Datasets of the hub, from a local stand-in for it."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import hub
from tests.corpora import PAIRS, ROWS, STORY, pair_lines, run_python, text_lines
from tokenizer import Tokenizer
from training.data.corpus import open_corpus
from training.data.prepare import prepare_corpus
from training.data.sources import Source

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def hub_folder(tmp_path):
    stories, plain = tmp_path / "hub/some/stories", tmp_path / "hub/some/plain"
    (stories / "data").mkdir(parents=True)
    plain.mkdir()
    for split, rows in (("train", ROWS[:150]), ("validation", ROWS[150:])):
        table = pa.table({"text": rows, "id": range(len(rows))})
        pq.write_table(table, stories / f"data/{split}-00000-of-00001.parquet")
    (plain / "train.txt").write_text(STORY)
    for language in ("en", "fr"):
        (tmp_path / "hub/some/tongues" / language).mkdir(parents=True)
        (tmp_path / "hub/some/tongues" / language / "a.jsonl").write_text('{"text": "x"}\n' * 9)
    (tmp_path / "hub/some/tongues/README.md").write_text(
        "---\nconfigs:\n- {config_name: en, data_files: en/*}\n"
        "- {config_name: fr, data_files: fr/*}\n---\n"
    )
    (tmp_path / "hub/some/pairs").mkdir()
    (tmp_path / "hub/some/pairs/train.jsonl").write_text(pair_lines(PAIRS))
    (tmp_path / "hub/some/pairs/test.jsonl").write_text(pair_lines([("a", "b"), ("a", "")]))
    return tmp_path / "hub"


PREPARE = """
from training.data.prepare import Source, prepare_corpus
for source in {sources}:
    try: print(prepare_corpus(source, "bytes", 0, sentence_pairs=source.data == "some/pairs").directory)
    except ValueError as error: print(error)
"""


def test_hub_datasets_downloaded_and_streamed(tmp_path, hub_folder):
    sources = """[Source("some/stories"), Source("some/stories", streaming=True),
        Source("some/plain"), Source("some/plain", streaming=True),
        Source("some/none"), Source("none"), Source("some/stories", split="test"),
        Source("some/tongues"), Source("some/tongues", config="de"),
        Source("some/tongues", config="fr"), Source("some/stories", column="id"),
        Source("some/pairs", split="train"), Source("some/pairs", split="train", streaming=True),
        Source("some/stories", streaming=True, shuffle_buffer=40),
        Source("some/pairs", languages="fr-en")]"""
    with hub.running(hub_folder) as address:
        home = {"HF_HOME": str(tmp_path / "home")}
        lines = run_python(
            PREPARE.format(sources=sources), HF_ENDPOINT=address, **home
        ).splitlines()
    stories, streamed, plain, plain_streamed, unknown, unknown_owner, split, *rest = lines
    expected = tmp_path / "expected"
    expected.mkdir()
    for name, rows in (("train", ROWS[:150]), ("validation", ROWS[150:])):
        (expected / f"{name}.jsonl").write_text(text_lines(rows))
    (tmp_path / "plain.txt").write_text(STORY)
    fingerprint = prepare_corpus(Source(str(expected)), "bytes", 0).fingerprint
    assert open_corpus(stories).fingerprint == open_corpus(streamed).fingerprint == fingerprint
    fingerprint = prepare_corpus(Source(str(tmp_path / "plain.txt")), "bytes", 0).fingerprint
    assert open_corpus(plain).fingerprint == open_corpus(plain_streamed).fingerprint == fingerprint
    assert "the hub has no dataset of that name" in unknown
    assert "the hub has no dataset of that name" in unknown_owner
    assert "--data-split can be train, validation" in split
    no_config, wrong_config, french, column, pairs, pairs_streamed, shuffled, bad_pair = rest
    assert "--data-config can be one of ['en', 'fr']" in no_config
    assert "--data-config can be one of ['en', 'fr']" in wrong_config
    assert open_corpus(french).splits["train"].documents
    assert "no column 'id' of strings" in column
    (tmp_path / "pairs.jsonl").write_text(pair_lines(PAIRS))
    fingerprint = prepare_corpus(
        Source(str(tmp_path / "pairs.jsonl")), "bytes", 0, sentence_pairs=True
    ).fingerprint
    for directory in (pairs, pairs_streamed):
        assert open_corpus(directory, sentence_pairs=True).fingerprint == fingerprint
    in_order, in_another = (
        Tokenizer.load(directory).decode(open_corpus(directory).splits["train"].tokens)
        for directory in (streamed, shuffled)
    )
    assert in_order != in_another
    assert sorted(in_order.split("Row ")) == sorted(in_another.split("Row "))
    assert "shuffled with a buffer of 40" in open_corpus(shuffled).description
    assert "some/pairs, split test, row 2: no 'fr' sentence, only en" in bad_pair
    # Offline, what was downloaded is still there, and already tokenized.
    sources = '[Source("some/stories"), Source("some/plain"), Source("some/none")]'
    lines = run_python(PREPARE.format(sources=sources), HF_HUB_OFFLINE="1", **home).splitlines()
    assert lines[0] == stories
    assert open_corpus(lines[1]).fingerprint == open_corpus(plain).fingerprint
    assert "HF_HUB_OFFLINE prevents a download" in lines[2]


def test_unreachable_hub_is_reported_within_seconds(tmp_path):
    with hub.running(tmp_path) as address:
        pass  # The port is free again, so connections are refused.
    code = PREPARE.format(sources='[Source("some/stories")]')
    message = run_python(code, HF_ENDPOINT=address, HF_HOME=str(tmp_path))
    assert "cannot be reached" in message
    assert "give a local file" in message
