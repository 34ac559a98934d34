"""A tokenizer as metadata of a GGUF file, with which llama.cpp gives the same ids.

llama.cpp has a byte-level BPE of its own. How it splits text before the merges is not in the file: it
knows the patterns of well-known models by name. Any other tokenizer is a ValueError that says why.
"""

import json
from typing import Any

from tokenizer import BYTE_TO_UNICODE, Tokenizer

JSON = dict[str, Any]

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of tokens: result of merges; special, not found in text; found in text as a whole; none."""

GPT2_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
NO_SPLIT = {**GPT2_SPLIT, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> JSON:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


PRE_TOKENIZERS: dict[tuple[str, bool], list[JSON]] = {
    ("gpt-2", False): [GPT2_SPLIT],
    ("smollm", False): [DIGITS, GPT2_SPLIT],
    ("qwen2", False): [_split(rf"{_WORDS}\p{{N}}{_SIGNS}"), NO_SPLIT],
    ("dbrx", False): [_split(rf"{_WORDS}\p{{N}}{{1,3}}{_SIGNS}"), NO_SPLIT],
    ("llama-bpe", True): [_split(rf"{_WORDS}\p{{N}}{{1,3}}{_SIGNS}"), NO_SPLIT],
}
"""llama.cpp's name of a pre-tokenizer, whether it ignores merges of words that are tokens, and its steps."""


def gguf_metadata(tokenizer: Tokenizer) -> JSON:
    """Return the metadata by GGUF's keys; llama.cpp then begins a prompt with the EOS token, as training does.

    A ValueError says why llama.cpp cannot have this tokenizer.
    """
    content = json.loads(tokenizer.to_json())
    model, added = content["model"], {token["id"]: token for token in content["added_tokens"]}
    if reason := _unsupported(content, added):
        raise ValueError(f"llama.cpp has no such tokenizer: {reason}")
    names = {index: name for name, index in model["vocab"].items()}
    names |= {index: token["content"] for index, token in added.items()}
    ids = range(tokenizer.vocab_size)
    types = dict.fromkeys(names, NORMAL)
    types |= {
        index: CONTROL if token["special"] else USER_DEFINED for index, token in added.items()
    }
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    eos_token, eos_name = tokenizer.eos_token, names[tokenizer.eos_token]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer_name(content),
        "tokenizer.ggml.tokens": [names.get(index, f"<|unused_{index}|>") for index in ids],
        "tokenizer.ggml.token_type": [types.get(index, UNUSED) for index in ids],
        # llama.cpp requires at least one; this one never applies, as text has no special tokens.
        "tokenizer.ggml.merges": merges or [f"{eos_name} {eos_name}"],
        "tokenizer.ggml.bos_token_id": eos_token,
        "tokenizer.ggml.eos_token_id": eos_token,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }


def _unsupported(content: JSON, added: dict[int, JSON]) -> str:
    """Return what of a tokenizer.json and its added tokens llama.cpp does not have, or ""."""
    model, normalizer = content["model"], content["normalizer"]
    if model["type"] != "BPE":
        return f"its model is {model['type']}, not byte-level BPE"
    for field in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            return f"its tokens have a {field.replace('_', ' ')}, {model[field]!r}"
    # Released models normalize by NFC, which changes hardly any text.
    if normalizer and normalizer["type"] != "NFC":
        return f"it changes text before it splits it ({normalizer['type']})"
    if not model["vocab"].keys() >= set(BYTE_TO_UNICODE):
        return "not all 256 bytes are tokens"
    for token in added.values():
        if not token["special"] and (token["single_word"] or token["lstrip"] or token["rstrip"]):
            return f"its token {token['content']!r} depends on the text around it"
    return ""


def _pre_tokenizer_name(content: JSON) -> str:
    """Return llama.cpp's name of the pre-tokenizer; a ValueError if it has none."""
    model, step = content["model"], content["pre_tokenizer"] or {}
    steps = [
        {name: value for name, value in each.items() if name != "trim_offsets"}
        for each in step.get("pretokenizers", [step])
    ]
    # Without merges, it does not matter where text is split.
    if not model["merges"] and steps == [NO_SPLIT]:
        return "gpt-2"
    for (name, ignore_merges), known in PRE_TOKENIZERS.items():
        if steps == known and bool(model.get("ignore_merges")) == ignore_merges:
            return name
    names = ", ".join(name for name, _ in PRE_TOKENIZERS)
    raise ValueError(
        f"llama.cpp does not know by name how this tokenizer splits text before it merges (it knows {names}): "
        "train a new run, whose --tokenizer bpe splits as gpt-2 does"
    )


def normalizes(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer normalizes text (NFC), which llama.cpp leaves out."""
    return json.loads(tokenizer.to_json())["normalizer"] is not None
