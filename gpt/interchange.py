"""Configs and weights in the formats of `transformers`: GPT2LMHeadModel and Qwen3ForCausalLM.

    GPT2   <->  GPT2LMHeadModel     OpenAI's names; matrices multiply from the right (Conv1D)
    GPT    <->  Qwen3ForCausalLM    the same matrices under other names

`gguf` writes the same for llama.cpp. What a format cannot express is a ValueError that says so. No function here needs `transformers`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpt.models.base import Model
from gpt.models.gpt import GPT, GPT2

JSON = dict[str, Any]

QWEN3_NAMES = {
    "embedding": "embed_tokens",
    "blocks": "layers",
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
    "query_norm": "q_norm",
    "key_norm": "k_norm",
    "mlp_norm": "post_attention_layernorm",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
    "unembedding": "lm_head",
}
"""Parts of names; all but `lm_head` stand behind `model.`."""
GPT2_NAMES = {
    "embedding": "wte",
    "position": "wpe",
    "blocks": "h",
    "attention_norm": "ln_1",
    "attention.output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
    "norm": "ln_f",
}
QKV = ("query", "key", "value")


def to_transformers(model: Model) -> tuple[JSON, dict[str, Tensor]]:
    """Return the config.json and the tensors of the same model for `transformers`.

    A ValueError says why there is none.
    """
    if isinstance(model, GPT2):
        return _to_gpt2(model)
    if not isinstance(model, GPT):
        raise ValueError(
            f"neither transformers nor llama.cpp has a model that is a {type(model).__name__}: "
            "GPT and GPT2 can be exported"
        )
    if model.ngrams:
        raise ValueError(
            "Qwen3 has no n-gram tables: a GPT that was trained with --ngrams cannot be exported"
        )
    return _to_qwen3(model)


def from_transformers(
    config: JSON, tensors: dict[str, Tensor]
) -> tuple[str, JSON, dict[str, Tensor]]:
    """Return our model's name, its constructor arguments and its tensors in float32.

    A ValueError says what of the model is not supported.
    """
    readers: dict[str, Callable[[JSON, dict[str, Tensor]], tuple[str, JSON, dict[str, Tensor]]]]
    readers = {"gpt2": _from_gpt2, "qwen3": _from_qwen3}
    kind = config.get("model_type")
    if kind not in readers:
        raise ValueError(
            f"model_type {kind!r} is not supported: expected {' or '.join(map(repr, readers))}"
        )
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    try:
        return readers[kind](config, tensors)
    except KeyError as error:
        raise ValueError(f"a model of type {kind} has {error}, which is missing") from error


def _require(config: JSON, **expected: Any) -> None:  # noqa: ANN401 (JSON values)
    """Raise a ValueError for the first field that is there and differs: our model has that value."""
    for name, value in expected.items():
        values = value if isinstance(value, tuple) else (value,)
        if name in config and config[name] not in values:
            shown = " or ".join(repr(each) for each in values)
            raise ValueError(f"{name} {config[name]!r} is not supported: expected {shown}")


def _to_qwen3(model: GPT) -> tuple[JSON, dict[str, Tensor]]:
    attention, mlp = model.first_block.attention, model.first_block.mlp
    tied = model.unembedding.weight is model.embedding.weight
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.context_length,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_width,
        "intermediate_size": mlp.up.out_features,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": model.rotary_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
    }
    tensors = {}
    for name, tensor in model.state_dict().items():
        theirs = ".".join(QWEN3_NAMES.get(part, part) for part in name.split("."))
        tensors[theirs if theirs == "lm_head.weight" else f"model.{theirs}"] = tensor
    if tied:
        del tensors["lm_head.weight"]
    return config, tensors


def _from_qwen3(config: JSON, tensors: dict[str, Tensor]) -> tuple[str, JSON, dict[str, Tensor]]:
    _require(
        config,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        attention_bias=False,
        use_sliding_window=False,
        rope_scaling=None,
    )
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters must be an object, not {rope!r}")
    _require(rope, rope_type="default")
    tied = bool(config.get("tie_word_embeddings", False))
    model_args = {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "head_width": config.get("head_dim") or 0,
        "hidden": config["intermediate_size"],
        "tied": tied,
        "rotary_base": float(rope.get("rope_theta") or config["rope_theta"]),
    }
    ours = {theirs: name for name, theirs in QWEN3_NAMES.items()}
    renamed = {}
    for name, tensor in tensors.items():
        parts = name.removeprefix("model.").split(".")
        renamed[".".join(ours.get(part, part) for part in parts)] = tensor
    if tied:
        renamed.pop("unembedding.weight", None)
    return "gpt", model_args, renamed


def _to_gpt2(model: GPT2) -> tuple[JSON, dict[str, Tensor]]:
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.vocab_size,
        "n_positions": model.context_length,
        "n_embd": model.width,
        "n_layer": model.depth,
        "n_head": model.heads,
        "n_inner": model.first_block.mlp.up.out_features,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "attn_pdrop": model.dropout.p,
        "embd_pdrop": model.dropout.p,
        "resid_pdrop": model.dropout.p,
        "tie_word_embeddings": True,
    }
    tensors = {
        f"transformer.{name}": tensor.T.contiguous() if is_conv1d(name) else tensor
        for name, tensor in _openai_state_dict(model).items()
    }
    return config, tensors


def is_conv1d(name: str) -> bool:
    """Return whether OpenAI's tensor of that name is a matrix that multiplies from the right."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def _openai_state_dict(model: GPT2) -> dict[str, Tensor]:
    """Return the weights by OpenAI's names, matrices as `nn.Linear` has them; absent biases are zeros."""
    weights = model.state_dict()
    for name, tensor in model.state_dict().items():
        if "embedding" not in name and "position" not in name:
            weights.setdefault(name.replace("weight", "bias"), tensor.new_zeros(len(tensor)))
    state = {"wte.weight": weights["embedding.weight"], "wpe.weight": weights["position.weight"]}
    for kind in ("weight", "bias"):
        state[f"ln_f.{kind}"] = weights[f"norm.{kind}"]
        for layer in range(model.depth):
            block = f"blocks.{layer}"
            for name in ("attention_norm", "attention.output", "mlp_norm", "mlp.up", "mlp.down"):
                state[f"h.{layer}.{GPT2_NAMES[name]}.{kind}"] = weights[f"{block}.{name}.{kind}"]
            qkv = [weights[f"{block}.attention.{name}.{kind}"] for name in QKV]
            state[f"h.{layer}.attn.c_attn.{kind}"] = torch.cat(qkv)
    return state


