"""The application on Ray Serve: options, and two replicas under load (`pip install 'tinygpt[ray]'`)."""

import asyncio
import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import httpx
import pytest

from serving.http.registry import ModelRegistry
from tests.serving.running_server import DEADLINE, read_stream
from tests.serving.test_cli import save_run

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("ray"), reason="ray is not installed: pip install 'tinygpt[ray]'"
)

ROOT = Path(__file__).parents[2]
SCALE = (ROOT / "docs" / "scale.md").read_text("utf-8")
SERVER = """
import ast, sys
import ray
from ray import serve
from serving.ray_serve import app

port, folder, args = sys.argv[1:]
ray.init(num_cpus=4, object_store_memory=10**8, include_dashboard=False, _temp_dir=folder)
serve.start(http_options={"port": int(port)})
serve.run(app(ast.literal_eval(args)))
print("serving", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory):
    """The runs `tiny` and `other`, in the working directory of all tests."""
    with warnings.catch_warnings(action="ignore"):  # Ray's own
        importlib.import_module("serving.ray_serve")
    folder = tmp_path_factory.mktemp("folder")
    save_run(folder / "runs" / "tiny", 20_000)
    save_run(folder / "runs" / "other", 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


@pytest.fixture
def build():
    """Return the options of the deployment, and what each replica gets, for arguments."""
    from serving.ray_serve import app

    def build(**args):
        deployment = app(args)._bound_deployment
        options, paths = deployment.init_args
        return deployment, options, [path.name for path in paths]

    return build


def test_options_come_from_arguments_environment_and_file(build, monkeypatch):
    Path("serve.toml").write_text("max-queue = 5\nmax-num-seqs = 6\n[limits]\nmax-tokens = 7\n")
    monkeypatch.setenv("TINYGPT_MAX_NUM_SEQS", "8")
    monkeypatch.setenv("TINYGPT_API_KEY", "secret")
    deployment, options, runs = build(run="tiny other", config="serve.toml", num_replicas="3")
    assert (options.max_queue, options.max_num_seqs, options.limits.max_tokens) == (5, 8, 7)
    assert (options.api_key, runs, deployment.num_replicas) == ("secret", ["tiny", "other"], 3)
    assert deployment.max_ongoing_requests > 5 + 8
    # As in a configuration file of Ray, where values have types.
    _, options, runs = build(run=["other"], max_num_seqs=9, no_compile=True)
    assert (options.max_num_seqs, options.no_compile, runs) == (9, True, ["other"])


def test_autoscaling_aims_at_the_slots(build):
    deployment, _, _ = build(run="tiny", max_replicas="4", max_num_seqs="8", num_gpus="0.5")
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 4)
    assert scaling.get_target_ongoing_requests() == 8
    assert deployment.ray_actor_options["num_gpus"] == 0.5


@pytest.mark.parametrize(
    ("args", "message"),
    {
        "unknown": ({"max_num_seq": "3"}, "did you mean max-num-seqs"),
        "no number": ({"num_replicas": "x"}, "arguments: num_replicas = 'x': Input should be"),
        "range": ({"max_num_seqs": "0"}, "--max-num-seqs must be at least 1, not 0"),
        "range of a limit": ({"max_tokens": 0}, "--max-tokens must be at least 1, not 0"),
        "range of replicas": ({"num_replicas": 0}, "--num-replicas must be at least 1, not 0"),
        "no run": ({"run": "nope"}, "runs/nope: no such run directory; there are other, tiny"),
        "key": ({"api_key": "a b"}, "--api-key must be printable ASCII"),
        "the proxy's": ({"port": "80"}, "arguments: port: requests come through Ray's HTTP proxy"),
        "both": ({"num_replicas": 1, "max_replicas": 2}, "not both"),
        "no maximum": ({"min_replicas": 1}, "min_replicas is for autoscaling"),
        "order": ({"min_replicas": 3, "max_replicas": 2}, "min_replicas 3 is above max_replicas 2"),
    }.values(),
    ids=lambda each: "",
)
def test_mistakes_are_named(build, args, message):
    import click

    with pytest.raises(click.ClickException, match=re.escape(message)):
        build(**args)


def test_commands_of_the_docs(build):
    commands = re.findall(r"^serve run serving\.ray_serve:app (.*)$", SCALE, re.MULTILINE)
    assert commands
    for command in commands:
        args = dict(argument.split("=", 1) for argument in shlex.split(command.partition("#")[0]))
        build(**args | {"run": args["run"].replace("runs/NAME", "runs/tiny")})


def test_configuration_file_of_the_docs(build):
    import yaml
    from ray.serve.schema import ServeDeploySchema

    (text,) = re.findall(r"^```yaml\n(http_options.*?)^```", SCALE, re.MULTILINE | re.DOTALL)
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    deployment, options, _ = build(**application.args | {"run": ["tiny", "other"]})
    (overridden,) = application.deployments
    assert application.import_path == "serving.ray_serve:app"
    assert (deployment.name, options.max_num_seqs) == (overridden.name, 32)


def test_a_replica_with_a_failed_engine_is_unhealthy():
    from serving.cli import Serve
    from serving.ray_serve import Replica

    async def check(replica):
        entry = Serve(threads=1, max_num_seqs=1).load_entry("other")
        replica.registry.entries["other"] = entry
        await replica.check_health()
        entry.engine.has_failed = True
        await replica.check_health()

    replica = Replica(Serve(), [])
    assert isinstance(replica.registry, ModelRegistry)
    with pytest.raises(RuntimeError, match="an engine has stalled or failed"):
        asyncio.run(check(replica))


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def replica_processes(root):
    """The processes of replicas among the descendants of a process."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True)
    rows = [line.split(None, 2) for line in listing.stdout.splitlines()]
    family = {root}
    while more := {int(pid) for pid, parent, *_ in rows if int(parent) in family} - family:
        family |= more
    replicas = [row for row in rows if row[-1].startswith("ray::ServeReplica")]
    return [int(pid) for pid, *_ in replicas if int(pid) in family]


