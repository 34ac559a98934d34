"""The commands `export` and `import`: runs as folders that `transformers`, vLLM or llama.cpp open, and back."""

import json as jsonlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tyro.conf import Positional, arg

from gpt.checkpoint import (
    build_model,
    find_run,
    load_language_model,
    load_tensors,
    load_weights,
    read_json,
    read_run_json,
    run_argument,
    run_path,
    save_config,
    save_tensors,
    unique_state_dict,
    write_atomically,
)
from gpt.cli import OptionalText
from gpt.gguf import GGUF_DTYPES, save_gguf, to_gguf
from gpt.interchange import from_transformers, to_transformers
from gpt.summary import count_parameters
from tokenizer import Tokenizer
from tokenizer.gguf import gguf_metadata, normalizes
from training.config import TASK_ARGS, TrainingConfig
from training.data.mixture import parse_data
from training.progress import final_metrics
from training.run_directory import save_training_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Export:
    """Write a run of a GPT or GPT-2 as a folder for `transformers` and vLLM, or with --to gguf for llama.cpp and Ollama."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Run: a name in runs/, or a path."""
    folder: Annotated[Positional[Path], arg(metavar="DIR")]
    """Folder to create."""
    to: Literal["hf", "gguf"] = "hf"
    """hf: config.json, model.safetensors and tokenizer.json; gguf: one file, model.gguf (`pip install gguf`)."""
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] = "float32"
    """Number format of the weights; float32 is exact. q8_0, 8-bit integers with a scale for every 32 of a row, is for gguf."""
    push: OptionalText = None
    """Also upload the folder to the Hugging Face hub, as the model USER/NAME. Needs `hf auth login` or HF_TOKEN."""
    private: bool = False
    """With --push: create a private repository."""

    def __call__(self) -> None:
        """Write the folder, upload it, and print what to type next."""
        run = find_run(self.run)
        if self.private and not self.push:
            raise ValueError("--private needs --push USER/NAME")
        if self.dtype not in (DTYPES if self.to == "hf" else GGUF_DTYPES):
            raise ValueError(f"--dtype {self.dtype} needs --to gguf")
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ValueError(f"{self.folder} exists already: choose another folder, or remove it")
        if self.to == "hf":
            export_run(run, self.folder, self.dtype)
        else:
            export_gguf(run, self.folder, self.dtype)
        print(f"{self.folder}: " + ", ".join(sorted(path.name for path in self.folder.iterdir())))
        if self.push:
            from training.hub import push

            print(f"pushed to {push(self.folder, self.push, self.private)}")


@dataclass(frozen=True)
class Import:
    """Make a run of a GPT-2 or Qwen3 model: a folder written by `transformers`, or a model of the hub."""

    source: Annotated[Positional[str], arg(metavar="DIR_OR_NAME")]
    """Folder with config.json, *.safetensors and tokenizer.json, or the name of a model on the hub."""
    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Run to create: a name in runs/, or a path."""
    revision: OptionalText = None
    """Branch, tag or commit of a model on the hub."""

    def __call__(self) -> None:
        """Write the run, and print what to type next."""
        directory = run_path(self.run)
        if directory.exists():
            raise ValueError(f"{directory} exists already: choose another name, or remove it")
        folder = Path(self.source)
        if not folder.is_dir():
            from training.hub import download

            folder = download(self.source, self.revision)
        elif self.revision:
            raise ValueError(f"{folder} is a folder: --revision is for models on the hub")
        import_folder(folder, directory, self.source)
        name = run_argument(directory)
        size = count_parameters(load_language_model(directory))
        print(f"{directory}: {size:,} parameters; next:")
        print(f'  tinygpt sample {name} --prompt "..."\n  tinygpt serve {name}')
        print(f"  tinygpt eval {name} --data FILE")


def export_run(run: Path, folder: Path, dtype: str) -> None:
    """Write a run's model, tokenizer and model card to a new folder; a ValueError if there is no such format."""
    model, tokenizer = load_language_model(run), Tokenizer.load(run)
    config, tensors = to_transformers(model)
    ids = {"bos_token_id": tokenizer.eos_token, "eos_token_id": tokenizer.eos_token}
    tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_tensors(folder / "model.safetensors", tensors)
        tokenizer.save(folder / "tokenizer.json")
        write_json(folder / "config.json", {**config, **ids, "dtype": dtype})
        write_json(folder / "generation_config.json", {**ids, "do_sample": True})
        write_json(
            folder / "tokenizer_config.json", tokenizer_config(tokenizer, model.context_length)
        )
        size = sum(map(torch.Tensor.numel, tensors.values()))
        end_of_text = tokenizer.token_name(tokenizer.eos_token)
        write_atomically(folder / "README.md", model_card(run, size, end_of_text))
    except OSError:
        shutil.rmtree(folder)
        raise


