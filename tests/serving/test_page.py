"""The page in a real browser, before a real server and runs that were really trained."""

import contextlib
import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

playwright_api = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"),
    "--no-first-run",
]
DEADLINE = 120
VIEWS = ("play", "compare", "xray", "ladder", "runs", "docs")
TINY = ("--width", "64", "--heads", "4", "--depth", "2")
LITTLE = ("--eval-tokens", "1000", "--sample-tokens", "30", "--log-interval", "2")
SMALL = (
    "--tokenizer",
    "bytes",
    "--context-length",
    "64",
    "--batch-size",
    "8",
    "--eval-interval",
    "20",
    *LITTLE,
)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    )


def text_in(folder):
    """Some English beside the runs."""
    text = folder.with_name("text.txt")
    text.write_bytes((ROOT / "docs" / "chapters.md").read_bytes())
    return str(text)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of a GPT and an RNN, and a ladder of two rungs: all really trained."""
    folder = tmp_path_factory.mktemp("here") / "runs"
    data = text_in(folder)
    for preset, name, size in (("gpt-nano", "gpt", TINY), ("rnn", "rnn", ())):
        options = ("--data", data, "--run", str(folder / name), *SMALL, *size, "--steps", "60")
        run("training", "train", preset, *options)
    options = ("--tokens", "20000", "--tokenizer", "bytes", "--output", str(folder / "ladder"))
    run("training", "ladder", "softmax", "rnn", "--data", data, *options)
    return folder


class Server:
    """`python -m serving serve` in a process of its own."""

    def __init__(self, *arguments, port=0):
        self.process = subprocess.Popen(
            # A compiler beside it would take the cores that the browser draws with.
            [
                sys.executable,
                "-m",
                "serving",
                "serve",
                *arguments,
                "--no-compile",
                f"--port={port}",
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said = self.process.stdout.readline()
        self.address = re.search(r"http://\S+", self.said)[0]

    def ask(self, path, **body):
        url = f"{self.address}/{path}"
        answer = httpx.post(url, json=body, timeout=DEADLINE) if body else httpx.get(url)
        return answer.json() if "json" in answer.headers["content-type"] else answer.text

    def running(self):
        """Texts that have a row."""
        lines = [line for line in self.ask("metrics").splitlines() if "running" in line]
        return sum(float(line.split()[-1]) for line in lines if not line.startswith("#"))

    def close(self):
        """What it has logged."""
        self.process.terminate()
        return self.process.communicate(timeout=DEADLINE)[1]


@pytest.fixture(scope="module")
def server(runs):
    server = Server(str(runs / "gpt"), str(runs / "rnn"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def browser():
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens views; at its end, none of them had an error, or asked another host."""
    with contextlib.ExitStack() as undo:
        faults = []

        def begin(address, view="play", expected=(), **options):
            context = browser.new_context(**options)
            undo.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(DEADLINE * 1000)
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("console", lambda said: said.type == "error" and note(said.text))
            page.on("request", lambda asked: asked.url.startswith(address) or note(asked.url))

            def note(fault):
                if not any(one in fault for one in expected):
                    faults.append(fault)

            page.goto(f"{address}/#{view}")
            page.wait_for_selector(f"#{view}:not([hidden])")
            return page

        yield begin
        assert not faults


def write(page, prompt, length, seed=7, view="play"):
    page.eval_on_selector(f"#{view} .knobs", "knobs => { knobs.open = true }")  # closed on a phone
    page.fill(f"#{view}-prompt", prompt)
    page.fill(f"#{view} [name=max_tokens]", str(length))
    page.fill(f"#{view} [name=seed]", str(seed))
    page.click(f"#{view}-go")


def written(page, sheet="#play-text", kind=":not(.given)"):
    return page.eval_on_selector_all(
        f"{sheet} .token{kind}",
        "spans => spans.map(one => (one.matches('.line') ? '\\n' : '') + one.textContent).join('')",
    )


def slide(page, selector, value):
    page.eval_on_selector(
        selector,
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input', {bubbles: true})) }",
        str(value),
    )


def until(holds):
    end = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_text_is_streamed_and_is_the_one_that_the_api_gives(visit, server):
    page = visit(server.address)
    write(page, "The model ", 50)
    page.wait_for_selector("#play-text .token >> nth=20")
    page.wait_for_selector("#play-stop:disabled")
    body = {"model": "gpt", "prompt": "The model ", "temperature": 0.8, "seed": 7}
    (choice,) = server.ask("v1/completions", max_tokens=50, logprobs=0, **body)["choices"]
    assert written(page) == bytes_of(choice["logprobs"]["tokens"]).decode(errors="replace")
    figures = page.inner_text("#play-figures")
    assert re.match(r"50 tokens · [\d,]+ tokens/s · \d\.\d\d bits per token · seed 7", figures)


