"""What the page is told of the runs folder, while it is written, damaged or full of traps."""

import json
import os
from pathlib import Path

import pytest

import gpt
from gpt import CHAPTERS
from serving.http.runs import RunBrowser, latest_metrics
from tests.serving.test_app import Running, model  # noqa: F401
from tests.serving.test_server import raw, whole


def write(run, lines=(), **about):
    """A run's folder as training leaves it."""
    run.mkdir(parents=True, exist_ok=True)
    settings = {"task": "text", "model": "gpt", "preset": "gpt-nano", "steps": 20, **about}
    (run / "run.json").write_text(
        json.dumps({"format": 1, "run": settings, "parameters": 1234, "commit": "x"})
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
def server(model, tmp_path_factory):  # noqa: F811
    """A server whose runs folder is `server.folder`."""
    folder = tmp_path_factory.mktemp("here") / "runs"
    folder.mkdir()
    running = Running(model, 1, runs=RunBrowser(folder))
    running.folder = folder
    yield running
    running.close()


def test_runs_are_told_with_their_newest_figures_the_newest_first(server):
    old = write(server.folder / "old", [*LINES, FINAL])
    rung = write(server.folder / "ladder" / "rnn", LINES[:2], model="rnn", preset="rnn")
    os.utime(old / "metrics.jsonl", (1000, 1000.5))
    os.utime(rung / "metrics.jsonl", (2000, 2000.5))
    told = server.http.get("/v1/runs").json()
    assert told == {
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
    one = server.http.get("/v1/runs/ladder/rnn").json()
    assert (one["name"], one["metrics"], one["finished"]) == ("ladder/rnn", LINES[:2], True)


def test_a_run_that_grows_is_told_in_whole_lines(server):
    run = write(server.folder / "growing", LINES[:1])
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


def test_a_run_that_went_back_to_a_checkpoint_is_told_anew(server):
    run = write(server.folder / "resumed", LINES)
    before = server.http.get("/v1/runs/resumed").json()
    write(run, LINES[:2])
    again = server.http.get("/v1/runs/resumed", params={"after": before["next"]}).json()
    assert (again["restarted"], again["metrics"]) == (True, LINES[:2])
    longer = [{**LINES[0], "loss": 3.123456789}, *LINES]
    write(run, longer)  # there is no line at that byte any more
    told = server.http.get("/v1/runs/resumed", params={"after": again["next"]}).json()
    assert (told["restarted"], told["metrics"]) == (True, longer)
    (run / "metrics.jsonl").unlink()
    gone = server.http.get("/v1/runs/resumed", params={"after": told["next"]}).json()
    assert (gone["restarted"], gone["metrics"], gone["next"]) == (True, [], 0)


@pytest.mark.parametrize("after", ["-1", "x", "1.5", ""])
def test_a_byte_that_is_none_is_a_400(server, after):
    write(server.folder / "good", LINES)
    answer = server.http.get("/v1/runs/good", params={"after": after})
    assert answer.status_code == 400
    assert "after: " in answer.json()["error"]["message"]
    assert server.http.get("/v1/runs/good", params={"after": 10**30}).json()["restarted"]


DAMAGE = {
    "empty": b"",
    "cut": b'{"format": 1, "run": {"task": "te',
    "not UTF-8": b'{"run": {"task": "\xff"}}',
    "deep": b"[" * 100_000,
    "a list": b"[1, 2]",
    "a number": b'{"run": 5}',
    "a long number": b'{"run": {"steps": 1' + b"0" * 5000 + b"}}",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_left_out_and_the_others_are_told(server, damage):
    write(server.folder / "good", LINES)
    (write(server.folder / "damaged", LINES) / "run.json").write_bytes(DAMAGE[damage])
    names = [run["name"] for run in server.http.get("/v1/runs").json()["data"]]
    assert "good" in names
    assert "damaged" not in names
    answer = server.http.get("/v1/runs/damaged")
    assert answer.status_code == 404
    assert "no run 'damaged' that can be read" in answer.json()["error"]["message"]


def test_damaged_lines_are_left_out_and_what_is_no_number_is_null(server):
    run = write(server.folder / "lines")
    (run / "metrics.jsonl").write_bytes(
        b'{"step": 1, "loss": NaN}\nnothing\n[1]\n\xff\xfe\n{"step": 2, "loss": 1e999}\n'
        + b"[" * 100_000
        + b'\n{"step": 3, "loss": 2.5, "sample": "\\ud800"}\n\n'
    )
    told = server.http.get("/v1/runs/lines")
    wanted = [
        {"step": 1, "loss": None},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 2.5, "sample": "?"},
    ]
    assert json.loads(told.content, parse_constant=pytest.fail)["metrics"] == wanted
    (line,) = [run for run in server.http.get("/v1/runs").json()["data"] if run["name"] == "lines"]
    assert (line["step"], line["loss"]) == (3, 2.5)


def test_of_a_long_log_the_end_is_looked_at(folder):
    lines = [{"step": step, "loss": 1.0, "sample": "x" * 50} for step in range(3000)]
    run = write(folder / "long", [{"step": 0, "validation_loss": 1.0}, *lines, FINAL])
    assert (run / "metrics.jsonl").stat().st_size > 2 * 65_536
    assert latest_metrics(run)["final_bits_per_byte"] == 1.5
    assert RunBrowser(folder).overview()[0]["step"] == 20
    assert len(RunBrowser(folder).one("long")["metrics"]) == 3002
    assert latest_metrics(folder) == {}


def test_no_name_and_no_link_leads_out_of_the_folder(server, tmp_path):
    write(server.folder / "good", LINES)
    secret = write(tmp_path / "secret", [{"step": 1, "loss": 42.0}])
    (server.folder / "link").symlink_to(secret)
    (server.folder / "loop").symlink_to("loop")
    (server.folder / "round").symlink_to(server.folder)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "inner").symlink_to(secret)
    (server.folder / "outer").symlink_to(tmp_path / "more")
    half = write(server.folder / "half")
    (half / "metrics.jsonl").unlink()
    (half / "metrics.jsonl").symlink_to(secret / "metrics.jsonl")
    os.mkfifo(write(server.folder / "pipe") / "fifo")
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
            answer = whole(raw(server, f"GET /v1/runs/{name} HTTP/1.1\r\n{rest}".encode()))
            assert answer.startswith(b"HTTP/1.1 404"), name
            assert b"42.0" not in answer
        told = server.http.get("/v1/runs")
        assert b"42.0" not in told.content
        found = {run["name"] for run in told.json()["data"]}
        assert not {"link", "loop", "outer/inner"} & found
        assert {"good", "half", "pipe"} <= found
        assert server.http.get("/v1/runs/half").json()["metrics"] == []
        assert server.http.get("/v1/runs/pipe").json()["metrics"] == []
        # A link that stays inside is as good as a folder.
        assert server.http.get("/v1/runs/round/good").json()["metrics"] == LINES
    finally:
        for name in ("link", "loop", "round", "outer"):
            (server.folder / name).unlink()


def test_the_ladder_is_told_with_what_the_code_says_of_each_rung(server, folder):
    assert server.http.get("/v1/ladder").json()["rows"] == []
    row = {"rung": "rnn", "chapter": 8, "bits_per_byte": 2.0, "sample": "x"}
    for name, changed in (("first", 1000), ("second", 2000)):
        (folder / name).mkdir(parents=True)
        (folder / name / "ladder.json").write_text(json.dumps([{**row, "sample": name}]))
        os.utime(folder / name / "ladder.json", (changed, changed))
    told = RunBrowser(folder).ladder()
    assert told["source"] == "second"
    (shown,) = told["rows"]
    assert {name: shown[name] for name in row} == {**row, "sample": "second"}
    assert (shown["paper"], shown["idea"]) == (CHAPTERS["rnn"].paper, CHAPTERS["rnn"].idea)
    assert shown["about"].startswith(gpt.models.recurrent.__doc__.splitlines()[0])
    assert [rung["name"] for rung in told["rungs"]] == list(CHAPTERS)
    for rung, kind in zip(told["rungs"], CHAPTERS.values(), strict=True):
        assert set(rung) == {"name", "chapter", "year", "paper", "idea", "about"}
        assert (rung["chapter"], rung["year"]) == (kind.chapter, kind.year)
    write(folder / "ladder", LINES)
    (folder / "ladder" / "ladder.json").write_text(json.dumps([row, {"rung": "of the future"}]))
    os.utime(folder / "ladder" / "ladder.json", (1, 1))
    told = RunBrowser(folder).ladder()
    assert told["source"] == "ladder"
    assert told["rows"][1] == {"rung": "of the future", "paper": None, "idea": None, "about": None}
    for damage in ('[{"rung"', "{}", "[1]", "[" * 100_000):
        (folder / "ladder" / "ladder.json").write_text(damage)
        assert RunBrowser(folder).ladder()["source"] == "second"
    # Who serves a rung has the ladder's own folder.
    assert RunBrowser(folder / "second").ladder()["source"] == "second"


def test_without_a_folder_there_are_no_runs():
    runs = RunBrowser()
    assert (runs.overview(), runs.one("a"), runs.name_of(Path("a"))) == ([], None, None)
    assert runs.ladder()["rows"] == []
