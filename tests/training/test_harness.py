"""A run under EleutherAI's evaluation harness, without a server: log-likelihoods, texts, tasks.

The harness is an extra: `pip install -e '.[clients]'`. tests/serving/test_clients.py compares with
the way over HTTP.
"""

import json
import logging
import random
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt.checkpoint import build_model
from gpt.generation import generate
from gpt.sampling import SamplingParams
from tests.corpora import write_pairs_task
from tests.training.helpers import save_run
from tokenizer import byte_tokenizer
from training import cli
from training.config import TrainingConfig
from training.data.known_truth import generate_documents
from training.evaluation.evaluate import evaluate

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from training.evaluation.harness import HarnessModel  # noqa: E402

ROOT = Path(__file__).parents[2]
TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token
CONTEXT = 48


def make_run(directory, name="gpt", **config_fields):
    """Save a run with random weights; return it and its model."""
    args = {"vocab_size": TOKENIZER.vocab_size, "context_length": CONTEXT, "width": 16}
    args |= {"depth": 1, "heads": 2} if name == "gpt" else {}
    torch.manual_seed(0)
    model = build_model(name, args).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    config = TrainingConfig(model=name, tokenizer="bytes", **config_fields)
    save_run(directory, model, args, config, TOKENIZER)
    return directory, model


@pytest.fixture(scope="module")
def run_and_model(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def run(run_and_model):
    return str(run_and_model[0])


@pytest.fixture
def model(run_and_model):
    return run_and_model[1]


def requests(kind, *arguments):
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def loglikelihoods(lm, *pairs):
    return lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)


def one_at_a_time(model, context, continuation):
    """log p of a continuation, token by token, and whether greedy sampling would return it."""
    ids = TOKENIZER.encode(context) or [EOS]
    total, greedy = 0.0, True
    for token in TOKENIZER.encode(continuation):
        with torch.inference_mode():
            logits_V = model(torch.tensor([ids[-CONTEXT:]]))[0, -1]
        total += logits_V.log_softmax(-1)[token].item()
        greedy = greedy and int(logits_V.argmax()) == token
        ids.append(token)
    return total, greedy


@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"batch_size": "auto"}])
def test_loglikelihoods_equal_one_prediction_at_a_time(options, run, model):
    pairs = [("", "the cat"), ("ab", "c"), ("the cat sat on the", " mat")]
    with torch.inference_mode():
        contexts = torch.arange(ord("a"), ord("z")).unsqueeze(1)
        likeliest = model(contexts)[:, -1].argmax(-1)
    pairs += [(chr(a), chr(b)) for (a,), b in zip(contexts, likeliest, strict=True) if b < 128]
    results = loglikelihoods(HarnessModel(run, device="cpu", **options), *pairs)
    for result, pair in zip(results, pairs, strict=True):
        expected = one_at_a_time(model, *pair)
        assert result == (pytest.approx(expected[0], abs=1e-4), expected[1])
    assert [greedy for _, greedy in results[:4]] == [False, False, False, True]


def test_a_context_that_is_too_long_loses_its_first_tokens(run):
    lm = HarnessModel(run, device="cpu")
    context = "x" * 100 + "the cat sat on the mat and saw that the dog ran"
    (whole, _), (end, _) = loglikelihoods(lm, (context, " too"), (context[-CONTEXT + 3 :], " too"))
    assert whole == pytest.approx(end, abs=1e-4)
    with pytest.raises(ValueError, match="a continuation has 49 tokens, the context 48"):
        loglikelihoods(lm, ("a", "b" * 49))


@pytest.mark.parametrize("name", ["gpt", "lstm", "seq2seq"])
def test_rolling_loglikelihood_is_what_eval_computes(name, tmp_path):
    run, model = make_run(tmp_path / "run", name)
    texts = ["the cat sat on the mat " * 9, "a", ""]
    lm = HarnessModel(str(run), device="cpu", stride=20)
    results = lm.loglikelihood_rolling(
        requests("loglikelihood_rolling", *((text,) for text in texts)), disable_tqdm=True
    )
    for text, result in zip(texts[:2], results, strict=False):
        ids = np.array([EOS, *TOKENIZER.encode(text)])
        score = evaluate(model, ids, stride=20, precision="float32").score(1, 1)
        assert result == -score.nll
    assert results[2] == 0
    if name == "seq2seq":
        with pytest.raises(ValueError, match="Seq2Seq predicts only the second half of a text"):
            loglikelihoods(lm, ("a", "b"))


def test_generated_texts_end_before_a_stop_string(run, model):
    lm = HarnessModel(run, device="cpu")
    prompt = TOKENIZER.encode("the cat")

    def generated(**kwargs):
        kwargs = {"until": [], "max_gen_toks": 20} | kwargs
        (text,) = lm.generate_until(
            requests("generate_until", ("the cat", kwargs)), disable_tqdm=True
        )
        return text

    def expected(params):
        return TOKENIZER.decode(generate(model, prompt, 20, params, {EOS}))

    text = expected(SamplingParams(0.0))
    assert generated() == text
    assert generated(until=[text[5:7], "never"]) == text[: text.index(text[5:7])]
    assert generated(do_sample=True, temperature=0.9, top_k=9, seed=3) == expected(
        SamplingParams(0.9, top_k=9, seed=3)
    )
    with pytest.raises(ValueError, match="no generation option typical_p is known"):
        generated(typical_p=0.5)
    with pytest.raises(ValueError, match="give --gen_kwargs max_gen_toks=24"):
        generated(max_gen_toks=60)