def bytes_of(tokens):
    """Of the names that the API gives tokens."""
    return b"".join(
        bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
        if token.startswith("bytes:")
        else token.encode()
        for token in tokens
    )


def test_stop_frees_the_row_of_a_text(visit, server):
    page = visit(server.address)
    page.select_option("#play [name=model]", "rnn")
    write(page, "", 60_000)
    page.wait_for_selector("#play-text .token >> nth=30")
    assert server.running() == 1
    page.click("#play-stop")
    until(lambda: server.running() == 0)
    assert "stopped" in page.inner_text("#play-figures")
    assert page.is_enabled("#play-go")


def candidates(page, **asked):
    """Name, probability and share of each candidate, once those asked for are shown."""

    def shown():
        said = json.loads(page.get_attribute("#play-next", "data-shown") or "{}")
        return asked.items() <= said.items()

    until(shown)
    return page.eval_on_selector_all(
        "#play-next li:not(.head):not([hidden])",
        "rows => rows.map(row => [...row.querySelectorAll('.name, .number')].map(part => part.textContent))",
    )


def test_temperature_bends_what_is_drawn_from_and_leaves_what_the_model_says(visit, server):
    page = visit(server.address)
    page.fill("#play-prompt", "The mode")
    before = candidates(page, prompt="The mode", temperature=0.8)
    about = page.inner_text("#play-next .about >> nth=0")
    slide(page, "#play [name=temperature]", 0)
    cold = candidates(page, prompt="The mode", temperature=0)
    assert [row[2] for row in cold] == ["100%"] + ["0"] * (len(cold) - 1)
    assert page.inner_text("#play-next .about >> nth=0").startswith("1 token can be drawn")
    slide(page, "#play [name=temperature]", 2)
    hot = candidates(page, prompt="The mode", temperature=2)
    assert [row[:2] for row in before] == [row[:2] for row in cold] == [row[:2] for row in hot]
    body = {"model": "gpt", "prompt": "The mode", "temperature": 2.0, "candidates": 12}
    found = server.ask("v1/next", **body)["candidates"]
    for row, one in zip(hot, found, strict=True):
        for shown, value in zip(
            row[1:], (one["probability"], one["sampling_probability"]), strict=True
        ):
            assert float(shown.rstrip("%")) == pytest.approx(100 * value, rel=0.05)
    assert page.inner_text("#play-next .about >> nth=0") != about


def test_a_token_tells_what_else_it_could_have_been(visit, server):
    page = visit(server.address)
    write(page, "The model ", 20)
    page.wait_for_selector("#play-stop:disabled")
    page.hover("#play-text .token >> nth=5")
    until(
        lambda: page.evaluate(
            "document.querySelector('#play-next h3').innerText.startsWith('Instead')"
        )
    )
    name = page.inner_text("#play-next h3 .token-name")
    until(lambda: any(row[0].endswith(name) for row in candidates(page)))
    assert page.locator("#play-next .chosen").count() == 1
    page.focus("#play-text")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    until(lambda: page.locator("#play-text .token.here").evaluate("span => span.place") == 1)


def test_a_prompt_is_shown_as_its_tokens_too(visit, server):
    page = visit(server.address)
    write(page, "The modèl", 5)
    page.wait_for_selector("#play-stop:disabled")
    assert written(page, kind=".given") == "The modèl"
    body = {"model": "gpt", "prompt": "The modèl", "max_tokens": 0, "logprobs": 0, "echo": True}
    (choice,) = server.ask("v1/completions", **body)["choices"]
    logprobs = choice["logprobs"]["token_logprobs"]
    assert page.locator("#play-text .given").count() == len(logprobs) == 10
    page.hover("#play-text .given >> nth=4")
    until(lambda: page.locator("#play-next .chosen .name").all_inner_texts() == ["m"])
    probability = page.inner_text("#play-next .chosen .number >> nth=0")
    assert float(probability.rstrip("%")) == pytest.approx(100 * math.exp(logprobs[4]), rel=0.05)


