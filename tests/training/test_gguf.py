"""Exported runs as GGUF files: read by the `gguf` library, and by llama.cpp where it is installed.

llama.cpp is compiled on installation, so it is no extra: `pip install llama-cpp-python`.
"""

import contextlib
import random

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from gpt.checkpoint import save_config, save_tensors, unique_state_dict
from gpt.generation import generate
from gpt.models.gpt import GPT
from gpt.models.recurrent import LSTM
from gpt.sampling import SamplingParams
from tests.training.helpers import save_lower_case_tokenizer
from tests.training.test_interchange import (
    CONTEXT,
    MODELS,
    VOCAB_SIZE,
    logits,
    make_text,
    save_run,
    tinygpt,
)
from tokenizer import (
    END_OF_TEXT,
    Tokenizer,
    _byte_level,
    byte_tokenizer,
    train_bpe,
    train_characters,
    train_words,
)
from tokenizer.gguf import NO_SPLIT, PRE_TOKENIZERS

OWN_PATTERN = r" ?\w+|\W"


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(0)
    return train_bpe((make_text(rng, 50) for _ in range(100)), VOCAB_SIZE)


def varied_strings():
    """A thousand: words of several scripts, emoji, combining marks, digits, white space, special tokens."""
    rng = random.Random(1)
    texts = [make_text(rng, rng.randint(0, 20)) for _ in range(700)]
    texts += [f"a{special}b" for special in (END_OF_TEXT, "<unk>", "\u200d", "\x00")]
    texts += [END_OF_TEXT, " \n\n \t x\r\n\r\n y   ", "123 4567 ½²³", "don't DON'T it's'll", " "]
    signs = " \n\t\r'\u00a0\u3000\u2028sStTlLdDrReE.,-09½²é가각\u0301\u200dあ👍🏽Ⅷ"
    texts += ["".join(rng.choices(signs, k=rng.randint(1, 12))) for _ in range(191)]
    return texts + [
        "".join(chr(rng.choice([rng.randrange(128), rng.randrange(0x3000)])) for _ in range(9))
        for _ in range(100)
    ]


def pairs_tokenizer(steps, ignore_merges):
    """A tokenizer that merges any two bytes which its pre-tokenizer leaves together."""
    letters = [*"'.,-0123456789sStTlLdDrReEab"]
    vocab = dict(byte_tokenizer()._library.get_vocab(with_added_tokens=False))
    merges = [(a, b) for a in ["Ġ", "Ċ", *letters] for b in ["Ġ", "Ċ", *letters]]
    random.Random(0).shuffle(merges)
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    library = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizer(step) for step in steps])
    return _byte_level(library)


def pre_tokenizer(step):
    if step["type"] == "Split":
        return pre_tokenizers.Split(tokenizers.Regex(step["pattern"]["Regex"]), "isolated")
    return getattr(pre_tokenizers, step["type"])(**{k: v for k, v in step.items() if k != "type"})


def save_small_run(directory, tokenizer, model_class=GPT, **own):
    args = {"vocab_size": tokenizer.vocab_size, "context_length": 32, "width": 32, "depth": 1} | own
    directory.mkdir()
    save_config(directory, "gpt" if model_class is GPT else "lstm", args)
    save_tensors(directory / "model.safetensors", unique_state_dict(model_class(**args)))
    tokenizer.save(directory / "tokenizer.json")
    return directory


def export(run, folder, *options):
    tinygpt("export", run, folder, "--to", "gguf", *options)
    return folder / "model.gguf"


