"""The runs folder over HTTP: while training writes it, damaged, and with links that lead out of it."""

import json
import os
from pathlib import Path

import pytest

import gpt
from gpt import CHAPTERS
from serving.http.runs import RunBrowser, latest_metrics
from tests.serving.running_server import RunningServer, connect, read_all


def write_run(run, lines=(), **config):
    """Write a run directory as training does."""
    run.mkdir(parents=True, exist_ok=True)
    config = {"task": "text", "model": "gpt", "preset": "gpt-nano", "steps": 20, **config}
    (run / "run.json").write_text(
        json.dumps({"format": 2, "config": config, "parameters": 1234, "commit": "x"})
    )
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


LINES = [
    {"step": 10, "loss": 3.5, "lr_fraction": 1.0, "tokens": 1000, "seconds": 1.5},
    {"step": 10, "validation_loss": 3.25, "sample": "é\u2028"},
    {"step": 20, "loss": 3.0, "lr_fraction": 0.1, "tokens": 2000, "seconds": 3.0},
    {"step": 20, "validation_loss": 3.125, "sample": "b"},
]
FINAL = {"step": 20, "final_loss": 3.0, "final_bits_per_byte": 1.5}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """A server whose runs folder is `server.folder`."""
    folder = tmp_path_factory.mktemp("here") / "runs"
    folder.mkdir()
    server = RunningServer(model, 1, runs=RunBrowser(folder))
    server.folder = folder
    yield server
    server.close()


def test_runs_are_listed_newest_first_with_their_latest_metrics(server):
    old = write_run(server.folder / "old", [*LINES, FINAL])
    rung = write_run(server.folder / "ladder" / "rnn", LINES[:2], model="rnn", preset="rnn")
    os.utime(old / "metrics.jsonl", (1000, 1000.5))
    os.utime(rung / "metrics.jsonl", (2000, 2000.5))
    response = server.http.get("/v1/runs").json()
    assert response == {
        "object": "list",
        "data": [
            {
                "name": "ladder/rnn",
                "task": "text",
                "model": "rnn",
                "preset": "rnn",
                "steps": 20,
                "step": 10,
                "tokens": 1000,
                "seconds": 1.5,
                "loss": 3.5,
                "validation_loss": 3.25,
                "final_bits_per_byte": None,
                "updated": 2000.5,
                "finished": False,
                "parameters": 1234,
            },
            {
                "name": "old",
                "task": "text",
                "model": "gpt",
                "preset": "gpt-nano",
                "steps": 20,
                "step": 20,
                "tokens": 2000,
                "seconds": 3.0,
                "loss": 3.0,
                "validation_loss": 3.125,
                "final_bits_per_byte": 1.5,
                "updated": 1000.5,
                "finished": True,
                "parameters": 1234,
            },
        ],
    }
    (rung / "rung.json").write_text("{}")
    assert server.http.get("/v1/runs").json()["data"][0]["finished"]
    details = server.http.get("/v1/runs/ladder/rnn").json()
    assert (details["name"], details["metrics"], details["finished"]) == (
        "ladder/rnn",
        LINES[:2],
        True,
    )


def test_growing_metrics_are_returned_in_complete_lines(server):
    run = write_run(server.folder / "growing", LINES[:1])
    metrics, address = run / "metrics.jsonl", "/v1/runs/growing"
    first = server.http.get(address).json()
    assert first["config"] == {"task": "text", "model": "gpt", "preset": "gpt-nano", "steps": 20}
    assert (first["metrics"], first["finished"]) == (LINES[:1], False)
    assert first["next"] == metrics.stat().st_size
    line = json.dumps(LINES[1], ensure_ascii=False).encode() + b"\n"
    for cut in range(1, len(line)):  # also in the middle of a character
        metrics.write_bytes(metrics.read_bytes()[: first["next"]] + line[:cut])
        half = server.http.get(address, params={"after": first["next"]}).json()
        assert (half["metrics"], half["next"]) == ([], first["next"])
        assert "restarted" not in half
    metrics.write_bytes(metrics.read_bytes()[: first["next"]] + line)
    more = server.http.get(address, params={"after": first["next"]}).json()
    assert (more["metrics"], more["next"]) == (LINES[1:2], metrics.stat().st_size)
    with metrics.open("a") as file:
        file.write(json.dumps(FINAL) + "\n")
    last = server.http.get(address, params={"after": more["next"]}).json()
    assert (last["metrics"], last["finished"]) == ([FINAL], True)