def write_minimal_pairs(folder):
    """Write a task of minimal pairs, where a bracket is closed by its own kind or by another."""
    rng, pairs = random.Random(0), []
    for text in generate_documents("minimal pairs"):
        closings = [number for number, symbol in enumerate(text) if symbol in ")]}"]
        if closings and len(text) < CONTEXT:
            place = rng.choice(closings)
            wrong = rng.choice([symbol for symbol in ")]}" if symbol != text[place]])
            bad = text[:place] + wrong + text[place + 1 :]
            pairs.append({"sentence_good": text, "sentence_bad": bad})
        if len(pairs) == 40:
            break
    write_pairs_task(folder, "own_brackets", pairs)
    return pairs


def accuracy(run, folder):
    evaluation = lm_eval.simple_evaluate(
        model="tinygpt",
        model_args={"run": str(run)},
        device="cpu",
        batch_size="auto",
        tasks=["own_brackets"],
        # Without the harness's own tasks, of which reading the list takes seconds.
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    return evaluation["results"]["own_brackets"]["acc,none"]


@pytest.fixture
def argv_and_logging_restored(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    handlers = logging.root.handlers
    yield
    logging.root.handlers = handlers


@pytest.mark.long
@pytest.mark.usefixtures("argv_and_logging_restored")
def test_the_task_of_the_documentation_runs_by_its_command(run_and_model, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "lm-eval.md").read_text("utf-8")
    (tmp_path / "tasks").mkdir()
    for file, language in {"own_brackets.yaml": "yaml", "pairs.jsonl": "json"}.items():
        (block,) = re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
        (tmp_path / "tasks" / file).write_text(block)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "wide").symlink_to(run_and_model[0])
    (command,) = re.findall(r"^tinygpt (lm-eval .*)$", page, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    cli.main("tinygpt", shlex.split(command))
    (file,) = tmp_path.glob("results/**/*.json")
    results = json.loads(file.read_text())["results"]["own_brackets"]
    good, bad = (
        one_at_a_time(run_and_model[1], "", text)[0] for text in ("Ahg(ab[c]d)A", "Ahg(ab[c)d)A")
    )
    assert results["acc,none"] == (good > bad)


@pytest.mark.parametrize("arguments", [[], ["--tasks", "x"]])
def test_a_command_that_cannot_run_is_one_line(arguments, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "training.evaluation.harness")
    monkeypatch.setitem(sys.modules, "lm_eval.api.instance", None)  # as if it were not installed
    with pytest.raises(SystemExit):
        cli.main("tinygpt", ["lm-eval", *arguments])
    assert re.fullmatch(r"tinygpt: (which tasks\? |lm-eval is not).*\n", capsys.readouterr().err)


def test_minimal_pairs(run, model, tmp_path):
    pairs = write_minimal_pairs(tmp_path)

    def nll(text):
        ids = np.array([EOS, *TOKENIZER.encode(text)])
        return evaluate(model, ids, precision="float32").score(1, 1).nll

    right = [nll(pair["sentence_good"]) < nll(pair["sentence_bad"]) for pair in pairs]
    assert accuracy(run, tmp_path) == pytest.approx(np.mean(right))
    assert 0 < np.mean(right) < 1


def test_a_tie_is_not_right(tmp_path):
    _, model = make_run(tmp_path / "uniform")
    torch.nn.init.zeros_(model.unembedding.weight)
    args = {"vocab_size": TOKENIZER.vocab_size, "context_length": CONTEXT}
    args |= {"width": 16, "depth": 1, "heads": 2}
    save_run(tmp_path / "zero", model, args, TrainingConfig(), TOKENIZER)
    write_minimal_pairs(tmp_path)
    assert accuracy(tmp_path / "zero", tmp_path) == 0
    lm = HarnessModel(str(tmp_path / "zero"), device="cpu")
    assert loglikelihoods(lm, ("a", "b")) == [(pytest.approx(-np.log(257), abs=1e-6), False)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runs": "x"}, "--model_args has no runs: it takes run, precision, stride"),
        ({"context_length": 49}, "context_length must be between 1 and 48, not 49"),
        ({"batch_size": 0}, "--batch_size must be at least 1 or auto, not 0"),
        ({"run": "missing"}, "missing"),
    ],
)
def test_arguments_that_do_not_apply_are_errors(options, message, run):
    with pytest.raises(ValueError, match=message):
        HarnessModel(**{"run": run, "device": "cpu", **options})


def test_a_run_of_another_task_is_refused(tmp_path):
    run, _ = make_run(tmp_path / "run", task="translation", data="toy-pairs")
    with pytest.raises(ValueError, match="needs a run of the task text, not translation"):
        HarnessModel(str(run), device="cpu")
