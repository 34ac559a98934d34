"""GGUF, the file format of llama.cpp and Ollama: one file with config, tokenizer and weights.

    GPT2   ->  architecture gpt2
    GPT    ->  architecture qwen3

Names and sizes are those of `transformers` (see `interchange`), translated by the `gguf` library, an
optional package that only this file imports. Vectors and position embeddings stay in float32.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt.checkpoint import replacing
from gpt.interchange import is_conv1d, to_transformers
from gpt.models.base import Model

GGUF_DTYPES = {
    "float32": ("F32", "ALL_F32"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "float16": ("F16", "MOSTLY_F16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
"""Number formats of matrices, and what the library calls them and a file of them."""

Q8_0_BLOCK = 32
"""Numbers of a row that share a scale in q8_0."""

CONFIG_KEYS = {
    "gpt2": {
        "context_length": "n_positions",
        "embedding_length": "n_embd",
        "block_count": "n_layer",
        "feed_forward_length": "n_inner",
        "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
        "vocab_size": "vocab_size",
    },
    "qwen3": {
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.value_length": "head_dim",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "rope.freq_base": "rope_theta",
        "vocab_size": "vocab_size",
    },
}
"""GGUF's keys of an architecture, and the fields of config.json that have their values."""


def to_gguf(model: Model, dtype: str, metadata: Mapping[str, Any]) -> Any:  # noqa: ANN401 (a GGUFWriter)
    """Return a `gguf.GGUFWriter` of the model, its matrices in `dtype`, and of further metadata: a tokenizer.

    A ValueError says why the model cannot be expressed.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError("GGUF needs one more package: pip install gguf") from None
    config, tensors = to_transformers(model)
    architecture = config["model_type"]
    qtype_name, file_type = GGUF_DTYPES[dtype]
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, field in CONFIG_KEYS[architecture].items():
        value = config[field]
        is_float = key.endswith(("epsilon", "freq_base"))
        _add(writer, f"{architecture}.{key}", float(value) if is_float else value)
    for key, value in metadata.items():
        _add(writer, key, value)
    depth = config[CONFIG_KEYS[architecture]["block_count"]]
    names: Any = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], depth)
    for name, tensor in tensors.items():
        values = (tensor.T if is_conv1d(name) else tensor).detach().float().cpu().numpy()
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        is_matrix = values.ndim == 2 and not gguf_name.startswith("position_embd")
        if is_matrix and dtype == "q8_0" and values.shape[1] % Q8_0_BLOCK:
            raise ValueError(
                f"q8_0 needs rows of a multiple of {Q8_0_BLOCK} numbers, and {gguf_name} has rows of "
                f"{values.shape[1]}: export it in float16, or train with --width, --hidden and "
                f"heads * --head-width that are multiples of {Q8_0_BLOCK}"
            )
        qtype = gguf.GGMLQuantizationType[qtype_name if is_matrix else "F32"]
        data = gguf.quants.quantize(np.ascontiguousarray(values), qtype)
        writer.add_tensor(gguf_name, data, raw_dtype=qtype)
    return writer


def _add(writer: Any, key: str, value: str | bool | int | float | list[Any]) -> None:  # noqa: ANN401
    """Add metadata of the type that a value has."""
    kinds = {str: "string", bool: "bool", int: "uint32", float: "float32", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def save_gguf(path: Path, writer: Any) -> None:  # noqa: ANN401
    """Write a file of what `to_gguf` returned; if that fails, the previous content stays."""
    with replacing(path) as temporary:
        try:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