def test_all_metrics_are_returned_after_resuming_from_a_checkpoint(server):
    run = write_run(server.folder / "resumed", LINES)
    before = server.http.get("/v1/runs/resumed").json()
    write_run(run, LINES[:2])
    again = server.http.get("/v1/runs/resumed", params={"after": before["next"]}).json()
    assert (again["restarted"], again["metrics"]) == (True, LINES[:2])
    longer = [{**LINES[0], "loss": 3.123456789}, *LINES]
    write_run(run, longer)  # no line starts at that byte any more
    rewritten = server.http.get("/v1/runs/resumed", params={"after": again["next"]}).json()
    assert (rewritten["restarted"], rewritten["metrics"]) == (True, longer)
    (run / "metrics.jsonl").unlink()
    gone = server.http.get("/v1/runs/resumed", params={"after": rewritten["next"]}).json()
    assert (gone["restarted"], gone["metrics"], gone["next"]) == (True, [], 0)


@pytest.mark.parametrize("after", ["-1", "x", "1.5", ""])
def test_invalid_after_is_400(server, after):
    write_run(server.folder / "good", LINES)
    response = server.http.get("/v1/runs/good", params={"after": after})
    assert response.status_code == 400
    assert "after: " in response.json()["error"]["message"]
    assert server.http.get("/v1/runs/good", params={"after": 10**30}).json()["restarted"]


DAMAGE = {
    "empty": b"",
    "cut": b'{"format": 2, "config": {"task": "te',
    "not UTF-8": b'{"config": {"task": "\xff"}}',
    "deep": b"[" * 100_000,
    "a list": b"[1, 2]",
    "a number": b'{"config": 5}',
    "a long number": b'{"config": {"steps": 1' + b"0" * 5000 + b"}}",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_run_is_left_out(server, damage):
    write_run(server.folder / "good", LINES)
    (write_run(server.folder / "damaged", LINES) / "run.json").write_bytes(DAMAGE[damage])
    names = [run["name"] for run in server.http.get("/v1/runs").json()["data"]]
    assert "good" in names
    assert "damaged" not in names
    response = server.http.get("/v1/runs/damaged")
    assert response.status_code == 404
    assert "no readable run 'damaged'" in response.json()["error"]["message"]


def test_damaged_lines_are_left_out_and_nan_is_null(server):
    run = write_run(server.folder / "lines")
    (run / "metrics.jsonl").write_bytes(
        b'{"step": 1, "loss": NaN}\nnothing\n[1]\n\xff\xfe\n{"step": 2, "loss": 1e999}\n'
        + b"[" * 100_000
        + b'\n{"step": 3, "loss": 2.5, "sample": "\\ud800"}\n\n'
    )
    response = server.http.get("/v1/runs/lines")
    expected = [
        {"step": 1, "loss": None},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 2.5, "sample": "?"},
    ]
    details = json.loads(response.content, parse_constant=pytest.fail)
    assert details["metrics"] == expected
    summaries = {run["name"]: run for run in server.http.get("/v1/runs").json()["data"]}
    assert (summaries["lines"]["step"], summaries["lines"]["loss"]) == (3, 2.5)


def test_latest_metrics_read_only_the_end_of_the_file(folder):
    lines = [{"step": step, "loss": 1.0, "sample": "x" * 50} for step in range(3000)]
    run = write_run(folder / "long", [{"step": 0, "validation_loss": 1.0}, *lines, FINAL])
    assert (run / "metrics.jsonl").stat().st_size > 2 * 65_536
    assert latest_metrics(run)["final_bits_per_byte"] == 1.5
    assert RunBrowser(folder).summaries()[0]["step"] == 20
    assert len(RunBrowser(folder).details("long")["metrics"]) == 3002
    assert latest_metrics(folder) == {}


