"""The model files of a run directory: write and read config.json and model.safetensors.

JSON and safetensors only, so that loading a model runs no code. Every file is written under a
temporary name, flushed to the disk and renamed: it is complete or absent.
"""

import contextlib
import difflib
import hashlib
import inspect
import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpt import CHAPTERS, TABULAR_MODELS, LanguageModel, Model

T = TypeVar("T")

MODEL_CLASSES: dict[str, type[Model]] = {**CHAPTERS, **TABULAR_MODELS}
"""Every model that a run can hold, by name."""

FORMAT = 2
"""Format of config.json and run.json; a run of any other format is refused."""

MAX_SIZES = {
    "depth": 1000,
    **dict.fromkeys(("vocab_size", "context_length", "ngrams"), 2**31 - 1),
    "rotary_base": 10**12,
}
"""Largest values of integer constructor arguments of models; of any other it is `MAX_SIZE`."""
MAX_SIZE = 2**20

RUNS = Path("runs")
"""Default directory of runs."""


def cache_dir() -> Path:
    """Return the directory for files that can be rebuilt: TINYGPT_CACHE, or in the user's cache."""
    if root := os.environ.get("TINYGPT_CACHE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinygpt"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to; on success the file replaces `path`."""
    temporary = path.with_name(path.name + ".part")
    yield temporary
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file; if that fails, the previous content stays."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _sha256(tensors: dict[str, Tensor]) -> str:
    """Return a hash of names, dtypes, shapes and contents of tensors on the CPU."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file with a hash of its tensors; if that fails, the previous content stays."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # Other loaders, such as that of transformers, require the format.
    metadata = {"format": "pt", "sha256": _sha256(tensors)}
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from error
        # The library writes metadata in random order; equal tensors should make equal files.
        header = json.dumps({"__metadata__": metadata}, separators=(",", ":")).removesuffix("}")
        with temporary.open("rb+") as file:
            file.seek(8)  # after the header's length
            file.write(header.encode())


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; a ValueError says how it is damaged.

    The tensors are compared with their hash, if the file has one: those of other programs have none.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: damaged ({error}); restore it from a copy or train again"
        ) from error
    expected = metadata.get("sha256")
    if expected is not None and _sha256(tensors) != expected:
        raise ValueError(
            f"{path}: damaged (its tensors are not those that were saved: their SHA-256 differs); "
            "restore it from a copy or train again"
        )
    return tensors


def unique_state_dict(model: Model) -> dict[str, Tensor]:
    """Return the model's state dict with tied tensors once, as safetensors requires."""
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        unique.setdefault(id(tensor), (name, tensor.detach()))
    return dict(unique.values())


def load_weights(model: Model, tensors: dict[str, Tensor], source: Path) -> None:
    """Copy `tensors` into the model.

    One that is missing, unknown or of another shape is a ValueError that names the file `source`.
    """
    expected = unique_state_dict(model)
    for name in (*expected, *tensors):
        if name not in tensors:
            raise ValueError(f"{source}: the tensor {name} is missing; config.json requires it")
        if name not in expected:
            raise ValueError(f"{source}: the tensor {name} is unknown to the model of config.json")
        if tensors[name].shape != expected[name].shape:
            raise ValueError(
                f"{source}: the tensor {name} has shape {list(tensors[name].shape)}, "
                f"config.json requires {list(expected[name].shape)}"
            )
    model.load_state_dict(tensors, strict=False)


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return ' (did you mean …?)' for a mistyped word, or '' if none of `words` is similar."""
    matches = difflib.get_close_matches(word, list(words), n=3)
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""


def lookup(kind: str, name: str, values: Mapping[str, T]) -> T:
    """Return `values[name]`; a ValueError suggests similar names and lists all."""
    if name not in values:
        hint, names = did_you_mean(name, values), ", ".join(values)
        raise ValueError(f"no {kind} is named {name!r}{hint}; there are {names}")
    return values[name]


def model_class(name: str) -> type[Model]:
    """Return the model class of that name; a ValueError lists the names there are."""
    return lookup("model", name, MODEL_CLASSES)


def constructor_arguments(name: str, model_args: dict[str, Any]) -> dict[str, Any]:
    """Return all constructor arguments of model `name`: `model_args`, and defaults for the rest.

    A ValueError if an argument is unknown, missing, too large or not finite; the model checks the rest.
    """
    signature = inspect.signature(model_class(name))
    for argument in model_args:
        if argument not in signature.parameters:
            hint = did_you_mean(argument, signature.parameters)
            raise ValueError(f"the model {name} has no argument {argument!r}{hint}")
    try:
        bound = signature.bind(**model_args)
    except TypeError as error:
        raise ValueError(f"the model {name}: {error}") from error
    bound.apply_defaults()
    for argument, value in bound.arguments.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            largest = 1e38 if isinstance(number, float) else MAX_SIZES.get(argument, MAX_SIZE)
            # NaN is not below it either.
            if isinstance(number, int | float) and not abs(number) <= largest:
                raise ValueError(f"{argument} must be at most {largest}, not {number}")
    return dict(bound.arguments)


def build_model(name: str, model_args: dict[str, Any]) -> Model:
    """Return a new, initialized model; a ValueError says which argument is wrong."""
    return model_class(name)(**constructor_arguments(name, model_args))


def save_config(directory: Path, name: str, model_args: dict[str, Any]) -> None:
    """Write config.json, from which `load_model` builds the model again."""
    arguments = constructor_arguments(name, model_args)
    config = {"format": FORMAT, "model": name, "model_args": arguments}
    write_atomically(directory / "config.json", json.dumps(config, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; anything else is a ValueError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds {type(value).__name__}, expected a JSON object")
    return value


def check_format(path: Path, content: dict[str, Any]) -> None:
    """Raise a ValueError unless `content` of a run's config.json or run.json has our `FORMAT`."""
    version = content.get("format")
    if isinstance(version, int) and version < FORMAT:
        raise ValueError(
            f"{path}: made by an earlier version of tinygpt, in format {version}; this version "
            f"reads format {FORMAT}: train the run again"
        )
    if version != FORMAT:
        message = f"format {version}, this tinygpt reads format {FORMAT}: upgrade tinygpt"
        raise ValueError(f"{path}: {message}")