@pytest.fixture
def server(tmp_path):
    """The process of two replicas, and the address of Ray's proxy."""
    environment = os.environ | {
        "HOME": str(tmp_path),  # Ray writes there
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    args = {"run": "tiny other", "num_replicas": 2, "no_compile": True, "stream_interval": 0}
    port = free_port()
    # The paths of sockets are at most 107 characters long.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-c", SERVER, str(port), folder, repr(args)]
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                for line in process.stdout:
                    if line == "serving\n":
                        break
                else:
                    pytest.fail("Ray has not started")
                yield process, f"http://127.0.0.1:{port}"
            finally:
                process.stdin.close()
                process.stdout.read()


@pytest.mark.long
def test_two_replicas_under_load(server):
    process, address = server
    asyncio.run(asyncio.wait_for(use_two_replicas(process, address), 2 * DEADLINE))


async def use_two_replicas(process, address):
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=DEADLINE, limits=limits) as http:

        async def running():
            """Sequences of `tiny` that run or wait, by replica."""
            response = await http.get("/metrics")
            pattern = r'num_requests_(?:running|waiting){model_name="tiny",replica="(\w+)"} (\d+)'
            numbers = Counter()
            for replica, number in re.findall(pattern, response.text):
                numbers[replica] += int(number)
            return numbers

        async def wait_for(condition):
            while not condition(numbers := await running()):
                await asyncio.sleep(0.02)
            return numbers

        def body(max_tokens, **fields):
            return {"prompt": "", "temperature": 0, "max_tokens": max_tokens, **fields}

        async def stream(max_tokens, started):
            """The text of a stream, or None if it broke off."""
            lines = []
            request = body(max_tokens, stream=True)
            async with http.stream("POST", "/v1/completions", json=request) as response:
                assert response.status_code == 200
                try:
                    async for line in response.aiter_lines():
                        lines.append(line)
                        started.set()
                except httpx.RemoteProtocolError:
                    return None
            texts, finish_reasons, _ = read_stream(lines)
            assert finish_reasons == {0: "length"}
            return texts[0]

        await wait_for(lambda numbers: len(numbers) == 2)

        # Models by name.
        listed = (await http.get("/v1/models")).json()["data"]
        assert [each["id"] for each in listed] == ["tiny", "other"]
        response = await http.post("/v1/completions", json=body(8, model="other"))
        assert response.json()["model"] == "other"
        error = await http.post("/v1/completions", json=body(8, model="neither"))
        assert (error.status_code, error.json()["error"]["code"]) == (404, "model_not_found")

        # A hundred streams at a time.
        expected = (await http.post("/v1/completions", json=body(50))).json()["choices"][0]["text"]
        texts = await asyncio.gather(*(stream(50, asyncio.Event()) for _ in range(100)))
        assert texts == [expected] * 100

        # Chunks arrive while the sequence runs, and a client that leaves frees the slot.
        request = body(19_000, stream=True)
        async with http.stream("POST", "/v1/completions", json=request) as response:
            lines = response.aiter_lines()
            first = json.loads((await anext(lines)).removeprefix("data: "))
            assert first["choices"][0]["finish_reason"] is None
            assert (await running()).total() == 1
        await wait_for(lambda numbers: not numbers.total())
        unstreamed = asyncio.create_task(http.post("/v1/completions", json=body(19_000)))
        await wait_for(lambda numbers: numbers.total() == 1)
        unstreamed.cancel()
        await wait_for(lambda numbers: not numbers.total())

        # A killed replica loses its own streams, and is replaced.
        tasks = []
        for _ in range(12):  # one after the other: Ray's proxy then knows how many each has
            tasks.append(asyncio.create_task(stream(2500, started := asyncio.Event())))
            await started.wait()
        before = await running()
        assert before.total() == 12
        assert len(before) == 2
        assert min(before.values()) > 0
        os.kill(replica_processes(process.pid)[0], signal.SIGKILL)
        texts = await asyncio.gather(*tasks)
        after = await wait_for(lambda numbers: len(numbers) == 2)
        (killed,) = before.keys() - after.keys()
        assert texts.count(None) == before[killed]
        assert len(set(texts) - {None}) == 1
        texts = await asyncio.gather(*(stream(50, asyncio.Event()) for _ in range(100)))
        assert texts == [expected] * 100
