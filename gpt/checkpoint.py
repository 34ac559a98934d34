"""The run directory, as far as a model goes: config.json and model.safetensors, in and out.

JSON and safetensors only, so that opening a model runs no code. Every file is written
beside its place, flushed to the disk and renamed: it is whole or it is not there.
"""

import difflib
import inspect
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt import CHAPTERS, TABULAR, LanguageModel, Model

MODEL_CLASSES: dict[str, type[Model]] = {**CHAPTERS, **TABULAR}
"""Every model that a run can hold."""

FORMAT = 2
"""Of config.json; a reader refuses a higher one."""

RUNS = Path("runs")
"""Where runs are written, and looked for when none is named."""


def cache_dir() -> Path:
    """Where what can be made again is kept: TINYGPT_CACHE, or the user's cache folder."""
    if root := os.environ.get("TINYGPT_CACHE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinygpt"


def write_atomically(path: Path, text: str) -> None:
    """Put `text` in `path`, or leave what was there."""
    beside = path.with_name(path.name + ".part")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, or leave what was there."""
    beside = path.with_name(path.name + ".part")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error
    with beside.open("rb+") as file:
        os.fsync(file.fileno())
    beside.replace(path)


def load_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file; a ValueError says what is wrong with it."""
    try:
        return load_file(path, device=str(device))
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: damaged ({error}); restore it from a copy or train again"
        ) from error


def unique_state_dict(model: Model) -> dict[str, Tensor]:
    """The model's state dict with tied tensors once, as safetensors wants them."""
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor.detach()
    return kept


def load_weights(model: Model, tensors: dict[str, Tensor], source: Path) -> None:
    """Copy `tensors` into the model; a ValueError names the first that is missing, unknown or of another shape."""
    expected = unique_state_dict(model)
    for name in (*expected, *tensors):
        if name not in tensors:
            raise ValueError(f"{source}: the tensor {name} is missing; config.json asks for it")
        if name not in expected:
            raise ValueError(
                f"{source}: the tensor {name} is not part of what config.json asks for"
            )
        if tensors[name].shape != expected[name].shape:
            raise ValueError(
                f"{source}: the tensor {name} has shape {list(tensors[name].shape)}, "
                f"config.json asks for {list(expected[name].shape)}"
            )
    model.load_state_dict(tensors, strict=False)


def model_class(name: str) -> type[Model]:
    """The class of that name; a ValueError lists those there are."""
    if name not in MODEL_CLASSES:
        raise ValueError(
            f"no model is named {name!r}{did_you_mean(name, MODEL_CLASSES)}; there are {', '.join(MODEL_CLASSES)}"
        )
    return MODEL_CLASSES[name]


def constructor_arguments(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """All constructor arguments of model `name`: those given, and the defaults of the others.

    A ValueError names what is unknown or absent.
    """
    signature = inspect.signature(model_class(name))
    for argument in given:
        if argument not in signature.parameters:
            raise ValueError(
                f"the model {name} has no argument {argument!r}{did_you_mean(argument, signature.parameters)}"
            )
    try:
        bound = signature.bind(**given)
    except TypeError as error:
        raise ValueError(f"the model {name}: {error}") from error
    bound.apply_defaults()
    return dict(bound.arguments)


def did_you_mean(word: str, words: Any) -> str:  # noqa: ANN401 (any iterable of names)
    """' (did you mean …?)' for a mistyped word, or nothing."""
    matches = difflib.get_close_matches(word, list(words), n=3)
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""


def build_model(name: str, given: dict[str, Any]) -> Model:
    """A new model, its weights at their first values; a ValueError says what does not fit."""
    arguments = constructor_arguments(name, given)
    return model_class(name)(**arguments)


def save_config(directory: Path, name: str, given: dict[str, Any]) -> None:
    """Write config.json: enough to build the model again."""
    config = {"format": FORMAT, "model": name, "model_args": constructor_arguments(name, given)}
    write_atomically(directory / "config.json", json.dumps(config, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a ValueError says where it is cut short or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not whole JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds {type(value).__name__}, expected a JSON object")
    return value


def find_run(run: Path | None, file: str = "model.safetensors") -> Path:
    """The run directory that was named, or the one under runs/ with the newest `file`.

    A ValueError if there is none.
    """
    if run is None:
        found = sorted(RUNS.glob(f"*/{file}"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise ValueError(f"there is no run in {RUNS.absolute()}: train one with `make train`")
        return found[-1].parent
    if not run.is_dir():
        names = sorted(path.parent.name for path in RUNS.glob("*/config.json"))
        known = f"; there are {', '.join(names)}" if names else ""
        raise ValueError(f"{run}: no such run directory{did_you_mean(run.name, names)}{known}")
    return run


def is_translation_run(run: Path) -> bool:
    """Whether a run was trained on pairs of sentences, so that it writes what its prompt means."""
    file = run / "run.json"
    settings = read_json(file).get("config") if file.is_file() else None
    return isinstance(settings, dict) and settings.get("task") == "translation"


def load_language_model(run: Path, device: str | torch.device = "cpu") -> LanguageModel:
    """The trained model in a run directory, as `open_model`; a ValueError if it does not speak."""
    model = load_model(run, device)
    if not isinstance(model, LanguageModel):
        raise ValueError(
            f"{run}: holds a model that does not speak ({type(model).__name__}, "
            f"it learns {' or '.join(model.supported_tasks)}): choose a run of a language model"
        )
    return model


def load_model(run: Path, device: str | torch.device = "cpu") -> Model:
    """The trained model in a run directory, ready to be evaluated.

    A ValueError says what is absent, cut short, damaged or of a newer format.
    """
    config_path, weights_path = run / "config.json", run / "model.safetensors"
    if not config_path.is_file():
        raise ValueError(f"{run}: not a run directory: it has no config.json")
    config = read_json(config_path)
    version = config.get("format")
    if not isinstance(version, int) or version > FORMAT:
        raise ValueError(
            f"{config_path}: format {version}, this tinygpt reads up to {FORMAT}: upgrade tinygpt"
        )
    if not isinstance(config.get("model"), str) or not isinstance(config.get("model_args"), dict):
        raise ValueError(f"{config_path}: expected a model's name and its arguments")
    if not weights_path.is_file():
        raise ValueError(
            f"{run}: has no model.safetensors: a run writes it at its first validation"
        )
    try:
        model = build_model(config["model"], config["model_args"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config_path}: {error}") from error
    load_weights(model, load_tensors(weights_path), weights_path)
    return model.to(device).eval()