def read_config(run: Path) -> tuple[str, dict[str, Any]]:
    """Return the model name and constructor arguments in a run's config.json.

    A file that is missing, damaged or of another format is a ValueError.
    """
    path = run / "config.json"
    if not path.is_file():
        raise ValueError(f"{run}: not a run directory: it has no config.json")
    config = read_json(path)
    check_format(path, config)
    name, model_args = config.get("model"), config.get("model_args")
    if not isinstance(name, str) or not isinstance(model_args, dict):
        raise ValueError(f"{path}: expected a model's name and its arguments")
    return name, model_args


def run_path(run: str) -> Path:
    """Return the directory of a run that is named on the command line: a bare NAME is runs/NAME."""
    if not run:
        raise ValueError("the name of the run is empty: give a NAME, which is in runs/, or a path")
    return RUNS / run if Path(run).name == run else Path(run)


def run_argument(directory: Path) -> str:
    """Return what to type in a shell for a run directory: the inverse of `run_path`, quoted."""
    path = str(directory)
    return shlex.quote(f"./{path}" if directory.name == path else path)


def find_run(run: str | Path | None, file: str = "model.safetensors") -> Path:
    """Return the directory of an existing run; a ValueError if there is none.

    A string is read as by `run_path`, or is the path of a run. None is the run under runs/ with the
    newest `file`.
    """
    if isinstance(run, str):
        named = run_path(run)
        run = Path(run) if not named.is_dir() and Path(run, "config.json").is_file() else named
    if run is None:
        files = sorted(RUNS.glob(f"*/{file}"), key=lambda path: path.stat().st_mtime)
        if not files:
            raise ValueError(f"there is no run in {RUNS.absolute()}: train one with `make train`")
        return files[-1].parent
    if not run.is_dir():
        names = sorted(path.parent.name for path in RUNS.glob("*/config.json"))
        known = f"; there are {', '.join(names)}" if names else ""
        raise ValueError(f"{run}: no such run directory{did_you_mean(run.name, names)}{known}")
    return run


def read_run_json(run: Path) -> dict[str, Any]:
    """Return what a run's run.json records; nothing of a run that was not made by training."""
    path = run / "run.json"
    return read_json(path) if path.is_file() else {}


def is_translation_run(run: Path) -> bool:
    """Return whether a run was trained on pairs of sentences, so that it translates its prompt."""
    config = read_run_json(run).get("config")
    return isinstance(config, dict) and config.get("task") == "translation"


def load_language_model(run: Path, device: str | torch.device = "cpu") -> LanguageModel:
    """Load a run's model as `load_model` does; any but a language model is a ValueError."""
    model = load_model(run, device)
    if not isinstance(model, LanguageModel):
        raise ValueError(
            f"{run}: {type(model).__name__} is not a language model "
            f"(it learns {' or '.join(model.supported_tasks)}): choose a run of a language model"
        )
    return model


def load_model(run: Path, device: str | torch.device = "cpu") -> Model:
    """Load the trained model of a run directory, in evaluation mode.

    A file that is missing, truncated, damaged or of another format is a ValueError.
    """
    name, model_args = read_config(run)
    weights_path = run / "model.safetensors"
    if not weights_path.is_file():
        raise ValueError(
            f"{run}: has no model.safetensors: a run writes it at its first validation"
        )
    try:
        model = build_model(name, model_args)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{run / 'config.json'}: {error}") from error
    load_weights(model, load_tensors(weights_path), weights_path)
    return model.to(device).eval()