def test_no_name_or_link_leads_out_of_the_folder(server, tmp_path):
    write_run(server.folder / "good", LINES)
    secret = write_run(tmp_path / "secret", [{"step": 1, "loss": 42.0}])
    (server.folder / "link").symlink_to(secret)
    (server.folder / "loop").symlink_to("loop")
    (server.folder / "round").symlink_to(server.folder)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "inner").symlink_to(secret)
    (server.folder / "outer").symlink_to(tmp_path / "more")
    half = write_run(server.folder / "half")
    (half / "metrics.jsonl").unlink()
    (half / "metrics.jsonl").symlink_to(secret / "metrics.jsonl")
    os.mkfifo(write_run(server.folder / "pipe") / "fifo")
    (server.folder / "pipe" / "metrics.jsonl").unlink()
    (server.folder / "pipe" / "fifo").rename(server.folder / "pipe" / "metrics.jsonl")
    rest = "host: x\r\nconnection: close\r\n\r\n"
    try:
        names = [
            "link",
            "loop",
            "outer/inner",
            "../secret",
            "..",
            ".",
            "good/..",
            "good/../good",
            "%2e%2e/secret",
            "%2e%2e%2fsecret",
            "..%2f..%2fsecret",
            "%2f" + str(secret).removeprefix("/"),
            "/" + str(secret),
            "%00",
            "good%00",
            "%ff",
            "a/b/c/d",
            "",
            "good/checkpoints",
            "x" * 5000,
        ]
        for name in names:
            request = f"GET /v1/runs/{name} HTTP/1.1\r\n{rest}"
            response = read_all(connect(server, request.encode()))
            assert response.startswith(b"HTTP/1.1 404"), name
            assert b"42.0" not in response
        response = server.http.get("/v1/runs")
        assert b"42.0" not in response.content
        listed = {run["name"] for run in response.json()["data"]}
        assert not {"link", "loop", "outer/inner"} & listed
        assert {"good", "half", "pipe"} <= listed
        assert server.http.get("/v1/runs/half").json()["metrics"] == []
        assert server.http.get("/v1/runs/pipe").json()["metrics"] == []
        # A link to a folder inside is followed.
        assert server.http.get("/v1/runs/round/good").json()["metrics"] == LINES
    finally:
        for name in ("link", "loop", "round", "outer"):
            (server.folder / name).unlink()


def test_ladder_has_rows_of_the_newest_and_descriptions_of_all_rungs(server, folder):
    assert server.http.get("/v1/ladder").json()["rows"] == []
    row = {"rung": "rnn", "chapter": 8, "bits_per_byte": 2.0, "sample": "x"}
    for name, changed in (("first", 1000), ("second", 2000)):
        (folder / name).mkdir(parents=True)
        (folder / name / "ladder.json").write_text(json.dumps([{**row, "sample": name}]))
        os.utime(folder / name / "ladder.json", (changed, changed))
    ladder = RunBrowser(folder).ladder()
    assert ladder["source"] == "second"
    (ladder_row,) = ladder["rows"]
    assert {name: ladder_row[name] for name in row} == {**row, "sample": "second"}
    assert (ladder_row["paper"], ladder_row["idea"]) == (
        CHAPTERS["rnn"].paper,
        CHAPTERS["rnn"].idea,
    )
    assert ladder_row["description"].startswith(gpt.models.recurrent.__doc__.splitlines()[0])
    assert [rung["name"] for rung in ladder["rungs"]] == list(CHAPTERS)
    for rung, model_class in zip(ladder["rungs"], CHAPTERS.values(), strict=True):
        assert set(rung) == {"name", "chapter", "year", "paper", "idea", "equation", "description"}
        assert (rung["chapter"], rung["year"]) == (model_class.chapter, model_class.year)
        assert rung["equation"].isascii() == ("·" not in rung["equation"])
        assert len(rung["equation"]) < 50
    write_run(folder / "ladder", LINES)
    (folder / "ladder" / "ladder.json").write_text(json.dumps([row, {"rung": "of the future"}]))
    os.utime(folder / "ladder" / "ladder.json", (1, 1))
    ladder = RunBrowser(folder).ladder()
    assert ladder["source"] == "ladder"
    assert ladder["rows"][1] == {
        "rung": "of the future",
        "paper": None,
        "idea": None,
        "description": None,
    }
    for damage in ('[{"rung"', "{}", "[1]", "[" * 100_000):
        (folder / "ladder" / "ladder.json").write_text(damage)
        assert RunBrowser(folder).ladder()["source"] == "second"
    # The runs folder of a served rung is the ladder's own folder.
    assert RunBrowser(folder / "second").ladder()["source"] == "second"


def test_no_folder_means_no_runs():
    runs = RunBrowser()
    assert (runs.summaries(), runs.details("a"), runs.name_of(Path("a"))) == ([], None, None)
    assert runs.ladder()["rows"] == []
