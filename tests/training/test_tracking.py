"""Trackers get the metrics of a run; the real libraries run here, offline."""

import dataclasses
import json
import os
import signal
import sys

import pytest

from tests.training.helpers import read_log
from training import tracking
from training.cli import main
from training.config import TrainingConfig
from training.progress import read_metrics
from training.run_directory import create_run, resume_run
from training.trainer import Stopped

TINY = TrainingConfig(
    preset="tiny",
    data="text.txt",
    tokenizer="bytes",
    model_args={"width": 16, "depth": 1, "heads": 2},
    steps=6,
    batch_size=2,
    context_length=16,
    warmup_steps=2,
    eval_interval=3,
    eval_tokens=64,
    checkpoint_interval=2,
    log_interval=1,
    sample_tokens=4,
    device="cpu",
)


@pytest.fixture(autouse=True)
def folder(cache, tmp_path, monkeypatch):
    """A folder with a text, and no settings of trackers but to stay on this machine."""
    for name in os.environ:
        if name.startswith(("WANDB_", "TRACKIO_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONSOLE", "off")  # pytest has its own standard output
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n" * 200)
    return tmp_path


@pytest.fixture
def wandb():
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    yield wandb
    wandb.teardown()  # it reads its variables once in a session


@pytest.fixture
def trackio(folder, monkeypatch):
    """Trackio, which stores its runs in the folder."""
    pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio")
    for module in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, module)  # it reads the variable when it is imported
    monkeypatch.setenv("TRACKIO_DIR", str(folder / "trackio"))
    import trackio

    return trackio


def train_and_resume(track, directory):
    """Train to a signal after step 3, resume to the end, and score."""
    trainer = create_run(dataclasses.replace(TINY, track=track), directory)
    train_step = trainer.train_step

    def train_step_with_signal(objective):
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(objective)

    trainer.train_step = train_step_with_signal
    with pytest.raises(Stopped):
        trainer.train()
    if track == "wandb":  # names its folders by the second
        (directory / "wandb").rename(directory / "wandb-before")
    trainer = resume_run(directory, "cpu")
    assert trainer.step == 3
    trainer.train()
    trainer.score()


def logged(directory):
    """The numbers and texts of metrics.jsonl."""
    return [
        {name: value for name, value in line.items() if isinstance(value, str | int | float)}
        for line in read_metrics(directory)
    ]


def tracked_by_wandb(directory):
    """What W&B's local files hold: run ids, config, exit codes, and the values of each call of `log`."""
    from wandb.proto.wandb_internal_pb2 import Record

    ids, config, exit_codes, rows = [], {}, [], []
    for file in sorted(directory.glob("wandb*/offline-*/run-*.wandb"), reverse=True):
        for content in leveldb_records(file.read_bytes()[7:]):
            record = Record.FromString(content)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.append(record.run.run_id)
                updates = record.run.config.update
                config |= {item.key: json.loads(item.value_json) for item in updates}
            elif kind == "exit":
                exit_codes.append(record.exit.exit_code)
            elif kind == "history":
                names = [
                    (item.key or ".".join(item.nested_key), item) for item in record.history.item
                ]
                row = {name: json.loads(item.value_json) for name, item in names}
                rows.append({name: it for name, it in row.items() if not name.startswith("_")})
    return ids, config, exit_codes, rows


def leveldb_records(data):
    """The records of a file in the format of LevelDB's log, whose first block lacks the file's header."""
    position, content, block_end = 0, b"", 32768 - 7
    while position < len(data):
        if block_end - position < 7:
            position, block_end = block_end, block_end + 32768
            continue
        length, kind = (
            int.from_bytes(data[position + 4 : position + 6], "little"),
            data[position + 6],
        )
        content += data[position + 7 : position + 7 + length]
        position += 7 + length
        if position == block_end:
            block_end += 32768
        if kind in (1, 4):  # a full record, or the last part of one
            yield content
            content = b""


def test_wandb_continues_one_run(wandb, folder):
    run = folder / "run"
    train_and_resume("wandb", run)
    wandb.teardown()  # writes the files to their ends
    ids, config, exit_codes, rows = tracked_by_wandb(run)
    assert set(ids) == {json.loads((run / "run.json").read_text())["tracking_id"]}
    assert exit_codes == [128 + signal.SIGTERM, 0]
    assert (config["steps"], config["model_args"]["width"]) == (6, 16)
    assert rows == logged(run)


