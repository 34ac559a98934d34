"""distinct-n, repetition and the judge's loss of hand-made texts and models; the command."""

import json
import math
import random

import numpy as np
import pytest
import torch

from gpt import GPT, LSTM
from gpt.generation import generate
from gpt.models.linear import BigramLM
from gpt.models.transformer import Transformer
from gpt.sampling import SamplingParams
from tests.corpora import text_lines
from tests.training.helpers import WORDS, save_run
from tokenizer import byte_tokenizer, train_bpe, train_words
from training import cli
from training.config import TrainingConfig
from training.evaluation.sample_quality import Judge, continue_prompts, distinct, measure

BYTES = byte_tokenizer()
NO_CONTEXT = {"vocab_size": BYTES.vocab_size, "context_length": 96}


def unigram_model(seed):
    """Return a model that predicts each token with the same probabilities everywhere, and these."""
    model = BigramLM(**NO_CONTEXT)
    with torch.no_grad():
        model.bias.copy_(1.5 * torch.randn(BYTES.vocab_size, generator=torch.manual_seed(seed)))
    return model.eval(), model.bias.detach().double().softmax(0)


def judge(model):
    return Judge(model, BYTES, stateful=False, source=BYTES, has_bytes=True)


def test_distinct_n_of_texts_made_by_hand():
    assert distinct([[1, 2, 3, 4]], 1) == distinct([[1, 2, 3, 4]], 3) == 1
    assert distinct([[7] * 10], 1) == 1 / 10
    assert distinct([[7] * 10], 2) == 1 / 9
    assert distinct([[1, 2, 1, 2]], 2) == 2 / 3
    assert distinct([[1, 2], [1, 2], [2, 1]], 2) == 2 / 3  # no bigram spans two texts
    assert distinct([[1, 2], [3]], 2) == 1


def test_repetition_is_the_mean_over_texts_of_repeated_4_grams():
    different, same, half = list(range(8)), [7] * 8, [1, 2, 3, 4, 1, 2, 3, 4]
    model, _ = unigram_model(0)
    for texts, expected in (
        ([different, different], 0),  # what two samples share is no repetition
        ([same, same], 4 / 5),
        ([different, same, half], (0 + 4 / 5 + 1 / 5) / 3),
    ):
        figures = measure(np.array([[0]] * len(texts)), np.array(texts), judge(model))
        assert figures["repetition"] == pytest.approx(expected)
    assert figures["distinct_1"] == 8 / 24


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_loss_of_a_models_own_samples_is_its_entropy(temperature):
    """And at another temperature the cross-entropy of what it then samples from."""
    model, p_V = unigram_model(1)
    params = SamplingParams(temperature=temperature)
    texts_NT = continue_prompts(model, np.full((200, 1), 65), 50, params)
    figures = measure(np.full((200, 1), 65), texts_NT, judge(model))
    sampled_V = p_V ** (1 / temperature)
    sampled_V /= sampled_V.sum()
    expected = -(sampled_V * p_V.log()).sum()
    deviation = ((sampled_V * (p_V.log() + expected) ** 2).sum() / texts_NT.size).sqrt()
    assert figures["loss"] == pytest.approx(expected.item(), abs=3 * deviation.item())
    low, high = figures["intervals"]["loss"]
    assert low < figures["loss"] < high
    assert high - low == pytest.approx(2 * 1.96 * deviation.item(), rel=0.3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("model_class", "sizes"),
    [
        (GPT, {"width": 16, "depth": 1, "heads": 2}),
        (LSTM, {"width": 16}),
        (Transformer, {"width": 16, "depth": 1, "heads": 2}),
        (BigramLM, {}),
    ],
)
def test_batches_sample_what_generate_samples(model_class, sizes, temperature, monkeypatch):
    torch.manual_seed(0)
    model = model_class(50, 24, **sizes).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    monkeypatch.setattr("training.evaluation.sample_quality.MAX_BATCH_TOKENS", 3 * 18)
    prompts_NT = np.random.default_rng(0).integers(0, 50, (5, 6))
    params = SamplingParams(temperature=temperature, seed=3)
    expected = [
        list(generate(model, prompt, 12, params, choice=number))
        for number, prompt in enumerate(prompts_NT.tolist())
    ]
    assert continue_prompts(model, prompts_NT, 12, params).tolist() == expected


