"""Other projects' clients against a server over real sockets.

LangChain and the evaluation harness are an extra: `pip install -e '.[clients]'`.
"""

import asyncio
import json
import subprocess
import sys
import threading

import numpy as np
import openai
import pytest

from gpt.sampling import SamplingParams
from tests.corpora import write_pairs_task
from tests.serving.running_server import (
    CONTEXT_LENGTH,
    DEADLINE,
    LONG,
    TOKENIZER,
    RunningServer,
    reference,
    wait_until,
)
from tests.training.helpers import save_run
from training.config import TrainingConfig
from training.evaluation.commands import Eval
from training.evaluation.evaluate import evaluate

TEXT = "".join(
    f"Line {i}: the cat sat on {'ab'[i % 2] * (i % 7)} mat \N{CAT FACE}.\n" for i in range(9)
)


@pytest.fixture(scope="module")
def server(model):
    server = RunningServer(model, 4, max_queue=100)
    yield server
    server.close()


def greedy(model, prompt, max_tokens):
    return reference(model, prompt, SamplingParams(0.0), max_tokens)


def test_async_openai_client_streams_concurrently(server, model):
    client = openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="none")

    async def complete(i):
        stream = await client.completions.create(
            model="tiny", prompt=f"number {i}", max_tokens=12, temperature=0, stream=True, n=2
        )
        texts = ["", ""]
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        return texts

    async def complete_all():
        async with client:
            return await asyncio.gather(*(complete(i) for i in range(30)))

    for i, texts in enumerate(asyncio.run(complete_all())):
        assert texts == [greedy(model, f"number {i}", 12)] * 2


def test_openai_client_retries_after_429(model):
    server = RunningServer(model, 1, max_queue=0)
    try:
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=5)
        statuses = []
        client._client.event_hooks["response"].append(lambda r: statuses.append(r.status_code))
        short = {**LONG, "max_tokens": 20}
        blocker = threading.Thread(target=server.complete, kwargs=short)
        released, step = threading.Event(), server.engine.step

        def blocking_step():
            assert released.wait(60)
            return step()

        server.engine.step = blocking_step  # the slot is taken until the client is refused once
        blocker.start()
        wait_until(lambda: server.async_engine.num_unfinished == 1)
        client._client.event_hooks["response"].append(lambda _: released.set())
        completion = client.completions.create(
            model="tiny", prompt="x", max_tokens=3, temperature=0
        )
        blocker.join()
        assert statuses[0] == 429
        assert statuses[-1] == 200
        assert completion.choices[0].text == greedy(model, "x", 3)
        released.clear()
        blocker = threading.Thread(target=server.complete, kwargs=short)
        blocker.start()
        wait_until(lambda: server.async_engine.num_unfinished == 1)
        without_retries = client.with_options(max_retries=0).completions
        with pytest.raises(openai.RateLimitError) as refused:
            without_retries.create(model="tiny", prompt="x")
        released.set()
        blocker.join()
        assert int(refused.value.response.headers["retry-after"]) >= 1
    finally:
        released.set()
        server.close()


def run_client(script, *arguments):
    """Run a client in its own process; the JSON in its last line of output."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=4 * DEADLINE,  # they are slow to start
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


LANGCHAIN = """
import json, sys
from langchain_openai import OpenAI
chain = OpenAI(base_url=sys.argv[1], api_key="none", model="tiny", temperature=0, max_tokens=9)
print(json.dumps([chain.invoke("a cat"), "".join(chain.stream("a cat")), *chain.batch(["a", "b"])]))
"""


def test_langchain_completion_and_streaming(server, model):
    pytest.importorskip("langchain_openai")
    texts = run_client(LANGCHAIN, f"{server.address}/v1")
    assert texts == [greedy(model, text, 9) for text in ("a cat", "a cat", "a", "b")]


HARNESS = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
import training.evaluation.harness
def evaluate(model, model_args):
    evaluation = lm_eval.simple_evaluate(
        model=model,
        model_args=model_args,
        device="cpu",
        batch_size=8,
        tasks=["own_text", "own_pairs"],
        task_manager=TaskManager(include_path=sys.argv[3], include_defaults=False),
        bootstrap_iters=0,
    )
    logprobs = [
        logprob for sample in evaluation["samples"]["own_pairs"] for logprob, _ in sample["filtered_resps"]
    ]
    return evaluation["results"]["own_text"]["bits_per_byte,none"], logprobs
by_http = evaluate("local-completions", json.loads(sys.argv[1]))
print(json.dumps([by_http, evaluate("tinygpt", json.loads(sys.argv[2]))]))
"""


def test_evaluation_harness_by_http_and_on_the_run_agrees_with_eval(server, model, tmp_path):
    """Its windows are disjoint; by HTTP they are two tokens shorter than its `max_length`."""
    pytest.importorskip("lm_eval")
    window = 100
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    pairs = [
        {
            "sentence_good": f"the {noun} sits on the mat",
            "sentence_bad": f"the {noun} sit on the mat",
        }
        for noun in ("cat", "dog", "black bird \N{CAT FACE}")
    ]
    text_task = {
        "task": "own_text",
        "dataset_path": "text",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "text.txt")},
            "sample_by": "document",
            "cache_dir": str(tmp_path),
        },
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "own_text.yaml").write_text(json.dumps(text_task))
    write_pairs_task(tmp_path, "own_pairs", pairs)
    config = TrainingConfig(tokenizer="bytes")
    sizes = {"context_length": CONTEXT_LENGTH, "width": 16, "depth": 2, "heads": 2}
    model_args = {"vocab_size": TOKENIZER.vocab_size, **sizes}
    save_run(tmp_path / "run", model, model_args, config, TOKENIZER)
    arguments = {
        "model": "tiny",
        "base_url": f"{server.address}/v1/completions",
        "tokenizer_backend": "remote",
        "tokenized_requests": True,
        "max_length": window + 2,
        "num_concurrent": 2,
    }
    run = {"run": str(tmp_path / "run"), "context_length": window}
    (http_bits, http_logprobs), (bits, logprobs) = run_client(
        HARNESS, json.dumps(arguments), json.dumps(run), str(tmp_path)
    )
    ids = np.array([TOKENIZER.eos_token, *TOKENIZER.encode(TEXT)])
    size, precision = len(TEXT.encode()), Eval.precision  # of `tinygpt eval`
    windows = {"stride": window, "context_length": window}
    score = evaluate(model, ids, precision=precision, **windows).score(1, size)
    assert score.tokens > 3 * window
    assert http_bits == pytest.approx(score.bits_per_byte, abs=1e-4)
    assert bits == pytest.approx(score.bits_per_byte, abs=1e-4)
    assert logprobs == pytest.approx(http_logprobs, abs=1e-4)
    sentences = [pair[name] for pair in pairs for name in ("sentence_bad", "sentence_good")]
    for logprob, sentence in zip(logprobs, sentences, strict=True):
        ids = np.array([TOKENIZER.eos_token, *TOKENIZER.encode(sentence)])
        score = evaluate(model, ids, precision=precision).score(1, 1)
        assert logprob == pytest.approx(-score.nll, abs=1e-4)