def test_trackio_continues_one_run(trackio, folder):
    run = folder / "run"
    train_and_resume("trackio", run)
    (tracked,) = trackio.Api().runs("tinygpt")
    assert tracked.name == f"run-{json.loads((run / 'run.json').read_text())['tracking_id']}"
    assert (tracked.config["steps"], tracked.config["model_args"]["width"]) == (6, 16)
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs("tinygpt", tracked.name)
    for row in rows:
        del row["timestamp"]
    assert rows == logged(run)


def test_every_run_is_tracked_as_its_own(folder):
    tracked = dataclasses.replace(TINY, track="wandb")
    ids = {tracking.new_tracking_id(tracked)["tracking_id"] for _ in range(20)}
    assert len(ids) == 20
    assert tracking.new_tracking_id(TINY) == {}


@pytest.mark.parametrize("option", ["--track=wandb", "--track=trackio", "--tensorboard"])
def test_a_missing_package_is_named_before_anything_is_written(option, folder, monkeypatch, capsys):
    name = option.rpartition("=")[2].strip("-")
    for module in [it for it in sys.modules if name in it.split(".")]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, tracking.LIBRARIES[name][0], None)
    with pytest.raises(SystemExit) as stop:
        main("tinygpt", ["train", "linear", option, "--run", "new"])
    assert stop.value.code == 2
    error = f"tinygpt: {option.replace('=', ' ')} needs a package: pip install {name}\n"
    assert capsys.readouterr().err == error
    assert not (folder / "runs").exists() or not list((folder / "runs").iterdir())


def test_a_folder_of_the_trackers_name_is_no_package(folder, monkeypatch):
    """W&B itself makes a folder `wandb`, which Python imports as an empty package."""
    (folder / "wandb").mkdir()
    for module in [it for it in sys.modules if it.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [str(folder)])
    with pytest.raises(ValueError, match="--track wandb needs a package: pip install wandb"):
        tracking.check_installed(dataclasses.replace(TINY, track="wandb"))
    del sys.modules["wandb"]


def test_wandb_that_cannot_start_is_one_line_and_the_run_can_begin_later(
    wandb, folder, monkeypatch, capfd
):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(folder))  # where no account is logged in
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in OPTIONS.items()]
    with pytest.raises(SystemExit) as stop:
        main("tinygpt", ["train", "gpt-nano", *arguments, "--track=wandb", "--run=new"])
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("tinygpt: --track wandb could not start: No API key configured")
    assert "WANDB_MODE=offline" in line
    assert line.endswith("then continue with: tinygpt train --resume runs/new")
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    main("tinygpt", ["train", "--resume", "new", "--device", "cpu"])
    wandb.teardown()
    assert tracked_by_wandb(folder / "runs" / "new")[3] == logged(folder / "runs" / "new")


OPTIONS = {
    **{name: getattr(TINY, name) for name in ("data", "tokenizer", "steps", "batch_size")},
    **{name: getattr(TINY, name) for name in ("context_length", "log_interval", "device")},
    **TINY.model_args,
    "sample_tokens": 4,
}


class Failing:
    """A tracker whose connection breaks after a few values."""

    def __init__(self):
        self.steps, self.exit_codes = [], []

    def log(self, step, values):
        if step > 2:
            raise ConnectionError("the service\nis gone.")
        self.steps.append(step)

    def close(self, exit_code):
        self.exit_codes.append(exit_code)


def test_a_tracker_that_fails_later_does_not_end_the_run(folder, monkeypatch, capsys):
    tracker = Failing()
    monkeypatch.setattr(tracking, "_import", lambda name, option: None)
    monkeypatch.setattr(tracking, "_start", lambda *_: tracker)
    trainer = create_run(dataclasses.replace(TINY, track="wandb"), folder / "run")
    trainer.train()
    trainer.score()
    assert tracker.steps == [1, 2]
    message = "--track wandb failed: the service is gone; the run goes on without it"
    assert capsys.readouterr().err.count(message) == 1
    assert [line["step"] for line in read_log(folder / "run") if "loss" in line] == [*range(1, 7)]
    assert "final_loss" in read_metrics(folder / "run")[-1]
