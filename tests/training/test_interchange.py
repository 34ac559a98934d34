"""Exported runs in `transformers`, and models of `transformers` as runs."""

import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from gpt.checkpoint import load_language_model, save_config, save_tensors, unique_state_dict
from gpt.generation import generate
from gpt.models.gpt import GPT, GPT2
from gpt.models.recurrent import LSTM
from gpt.sampling import SamplingParams
from tests.training.helpers import write_corpus
from tokenizer import Tokenizer, train_bpe
from training import cli

SCALE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text("utf-8")

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat;",
    "naïve",
    "café",
    "東京",
    "привет",
    "👍🏽",
    "한글",
    "각",
    "é",
    "x=1_000",
]
VOCAB_SIZE, CONTEXT = 320, 256
SIZES = {"width": 32, "depth": 2, "heads": 4}
MODELS = {
    "gpt2": (GPT2, {}),
    "gpt2-no-bias": (GPT2, {"bias": False, "hidden": 96}),
    "gpt": (GPT, {}),
    "gpt-tied": (GPT, {"tied": True, "rotary_base": 1e6}),
    "gpt-grouped": (GPT, {"kv_heads": 2, "head_width": 16}),
    "gpt-grouped-tied": (GPT, {"kv_heads": 1, "tied": True, "hidden": 96}),
}


def make_text(rng, length):
    return "".join(rng.choice(WORDS) + rng.choice([" ", "  ", "\n", ""]) for _ in range(length))


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(0)
    return train_bpe((make_text(rng, 50) for _ in range(100)), VOCAB_SIZE)


def save_run(directory, name, tokenizer):
    model_class, own = MODELS[name]
    args = {"vocab_size": tokenizer.vocab_size, "context_length": CONTEXT, **SIZES, **own}
    torch.manual_seed(0)
    model = model_class(**args).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    directory.mkdir(parents=True)
    save_config(directory, "gpt2" if model_class is GPT2 else "gpt", args)
    save_tensors(directory / "model.safetensors", unique_state_dict(model))
    tokenizer.save(directory / "tokenizer.json")
    return model


def tinygpt(*arguments):
    cli.main("tinygpt", [str(argument) for argument in arguments])


def logits(model, tokens_BT):
    with torch.inference_mode():
        output = model(tokens_BT)
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_and_generates_the_same(name, tokenizer, tmp_path):
    model = save_run(tmp_path / "run", name, tokenizer)
    tinygpt("export", tmp_path / "run", tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens_BT = torch.randint(tokenizer.vocab_size, (3, CONTEXT))
    torch.testing.assert_close(
        logits(model, tokens_BT), logits(theirs, tokens_BT), rtol=1e-5, atol=1e-5
    )
    prompt = tokenizer.encode("the cat")
    ours = list(generate(model, prompt, 200, SamplingParams(temperature=0)))
    [sequence] = theirs.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=200, eos_token_id=-1, pad_token_id=0
    )
    assert sequence[len(prompt) :].tolist() == ours


