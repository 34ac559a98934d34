import contextlib
import dataclasses
import io
import json
import math
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys

import httpx
import numpy as np
import pytest
import torch

from gpt import GPT
from gpt.beam_search import translate
from gpt.checkpoint import (
    load_language_model,
    load_tensors,
    save_config,
    save_tensors,
    unique_state_dict,
)
from gpt.cli import OptionalInt
from gpt.generation import generate
from gpt.sampling import SamplingParams
from serving.cli import Sample, Serve
from serving.engine.compilation import find_cpp_compiler
from serving.http.limits import Limits, Timeouts
from serving.tokenization import tokenize_prompt
from tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
DEADLINE = 60


def save_run(run, context_length):
    arguments = {
        "vocab_size": 257,
        "context_length": context_length,
        "width": 16,
        "depth": 2,
        "heads": 2,
    }
    torch.manual_seed(0)
    model = GPT(**arguments).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=3 * parameter.shape[-1] ** -0.5)
    with torch.no_grad():
        model.unembedding.weight[TOKENIZER.eos_token] = 0  # so that greedy outputs do not end
    run.mkdir(parents=True)
    save_config(run, "gpt", arguments)
    save_tensors(run / "model.safetensors", unique_state_dict(model))
    TOKENIZER.save(run / "tokenizer.json")
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with runs/tiny in it."""
    return tmp_path_factory.mktemp("folder")


@pytest.fixture(scope="module", autouse=True)
def model(folder):
    return save_run(folder / "runs" / "tiny", 64)


@pytest.fixture(autouse=True)
def import_path(monkeypatch, request):
    monkeypatch.setenv("PYTHONPATH", str(request.config.rootpath))


def run_serving(folder, *arguments, stdin=b""):
    return subprocess.run(
        [sys.executable, "-m", "serving", *arguments],
        cwd=folder,
        input=stdin,
        capture_output=True,
        timeout=DEADLINE,
    )


def test_sample_prints_prompt_and_output(folder, model):
    done = run_serving(
        folder, "sample", "--prompt", "déf", "--temperature", "0", "--max-tokens", "20"
    )
    tokens = list(
        generate(model, tokenize_prompt(TOKENIZER, "déf").ids, 20, SamplingParams(0.0), {256})
    )
    assert done.returncode == 0
    assert done.stdout.decode() == "déf" + TOKENIZER.decode(tokens) + "\n"
    assert done.stderr == b""


def test_sample_with_the_printed_seed_repeats_the_output(folder):
    first = run_serving(folder, "sample", "runs/tiny", "-n", "2", stdin=b"a\nb")
    assert first.stdout.startswith(b"a\nb")
    texts = first.stdout.split(b"\n" + b"-" * 20 + b"\n")
    assert len(set(texts)) == 2
    seed = first.stderr.split()[3].decode()
    assert first.stderr.startswith(b"seed " + seed.encode())
    again = run_serving(folder, "sample", "--prompt", "a\nb", "--seed", seed, "-n", "2")
    assert (again.stdout, again.stderr) == (first.stdout, b"")


def test_sample_ends_before_a_stop_string(folder, model):
    tokens = generate(model, [256], 60, SamplingParams(0.0), {256})
    text = TOKENIZER.decode(tokens)
    stop = text[9:11]
    done = run_serving(folder, "sample", "--temperature", "0", "--stop", "absent", "--stop", stop)
    assert done.stdout.decode() == text[: text.index(stop)] + "\n"


def test_sample_continues_to_min_tokens_and_after_eos(tmp_path, capsys):
    run = tmp_path / "run"
    model = save_run(run, 64)
    first = next(generate(model, [256], 1, SamplingParams(0.0)))
    with torch.no_grad():  # now the output ends at once
        weight_VD = model.unembedding.weight
        weight_VD[[first, 256]] = weight_VD[[256, first]]
    save_tensors(run / "model.safetensors", unique_state_dict(model))

    def sample(**options):
        Sample(str(run), prompt="", temperature=0, max_tokens=9, **options)()
        return capsys.readouterr().out

    def expected(min_tokens, stop):
        params = SamplingParams(0.0, min_tokens=min_tokens)
        tokens = generate(model, [256], 9, params, stop)
        return TOKENIZER.decode([token for token in tokens if token != 256]) + "\n"

    assert sample() == "\n"
    assert sample(min_tokens=5) == expected(5, {256}) != "\n"
    assert sample(ignore_eos=True) == expected(0, ()) != expected(5, {256})
    text = expected(5, {256})
    assert sample(min_tokens=5, stop=(text[:1],)).startswith(text[:5])


MISTAKES = {
    "no such run": (["sample", "runs/tinny"], "did you mean tiny?"),
    "no run at all": (["sample"], "train one with `make train`"),
    "a long prompt": (["sample", "runs/tiny", "--prompt", "a" * 99], "100 tokens long"),
    "not UTF-8": (["sample", "runs/tiny"], "standard input, line 1: byte 0xff is not UTF-8"),
    "a temperature": (["sample", "runs/tiny", "--temperature", "-1"], "temperature must be"),
    "not a number": (["sample", "runs/tiny", "--temperature", "hot"], "could not convert"),
    "an option": (["sample", "runs/tiny", "--temprature", "1"], "--temperature"),
    "a command": (["smple"], "sample"),
    "a device": (
        ["sample", "runs/tiny", "--device", "gpu"],
        "--device must be auto, cpu, cuda, cuda:N or mps, not 'gpu'",
    ),
    "no outputs": (["sample", "runs/tiny", "-n", "0"], "-n must be at least 1"),
    "an empty stop": (["sample", "runs/tiny", "--stop", ""], "a stop string is empty"),
    "a port": (["serve", "runs/tiny", "--port", "70000"], "between 0 and 65535"),
    "a host": (["serve", "runs/tiny", "--host", "256.0.0.1"], "cannot listen on 256.0.0.1"),
    "slots": (
        ["serve", "runs/tiny", "--port", "0", "--max-num-seqs", "0"],
        "--max-num-seqs must be at least 1, not 0",
    ),
    "a queue": (
        ["serve", "runs/tiny", "--max-queue", "-1"],
        "--max-queue must be at least 0, not -1",
    ),
    "threads": (["serve", "runs/tiny", "--threads", "0"], "--threads must be at least 1, not 0"),
    "a format": (["serve", "runs/tiny", "--dtype", "int4"], "--dtype"),
    "a limit": (
        ["serve", "runs/tiny", "--max-sequences", "0"],
        "--max-sequences must be at least 1, not 0",
    ),
    "connections": (
        ["serve", "runs/tiny", "--max-connections", "0"],
        "--max-connections must be at least 1, not 0",
    ),
    "a deadline": (
        ["serve", "runs/tiny", "--shutdown-timeout", "-1"],
        "--shutdown-timeout must be at least 0",
    ),
    "no key": (
        ["serve", "runs/tiny", "--host", "0.0.0.0", "--port", "0"],
        "--host 0.0.0.0 can be reached from other machines: give --api-key KEY",
    ),
    "a key": (["serve", "runs/tiny", "--api-key", "a b"], "--api-key must be printable ASCII"),
    "a folder": (["serve", "--watch", "absent"], "--watch absent: no such folder"),
    "a folder of runs": (
        ["serve", "runs/tiny", "--runs-dir", "absent"],
        "--runs-dir absent: no such folder",
    ),
    "an X-ray": (
        ["serve", "runs/tiny", "--max-xray-tokens", "0"],
        "--max-xray-tokens must be at least 1, not 0",
    ),
    "twice": (["serve", "runs/tiny", "runs/tiny", "--port", "0"], "two runs have one name"),
}


@pytest.fixture
def run_mistake(monkeypatch, capsys):
    """Runs the module in this process; returns the one line of its error message."""

    def run(folder, *arguments, stdin=b""):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["serving", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as exit_:
            runpy.run_module("serving", run_name="__main__")
        out, line = capsys.readouterr()
        assert (exit_.value.code, out) == (2, "")
        assert line.startswith("python -m serving: ")
        assert line.count("\n") == 1
        return line

    return run


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_one_line_and_exit_code_2(folder, tmp_path, run_mistake, case):
    arguments, message = MISTAKES[case]
    cwd = tmp_path if case == "no run at all" else folder
    stdin = b"\xff" if case == "not UTF-8" else b""
    assert message in run_mistake(cwd, *arguments, stdin=stdin)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.safetensors", lambda raw: raw[: len(raw) // 2], "model.safetensors: damaged"),
        ("tokenizer.json", lambda raw: raw[:99], "tokenizer.json: damaged"),
        ("config.json", lambda raw: raw.replace(b'format": 2', b'format": 9'), "format 9"),
        ("config.json", lambda raw: raw.replace(b"257", b"300"), "shape [257, 16]"),
    ],
)
def test_sample_of_a_damaged_run_is_one_line_and_exit_code_2(
    tmp_path, run_mistake, name, change, message
):
    save_run(tmp_path / "run", 8)
    file = tmp_path / "run" / name
    file.write_bytes(change(file.read_bytes()))
    assert message in run_mistake(tmp_path, "sample", "run")


def run_options(options):
    """Run a command as far as all its options are checked."""
    if isinstance(options, Sample) or (isinstance(options, Serve) and options.port != 8000):
        options()


@pytest.mark.parametrize("command", [Serve, Limits, Timeouts, Sample])
def test_every_number_is_used_or_refused_in_one_sentence(command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    unlimited = {(Sample, name) for name in ("max_tokens", "n")}
    for field in dataclasses.fields(command):
        kind = int if field.type is OptionalInt else type(field.default)
        if kind is float:
            numbers = [-1.0, math.nan, math.inf]
        elif kind is int:
            numbers = [10**30] * ((command, field.name) not in unlimited)
            numbers += [-1] * (field.name != "seed")
        else:
            continue
        for number in numbers:
            with pytest.raises(ValueError, match=f"{field.name.replace('_', '.')} must be"):
                run_options(command(**{field.name: number}))


@pytest.mark.parametrize("arguments", ["sample --seed 1 -n 50", "sample --help"])
def test_closed_output_pipe_is_no_traceback(folder, arguments):
    with subprocess.Popen(
        [sys.executable, "-m", "serving", *arguments.split()],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(DEADLINE) == 1


class ServeProcess:
    """`serve` in its own process, and the line it prints once it is ready."""

    def __init__(self, folder, *arguments, with_compilation=False):
        if not with_compilation:
            arguments = *arguments, "--no-compile"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serving", "serve", "--port", "0", *arguments],
            cwd=folder,
            stdout=subprocess.PIPE,
            # While it compiles, the log of many requests would fill a pipe.
            stderr=subprocess.DEVNULL if with_compilation else subprocess.PIPE,
            text=True,
        )
        self.line = self.process.stdout.readline()
        self.address = next(word for word in self.line.split() if word.startswith("http://"))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate(timeout=DEADLINE)


def test_serve_prints_a_working_command(folder):
    with ServeProcess(folder) as server:
        assert server.line.startswith("tiny at http://127.0.0.1:")
        _, command = server.line.split("try:")
        done = subprocess.run(
            ["sh", "-c", command], capture_output=True, text=True, timeout=DEADLINE
        )
        assert done.stdout.endswith("data: [DONE]\n\n")
        server.process.send_signal(signal.SIGINT)
        _, log = server.process.communicate(timeout=DEADLINE)
        assert server.process.returncode == 0
        model_line, request_line = log.splitlines()
        assert model_line.startswith("tiny: ")
        assert "16 slots of 64 tokens" in model_line
        assert '"POST /v1/completions HTTP/1.1" 200' in request_line


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_other_dtypes_print_their_cost_and_serve(folder, tmp_path, model, dtype):
    run = shutil.copytree(folder / "runs" / "tiny", tmp_path / "run")
    ids = torch.randint(256, (300,), dtype=torch.int32)
    save_tensors(run / "validation.safetensors", {"tokens": ids})
    with ServeProcess(tmp_path, "run", "--dtype", dtype) as server:
        body = {"prompt": "ab", "max_tokens": 20, "temperature": 0}
        response = httpx.post(f"{server.address}/v1/completions", json=body).json()
        assert response["usage"]["completion_tokens"] == 20
        server.process.terminate()
        _, log = server.process.communicate(timeout=DEADLINE)
    match = re.search(
        r"perplexity ([0-9.]+) instead of ([0-9.]+) \(([-+0-9.]+)%\) on (\d+) of", log
    )
    new, old, share, count = map(float, match.groups())
    losses = [
        model.loss(part[:-1].long().unsqueeze(0), part[1:].long().unsqueeze(0)).item()
        for part in ids.split(65)
    ]
    weights_of_losses = [len(part) - 1 for part in ids.split(65)]
    expected = math.exp(float(np.average(losses, weights=weights_of_losses)))
    assert (old, count) == (pytest.approx(expected, rel=1e-3), sum(weights_of_losses))
    assert new == pytest.approx(expected, rel=0.1)
    assert share == pytest.approx(100 * (new / old - 1), abs=0.02)
    assert f"parameters in {dtype}" in log


def test_threads_option(folder):
    with ServeProcess(folder, "--threads", "3", "--dtype", "int8") as server:
        server.process.terminate()
        _, log = server.process.communicate(timeout=DEADLINE)
    assert "threads: 3" in log
    assert "what int8 costs in perplexity is not known" in log


@pytest.mark.long
@pytest.mark.skipif(not find_cpp_compiler(), reason="there is no C++ compiler")
def test_outputs_stay_the_same_while_steps_are_compiled(folder, tmp_path):
    def compiled(server):
        metrics = httpx.get(f"{server.address}/metrics").text
        return re.search(r"compiled_steps{.*} (\d)", metrics)[1]

    body = {"prompt": "ab", "max_tokens": 60, "temperature": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYGPT_CACHE", str(tmp_path))
        with ServeProcess(folder, "--max-num-seqs", "1", with_compilation=True) as server:
            assert compiled(server) == "0"
            texts = set()
            while compiled(server) != "2":
                response = httpx.post(f"{server.address}/v1/completions", json=body, timeout=60)
                texts.add(response.json()["choices"][0]["text"])
            response = httpx.post(f"{server.address}/v1/completions", json=body).json()
            assert texts == {response["choices"][0]["text"]}
        assert len(list((tmp_path / "steps").iterdir())) == 2


def test_requests_choose_a_run_by_name(folder, tmp_path):
    other = save_run(tmp_path / "other", 32)
    with ServeProcess(folder, "runs/tiny", str(tmp_path / "other")) as server:
        names = httpx.get(f"{server.address}/v1/models").json()["data"]
        assert [model["id"] for model in names] == ["tiny", "other"]
        body = {"model": "other", "prompt": "", "temperature": 0, "max_tokens": 99}
        response = httpx.post(f"{server.address}/v1/completions", json=body).json()
    tokens = generate(other, [256], 99, SamplingParams(0.0), {256})
    assert response["choices"][0]["text"] == TOKENIZER.decode(tokens)
    assert response["usage"]["completion_tokens"] == 32


def test_translation_run_translates(tmp_path):
    row = json.dumps({"translation": {"en": "one cat", "fr": "un chat"}}) + "\n"
    (tmp_path / "pairs").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / "pairs" / f"{split}.jsonl").write_text(row * 8)
    command = "-m training train translate-attention --data pairs --run runs/fr --tokenizer bytes"
    size = (
        "--context-length 32 --width 16 --batch-size 4 --steps 30 --learning-rate 0.02 --device cpu"
    )
    made = subprocess.run(
        [sys.executable, *command.split(), *size.split()], cwd=tmp_path, capture_output=True
    )
    assert made.returncode == 0, made.stderr
    model, tokenizer = load_language_model(tmp_path / "runs" / "fr"), byte_tokenizer()
    source, end = tokenizer.encode("one cat"), tokenizer.eos_token
    [tokens] = translate(model, [source], decoder_start_token=end, eos_token=end, max_tokens=12)
    expected = tokenizer.decode([token for token in tokens if token != end]).removeprefix(" ")
    assert expected
    options = ("--prompt", "one cat", "--temperature", "0", "--max-tokens", "12")
    done = run_serving(tmp_path, "sample", *options)
    assert (done.stdout.decode(), done.returncode) == (expected + "\n", 0)
    with ServeProcess(tmp_path, "runs/fr", "--no-compile") as server:
        (entry,) = httpx.get(f"{server.address}/v1/models").json()["data"]
        assert entry["translates"] is True
        body = {"prompt": "one cat", "temperature": 0, "max_tokens": 12}
        (choice,) = httpx.post(f"{server.address}/v1/completions", json=body).json()["choices"]
        assert choice["text"] == expected


def test_models_and_runs_endpoints_read_the_runs_folder(tmp_path):
    for run in (tmp_path / "runs" / "one", tmp_path / "others" / "two"):
        save_run(run, 64)
        (run / "run.json").write_text('{"format": 2, "config": {"task": "text", "model": "gpt"}}')
        line = {"step": 1, "final_loss": 2.0, "final_bits_per_byte": 1.5}
        (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    for arguments, name, run_names in (
        (("runs/one", "--dtype", "int8"), "one", ["one"]),
        (("runs/one", "--runs-dir", "others"), None, ["two"]),
        (("runs/one", "--runs-dir", "."), "runs/one", ["others/two", "runs/one"]),
    ):
        with ServeProcess(tmp_path, *arguments) as server:
            (entry,) = httpx.get(f"{server.address}/v1/models").json()["data"]
            assert (entry["bits_per_byte"], entry["run"]) == (1.5, name)
            assert entry["dtype"] == ("int8" if "int8" in arguments else "float32")
            weights_file = load_tensors(tmp_path / "runs" / "one" / "model.safetensors")
            assert entry["parameters"] == sum(tensor.numel() for tensor in weights_file.values())
            runs = httpx.get(f"{server.address}/v1/runs").json()["data"]
            assert sorted(run["name"] for run in runs) == run_names
            assert "<title>tinygpt" in httpx.get(f"{server.address}/").text


def test_watched_run_is_served_once_it_has_finished(folder, tmp_path):
    with ServeProcess(folder, "--watch", str(tmp_path)) as server:
        assert server.line.startswith("no finished run to serve yet; listening at ")
        assert httpx.get(f"{server.address}/v1/models").json()["data"] == []
        save_run(tmp_path / "new", 8)
        assert httpx.get(f"{server.address}/v1/models").json()["data"] == []
        (tmp_path / "new" / "metrics.jsonl").write_text('{"step": 1, "final_loss": 2.0}\n')
        assert server.process.stdout.readline() == "new: now served\n"
        body = {"model": "new", "prompt": "", "max_tokens": 1}
        assert httpx.post(f"{server.address}/v1/completions", json=body).status_code == 200


def test_api_key_from_the_environment_is_required_and_not_logged(folder, monkeypatch):
    monkeypatch.setenv("TINYGPT_API_KEY", "sesame")
    with ServeProcess(folder, "--host", "0.0.0.0") as server:
        port = server.address.rpartition(":")[2]
        url = f"http://127.0.0.1:{port}/v1/models"
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, headers={"authorization": "Bearer sesame"}).status_code == 200
        server.process.terminate()
        out, log = server.process.communicate(timeout=DEADLINE)
        assert "sesame" not in server.line + out + log


def test_serve_of_a_damaged_run_is_one_line_and_exit_code_2(tmp_path):
    save_run(tmp_path / "run", 8)
    file = tmp_path / "run" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    done = run_serving(tmp_path, "serve", "run", "--port", "0")
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.startswith(b"python -m serving: run/model.safetensors: damaged")
    assert done.stderr.count(b"\n") == 1


def test_port_in_use_is_one_line(folder, run_mistake):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = run_mistake(folder, "serve", "--port", str(taken.getsockname()[1]))
    assert "Address already in use; choose others with --host, --port" in line


def test_sigterm_ends_open_streams_and_exits(folder, tmp_path):
    """Two sequences are running and a third waits for a slot."""
    save_run(tmp_path / "long", 20_000)
    body = {"prompt": "", "temperature": 0, "max_tokens": 20_000, "stream": True}
    with (
        ServeProcess(
            folder, str(tmp_path / "long"), "--max-num-seqs", "2", "--shutdown-timeout", "0.2"
        ) as server,
        httpx.Client(timeout=DEADLINE) as client,
        contextlib.ExitStack() as stack,
    ):
        url = f"{server.address}/v1/completions"
        streams = [
            stack.enter_context(client.stream("POST", url, json=body)).iter_lines()
            for _ in range(3)
        ]
        for lines in streams[:2]:
            assert json.loads(next(lines).removeprefix("data: "))["choices"]
        server.process.send_signal(signal.SIGTERM)
        for lines in streams:
            *_, error, done = (line for line in lines if line)
            assert "shutting down" in json.loads(error.removeprefix("data: "))["error"]["message"]
            assert done == "data: [DONE]"
        _, log = server.process.communicate(timeout=DEADLINE)
        assert server.process.returncode == 0
        assert "Traceback" not in log
