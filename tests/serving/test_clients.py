"""Clients that we did not write, against a server over real sockets.

Those of evaluation and of chains are an extra: `pip install -e '.[clients]'`.
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
from tests.serving.test_app import DEADLINE, TOKENIZER, Running, model, reference  # noqa: F401
from tests.serving.test_server import LONG, until
from training.cli import Eval
from training.evaluation.evaluate import evaluate

TEXT = "".join(
    f"Line {i}: the cat sat on {'ab'[i % 2] * (i % 7)} mat \N{CAT FACE}.\n" for i in range(9)
)


@pytest.fixture(scope="module")
def server(model):  # noqa: F811
    running = Running(model, 4, places=100)
    yield running
    running.close()


def greedy(model, prompt, tokens):  # noqa: F811
    return reference(model, prompt, SamplingParams(0.0), tokens)


def test_openais_asynchronous_client_streams_many_at_once(server, model):  # noqa: F811
    client = openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="none")

    async def ask(i):
        stream = await client.completions.create(
            model="tiny", prompt=f"number {i}", max_tokens=12, temperature=0, stream=True, n=2
        )
        texts = ["", ""]
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        return texts

    async def ask_all():
        async with client:
            return await asyncio.gather(*(ask(i) for i in range(30)))

    for i, texts in enumerate(asyncio.run(ask_all())):
        assert texts == [greedy(model, f"number {i}", 12)] * 2


def test_openais_client_comes_again_by_itself_when_there_was_no_place(model):  # noqa: F811
    busy = Running(model, 1, places=0)
    try:
        client = openai.OpenAI(base_url=f"{busy.address}/v1", api_key="none", max_retries=5)
        statuses = []
        client._client.event_hooks["response"].append(lambda r: statuses.append(r.status_code))
        short = {**LONG, "max_tokens": 20}
        blocker = threading.Thread(target=busy.post, kwargs=short)
        go_on, step = threading.Event(), busy.engine.step

        def slow():
            assert go_on.wait(60)
            return step()

        busy.engine.step = slow  # the row is taken until the client has been refused once
        blocker.start()
        until(lambda: busy.service.num_unfinished == 1)
        client._client.event_hooks["response"].append(lambda _: go_on.set())
        answer = client.completions.create(model="tiny", prompt="x", max_tokens=3, temperature=0)
        blocker.join()
        assert statuses[0] == 429
        assert statuses[-1] == 200
        assert answer.choices[0].text == greedy(model, "x", 3)
        go_on.clear()
        blocker = threading.Thread(target=busy.post, kwargs=short)
        blocker.start()
        until(lambda: busy.service.num_unfinished == 1)
        impatient = client.with_options(max_retries=0).completions
        with pytest.raises(openai.RateLimitError) as refused:
            impatient.create(model="tiny", prompt="x")
        go_on.set()
        blocker.join()
        assert int(refused.value.response.headers["retry-after"]) >= 1
    finally:
        go_on.set()
        busy.close()


def said_by(script, *arguments):
    """What a client says that runs in a process of its own, as JSON in the last line."""
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


def test_langchain_completes_and_streams(server, model):  # noqa: F811
    pytest.importorskip("langchain_openai")
    found = said_by(LANGCHAIN, f"{server.address}/v1")
    assert found == [greedy(model, text, 9) for text in ("a cat", "a cat", "a", "b")]


HARNESS = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
found = lm_eval.simple_evaluate(
    model="local-completions",
    model_args=json.loads(sys.argv[1]),
    tasks=["own_text"],
    task_manager=TaskManager(include_path=sys.argv[2]),
    bootstrap_iters=0,
)
print(json.dumps(found["results"]["own_text"]["bits_per_byte,none"]))
"""


def test_the_evaluation_harness_finds_the_bits_per_byte_that_we_do(server, model, tmp_path):  # noqa: F811
    """Its windows are two tokens shorter than it is told that the context is, and disjoint."""
    pytest.importorskip("lm_eval")
    window = 100
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    task = {
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
    (tmp_path / "own_text.yaml").write_text(json.dumps(task))
    arguments = {
        "model": "tiny",
        "base_url": f"{server.address}/v1/completions",
        "tokenizer_backend": "remote",
        "tokenized_requests": True,
        "max_length": window + 2,
        "num_concurrent": 2,
    }
    theirs = said_by(HARNESS, json.dumps(arguments), str(tmp_path))
    ids = np.array([TOKENIZER.eos_token, *TOKENIZER.encode(TEXT)])
    size, precision = len(TEXT.encode()), Eval.precision  # of `python -m training eval`
    windows = {"stride": window, "context_length": window}
    score = evaluate(model, ids, words=1, bytes=size, precision=precision, **windows)
    assert score.tokens > 3 * window
    assert theirs == pytest.approx(score.bits_per_byte, abs=1e-4)