def test_transformers_tokenizes_the_same(tokenizer, tmp_path):
    save_run(tmp_path / "run", "gpt", tokenizer)
    tinygpt("export", tmp_path / "run", tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    rng = random.Random(1)
    texts = [make_text(rng, rng.randint(0, 20)) for _ in range(900)]
    texts += [f"a{special}b" for special in ("<|endoftext|>", "<unk>", "\u200d", "\x00")]
    texts += [
        "".join(chr(rng.choice([rng.randrange(128), rng.randrange(0x3000)])) for _ in range(9))
        for _ in range(100)
    ]
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ids == tokenizer.encode(text)
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == tokenizer.eos_token


@pytest.mark.parametrize("name", MODELS)
def test_exported_run_is_imported_and_exported_to_the_same_bytes(name, tokenizer, tmp_path):
    model = save_run(tmp_path / "run", name, tokenizer)
    tinygpt("export", tmp_path / "run", tmp_path / "first" / "run")
    tinygpt("import", tmp_path / "first" / "run", tmp_path / "again" / "run")
    tinygpt("export", tmp_path / "again" / "run", tmp_path / "second" / "run")
    tokens_BT = torch.randint(tokenizer.vocab_size, (2, 40))
    imported = load_language_model(tmp_path / "again" / "run")
    torch.testing.assert_close(logits(imported, tokens_BT), logits(model, tokens_BT))
    hashes = [
        {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (tmp_path / folder / "run").iterdir()
        }
        for folder in ("first", "second")
    ]
    assert hashes[0] == hashes[1]


THEIR_MODELS = {
    "qwen3": (
        "Qwen3ForCausalLM",
        {
            "vocab_size": 400,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 400, "n_positions": 128, "n_embd": 48, "n_layer": 3, "n_head": 4},
    ),
}


def save_theirs(folder, name, tokenizer, dtype="float32", **options):
    class_name, sizes = THEIR_MODELS[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**sizes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder, **options)
    tokenizer.save(folder / "tokenizer.json")
    return model_class.from_pretrained(folder, dtype="float32").eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", THEIR_MODELS)
def test_sharded_models_of_transformers_are_imported(name, dtype, tokenizer, tmp_path):
    theirs = save_theirs(tmp_path / "hf", name, tokenizer, dtype, max_shard_size="100KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    tinygpt("import", tmp_path / "hf", tmp_path / "run")
    ours = load_language_model(tmp_path / "run")
    tokens_BT = torch.randint(400, (2, 128))
    torch.testing.assert_close(
        logits(ours, tokens_BT), logits(theirs, tokens_BT), rtol=1e-4, atol=1e-4
    )
    # Their embedding has more rows than the tokenizer has tokens.
    assert Tokenizer.load(tmp_path / "run").vocab_size == 400
    assert Tokenizer.load(tmp_path / "run").encode("the cat") == tokenizer.encode("the cat")


def test_imported_run_is_scored_and_continued(tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "cache"))
    save_theirs(tmp_path / "hf", "qwen3", tokenizer)
    tinygpt("import", tmp_path / "hf", tmp_path / "run")
    (tmp_path / "text.txt").write_text(make_text(random.Random(2), 400))
    capsys.readouterr()
    tinygpt("eval", tmp_path / "run", "--data", tmp_path / "text.txt", "--json")
    score = json.loads(capsys.readouterr().out)
    assert score["bits_per_byte"] > 0
    with pytest.raises(SystemExit):
        tinygpt("eval", tmp_path / "run")
    assert "give --data" in capsys.readouterr().err


def sliding_window_perplexity(model, input_ids, max_length, stride):
    """The method of "Perplexity of fixed-length models" in the documentation of `transformers`."""
    seq_len = input_ids.shape[1]
    nll_sum, n_tokens, prev_end_loc = 0.0, 0, 0
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc
        window = input_ids[:, begin_loc:end_loc]
        target_ids = window.clone()
        target_ids[:, :-trg_len] = -100
        with torch.no_grad():
            neg_log_likelihood = model(window, labels=target_ids).loss
        # The labels are shifted: the first token of a window has none.
        num_loss_tokens = (target_ids[:, 1:] != -100).sum().item()
        nll_sum += neg_log_likelihood.item() * num_loss_tokens
        n_tokens += num_loss_tokens
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    return math.exp(nll_sum / n_tokens), n_tokens


@pytest.mark.parametrize("name", THEIR_MODELS)
def test_perplexity_equals_the_sliding_window_method_of_transformers(
    name, tokenizer, tmp_path, capsys, monkeypatch
):
    """Their window of C tokens makes C - 1 predictions; their last one fills only at these lengths."""
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "cache"))
    save_theirs(tmp_path / "hf", name, tokenizer)
    tinygpt("import", tmp_path / "hf", tmp_path / "run")
    tinygpt("export", tmp_path / "run", tmp_path / "exported")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    text, context = make_text(random.Random(2), 300), 64
    while len(tokenizer.encode(text)) % context:
        text = text[:-1]
    (tmp_path / "text.txt").write_text(text, "utf-8")
    input_ids = torch.tensor([[tokenizer.eos_token, *tokenizer.encode(text)]])
    options = ("--data", tmp_path / "text.txt", "--context-length", context, "--json")
    for stride in (context, context // 2, context // 8):
        capsys.readouterr()
        tinygpt("eval", tmp_path / "run", "--stride", stride, *options)
        score = json.loads(capsys.readouterr().out)
        expected, tokens = sliding_window_perplexity(model, input_ids, context + 1, stride)
        assert score["tokens"] == tokens > 3 * context
        assert score["perplexity"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "llama"},
            "model_type 'llama' is not supported: expected 'gpt2' or 'qwen3'",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported: expected 'silu'"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"vocab_size": 17}, "has shape"),
        ({"hidden_size": None}, "config.json"),
    ],
)
def test_models_that_cannot_be_imported_are_one_line(change, message, tokenizer, tmp_path, capsys):
    save_theirs(tmp_path / "hf", "qwen3", tokenizer)
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        tinygpt("import", tmp_path / "hf", tmp_path / "run")
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert message in error or "missing" in error
    assert not (tmp_path / "run").exists()


