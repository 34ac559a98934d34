import contextlib
import json
import shlex

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gpt.checkpoint import (
    FORMAT,
    build_model,
    find_run,
    load_model,
    load_tensors,
    run_argument,
    run_path,
    save_config,
    save_tensors,
)
from training.cli import Describe
from training.presets import get_preset
from training.run_directory import load_training_config, save_training_config


def set_format(path, version):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": version}))


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (
            FORMAT - 1,
            r"made by an earlier version of tinygpt, in format 1; this version reads format 2: "
            "train the run again",
        ),
        (FORMAT + 1, "format 3, this tinygpt reads format 2: upgrade tinygpt"),
        (None, "format None, this tinygpt reads format 2: upgrade tinygpt"),
    ],
)
def test_runs_of_other_formats_are_refused(version, message, tmp_path):
    save_config(tmp_path, "softmax", {"vocab_size": 5, "context_length": 4})
    save_training_config(get_preset("gpt-nano"), tmp_path, {})
    load_training_config(tmp_path)
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        load_model(tmp_path)
    for name, load in (
        ("config.json", load_model),
        ("config.json", lambda run: Describe(str(run))()),
        ("run.json", load_training_config),
    ):
        set_format(tmp_path / name, version)
        with pytest.raises(ValueError, match=message) as error:
            load(tmp_path)
        assert str(error.value).startswith(f"{tmp_path / name}: ")


TENSORS = {
    "cpu": torch.arange(5, dtype=torch.uint8),
    "weight": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
    "step": torch.tensor(3.0),
    "none": torch.zeros(0, 4),
}


def test_no_flipped_bit_is_loaded(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, TENSORS)
    whole = path.read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 7  # bit 7 would make a header that is no UTF-8
        path.write_bytes(flipped)
        with contextlib.suppress(ValueError):
            loaded = load_tensors(path)  # where the bit is in the metadata
            assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)
    path.write_bytes(whole[:-1] + b"x")
    with pytest.raises(ValueError, match=r"a\.safetensors: damaged \(its tensors are not those"):
        load_tensors(path)


def test_equal_tensors_make_equal_files_that_other_loaders_accept(tmp_path):
    path, contents = tmp_path / "a.safetensors", set()
    for _ in range(8):
        save_tensors(path, TENSORS)
        contents.add(path.read_bytes())
    assert len(contents) == 1
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_files_of_other_programs_have_no_hash(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors")
    assert load_tensors(tmp_path / "a.safetensors").keys() == TENSORS.keys()


@pytest.fixture
def run_folders(tmp_path, monkeypatch):
    """Runs in runs/ and beside it, and a folder that is no run."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/both", "both", "runs/new", "old"):
        (tmp_path / name).mkdir(parents=True)
        save_config(tmp_path / name, "softmax", {"vocab_size": 5, "context_length": 4})
    (tmp_path / "folder").mkdir()


@pytest.mark.usefixtures("run_folders")
def test_a_bare_name_is_a_run_in_runs():
    found = {name: str(find_run(name)) for name in ("both", "./both", "new", "old", "runs/new")}
    assert found == {
        "both": "runs/both",
        "./both": "both",
        "new": "runs/new",
        "old": "old",  # made beside runs/
        "runs/new": "runs/new",
    }
    assert str(run_path("folder")) == "runs/folder"
    for name, message in (("folder", "runs/folder: no such run"), ("", "is empty")):
        with pytest.raises(ValueError, match=message):
            find_run(name)


@pytest.mark.usefixtures("run_folders")
@pytest.mark.parametrize("name", ["both", "./both", "/tmp/both", "runs/it's a $run; #1"])
def test_printed_argument_names_the_same_run(name):
    path = run_path(name)
    (argument,) = shlex.split(run_argument(path))
    assert run_path(argument) == path


@pytest.mark.parametrize(
    ("name", "value"),
    [("depth", 10**9), ("width", 10**30), ("dropout", float("nan")), ("rotary_base", 0.0)],
)
def test_sizes_that_no_machine_can_hold_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        build_model("gpt", {"vocab_size": 5, "context_length": 4, name: value})