def _from_gpt2(config: JSON, tensors: dict[str, Tensor]) -> tuple[str, JSON, dict[str, Tensor]]:
    _require(
        config,
        activation_function=("gelu_new", "gelu_pytorch_tanh"),
        layer_norm_epsilon=1e-5,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
        tie_word_embeddings=True,
    )
    fractions = {config.get(f"{name}_pdrop", 0.0) for name in ("attn", "embd", "resid")}
    model_args = {
        "vocab_size": config["vocab_size"],
        "context_length": config["n_positions"],
        "width": config["n_embd"],
        "depth": config["n_layer"],
        "heads": config["n_head"],
        "hidden": config.get("n_inner") or 0,
        "dropout": fractions.pop() if len(fractions) == 1 else 0.0,
    }
    ours = {theirs: name for name, theirs in GPT2_NAMES.items()}
    renamed = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight":
            continue  # masks, and the embedding again
        module, _, kind = name.rpartition(".")
        if is_conv1d(name):
            tensor = tensor.T.contiguous()
        prefix, rest = "", module
        if module.startswith("h."):
            _, layer, rest = module.split(".", 2)
            prefix = f"blocks.{layer}."
        if rest == "attn.c_attn":
            for part, each in zip(QKV, tensor.chunk(3), strict=True):
                renamed[f"{prefix}attention.{part}.{kind}"] = each.contiguous()
        else:
            renamed[f"{prefix}{ours.get(rest, rest)}.{kind}"] = tensor
    return "gpt2", model_args, renamed