def export_gguf(run: Path, folder: Path, dtype: str) -> None:
    """Write model.gguf and a model card to a new folder; a ValueError if llama.cpp has no such model or tokenizer."""
    model, tokenizer = load_language_model(run), Tokenizer.load(run)
    name = {"general.name": run.resolve().name}
    writer = to_gguf(model, dtype, {**name, **gguf_metadata(tokenizer)})
    if normalizes(tokenizer):
        print(
            "note: llama.cpp does not normalize text (NFC) as this tokenizer does: an accent that is a "
            "character of its own has other ids there"
        )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_gguf(folder / "model.gguf", writer)
        end_of_text = tokenizer.token_name(tokenizer.eos_token)
        card = model_card(run, count_parameters(model), end_of_text, library="gguf")
        write_atomically(folder / "README.md", card)
    except OSError:
        shutil.rmtree(folder)
        raise


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file."""
    write_atomically(path, jsonlib.dumps(value, indent=2) + "\n")


def tokenizer_config(tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
    """Return the tokenizer_config.json with which `transformers` encodes as `Tokenizer.encode` does."""
    special_tokens = {
        "bos_token": tokenizer.eos_token,
        "eos_token": tokenizer.eos_token,
        "unk_token": tokenizer.unk_token,
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        # Text that spells a special token is text.
        "split_special_tokens": True,
        **{
            name: tokenizer.token_name(token)
            for name, token in special_tokens.items()
            if token is not None
        },
    }


def model_card(
    run: Path, num_parameters: int, end_of_text: str, library: str = "transformers"
) -> str:
    """Return a README.md with a YAML header: what the model is, and what was measured of it."""
    content = read_run_json(run)
    config, data = content.get("config", {}), content.get("data", {})
    names = [source.data for source in parse_data(config.get("data", ""))]
    hub_datasets = [name for name in names if "/" in name and not Path(name).exists()]
    final = final_metrics(run)
    metrics = {
        metric: value
        for metric in ("perplexity", "word_perplexity", "bits_per_byte")
        if (value := final.get(f"final_{metric}")) is not None
    }
    header = [
        "---",
        "license: other  # fill in the license of the model and of its data",
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags:\n- tinygpt",
        *(["datasets:", *(f"- {name}" for name in hub_datasets)] if hub_datasets else []),
        *(["metrics:", *(f"- {metric}" for metric in metrics)] if metrics else []),
        "---",
    ]
    lines = [
        f"# {run.resolve().name}",
        "",
        f"A language model of {num_parameters:,} parameters, trained with tinygpt"
        + (f" on: {data['description']}." if data.get("description") else "."),
        "",
        f"In training, `{end_of_text}` stands before every document: "
        + (
            "llama.cpp puts it before a prompt." if library == "gguf" else "start a prompt with it."
        ),
    ]
    if metrics:
        lines += ["", "| on the validation split | |", "|---|---:|"]
        lines += [
            f"| {metric.replace('_', ' ')} | {value:.4f} |" for metric, value in metrics.items()
        ]
    return "\n".join([*header, "", *lines, ""])


def import_folder(folder: Path, directory: Path, source: str) -> None:
    """Write a run directory of a folder's model and tokenizer; a ValueError says what does not fit."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: not a model of transformers: it has no config.json")
    try:
        name, model_args, tensors = from_transformers(
            read_json(folder / "config.json"), read_tensors(folder)
        )
        model = build_model(name, model_args)
        load_weights(model, tensors, folder)
    except (TypeError, ValueError) as error:
        message = str(error)
        raise ValueError(message if str(folder) in message else f"{folder}: {message}") from error
    tokenizer = Tokenizer.load(folder).padded(model_args["vocab_size"])
    directory.mkdir(parents=True)
    try:
        tokenizer.save(directory / "tokenizer.json")
        save_config(directory, name, model_args)
        save_tensors(directory / "model.safetensors", unique_state_dict(model))
        config = TrainingConfig(
            model=name,
            model_args={name: value for name, value in model_args.items() if name not in TASK_ARGS},
            vocab_size=model_args["vocab_size"],
            context_length=model_args["context_length"],
            data="",
            tokenizer=str(directory),
        )
        save_training_config(config, directory, {"imported_from": source})
    except OSError:
        shutil.rmtree(directory)
        raise


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read model.safetensors, or the shards that model.safetensors.index.json lists."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not (folder / "model.safetensors").is_file():
            raise ValueError(
                f"{folder}: has no model.safetensors: save the model again with "
                "save_pretrained(..., safe_serialization=True)"
            )
        return load_tensors(folder / "model.safetensors")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: a weight_map is missing")
    shards = {str(shard) for shard in weight_map.values()}
    missing = [shard for shard in sorted(shards) if not (folder / shard).is_file()]
    if missing:
        raise ValueError(f"{index}: {', '.join(missing)} is missing")
    return {k: v for shard in sorted(shards) for k, v in load_tensors(folder / shard).items()}
