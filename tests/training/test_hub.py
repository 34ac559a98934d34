"""Datasets, models and tokenizers of the hub, and models pushed to it, with a local stand-in for it."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gpt.checkpoint import build_model, load_tensors, save_config, save_tensors, unique_state_dict
from tests import hub
from tests.corpora import PAIRS, ROWS, STORY, pair_lines, run_python, text_lines
from tokenizer import Tokenizer, train_bpe
from training.data.corpus import open_corpus
from training.data.prepare import prepare_corpus
from training.data.sources import Source
from training.interchange import export_run, import_folder

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
    with hub.running(hub_folder) as stand_in:
        home = {"HF_HOME": str(tmp_path / "home")}
        lines = run_python(
            PREPARE.format(sources=sources), HF_ENDPOINT=stand_in.address, **home
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
    with hub.running(tmp_path) as stand_in:
        pass  # The port is free again, so connections are refused.
    code = PREPARE.format(sources='[Source("some/stories")]')
    message = run_python(code, HF_ENDPOINT=stand_in.address, HF_HOME=str(tmp_path))
    assert "cannot be reached" in message
    assert "give a local file" in message


COMMANDS = """
import contextlib, io, json, os, sys, time
from training import cli, hub

# Waiting between two tries takes no time here: it moves the clock.
waits, clock = [], time.monotonic
time.sleep, time.monotonic = waits.append, lambda: clock() + sum(waits)
protocol = sys.stdout
for line in sys.stdin:
    environment, timeout, arguments = json.loads(line)
    os.environ.update(environment)
    os.environ |= {"HF_TOKEN": environment.get("HF_TOKEN", "")}
    hub.HUB_TIMEOUT_SECONDS = hub.UPLOAD_TIMEOUT_SECONDS = timeout
    waits.clear()
    hub.patience.silent_since = None
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main("tinygpt", arguments)
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, out.getvalue(), err.getvalue(), sum(waits)]), file=protocol, flush=True)
"""


class Hub:
    """The stand-in, and a process that runs commands of tinygpt with it."""

    def __init__(self, server, folder):
        self.server, self.folder = server, folder
        environment = os.environ | {
            "HF_ENDPOINT": server.address,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "TINYGPT_CACHE": str(folder / "cache"),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMANDS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=folder,
        )

    def run(self, *arguments, timeout=60.0, **environment):
        """What a command prints; it must succeed, and print nothing on standard error."""
        code, out, err, _ = self._run(arguments, timeout, environment)
        assert (code, err) == (0, ""), err
        return out

    def error(self, *arguments, timeout=60.0, **environment):
        """The only line that a command prints on standard error; it must fail within the deadline."""
        code, _, err, waits = self._run(arguments, timeout, environment)
        assert code == 2, err
        assert err.count("\n") == 1, err
        assert "Traceback" not in err
        assert waits < 30
        return err

    def _run(self, arguments, timeout, environment):
        line = json.dumps([environment, timeout, [str(argument) for argument in arguments]])
        print(line, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def files(self, name):
        return {p.name: p.read_bytes() for p in self.repository(name).iterdir() if p.is_file()}

    def repository(self, name):
        return self.server.folder / name


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with hub.running(folder / "repositories") as server:
        models = Hub(server, folder)
        with models.process:
            yield models
            models.process.stdin.close()


SIZES = {"width": 16, "depth": 2, "heads": 2, "context_length": 32}
OWNER, READER = {"HF_TOKEN": hub.TOKEN}, {"HF_TOKEN": hub.READ_TOKEN}


def save_run(directory, name, seed):
    """Write a run of a small model with random weights."""
    rng = random.Random(0)
    tokenizer = train_bpe((STORY[rng.randrange(500) :] for _ in range(9)), 300)
    args = {"vocab_size": tokenizer.vocab_size, **SIZES}
    torch.manual_seed(seed)
    directory.mkdir(parents=True)
    save_config(directory, name, args)
    save_tensors(directory / "model.safetensors", unique_state_dict(build_model(name, args)))
    tokenizer.save(directory / "tokenizer.json")
    export_run(directory, directory.with_suffix(".hf"), "float32")
    shutil.rmtree(directory)
    import_folder(directory.with_suffix(".hf"), directory, "a folder")
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by model and seed."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = [("gpt", 0), ("gpt", 1), ("gpt2", 0)]
    return {kind: save_run(folder / f"{kind[0]}-{kind[1]}", *kind) for kind in kinds}


def export(run, folder):
    folder.parent.mkdir(parents=True, exist_ok=True)
    export_run(run, folder, "float32")


def num_bytes(texts):
    return sum(len(text.encode()) for text in texts)


def shard(folder):
    """Divide a folder's weights into two files, as `transformers` does."""
    tensors = load_tensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_tensors(folder / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def assert_same_model(run, other):
    ours, theirs = (load_tensors(path / "model.safetensors") for path in (run, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (run / "tokenizer.json").read_text() == (other / "tokenizer.json").read_text()


@pytest.mark.parametrize("name", ["gpt2", "gpt"])
def test_import_of_a_model_by_its_name(name, models, runs, tmp_path):
    export(runs[name, 0], models.repository(f"some/{name}"))
    (models.repository(f"some/{name}") / "onnx.bin").write_bytes(b"0" * 1000)
    if name == "gpt":
        shard(models.repository("some/gpt"))
    assert "next:" in models.run("import", f"some/{name}", tmp_path / "run")
    assert_same_model(tmp_path / "run", runs[name, 0])
    assert not any("onnx" in request for request in models.server.requests)
    error = models.error("import", "some/nothing", tmp_path / "other")
    assert "some/nothing: no such file or folder, nor can it be had from the hub: none" in error
    assert "Repo id must" in models.error("import", "./some/nothing", tmp_path / "other")


def test_import_of_a_revision(models, runs, tmp_path):
    export(runs["gpt", 0], models.repository("some/revised"))
    export(runs["gpt", 1], models.repository("some/revised@v2"))
    commit = hub.commit_of(models.repository("some/revised"))
    models.run("import", "some/revised", tmp_path / "main")
    models.run("import", "some/revised", tmp_path / "v2", "--revision", "v2")
    models.run("import", "some/revised", tmp_path / "commit", "--revision", commit)
    for directory, seed in (("main", 0), ("v2", 1), ("commit", 0)):
        assert_same_model(tmp_path / directory, runs["gpt", seed])
    error = models.error("import", "some/revised", tmp_path / "v3", "--revision", "v3")
    assert "it has no such revision" in error
    # Without a revision it is the newest, also if an older one is in the cache.
    export_again = models.repository("some/revised")
    (export_again / "model.safetensors").unlink()
    (models.repository("some/revised@v2") / "model.safetensors").rename(
        export_again / "model.safetensors"
    )
    models.run("import", "some/revised", tmp_path / "newest")
    assert_same_model(tmp_path / "newest", runs["gpt", 1])


def test_private_repositories_need_a_token(models, runs, tmp_path):
    export(runs["gpt", 0], models.repository("some/secret"))
    (models.repository("some/secret") / hub.PRIVATE).touch()
    secrets = models.repository("some/secrets")
    secrets.mkdir()
    (secrets / hub.PRIVATE).touch()
    (secrets / "train.jsonl").write_text(text_lines(ROWS))
    imported = "import", "some/secret", tmp_path / "run"
    scored = "eval", runs["gpt", 0], "--data", "some/secrets", "--json"
    trained = *TRAIN, "--data", tmp_path / "a.txt", "--tokenizer", "some/secret", "--run"
    (tmp_path / "a.txt").write_text(STORY)
    for command in (imported, scored, (*trained, tmp_path / "trained")):
        assert "`hf auth login`, or set HF_TOKEN" in models.error(*command)
    assert "Invalid credentials" in models.error(*imported, HF_TOKEN="hf_wrong")
    models.run(*imported, **READER)
    assert_same_model(tmp_path / "run", runs["gpt", 0])
    assert json.loads(models.run(*scored, **READER))["bytes"] == num_bytes(ROWS)
    models.run(*trained, tmp_path / "trained", **READER)


TRAIN = [
    "train",
    "gpt-nano",
    "--steps",
    "2",
    "--batch-size",
    "2",
    "--context-length",
    "16",
    "--width",
    "16",
    "--depth",
    "1",
    "--heads",
    "2",
    "--device",
    "cpu",
    "--threads",
    "1",
    "--sample-tokens",
    "0",
]


def test_a_tokenizer_by_its_name(models, runs, tmp_path):
    repository = models.repository("some/tokenizer")
    export(runs["gpt", 0], repository)
    (repository / "model.safetensors").unlink()
    (tmp_path / "a.txt").write_text(STORY)
    command = *TRAIN, "--data", tmp_path / "a.txt", "--run", tmp_path / "run", "--tokenizer"
    models.run(*command, "some/tokenizer")
    expected = (runs["gpt", 0] / "tokenizer.json").read_text()
    assert (tmp_path / "run" / "tokenizer.json").read_text() == expected
    command = *command[:-2], tmp_path / "other", "--tokenizer"
    assert "none of that name" in models.error(*command, "some/nothing")
    (repository / "tokenizer.json").rename(models.repository("some") / "tokenizer.json")
    assert "has no tokenizer.json" in models.error(*command, "some/tokenizer")
    requests = len(models.server.requests)
    for path in ("bqe", "some/tokenizer.json", "a/b/c"):
        assert f"{path}: no such tokenizer" in models.error(*command, path)
    assert len(models.server.requests) == requests
    assert not (tmp_path / "other").exists()


def test_data_by_configuration_split_and_revision(models, runs, tmp_path):
    splits = "[{{split: train, path: {0}/train*}}, {{split: validation, path: {0}/validation*}}]"
    configs = (f"- {{config_name: {x}, data_files: {splits.format(x)}}}\n" for x in ("en", "fr"))
    card = f"---\nconfigs:\n{''.join(configs)}---\n"
    for revision, count in (("", 5), ("@v2", 7)):
        repository = models.repository(f"some/tongues{revision}")
        for language in ("en", "fr"):
            (repository / language).mkdir(parents=True)
            for split in ("train", "validation"):
                number = count + 10 * (language == "fr") + 100 * (split == "train")
                file = repository / language / f"{split}.jsonl"
                file.write_text(text_lines(ROWS[:number]))
        (repository / "README.md").write_text(card)
    command = "eval", runs["gpt", 0], "--data", "some/tongues", "--json", "--data-config"

    def scored_bytes(*options):
        return json.loads(models.run(*command, *options))["bytes"]

    assert scored_bytes("en") == num_bytes(ROWS[:5])
    assert scored_bytes("fr") == num_bytes(ROWS[:15])
    assert scored_bytes("fr", "--split", "train") == num_bytes(ROWS[:115])
    assert scored_bytes("fr", "--data-revision", "v2") == num_bytes(ROWS[:17])
    commit = hub.commit_of(models.repository("some/tongues@v2"))
    assert scored_bytes("en", "--data-revision", commit) == num_bytes(ROWS[:7])
    assert scored_bytes("en", "--data-revision", "v2", "--streaming") == num_bytes(ROWS[:7])
    assert scored_bytes("en") == num_bytes(ROWS[:5])
    out = models.run(*command[:-2], "--data-config", "fr", "--data-revision", "v2")
    assert "some/tongues (fr, revision v2)" in out
    assert "has no revision 'v3'" in models.error(*command, "en", "--data-revision", "v3")
    (tmp_path / "a.txt").write_text(STORY)
    error = models.error(
        "eval", runs["gpt", 0], "--data", tmp_path / "a.txt", "--data-revision", "v2"
    )
    assert "--data-revision is only for hub datasets" in error


def test_push(models, runs, tmp_path):
    models.server.requests.clear()
    out = models.run("export", runs["gpt", 0], tmp_path / "a", "--push", "some/pushed", **OWNER)
    assert f"pushed to {models.server.address}/some/pushed" in out
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert len(files) == 6
    assert models.files("some/pushed") == files

    def uploads():
        return sum("/commit/" in request or "PUT" in request for request in models.server.requests)

    assert uploads() == 2
    models.run("export", runs["gpt", 0], tmp_path / "b" / "a", "--push", "some/pushed", **OWNER)
    assert models.files("some/pushed").keys() == files.keys()
    models.run("import", "some/pushed", tmp_path / "run")
    assert_same_model(tmp_path / "run", runs["gpt", 0])
    # Private, and another version.
    options = "--push", "some/own", "--private"
    models.run("export", runs["gpt", 0], tmp_path / "c", *options, **OWNER)
    assert "HF_TOKEN" in models.error("import", "some/own", tmp_path / "own")
    models.run("export", runs["gpt", 1], tmp_path / "d", *options, **OWNER)
    models.run("import", "some/own", tmp_path / "own", **READER)
    assert_same_model(tmp_path / "own", runs["gpt", 1])


@pytest.mark.parametrize(
    ("fault", "token", "message"),
    [
        ("", hub.READ_TOKEN, "403 you may only read"),
        ("", "", "401 log in first"),
        ("500", hub.TOKEN, "500"),
        ("silent", hub.TOKEN, "timed out"),
    ],
)
def test_a_push_that_fails_leaves_a_complete_folder(fault, token, message, models, runs, tmp_path):
    models.server.faults["repos/create"] = models.server.faults["fault/push"] = fault
    command = "export", runs["gpt", 0], tmp_path / "hf", "--push", "fault/push"
    error = models.error(*command, HF_TOKEN=token, timeout=1)
    models.server.faults.clear()
    assert message in error
    assert f"the folder {tmp_path / 'hf'} is complete" in error
    assert len(list((tmp_path / "hf").iterdir())) == 6
    models.run("import", tmp_path / "hf", tmp_path / "run")
    assert_same_model(tmp_path / "run", runs["gpt", 0])


@pytest.mark.parametrize(
    ("fault", "messages"),
    [
        pytest.param(
            *("silent", ["timed out", "", "the hub has stopped answering", ""]),
            marks=pytest.mark.long,
        ),
        ("500", ["500", "500", "the hub has stopped answering, or answers only errors", ""]),
        ("cut", ["peer closed connection", "", "peer closed connection", "Server Disconnected"]),
        pytest.param(
            *("stalled", ["timed out", "", "timed out", "Server Disconnected"]),
            marks=pytest.mark.long,
        ),
        ("html", ["model.safetensors", "tokenizer.json", "train.parquet", "Parquet magic"]),
    ],
)
def test_a_faulty_hub_is_one_line_and_leaves_nothing_behind(
    fault, messages, models, runs, tmp_path
):
    model, data = f"fault/{fault}-model", f"fault/{fault}-data"
    export(runs["gpt", 0], models.repository(model))
    models.repository(data).mkdir()
    table = pa.table({"text": ROWS})
    pq.write_table(table, models.repository(data) / "train.parquet")
    (tmp_path / "a.txt").write_text(STORY)
    score = "eval", runs["gpt", 1], "--json", "--data", data
    train = *TRAIN, "--run", tmp_path / "trained", "--data", tmp_path / "a.txt"
    commands = [
        ("import", model, tmp_path / "run"),
        (*train, "--tokenizer", model),
        score,
        (*score, "--streaming"),
    ]
    models.server.faults |= dict.fromkeys((model, data), fault)
    for command, message in zip(commands, messages, strict=True):
        if message:
            assert message in models.error(*command, timeout=1)
    assert not (tmp_path / "run").exists()
    models.server.faults.clear()
    _, _, *scores = [models.run(*command) for command in commands]
    assert_same_model(tmp_path / "run", runs["gpt", 0])
    expected = (runs["gpt", 0] / "tokenizer.json").read_text()
    assert (tmp_path / "trained" / "tokenizer.json").read_text() == expected
    assert [json.loads(score)["bytes"] for score in scores] == [num_bytes(ROWS)] * 2