def test_two_models_write_side_by_side(visit, server):
    page = visit(server.address, "compare")
    write(page, "The ", 30, view="compare")
    page.wait_for_selector("#compare-stop:disabled")
    for name in ("gpt", "rnn"):
        column = f"#compare-columns article[aria-label={name}]"
        (choice,) = server.ask(
            *("v1/completions",),
            **{"model": name, "prompt": "The ", "temperature": 0.8, "seed": 7},
            **{"max_tokens": 30, "logprobs": 0},
        )["choices"]
        expected = bytes_of(choice["logprobs"]["tokens"]).decode(errors="replace")
        assert written(page, f"{column} .sheet") == expected
        assert "parameters" in page.inner_text(column)


def test_rows_of_an_attention_map_sum_to_one(visit, server):
    page = visit(server.address, "xray")
    page.fill("#xray-text", "The cat sat")
    page.click("#xray-go")
    page.wait_for_selector("#xray-says")
    (found,) = server.ask("v1/xray", model="gpt", prompt="The cat sat")["maps"]
    assert page.locator("#xray .maps button").count() == found["num_layers"] * found["num_heads"]
    assert [len(found["rows"]), len(found["columns"])] == [12, 12]
    for row in found["weights"][0][0]:
        assert sum(row) == pytest.approx(1, abs=1e-3)
    page.click("#xray .maps button >> nth=1")
    page.focus("#xray-found .looks")
    page.keyboard.press("Home")
    for _ in range(11):
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#xray-says").endswith("sum 1.00")
    assert page.locator("#xray-found .token.here").evaluate("span => span.place") == 11


def test_gates_of_an_rnn_are_units_over_tokens(visit, server):
    page = visit(server.address, "xray")
    page.select_option("#xray [name=model]", "rnn")
    page.click("#xray-go")
    page.wait_for_selector("#xray-says")
    assert "unit" in page.inner_text("#xray-says")


def test_a_translators_alignments_are_of_both_texts(visit, tmp_path):
    words = {"one": "un", "two": "deux", "three": "trois", "cat": "chat", "dog": "chien"}
    pairs = [{"en": f"{a} {b}", "fr": f"{words[a]} {words[b]}"} for a in words for b in words]
    lines = "".join(json.dumps({"translation": pair}) + "\n" for pair in pairs)
    data = tmp_path / "pairs"
    data.mkdir()
    for split in ("train", "validation", "test"):
        (data / f"{split}.jsonl").write_text(lines)
    folder, size = tmp_path / "translator", ("--width", "32", "--batch-size", "16", "--steps", "20")
    options = (
        "--data",
        str(data),
        "--run",
        str(folder),
        "--tokenizer",
        "bytes",
        "--context-length",
        "64",
    )
    run("training", "train", "translate-attention", *options, *size, "--device", "cpu")
    with contextlib.closing(Server(str(folder))) as server:
        page = visit(server.address, "xray")
        page.fill("#xray-text", "one cat")
        page.fill("#xray-translation", "un chat")
        page.click("#xray-go")
        page.wait_for_selector("#xray-says")
        source, told = page.locator("#xray-found .looks").all()
        assert source.inner_text().split() == ["one", "cat"]
        assert "".join(told.locator(".token").all_text_contents()[1:]) == "un chat"
        told.focus()
        page.keyboard.press("Home")
        lit = set()
        for _ in "un chat":
            page.keyboard.press("ArrowRight")
            assert page.inner_text("#xray-says").endswith("sum 1.00")
            weights = source.locator(".token").evaluate_all(
                "spans => spans.map(one => Number(one.style.getPropertyValue('--weight')))"
            )
            assert max(weights) == 1
            lit.add(tuple(weights))
        assert len(lit) > 1  # each of its tokens listens in its own way
        # Without a translation it is the model's own that is shown.
        page.fill("#xray-translation", "")
        page.click("#xray-go")
        written = server.ask("v1/xray", prompt="one cat")["target_tokens"]
        until(lambda: told.locator(".token").count() == len(written))
        # Its own translation stands below the source; after its end nothing comes.
        page.click("nav a[href='#play']")
        write(page, "one cat", 200)
        page.wait_for_selector("#play-stop:disabled")
        assert page.locator("#play-text .row").first.inner_text() == "one cat"
        assert "the model ended it" in page.inner_text("#play-figures")
        until(lambda: "<|endoftext|>" in page.inner_text("#play-next h3"))
        assert page.inner_text("#play-next .chosen .name").endswith("<|endoftext|>")


