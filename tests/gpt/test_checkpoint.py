import json

import pytest

from gpt.checkpoint import FORMAT, load_model, save_config
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
