"""The web page in a real browser, with a real server and runs that were trained for it."""

import contextlib
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import pytest

playwright_api = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"),
    "--no-first-run",
]
DEADLINE = 120
VIEWS = ("playground", "compare", "xray", "ladder", "runs", "docs")
SMALL_GPT = ("--width", "64", "--heads", "4", "--depth", "2")
SMALL_RUN = (
    *("--tokenizer", "bytes", "--context-length", "64", "--batch-size", "8"),
    *("--eval-interval", "20", "--eval-tokens", "1000", "--sample-tokens", "30"),
    *("--log-interval", "2"),
)


def run_module(*arguments):
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    )


def write_corpus(folder):
    """Write some English text beside the runs."""
    text = folder.with_name("text.txt")
    text.write_bytes((ROOT / "docs" / "chapters.md").read_bytes())
    return str(text)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train a GPT, an RNN, and a ladder of two rungs."""
    folder = tmp_path_factory.mktemp("page") / "runs"
    data = write_corpus(folder)
    for preset, name, size in (("gpt-nano", "gpt", SMALL_GPT), ("rnn", "rnn", ())):
        options = ("--data", data, "--run", str(folder / name), *SMALL_RUN, *size, "--steps", "60")
        run_module("training", "train", preset, *options)
    options = ("--tokens", "20000", "--tokenizer", "bytes", "--output", str(folder / "ladder"))
    run_module("training", "ladder", "softmax", "rnn", "--data", data, *options)
    return folder


class Server:
    """`python -m serving serve` in a process of its own."""

    def __init__(self, *arguments, port=0):
        # Compilation would take the cores that the browser needs.
        options = (*arguments, "--no-compile", f"--port={port}")
        # Not a pipe: nobody reads it, and the server would block once it is full.
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serving", "serve", *options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.address = re.search(r"http://\S+", self.process.stdout.readline())[0]

    def request(self, path, **body):
        url = f"{self.address}/{path}"
        response = httpx.post(url, json=body, timeout=DEADLINE) if body else httpx.get(url)
        return response.json() if "json" in response.headers["content-type"] else response.text

    def num_running(self):
        """Return the number of sequences that have a slot."""
        lines = [line for line in self.request("metrics").splitlines() if "running" in line]
        return sum(float(line.split()[-1]) for line in lines if not line.startswith("#"))

    def close(self):
        """Stop the server and return its log."""
        self.process.terminate()
        self.process.communicate(timeout=DEADLINE)
        with self.log:
            self.log.seek(0)
            return self.log.read()


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
    """Open views; afterwards, check that none had an error or sent a request to another host."""
    with contextlib.ExitStack() as contexts:
        errors = []

        def open_view(address, view="playground", expected_errors=(), **options):
            context = browser.new_context(**options)
            contexts.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(DEADLINE * 1000)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("console", lambda message: message.type == "error" and record(message.text))
            page.on(
                "request", lambda request: request.url.startswith(address) or record(request.url)
            )

            def record(error):
                if not any(expected in error for expected in expected_errors):
                    errors.append(error)

            page.goto(f"{address}/#{view}")
            page.wait_for_selector(f"#{view}:not([hidden])")
            return page

        yield open_view
        assert not errors


def generate(page, prompt, max_tokens, seed=7, view="playground"):
    # The parameters are closed on mobile.
    page.eval_on_selector(f"#{view} .sampling", "details => { details.open = true }")
    page.fill(f"#{view}-prompt", prompt)
    page.fill(f"#{view} [name=max_tokens]", str(max_tokens))
    page.fill(f"#{view} [name=seed]", str(seed))
    page.click(f"#{view}-run")


GENERATED, ECHOED = ":not(.from-prompt)", ".from-prompt"


def text_of(page, output="#playground-output", tokens=GENERATED):
    return page.eval_on_selector_all(
        f"{output} .token{tokens}",
        "spans => spans.map(e => (e.matches('.newline') ? '\\n' : '') + e.textContent).join('')",
    )


def set_slider(page, selector, value):
    page.eval_on_selector(
        selector,
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input', {bubbles: true})) }",
        str(value),
    )


def wait_until(condition):
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_streamed_completion_equals_the_api_completion(visit, server):
    page = visit(server.address)
    generate(page, "The model ", 50)
    page.wait_for_selector("#playground-output .token >> nth=20")
    page.wait_for_selector("#playground-stop:disabled")
    body = {"model": "gpt", "prompt": "The model ", "temperature": 0.8, "seed": 7}
    (choice,) = server.request("v1/completions", max_tokens=50, logprobs=0, **body)["choices"]
    assert text_of(page) == to_bytes(choice["logprobs"]["tokens"]).decode(errors="replace")
    figures = page.inner_text("#playground-stats")
    assert re.match(r"50 tokens · [\d,]+ tokens/s · \d\.\d\d bits per token · seed 7", figures)


def to_bytes(tokens):
    """Convert token names of the API to bytes."""
    return b"".join(
        bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
        if token.startswith("bytes:")
        else token.encode()
        for token in tokens
    )


def test_stop_frees_the_slot(visit, server):
    page = visit(server.address)
    page.select_option("#playground [name=model]", "rnn")
    generate(page, "", 60_000)
    page.wait_for_selector("#playground-output .token >> nth=30")
    assert server.num_running() == 1
    page.click("#playground-stop")
    wait_until(lambda: server.num_running() == 0)
    assert "stopped" in page.inner_text("#playground-stats")
    assert page.is_enabled("#playground-run")


def candidates(page, **request):
    """Return name, model and sampling probability of each candidate, once those of a request are shown."""

    def is_shown():
        shown = json.loads(page.get_attribute("#playground-candidates", "data-shown") or "{}")
        return request.items() <= shown.items()

    wait_until(is_shown)
    return page.eval_on_selector_all(
        "#playground-candidates li:not(.head):not([hidden])",
        "rows => rows.map(row => [...row.querySelectorAll('.name, .number')].map(e => e.textContent))",
    )


def test_temperature_changes_the_sampling_probabilities_only(visit, server):
    page = visit(server.address)
    page.fill("#playground-prompt", "The mode")
    before = candidates(page, prompt="The mode", temperature=0.8)
    about = page.inner_text("#playground-candidates .hint >> nth=0")
    set_slider(page, "#playground [name=temperature]", 0)
    cold = candidates(page, prompt="The mode", temperature=0)
    assert [row[2] for row in cold] == ["100%"] + ["0"] * (len(cold) - 1)
    assert page.inner_text("#playground-candidates .hint >> nth=0").startswith(
        "1 token can be sampled"
    )
    set_slider(page, "#playground [name=temperature]", 2)
    hot = candidates(page, prompt="The mode", temperature=2)
    assert [row[:2] for row in before] == [row[:2] for row in cold] == [row[:2] for row in hot]
    body = {"model": "gpt", "prompt": "The mode", "temperature": 2.0, "candidates": 12}
    for row, candidate in zip(hot, server.request("v1/next", **body)["candidates"], strict=True):
        expected = candidate["probability"], candidate["sampling_probability"]
        for shown, value in zip(row[1:], expected, strict=True):
            assert float(shown.rstrip("%")) == pytest.approx(100 * value, rel=0.05)
    assert page.inner_text("#playground-candidates .hint >> nth=0") != about


def test_selected_token_shows_its_alternatives(visit, server):
    page = visit(server.address)
    generate(page, "The model ", 20)
    page.wait_for_selector("#playground-stop:disabled")
    page.hover("#playground-output .token >> nth=5")
    wait_until(
        lambda: page.evaluate(
            "document.querySelector('#playground-candidates h3').innerText.startsWith('Alternatives')"
        )
    )
    name = page.inner_text("#playground-candidates h3 .token-name")
    wait_until(lambda: any(row[0].endswith(name) for row in candidates(page)))
    assert page.locator("#playground-candidates .selected").count() == 1
    page.focus("#playground-output")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    wait_until(
        lambda: (
            page.locator("#playground-output .token.selected").evaluate("span => span.position")
            == 1
        )
    )


def test_prompt_is_shown_as_tokens(visit, server):
    page = visit(server.address)
    generate(page, "The modèl", 5)
    page.wait_for_selector("#playground-stop:disabled")
    assert text_of(page, tokens=ECHOED) == "The modèl"
    body = {"model": "gpt", "prompt": "The modèl", "max_tokens": 0, "logprobs": 0, "echo": True}
    (choice,) = server.request("v1/completions", **body)["choices"]
    logprobs = choice["logprobs"]["token_logprobs"]
    assert page.locator("#playground-output .from-prompt").count() == len(logprobs) == 10
    page.hover("#playground-output .from-prompt >> nth=4")
    name = "#playground-candidates .selected .name"
    # The name is preceded by the rank where that is below the others'.
    wait_until(lambda: [n.split(" ")[-1] for n in page.locator(name).all_inner_texts()] == ["m"])
    probability = page.inner_text("#playground-candidates .selected .number >> nth=0")
    assert float(probability.rstrip("%")) == pytest.approx(100 * math.exp(logprobs[4]), rel=0.05)


def test_compare_shows_the_completions_of_two_models(visit, server):
    page = visit(server.address, "compare")
    generate(page, "The ", 30, view="compare")
    page.wait_for_selector("#compare-stop:disabled")
    for name in ("gpt", "rnn"):
        column = f"#compare-columns article[aria-label={name}]"
        body = {"model": name, "prompt": "The ", "temperature": 0.8, "seed": 7}
        (choice,) = server.request("v1/completions", **body, max_tokens=30, logprobs=0)["choices"]
        expected = to_bytes(choice["logprobs"]["tokens"]).decode(errors="replace")
        assert text_of(page, f"{column} .tokens") == expected
        assert "parameters" in page.inner_text(column)


def test_attention_rows_sum_to_one(visit, server):
    page = visit(server.address, "xray")
    page.fill("#xray-text", "The cat sat")
    page.click("#xray-run")
    page.wait_for_selector("#xray-summary")
    (map_,) = server.request("v1/xray", model="gpt", prompt="The cat sat")["maps"]
    assert page.locator("#xray .maps button").count() == map_["num_layers"] * map_["num_heads"]
    assert [len(map_["rows"]), len(map_["columns"])] == [12, 12]
    for row in map_["weights"][0][0]:
        assert sum(row) == pytest.approx(1, abs=1e-3)
    page.click("#xray .maps button >> nth=1")
    page.focus("#xray-result .weighted")
    page.keyboard.press("Home")
    for _ in range(11):
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#xray-summary").endswith("sum 1.00")
    assert page.locator("#xray-result .token.selected").evaluate("span => span.position") == 11


def test_nearest_words_are_listed_with_their_cosines(visit, server):
    page = visit(server.address, "xray")
    page.fill("#nearest-form [name=word]", "a")
    page.press("#nearest-form [name=word]", "Enter")
    page.wait_for_selector("#nearest-result li")
    neighbors = server.request("v1/nearest", model="gpt", word="a")["neighbors"]
    cosines = page.locator("#nearest-result li span").all_text_contents()
    assert cosines == [f"{neighbor['cosine']:.3f}" for neighbor in neighbors]


def test_rnn_map_is_by_units(visit, server):
    page = visit(server.address, "xray")
    page.select_option("#xray [name=model]", "rnn")
    page.click("#xray-run")
    page.wait_for_selector("#xray-summary")
    assert "unit" in page.inner_text("#xray-summary")


def test_translation_alignments(visit, tmp_path):
    words = {"one": "un", "two": "deux", "three": "trois", "cat": "chat", "dog": "chien"}
    pairs = [{"en": f"{a} {b}", "fr": f"{words[a]} {words[b]}"} for a in words for b in words]
    lines = "".join(json.dumps({"translation": pair}) + "\n" for pair in pairs)
    data = tmp_path / "pairs"
    data.mkdir()
    for split in ("train", "validation", "test"):
        (data / f"{split}.jsonl").write_text(lines)
    folder, size = tmp_path / "translator", ("--width", "32", "--batch-size", "16", "--steps", "20")
    options = ("--data", str(data), "--run", str(folder), "--tokenizer", "bytes", *size)
    options += ("--context-length", "64", "--device", "cpu")
    run_module("training", "train", "translate-attention", *options)
    with contextlib.closing(Server(str(folder))) as server:
        page = visit(server.address, "xray")
        page.fill("#xray-text", "one cat")
        page.fill("#xray-translation", "un chat")
        page.click("#xray-run")
        page.wait_for_selector("#xray-summary")
        source, target = page.locator("#xray-result .weighted").all()
        assert source.inner_text().split() == ["one", "cat"]
        assert "".join(target.locator(".token").all_text_contents()[1:]) == "un chat"
        target.focus()
        page.keyboard.press("Home")
        distributions = set()
        for _ in "un chat":
            page.keyboard.press("ArrowRight")
            assert page.inner_text("#xray-summary").endswith("sum 1.00")
            weights = source.locator(".token").evaluate_all(
                "spans => spans.map(e => Number(e.style.getPropertyValue('--weight')))"
            )
            assert max(weights) == 1
            distributions.add(tuple(weights))
        assert len(distributions) > 1
        # Without a translation, the model's own is shown.
        page.fill("#xray-translation", "")
        page.click("#xray-run")
        output = server.request("v1/xray", prompt="one cat")["target_tokens"]
        wait_until(lambda: target.locator(".token").count() == len(output))
        # In the playground, the translation is below the source, and nothing follows its end.
        page.click("nav a[href='#playground']")
        generate(page, "one cat", 200)
        page.wait_for_selector("#playground-stop:disabled")
        assert page.locator("#playground-output .line").first.inner_text() == "one cat"
        assert "stopped at the end-of-text token" in page.inner_text("#playground-stats")
        wait_until(lambda: "<|endoftext|>" in page.inner_text("#playground-candidates h3"))
        assert page.inner_text("#playground-candidates .selected .name").endswith("<|endoftext|>")


def test_ladder_describes_the_selected_rung(visit, server):
    page = visit(server.address, "ladder")
    page.focus("#ladder-chart [data-name=softmax]")
    page.keyboard.press("Enter")
    page.wait_for_selector("#ladder-chart [data-name=softmax][aria-pressed=true]")
    rows = {row["rung"]: row for row in server.request("v1/ladder")["rows"]}
    description = page.inner_text("#ladder-rung")
    assert f"{rows['softmax']['bits_per_byte']:.4f}" in description
    assert rows["softmax"]["sample"].strip()[:20] in description
    page.select_option("#ladder-x", "tokens")
    assert "training tokens" in page.inner_text("#ladder-chart")


def test_api_reference_lists_every_field_and_limit(visit, server):
    page = visit(server.address, "docs")
    page.goto(f"{server.address}/docs")
    page.wait_for_selector("#docs details[open] .fields")
    schema = server.request("openapi.json")
    routes = [f"{m.upper()} {path}" for path, methods in schema["paths"].items() for m in methods]
    assert page.locator("#docs summary > code").all_inner_texts() == routes
    fields = schema["components"]["schemas"]["CompletionRequest"]["properties"]
    shown = page.locator("#docs details[open] .fields li > code").all_inner_texts()
    assert shown[0] == "prompt"  # required fields come first
    assert sorted(shown) == sorted(fields)
    assert "max_tokens: 65536" in page.inner_text("#docs")


def test_curve_of_a_run_grows_while_it_trains(visit, server, runs):
    options = (
        "--data",
        write_corpus(runs),
        "--run",
        str(runs / "live"),
        *SMALL_RUN,
        "--steps",
        "100000",
    )
    training = subprocess.Popen(
        [sys.executable, "-m", "training", "train", "rnn", *options],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: (runs / "live" / "metrics.jsonl").exists())
        page = visit(server.address, "runs")
        page.wait_for_selector("#runs-list input[value=live]")
        for name in ("gpt", "rnn", "ladder/rnn", "ladder/softmax"):
            page.uncheck(f"#runs-list input[value='{name}']")
        page.check("#runs-list input[value=live]")
        wait_until(
            lambda: page.evaluate("+document.querySelector('#runs-chart').dataset.points > 3")
        )
        before = page.get_attribute("#runs-chart", "data-points")
        has_grown = "before => +document.querySelector('#runs-chart').dataset.points > +before + 3"
        wait_until(lambda: page.evaluate(has_grown, before))
        assert "of 100,000" in page.inner_text("#runs-list")
    finally:
        training.kill()
        training.wait()
        shutil.rmtree(runs / "live")


def test_runs_show_configurations_and_samples(visit, server):
    page = visit(server.address, "runs")
    page.wait_for_selector("#runs-chart .curve", state="attached")
    for name in ("gpt", "rnn"):
        page.check(f"#runs-list input[value={name}]")
    page.click("#runs-config summary")
    wait_until(
        lambda: page.evaluate("document.querySelectorAll('#runs-config th[scope=col]').length >= 2")
    )
    assert '"rnn"' in page.inner_text("#runs-config tr.differs >> nth=0 >> xpath=..")
    assert page.locator("#runs-samples article").count() >= 2


HOSTILE_PROMPTS = {
    "markup": "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>",
    "right to left": "مرحبا بالعالم שלום",
    "emoji": "👩‍🚀🇫🇷 \u202e\u0000 é",
    "long": "word " * 4000,
}


@pytest.mark.parametrize("kind", HOSTILE_PROMPTS)
def test_prompt_is_always_rendered_as_text(visit, server, kind):
    page = visit(server.address, expected_errors=["400"])
    page.select_option("#playground [name=model]", "rnn")
    prompt = HOSTILE_PROMPTS[kind].replace("\u0000", "")
    generate(page, prompt, 5)
    page.wait_for_selector("#playground-stop:disabled")
    if kind == "long":
        shown = page.text_content("#playground-output .prompt")
    else:
        shown = text_of(page, tokens=ECHOED)
    assert shown == prompt
    assert page.locator("#playground-output .token:not(.from-prompt)").count() == 5
    assert page.evaluate("window.hacked") is None
    assert page.locator("#playground-output script, #playground-output img").count() == 0


def test_content_security_policy_allows_own_scripts_only(server):
    response = httpx.get(f"{server.address}/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy


def test_lost_connection_is_reported_and_can_be_retried(visit, runs):
    server = Server(str(runs / "rnn"))
    page = visit(server.address, expected_errors=["ERR_", "Failed to load"])
    generate(page, "a", 20_000)
    page.wait_for_selector("#playground-output .token >> nth=30")
    server.process.kill()
    server.close()
    page.wait_for_selector("#playground .error-box:not([hidden])")
    assert "connection was lost" in page.inner_text("#playground .error-box")
    page.click("#playground .error-box button")
    wait_until(
        lambda: page.evaluate(
            "document.querySelector('#playground .error-box').innerText.includes('Cannot reach the server')"
        )
    )
    again = Server(str(runs / "rnn"), port=int(server.address.rpartition(":")[2]))
    try:
        page.fill("#playground [name=max_tokens]", "5")
        page.click("#playground .error-box button")
        page.wait_for_selector("#playground-output .token >> nth=30")
        page.click("#playground-stop")
    finally:
        again.close()


def test_page_is_small_and_paints_fast(visit, server):
    folder = ROOT / "serving" / "page"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 150_000
    page = visit(server.address)
    paints = []
    for _ in range(3):
        page.reload()
        wait_until(
            lambda: page.evaluate("performance.getEntriesByName('first-contentful-paint').length")
        )
        paints.append(
            page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        )
    assert min(paints) < 200


def test_fast_stream_does_not_block_the_page(visit, server):
    page = visit(server.address)
    page.select_option("#playground [name=model]", "rnn")
    page.evaluate(
        "window.long = []; new PerformanceObserver(list => long.push(...list.getEntries().map(e => e.duration)))"
        ".observe({type: 'longtask'})"
    )
    worst = []
    for _ in range(3):  # one slow round may be the machine's fault
        page.evaluate("window.long = []")
        generate(page, "", 2000)
        page.wait_for_selector("#playground-stop:disabled")
        assert page.locator("#playground-output .token").count() == 2000
        speed = re.search(r"([\d,]+) tokens/s", page.inner_text("#playground-stats"))[1]
        if int(speed.replace(",", "")) >= 500:
            worst.append(max(page.evaluate("window.long"), default=0))
    assert worst, "no round reached 500 tokens/s: the stream was not a fast one"
    assert min(worst) < 100


def test_api_key_is_requested_and_never_shown(visit, runs):
    server = Server(str(runs / "rnn"), "--api-key", "quite-secret")
    try:
        page = visit(
            server.address,
            expected_errors=["401"],
            permissions=["clipboard-read", "clipboard-write"],
        )
        page.wait_for_selector("#key[open]")
        page.fill("#key input", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key[open] .error:not([hidden])")
        page.fill("#key input", "quite-secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#playground [name=model] option", state="attached")
        generate(page, "a", 5)
        page.wait_for_selector("#playground-output .token >> nth=4")
        assert "secret" not in page.url
        page.click("[data-copy=curl]")
        wait_until(lambda: "curl" in page.evaluate("navigator.clipboard.readText()"))
        assert "secret" not in page.evaluate("navigator.clipboard.readText()")
        page.click("header a[href='#docs']")
        page.wait_for_selector("#docs details[open] .fields")
        assert "secret" not in page.inner_text("#docs")
    finally:
        log = server.close()
    assert "secret" not in log


def fill_view(page, view):
    """Make a view show all its elements."""
    match view:
        case "playground" | "compare":
            generate(page, "The model ", 30, view=view)
            page.wait_for_selector(f"#{view}-stop:disabled")
        case "xray":
            page.click("#xray-run")
            page.wait_for_selector("#xray-summary")
        case "ladder" | "runs":
            page.wait_for_selector(f"#{view}-chart svg")
        case "docs":
            page.wait_for_selector("#docs details[open] .fields")
            page.eval_on_selector_all(
                "#docs details", "elements => elements.forEach(e => { e.open = true })"
            )


@pytest.mark.parametrize("view", VIEWS)
def test_narrow_screen_has_no_horizontal_overflow(visit, server, view):
    page = visit(server.address, view, viewport={"width": 320, "height": 640})
    fill_view(page, view)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 320
    overflowing = page.evaluate(
        """view => [...document.querySelectorAll(`header a, header button, #${view} button, #${view} select, #${view} input, #${view} textarea`)]
            .filter(e => e.checkVisibility()).filter(e => {
                const box = e.getBoundingClientRect();
                const scrolls = e.closest('nav, .scroll-x, .checkboxes');
                return !scrolls && (box.left < -1 || box.right > 321);
            }).map(e => e.outerHTML.slice(0, 80))""",
        view,
    )
    assert overflowing == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_accessibility(visit, server, view, scheme):
    page = visit(server.address, view, color_scheme=scheme)
    fill_view(page, view)
    violations = axe.Axe().run(page).response["violations"]
    serious = [v for v in violations if v["impact"] in ("serious", "critical")]
    assert serious == [], json.dumps(
        [(v["id"], [node["html"][:120] for node in v["nodes"]][:3]) for v in serious], indent=1
    )