def test_the_ladder_tells_of_each_rung(visit, server):
    page = visit(server.address, "ladder")
    page.focus("#ladder-chart [data-name=softmax]")
    page.keyboard.press("Enter")
    page.wait_for_selector("#ladder-chart [data-name=softmax][aria-pressed=true]")
    rows = {row["rung"]: row for row in server.ask("v1/ladder")["rows"]}
    told = page.inner_text("#ladder-rung")
    assert f"{rows['softmax']['bits_per_byte']:.4f}" in told
    assert rows["softmax"]["sample"].strip()[:20] in told
    page.select_option("#ladder-x", "tokens")
    assert "tokens of training" in page.inner_text("#ladder-chart")


def test_the_api_is_described_with_every_field_and_limit(visit, server):
    page = visit(server.address, "docs")
    page.goto(f"{server.address}/docs")
    page.wait_for_selector("#docs details[open] .fields")
    told = server.ask("openapi.json")
    routes = [f"{m.upper()} {path}" for path, methods in told["paths"].items() for m in methods]
    assert page.locator("#docs summary > code").all_inner_texts() == routes
    fields = told["components"]["schemas"]["Completion"]["properties"]
    shown = page.locator("#docs details[open] .fields li > code").all_inner_texts()
    assert shown[0] == "prompt"  # the one that is required
    assert sorted(shown) == sorted(fields)
    assert "max_tokens: 65536" in page.inner_text("#docs")


def test_the_curve_of_a_run_grows_while_it_trains(visit, server, runs):
    options = ("--data", text_in(runs), "--run", str(runs / "live"), *SMALL, "--steps", "100000")
    training = subprocess.Popen(
        [sys.executable, "-m", "training", "train", "rnn", *options],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: (runs / "live" / "metrics.jsonl").exists())
        page = visit(server.address, "runs")
        page.wait_for_selector("#runs-list input[value=live]")
        for name in ("gpt", "rnn", "ladder/rnn", "ladder/softmax"):
            page.uncheck(f"#runs-list input[value='{name}']")
        page.check("#runs-list input[value=live]")
        until(lambda: page.evaluate("+document.querySelector('#runs-chart').dataset.points > 3"))
        seen = page.get_attribute("#runs-chart", "data-points")
        grown = "seen => +document.querySelector('#runs-chart').dataset.points > +seen + 3"
        until(lambda: page.evaluate(grown, seen))
        assert "of 100,000" in page.inner_text("#runs-list")
    finally:
        training.kill()
        training.wait()
        shutil.rmtree(runs / "live")


def test_runs_side_by_side_with_their_configuration_and_samples(visit, server):
    page = visit(server.address, "runs")
    page.wait_for_selector("#runs-chart .curve", state="attached")
    for name in ("gpt", "rnn"):
        page.check(f"#runs-list input[value={name}]")
    page.click("#runs-config summary")
    until(
        lambda: page.evaluate("document.querySelectorAll('#runs-config th[scope=col]').length >= 2")
    )
    assert '"rnn"' in page.inner_text("#runs-config tr.differs >> nth=0 >> xpath=..")
    assert page.locator("#runs-samples article").count() >= 2