def test_a_judge_scores_the_text_in_its_own_tokens():
    text = "the cat sat on the mat and saw that dog. " * 5
    source = train_bpe([text], 300)
    torch.manual_seed(0)
    model = GPT(BYTES.vocab_size, 256, width=16, depth=1, heads=1).eval()
    torch.nn.init.normal_(model.unembedding.weight, std=0.5)
    eos, ids = source.eos_token, source.encode(text)
    prompt, continuation = [eos, *ids[:5]], [*ids[5:20], eos, *ids[20:30]]
    other = Judge(model, BYTES, stateful=False, source=source, has_bytes=True)
    nll, tokens, num_bytes = other.score(prompt, continuation)
    before, first, second = (source.decode(ids[i:j]) for i, j in ((0, 5), (5, 20), (20, 30)))
    same = [BYTES.encode(piece) for piece in (before, first, second)]
    assert (tokens, num_bytes) == (len(first + second) + 1, len(first + second))
    context, rejoined = [BYTES.eos_token, *same[0]], [*same[1], BYTES.eos_token, *same[2]]
    assert judge(model).score(context, rejoined) == (nll, tokens, num_bytes)
    with torch.inference_mode():
        logprobs_TV = model(torch.tensor([context + rejoined[:-1]]))[0].log_softmax(-1)
    expected = -sum(
        row[token] for row, token in zip(logprobs_TV[len(context) - 1 :], rejoined, strict=True)
    )
    assert nll == pytest.approx(expected.item(), rel=1e-5)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Runs that were not trained, of several tokenizers, and a text that loses words."""
    folder = tmp_path_factory.mktemp("workdir")
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=12)) + "\n" for _ in range(100)]
    (folder / "text.jsonl").write_text(text_lines(lines))
    tokenizers = {
        "small": BYTES,
        "large": train_bpe(lines, 280),
        "words": train_words(lines[:1], 20),
        "diverged": BYTES,
    }
    for name, tokenizer in tokenizers.items():
        config = TrainingConfig(data="text.jsonl", model="gpt", context_length=48)
        args = {"vocab_size": tokenizer.vocab_size, "context_length": 48, "width": 16}
        torch.manual_seed(0)
        model = GPT(**args, depth=1, heads=1)
        torch.nn.init.normal_(model.unembedding.weight, math.nan if name == "diverged" else 0, 0.5)
        save_run(folder / "runs" / name, model, {**args, "depth": 1, "heads": 1}, config, tokenizer)
    return folder


@pytest.fixture
def report(workdir, monkeypatch, capsys):
    """Return what the command prints, as JSON if there is any."""
    monkeypatch.chdir(workdir)
    monkeypatch.setenv("TINYGPT_CACHE", str(workdir / "cache"))

    def report(*arguments):
        capsys.readouterr()
        cli.main("tinygpt", ["sample-quality", *arguments, "--data", "text.jsonl"])
        out = capsys.readouterr().out
        return json.loads(out) if "--json" in arguments else out

    return report


def test_greedy_text_repeats_and_the_text_itself_is_a_row(report, workdir):
    output = workdir / "plots" / "quality.svg"
    result = report("small", "--judge", "large", "--json", "--output", str(output))
    assert (result["split"], result["samples"], result["tokens"]) == ("train", 64, 32)
    own, *rows = result["rows"]
    assert own["text"] == "train text"
    assert [row["temperature"] for row in rows] == [0, 0.5, 0.7, 1, 1.3]
    repetition = [row["repetition"] for row in rows]
    assert repetition[0] > 0.3 > 0.1 > repetition[3]
    assert rows[0]["distinct_2"] < rows[3]["distinct_2"]
    options = ("small", "--json", "--temperatures", "0.7")
    # The same numbers again, whatever else is sampled.
    assert report(*options, "--judge", "large")["rows"] == [own, rows[2]]
    other = report(*options, "--seed", "1")
    assert other["judge"] == other["run"] == result["run"]
    assert other["rows"][0]["distinct_2"] == own["distinct_2"]
    assert other["rows"][1]["distinct_2"] != rows[2]["distinct_2"]
    assert other["rows"][0]["loss"] != own["loss"]
    svg = output.read_text()
    for text in ("distinct-2", "repetition", "bits per byte under the judge", "train text"):
        assert text in svg


def test_where_words_are_lost_there_are_no_bits_per_byte(report, workdir):
    output = workdir / "words.svg"
    options = ("--tokens", "8", "--samples", "3", "--output", str(output))
    text = report("words", *options)
    assert "bits per byte |" not in text
    assert first_column(text) == [
        "train text",
        *(f"temperature {t}" for t in (0, 0.5, 0.7, 1, 1.3)),
    ]
    assert "3 samples of 8 tokens" in text
    assert "nats per token under the judge" in output.read_text()


def first_column(table):
    """Return the first column of a Markdown table."""
    return [line.split("|")[1].strip() for line in table.splitlines()[2:] if line.startswith("|")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    {
        "no temperature": (["--temperatures"], "--temperatures"),
        "a temperature below 0": (["--temperatures", "-1"], "temperature must be between 0 and"),
        "too few tokens": (["--tokens", "3"], "--tokens must be at least 4"),
        "too many tokens": (
            ["--tokens", "40"],
            "--tokens must be at least 4, and with a prompt of half as many fit in 48, not 40",
        ),
        "too many samples": (
            ["--samples", "500"],
            "--samples must be at least 2 and at most that, not 500",
        ),
        "an unknown format": (["--output", "x.doc"], "--output must end in .svg"),
        "a judge that loses words": (
            ["--judge", "words"],
            "runs/words has another tokenizer than the samples, and text is lost between them",
        ),
        "a judge that diverged": (
            ["--judge", "diverged", "--samples", "2"],
            "the judge's loss is not finite",
        ),
        "a judge that is not there": (["--judge", "absent"], "absent"),
    }.values(),
)
def test_mistakes_are_one_line_and_nothing_is_sampled(arguments, message, report, capsys):
    with pytest.raises(SystemExit) as stop:
        report("small", *arguments)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert message in err