def read(path):
    """The metadata and the tensors, as numbers, of a GGUF file."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


@pytest.mark.parametrize("name", MODELS)
def test_file_has_the_sizes_and_weights_of_the_model(name, tokenizer, tmp_path):
    model = save_run(tmp_path / "run", name, tokenizer)
    fields, tensors = read(export(tmp_path / "run", tmp_path / "gguf"))
    architecture = "gpt2" if name.startswith("gpt2") else "qwen3"
    attention, mlp = model.first_block.attention, model.first_block.mlp
    sizes = {
        "context_length": CONTEXT,
        "embedding_length": 32,
        "block_count": 2,
        "feed_forward_length": mlp.up.out_features,
        "attention.head_count": 4,
        "vocab_size": tokenizer.vocab_size,
    }
    if architecture == "qwen3":
        sizes |= {
            "attention.head_count_kv": attention.kv_heads,
            "attention.key_length": attention.head_width,
            "attention.value_length": attention.head_width,
            "rope.freq_base": model.rotary_base,
        }
    assert fields["general.architecture"] == architecture
    assert {key: fields[f"{architecture}.{key}"] for key in sizes} == sizes
    block = model.blocks[1]
    weights = {
        "token_embd": model.embedding,
        "blk.1.attn_output": block.attention.output,
        "blk.1.ffn_down": block.mlp.down,
    }
    if "output.weight" in tensors:
        weights["output"] = model.unembedding
    if architecture == "gpt2":
        weights["position_embd"] = model.position
    for gguf_name, module in weights.items():
        np.testing.assert_array_equal(tensors[f"{gguf_name}.weight"], module.weight.detach())
    assert ("output.weight" in tensors) == (model.unembedding.weight is not model.embedding.weight)


def test_file_has_the_tokenizer(tokenizer, tmp_path):
    save_run(tmp_path / "run", "gpt", tokenizer)
    fields, _ = read(export(tmp_path / "run", tmp_path / "gguf"))
    ggml = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    assert (ggml["model"], ggml["pre"], fields["general.name"]) == ("gpt2", "gpt-2", "run")
    assert ggml["bos_token_id"] == ggml["eos_token_id"] == tokenizer.eos_token
    assert (ggml["add_bos_token"], ggml["add_eos_token"]) == (True, False)
    assert ggml["token_type"] == [1] * tokenizer.eos_token + [gguf.TokenType.CONTROL]
    vocab = {token: index for index, token in enumerate(ggml["tokens"])}
    library = tokenizers.Tokenizer(
        models.BPE(vocab, [tuple(merge.split()) for merge in ggml["merges"]])
    )
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in varied_strings():
        assert library.encode(text).ids == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("dtype", "error"), [("float16", 1e-3), ("bfloat16", 1e-2), ("q8_0", 4e-3)]
)
def test_matrices_are_in_the_format_that_was_asked_for(dtype, error, tokenizer, tmp_path):
    model = save_run(tmp_path / "run", "gpt2", tokenizer)
    _, tensors = read(export(tmp_path / "run", tmp_path / "gguf", "--dtype", dtype))
    down = model.blocks[1].mlp.down
    ours, theirs = down.weight.detach().numpy(), tensors["blk.1.ffn_down.weight"]
    assert 0 < np.abs(ours - theirs).max() <= error * np.abs(ours).max()
    for name, tensor in (
        ("blk.1.ffn_down.bias", down.bias),
        ("position_embd.weight", model.position.weight),
    ):
        np.testing.assert_array_equal(tensors[name], tensor.detach())


@pytest.mark.parametrize("name", [name for name, _ in PRE_TOKENIZERS])
def test_pre_tokenizers_of_well_known_models_are_recognized(name, tmp_path):
    [(ignore_merges, steps)] = [(i, s) for (n, i), s in PRE_TOKENIZERS.items() if n == name]
    run = save_small_run(tmp_path / "run", pairs_tokenizer(steps, ignore_merges), heads=1)
    fields, _ = read(export(run, tmp_path / "gguf"))
    assert fields["tokenizer.ggml.pre"] == name


def test_normalization_that_llama_cpp_leaves_out_is_told(tmp_path, capsys):
    tokenizer = pairs_tokenizer(PRE_TOKENIZERS["qwen2", False], False)
    tokenizer._library.normalizer = tokenizers.normalizers.NFC()
    run = save_small_run(tmp_path / "run", Tokenizer(tokenizer._library), heads=1)
    fields, _ = read(export(run, tmp_path / "gguf"))
    assert fields["tokenizer.ggml.pre"] == "qwen2"
    assert "llama.cpp does not normalize text (NFC)" in capsys.readouterr().out


def lower_case_tokenizer(tmp_path):
    save_lower_case_tokenizer(tmp_path / "tokenizer.json")
    return Tokenizer.load(tmp_path / "tokenizer.json")


REFUSED = {
    "words": (lambda _: train_words(["a b"], 9), {}, "its model is WordLevel"),
    "characters": (lambda _: train_characters(["a b"], 9), {}, "its model is WordLevel"),
    "own pattern": (
        lambda _: pairs_tokenizer(
            [{"type": "Split", "pattern": {"Regex": OWN_PATTERN}}, NO_SPLIT], False
        ),
        {},
        "does not know by name how this tokenizer splits",
    ),
    "lower case": (lower_case_tokenizer, {}, "changes text before it splits it (Lowercase)"),
    "lstm": (lambda _: byte_tokenizer(), {"model_class": LSTM}, "has a model that is a LSTM"),
    "ngrams": (lambda _: byte_tokenizer(), {"heads": 1, "ngrams": 9}, "no n-gram tables"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_does_not_have_is_refused_in_one_line(case, tmp_path, capsys):
    make_tokenizer, own, message = REFUSED[case]
    own = own or {"heads": 1}
    run = save_small_run(tmp_path / "run", make_tokenizer(tmp_path), **own)
    with pytest.raises(SystemExit, match="2"):
        export(run, tmp_path / "gguf")
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "gguf").exists()


def test_q8_0_needs_gguf_and_rows_that_it_can_hold(tmp_path, capsys):
    run = save_small_run(tmp_path / "run", byte_tokenizer(), heads=1, hidden=40)
    for options, message in (
        (["--to", "gguf"], "blk.0.ffn_down.weight has rows of 40: export it in float16"),
        ([], "--dtype q8_0 needs --to gguf"),
    ):
        with pytest.raises(SystemExit, match="2"):
            tinygpt("export", run, tmp_path / "folder", "--dtype", "q8_0", *options)
        assert message in capsys.readouterr().err
        assert not (tmp_path / "folder").exists()


@contextlib.contextmanager
def llama(path, **options):
    """The model of a file in llama.cpp, whose cache is float32 as ours."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    sizes = {"n_ctx": CONTEXT, "n_batch": CONTEXT, "n_ubatch": CONTEXT, "logits_all": True}
    options = {**sizes, "type_k": 0, "type_v": 0, "n_threads": 1, "n_threads_batch": 1} | options
    with contextlib.closing(llama_cpp.Llama(str(path), verbose=False, **options)) as model:
        yield model