STRANGE = {
    "markup": "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>",
    "right to left": "مرحبا بالعالم שלום",
    "emoji": "👩‍🚀🇫🇷 \u202e\u0000 é",
    "long": "word " * 4000,
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_prompt_is_text_whatever_it_holds(visit, server, kind):
    page = visit(server.address, expected=["400"])
    page.select_option("#play [name=model]", "rnn")
    prompt = STRANGE[kind].replace("\u0000", "")
    write(page, prompt, 5)
    page.wait_for_selector("#play-stop:disabled")
    shown = (
        page.text_content("#play-text .prompt") if kind == "long" else written(page, kind=".given")
    )
    assert shown == prompt
    assert page.locator("#play-text .token:not(.given)").count() == 5
    assert page.evaluate("window.hacked") is None
    assert page.locator("#play-text script, #play-text img").count() == 0


def test_nothing_but_its_own_files_may_run(server):
    answer = httpx.get(f"{server.address}/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy


def test_a_server_that_goes_away_is_told_and_asked_again_on_demand(visit, runs):
    server = Server(str(runs / "rnn"))
    page = visit(server.address, expected=["ERR_", "Failed to load"])
    write(page, "a", 20_000)
    page.wait_for_selector("#play-text .token >> nth=30")
    server.process.kill()
    server.process.communicate()
    page.wait_for_selector("#play .fault:not([hidden])")
    assert "went away" in page.inner_text("#play .fault")
    page.click("#play .fault button")
    until(
        lambda: page.evaluate(
            "document.querySelector('#play .fault').innerText.includes('does not answer')"
        )
    )
    again = Server(str(runs / "rnn"), port=int(server.address.rpartition(":")[2]))
    try:
        page.fill("#play [name=max_tokens]", "5")
        page.click("#play .fault button")
        page.wait_for_selector("#play-text .token >> nth=30")
        page.click("#play-stop")
    finally:
        again.close()


def test_the_page_is_small_and_there_at_once(visit, server):
    folder = ROOT / "serving" / "page"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 150_000
    page = visit(server.address)
    paints = []
    for _ in range(3):
        page.reload()
        until(
            lambda: page.evaluate("performance.getEntriesByName('first-contentful-paint').length")
        )
        paints.append(
            page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        )
    assert min(paints) < 200


def test_a_quick_stream_leaves_the_page_at_ease(visit, server):
    page = visit(server.address)
    page.select_option("#play [name=model]", "rnn")
    page.evaluate(
        "window.long = []; new PerformanceObserver(list => long.push(...list.getEntries().map(e => e.duration)))"
        ".observe({type: 'longtask'})"
    )
    worst = []
    for _ in range(3):  # a machine that stalls is not the page's fault: three times it is
        page.evaluate("window.long = []")
        write(page, "", 2000)
        page.wait_for_selector("#play-stop:disabled")
        assert page.locator("#play-text .token").count() == 2000
        speed = re.search(r"([\d,]+) tokens/s", page.inner_text("#play-figures"))[1]
        if int(speed.replace(",", "")) >= 500:
            worst.append(max(page.evaluate("window.long"), default=0))
    assert min(worst) < 100


def test_a_key_is_asked_for_and_kept_out_of_sight(visit, runs):
    server = Server(str(runs / "rnn"), "--api-key", "quite-secret")
    try:
        page = visit(
            server.address, expected=["401"], permissions=["clipboard-read", "clipboard-write"]
        )
        page.wait_for_selector("#key[open]")
        page.fill("#key input", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key[open] .wrong:not([hidden])")
        page.fill("#key input", "quite-secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#play [name=model] option", state="attached")
        write(page, "a", 5)
        page.wait_for_selector("#play-text .token >> nth=4")
        assert "secret" not in page.url
        page.click("[data-copy=curl]")
        until(lambda: "curl" in page.evaluate("navigator.clipboard.readText()"))
        assert "secret" not in page.evaluate("navigator.clipboard.readText()")
        page.click("header a[href='#docs']")
        page.wait_for_selector("#docs details[open] .fields")
        assert "secret" not in page.inner_text("#docs")
    finally:
        log = server.close()
    assert "secret" not in log


def filled(page, view):
    """Let a view show what it has."""
    match view:
        case "play" | "compare":
            write(page, "The model ", 30, view=view)
            page.wait_for_selector(f"#{view}-stop:disabled")
        case "xray":
            page.click("#xray-go")
            page.wait_for_selector("#xray-says")
        case "ladder" | "runs":
            page.wait_for_selector(f"#{view}-chart svg")
        case "docs":
            page.wait_for_selector("#docs details[open] .fields")
            page.eval_on_selector_all(
                "#docs details", "every => every.forEach(one => { one.open = true })"
            )


@pytest.mark.parametrize("view", VIEWS)
def test_nothing_is_lost_on_a_narrow_screen(visit, server, view):
    page = visit(server.address, view, viewport={"width": 320, "height": 640})
    filled(page, view)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 320
    hidden = page.evaluate(
        """view => [...document.querySelectorAll(`header a, header button, #${view} button, #${view} select, #${view} input, #${view} textarea`)]
            .filter(e => e.checkVisibility()).filter(e => {
                const box = e.getBoundingClientRect();
                const scrolls = e.closest('nav, .wide, .checks');
                return !scrolls && (box.left < -1 || box.right > 321);
            }).map(e => e.outerHTML.slice(0, 80))""",
        view,
    )
    assert hidden == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_everybody_can_use_it(visit, server, view, scheme):
    page = visit(server.address, view, color_scheme=scheme)
    filled(page, view)
    found = axe.Axe().run(page).response["violations"]
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    assert serious == [], json.dumps(
        [(one["id"], [node["html"][:120] for node in one["nodes"]][:3]) for one in serious],
        indent=1,
    )