def test_runs_that_cannot_be_exported_are_one_line(tokenizer, tmp_path, capsys, corpus_run):
    run, message = corpus_run
    with pytest.raises(SystemExit, match="2"):
        tinygpt("export", run, tmp_path / "hf")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


@pytest.fixture(params=["lstm", "ngrams"])
def corpus_run(request, tokenizer, tmp_path):
    """A run that no format of transformers can express, and what the refusal says."""
    run = tmp_path / "run"
    run.mkdir()
    args = {"vocab_size": tokenizer.vocab_size, "context_length": 16, "width": 16}
    if request.param == "ngrams":
        args |= {"heads": 2, "ngrams": 100}
    model = (LSTM if request.param == "lstm" else GPT)(**args)
    save_config(run, "lstm" if request.param == "lstm" else "gpt", args)
    save_tensors(run / "model.safetensors", unique_state_dict(model))
    tokenizer.save(run / "tokenizer.json")
    messages = {"lstm": "has a model that is a LSTM", "ngrams": "no n-gram tables"}
    return run, messages[request.param]


def test_model_card_has_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "corpus").mkdir()
    write_corpus(tmp_path / "corpus")
    (tmp_path / "text.txt").write_text(make_text(random.Random(3), 3000))
    options = "--steps 4 --batch-size 4 --context-length 32 --width 16 --depth 1 --heads 2 --eval-interval 2"
    tinygpt(
        "train",
        "gpt-nano",
        *options.split(),
        "--vocab-size",
        "300",
        "--device",
        "cpu",
        "--data",
        tmp_path / "text.txt",
        "--run",
        tmp_path / "run",
    )
    tinygpt("export", tmp_path / "run", tmp_path / "hf", "--dtype", "bfloat16")
    card = (tmp_path / "hf" / "README.md").read_text()
    final = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"| bits per byte | {final['final_bits_per_byte']:.4f} |" in card
    assert "library_name: transformers" in card
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm-eval is not installed")
@pytest.mark.parametrize("name", ["gpt2", "gpt-grouped"])
def test_evaluation_harness_scores_the_folder_as_eval_does(
    name, tokenizer, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "run", name, tokenizer)
    tinygpt("export", "run", "wide-hf")
    tinygpt("import", "wide-hf", "wide")
    Path("my.txt").write_text(make_text(random.Random(4), 900), "utf-8")
    [task] = re.findall(r"```yaml\n(task: .*?)```", SCALE, re.DOTALL)
    Path("my_text.yaml").write_text(task)
    [command] = re.findall(r"^lm-eval (.*)", SCALE, re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *shlex.split(command)],
        env={**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    [scores] = Path("scores").rglob("*.json")
    theirs = json.loads(scores.read_text())["results"]["my_text"]["bits_per_byte,none"]
    [evaluation] = re.findall(r"^tinygpt (eval wide .*)", SCALE, re.MULTILINE)
    capsys.readouterr()
    tinygpt(*shlex.split(evaluation), "--json")
    ours = json.loads(capsys.readouterr().out)
    assert ours["tokens"] > 3 * CONTEXT
    assert theirs == pytest.approx(ours["bits_per_byte"], abs=1e-4)