def llama_ids(model, text):
    return model.tokenize(text.encode(), add_bos=False, special=False)


def perplexity(logits_TV, ids):
    log_probs = torch.as_tensor(logits_TV).log_softmax(-1)
    return (-log_probs[range(len(ids) - 1), ids[1:]].mean()).exp().item()


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_generates_and_scores_the_same(name, tokenizer, tmp_path):
    model = save_run(tmp_path / "run", name, tokenizer)
    text = make_text(random.Random(2), 80)
    ids = [tokenizer.eos_token, *tokenizer.encode(text)][:CONTEXT]
    expected = perplexity(logits(model, torch.tensor([ids]))[0, :-1], ids)
    with llama(export(tmp_path / "run", tmp_path / "f32")) as theirs:
        # It begins a prompt as training begins a document.
        prompt = theirs.tokenize(b"the cat", add_bos=True)
        assert prompt == [tokenizer.eos_token, *tokenizer.encode("the cat")]
        assert theirs.token_eos() == tokenizer.eos_token
        theirs.eval(prompt)
        generated = []
        for _ in range(100):
            generated.append(int(theirs.scores[theirs.n_tokens - 1].argmax()))
            theirs.eval(generated[-1:])
        assert generated == list(generate(model, prompt, 100, SamplingParams(temperature=0)))
        theirs.reset()
        theirs.eval(ids)
        assert perplexity(theirs.scores[: len(ids) - 1], ids) == pytest.approx(expected, rel=1e-4)
    with llama(export(tmp_path / "run", tmp_path / "q8", "--dtype", "q8_0")) as theirs:
        theirs.eval(ids)
        assert perplexity(theirs.scores[: len(ids) - 1], ids) == pytest.approx(expected, rel=0.01)


def test_llama_cpp_tokenizes_the_same(tokenizer, tmp_path):
    save_run(tmp_path / "run", "gpt", tokenizer)
    texts = varied_strings()
    assert len(texts) == 1000
    with llama(export(tmp_path / "run", tmp_path / "gguf"), vocab_only=True) as theirs:
        for text in texts:
            ids = llama_ids(theirs, text)
            assert ids == tokenizer.encode(text)
            assert theirs.detokenize(ids) == text.encode()


@pytest.mark.parametrize("name", ["bytes", *(name for name, _ in PRE_TOKENIZERS)])
def test_llama_cpp_splits_the_same(name, tmp_path):
    tokenizer = byte_tokenizer()
    for (known, ignore_merges), steps in PRE_TOKENIZERS.items():
        if known == name:
            tokenizer = pairs_tokenizer(steps, ignore_merges)
    run = save_small_run(tmp_path / "run", tokenizer, heads=1)
    with llama(export(run, tmp_path / "gguf"), vocab_only=True) as theirs:
        for text in varied_strings():
            assert llama_ids(theirs, text) == tokenizer.encode(text)
