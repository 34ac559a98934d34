"""The lessons of the page's Learn view in a real browser: their numbers against the equations computed here."""

import math
import re

import numpy as np
import pytest
import torch

from gpt.models.attention import rotary_table, rotate
from serving.http.static import PAGE_DIR
from tests.serving.running_browser import (
    checked_pages,
    find_overflowing,
    find_violations,
    set_slider,
)
from tests.serving.running_server import RunningServer, wait_until
from training.tasks.tables import CUPS

CHAPTERS = PAGE_DIR.parents[1] / "docs" / "chapters"
NUM_LESSONS = 15


@pytest.fixture(scope="module")
def server(model):
    server = RunningServer(model, 1)
    yield server
    server.close()


@pytest.fixture(scope="module")
def page(browser, server):
    with checked_pages(browser) as open_view:
        yield open_view(server.address, "learn-1")


def show(page, number):
    """Show a lesson as it is at first."""
    page.evaluate("number => { location.hash = `learn-${number}` }", number)
    # Its numbers are there once it has been laid out.
    page.wait_for_selector(f"#learn-heading:text-matches('^{number}\\\\. ')")
    page.wait_for_selector("#learn-lesson .lab dd")
    press(page, "Reset")


def press(page, name):
    page.click(f"#learn-lesson .lab button:text-is('{name}')")


def move(page, **values):
    """Move controls by name: a slider to a number, a checkbox to a bool, radio buttons to a text."""
    for name, value in values.items():
        if isinstance(value, bool):
            page.set_checked(f"#learn-lesson [type=checkbox][name={name}]", value)
        elif isinstance(value, str):
            page.check(f"#learn-lesson [type=radio][name^='{name}-'][value='{value}']")
        else:
            set_slider(page, f"#learn-lesson [type=range][name={name}]", value)


def read(page):
    """Return the lesson's numbers, as texts by name."""
    return page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('#learn-lesson .lab dt')]"
        ".map(term => [term.textContent, term.nextSibling.textContent]))"
    )


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+\.?\d*(?:e[+-]\d+)?", text)]


def test_line(page):
    show(page, 1)
    facts = read(page)
    assert facts["Prediction ŷ"] == "45 (it needs 50)"
    assert [facts[name] for name in ("Loss L", "∂L/∂w", "∂L/∂b")] == ["25", "-100", "-10"]
    press(page, "One step")
    assert read(page)["Weights"] == "w = 4.1, b = 5.01"
    assert read(page)["Prediction ŷ"].startswith("46.01 ")
    for rate, power in (("0.01", 55.1), ("0.02", 65.2)):
        press(page, "Reset")
        move(page, rate=rate)
        press(page, "One step")
        assert numbers(read(page)["Prediction ŷ"])[0] == pytest.approx(power)
    press(page, "Ten steps")  # the error triples at each step
    error = -5 * (1 - 0.02 * 2 * 101) ** 11
    assert numbers(read(page)["Loss L"])[0] == pytest.approx(error**2, rel=1e-3)
    move(page, data="rices", w=2.5, b=0)
    loss = float((0.25 * CUPS**2).mean())
    assert numbers(read(page)["Loss L"]) == [pytest.approx(loss, rel=1e-3)]
    assert [read(page)[name] for name in ("∂L/∂w", "∂L/∂b")] == ["0", "0"]


@pytest.mark.parametrize(
    ("z", "x", "product", "plane", "truth"),
    [
        (0, 10, 20, 23.5, 20),
        (0.25, 4, 10, 10, 10),
        (0.5, 10, 30, 26.5, 30),
        (1, 4, 16, 14.5, 4),
    ],
)
def test_products(page, z, x, product, plane, truth):
    show(page, 2)
    move(page, z=z, x=x)
    facts = read(page)
    assert numbers(facts["Product"]) == [product]
    assert numbers(facts["Plane"]) == [plane]
    assert numbers(facts["Truth"])[0] == truth


def test_probability(page):
    show(page, 3)
    for x, w, b in ((12, 1, -10), (12, 2, -20), (8, 1, -10), (10, 1, -10)):
        move(page, x=x, w=w, b=b)
        score, facts = w * x + b, read(page)
        p = 1 / (1 + math.exp(-score))
        assert facts["Score w x + b"] == f"{score}"
        assert facts["Probability p"] == f"{p:.3f}"
        assert facts["Threshold -b/w"] == "10"
        assert facts["Slope p (1 - p)"] == f"{p * (1 - p):.3f}"
        assert facts["Loss if yes is true"] == f"{-math.log(p):.3f}"
        assert facts["Loss if no is true"] == f"{-math.log(1 - p):.3f}"
        assert facts["Answer"].startswith("yes" if x >= 10 else "no")


def test_classes(page):
    show(page, 4)
    for scores, temperature, p in (
        ((3, 2, 1), 1, "0.665, 0.245, 0.090"),
        ((8, 7, 6), 1, "0.665, 0.245, 0.090"),  # only differences count
        ((3, 2, 1), 0.25, "0.982, 0.018, 0.000"),
        ((3, 2, 1), 5, "0.402, 0.329, 0.269"),
        ((1, 2, 8), 1, "0.001, 0.002, 0.997"),
    ):
        move(page, mat=scores[0], hat=scores[1], dog=scores[2], T=temperature)
        facts = read(page)
        assert facts["Probabilities"] == p
        exact = torch.tensor(scores).div(temperature).softmax(0)
        entropy = -float((exact * exact.log2()).sum())
        assert numbers(facts["Entropy"])[0] == pytest.approx(entropy, abs=1e-3)
        loss = -math.log(exact[0])
        assert numbers(facts["Loss if “mat” is true"])[0] == pytest.approx(loss, rel=1e-3)


def test_layers(page):
    show(page, 5)
    x = np.linspace(-1.5, 2.5, 60)
    curves = {
        "square": x**2 + 1,
        "cubic": x**3 - 2 * x**2 + 1,
        "sine": np.sin(2 * x),
    }
    for name, y in curves.items():
        for count in (3, 6, 10):
            move(page, curve=name, count=count)
            press(page, "Follow the curve")
            kinks = np.linspace(-1.5, 2.5, count + 1)
            exact = {"square": kinks**2 + 1, "cubic": kinks**3 - 2 * kinks**2 + 1}
            network = np.interp(x, kinks, exact.get(name, np.sin(2 * kinks)))
            error = ((network - y) ** 2).mean()
            facts = read(page)
            assert numbers(facts["Mean squared error"])[0] == pytest.approx(error, rel=1e-3)
            assert numbers(facts["Weights"])[0] == 3 * count + 1
    # By hand: c = 0 and one unit, max(0, x - 1) bent by 2.
    move(page, curve="square", count=1, unit=1, kink=1, bend=2, start=0)
    assert numbers(read(page)["Slope after the last kink"]) == [2]
    assert numbers(read(page)["y at x = 4"])[:2] == [6, 17]


def test_experts(page):
    show(page, 6)
    for z, x, sharpness, water in (
        (0, 4, 40, 8),
        (0.25, 4, 40, 10),
        (0.5, 10, 40, 30),
        (1, 10, 40, 10),
        (0.7, 10, 0, 20),
    ):
        move(page, z=z, x=x, sharpness=sharpness)
        facts = read(page)
        assert numbers(facts["Water y"]) == [pytest.approx(water, rel=2e-3)]
        assert sum(numbers(facts["Gates"])) == pytest.approx(1, abs=0.002)


def test_word_vectors(page):
    show(page, 7)
    groups = ("cat dog horse cow", "red blue green white", "two three four five")
    move(page, sentences=3000)
    for group in (*groups, "paris rome london berlin"):
        word, *others = group.split()
        move(page, word=word)
        facts = read(page)
        assert set(facts["Nearest words"].split(", ")) == {*others}
        own = float(facts["Mean cosine in its group"])
        assert own > float(facts["Mean cosine with the others"]) + 0.3
    move(page, sentences=0)
    assert abs(float(read(page)["Mean cosine in its group"])) < 0.4


def test_rnn(page):
    show(page, 8)
    assert read(page)["Gradient left"] == "0.00032"
    for u, h, steps in ((0.5, 0, 100), (2, 0, 100), (1, 0, 100), (1, 0.5, 10)):
        move(page, u=u, h=h, steps=steps)
        left = (u * (1 - h**2)) ** steps
        assert numbers(read(page)["Gradient left"]) == [pytest.approx(left, rel=1e-3)]


def test_lstm(page):
    show(page, 9)
    assert read(page)["C at the end"] == "-0.9"
    assert read(page)["h at the end"] == f"{math.tanh(-0.9):.4f}"
    move(page, i=1)
    assert read(page)["C at the end"] == "0"
    move(page, f=0)
    assert read(page)["C at the end"] == "0.9"
    move(page, o=0)
    assert [read(page)[name] for name in ("C at the end", "h at the end")] == ["0.9", "0"]
    press(page, "Reset")
    move(page, word="0", i=1, g=0.5)  # what the first word writes is carried to the end
    assert read(page)["C at the end"] == "-0.4"
    move(page, word="2", f=0.5)
    assert read(page)["C at the end"] == "-0.65"
    assert read(page)["First C left at the end"] == "0.5"


def test_gru(page):
    show(page, 10)
    for h, wx, r, z in ((0.8, -1, 1, 0.5), (0.8, -1, 1, 1), (0.8, -1, 1, 0), (0.8, -1, 0, 0)):
        move(page, h=h, input=wx, r=r, z=z)
        candidate = math.tanh(wx + r * h)
        facts = read(page)
        assert numbers(facts["Candidate n"]) == [pytest.approx(candidate, rel=1e-3)]
        state = z * h + (1 - z) * candidate
        assert numbers(facts["New state h"]) == [pytest.approx(state, rel=1e-3)]
    move(page, z=0.9)
    assert read(page)["Weight of the old after 10 steps"] == "0.3487"


def test_encoder_decoder(page):
    show(page, 11)
    shares = {}
    for width in (16, 32, 64, 128):
        for words in (1, 10, 30):
            move(page, width=str(width), words=words)
            shares[width, words] = float(read(page)["Share"].rstrip("%"))
    for width in (16, 32, 64, 128):
        assert shares[width, 1] == 100 > shares[width, 10] >= shares[width, 30]
    for words in (10, 30):
        of_widths = [shares[width, words] for width in (16, 32, 64, 128)]
        assert of_widths == sorted(of_widths)
    move(page, all=True)
    assert [read(page)[name] for name in ("Share", "Numbers kept")] == ["100%", "3840"]


def test_attention(page):
    show(page, 12)
    facts = read(page)
    assert facts["Scores e"] == "0.31, 0.85, 0.24"
    assert facts["Weights α"] == "0.27, 0.47, 0.26"
    assert facts["Context c"] == "(-0.02, 0.47)"  # of states (-1, 0), (0, 1) and (1, 0)
    for query in (0, -10, 4):
        move(page, q=query)
        weights = torch.tensor([0.31, 0.85, 0.24]).mul(query).softmax(0).tolist()
        assert numbers(read(page)["Weights α"]) == pytest.approx(weights, abs=0.005)
        assert read(page)["Sum of the weights"] == "1"


def attention_maps(page):
    """Return the rows of weights of each head."""
    labels = page.eval_on_selector_all(
        "#learn-lesson .picture svg", "maps => maps.map(map => map.getAttribute('aria-label'))"
    )
    return [[numbers(row) for row in label.partition(". ")[2].split("; ")] for label in labels]


def test_transformer(page):
    show(page, 13)
    assert read(page)["What the order changes in “eat”"] == "nothing: 0.000"
    (map_,) = attention_maps(page)
    for row in map_:
        assert sum(row) == pytest.approx(1, abs=0.02)
    assert map_[1][2] != map_[2][1]  # "eat" to "bread", and back
    move(page, order="backward")
    assert attention_maps(page)[0] == [row[::-1] for row in map_[::-1]]
    for switch in ("mask", "positions"):
        press(page, "Reset")
        move(page, **{switch: True})
        assert numbers(read(page)["What the order changes in “eat”"])[0] > 0.01
    press(page, "Reset")
    move(page, mask=True, equal=True)
    assert attention_maps(page) == [[[1, 0, 0], [0.5, 0.5, 0], [0.33, 0.33, 0.33]]]
    press(page, "Reset")
    move(page, heads="4")
    heads = attention_maps(page)
    assert len({str(head) for head in heads}) == 4


def test_gpt2(page):
    show(page, 14)
    facts = read(page)
    assert facts["Weights"] == "175,181,291,520"
    assert facts["Matrices"].startswith("27,938,")
    move(page, model="small")
    weights = 2 * 50_257 * 768 + 12 * 768**2 * 12
    assert read(page)["Weights"] == f"{weights:,}"
    move(page, width=128, depth=3)
    assert read(page)["Weights"] == f"{2 * 50_257 * 128 + 12 * 128**2 * 3:,}"
    assert page.is_checked("#learn-lesson [value=own]")
    move(page, depth=24, slope=0.25)
    gradient = numbers(read(page)["Gradient through all blocks"])
    assert gradient == pytest.approx([1.25**24, 0.25**24], rel=1e-3, abs=0)


def test_rotary_positions(page):
    show(page, 15)
    cos_SK, sin_SK = rotary_table(1100, 8, 10_000.0)
    ones = torch.ones(1, 1, 1100, 8)
    rotated_SK = rotate(ones, cos_SK[None], sin_SK[None])[0, 0]
    for query, key in ((10, 3), (3, 10), (50, 0), (7, 7)):
        for shift in (0, 500, 1000):
            move(page, m=query, n=key, shift=shift)
            score = float(rotated_SK[query + shift] @ rotated_SK[key + shift]) / 8**0.5
            facts = read(page)
            assert float(facts["Score q·k / √d"]) == pytest.approx(score, abs=1e-3)
            assert numbers(facts["Distance m - n"]) == [query - key]


def test_next_tokens_of_the_served_run(page, server):
    show(page, 15)
    shares = page.locator("#learn-next li:not(.head):not([hidden]) .number:last-child")

    def shown():
        return shares.all_text_contents()

    body = {"prompt": "The", "candidates": 12, "temperature": 1}
    candidates = server.http.post("/v1/next", json=body).json()["candidates"]
    wait_until(lambda: len(shown()) == len(candidates))
    for text, candidate in zip(shown(), candidates, strict=True):
        share = 100 * candidate["sampling_probability"]
        assert numbers(text) == [pytest.approx(share, rel=0.05)]
    set_slider(page, "#learn-next [name=temperature]", 0)
    wait_until(lambda: shown() == ["100%"] + ["0"] * 11)
    set_slider(page, "#learn-next [name=temperature]", 1)
    set_slider(page, "#learn-next [name=top_k]", 2)
    wait_until(lambda: shown()[0] != "100%" and shown()[2:] == ["0"] * 10)
    assert sum(numbers(text)[0] for text in shown()[:2]) == pytest.approx(100, abs=0.2)


def test_keyboard_moves_controls_and_lessons(page):
    show(page, 2)
    page.focus("#learn-lesson [name=z]")
    page.keyboard.press("ArrowRight")
    assert numbers(read(page)["Slope of the product"]) == [2.1]
    page.focus("#learn-lesson .pager a >> nth=1")
    page.keyboard.press("Enter")
    page.wait_for_selector("#learn-heading:focus:text-matches('^3\\. ')")
    assert page.get_attribute("#learn-list a[aria-current]", "href") == "#learn-3"
    assert page.get_attribute("header [aria-current]", "href") == "#learn"
    page.go_back()
    page.wait_for_selector("#learn-heading:text-matches('^2\\. ')")
    assert numbers(read(page)["Slope of the product"]) == [2.1]  # as it was left


@pytest.mark.parametrize("name", ["learn", "learn-99", "learn-x", "learn-"])
def test_unknown_lesson_is_the_first(visit, server, name):
    page = visit(server.address, name)
    page.wait_for_selector("#learn-lesson .lab dd")
    assert page.inner_text("#learn-heading") == "1. A line"


def test_each_lesson_belongs_to_a_chapter(page):
    names = sorted(path.name for path in CHAPTERS.iterdir())
    assert page.locator("#learn-list a").count() == len(names) == NUM_LESSONS
    for number, name in enumerate(names, 1):
        show(page, number)
        heading = (CHAPTERS / name).read_text("utf-8").splitlines()[0]
        assert heading == f"# {number} {page.inner_text('#learn-heading').split('. ', 1)[1]}"
        text = page.inner_text("#learn-lesson")
        assert f"docs/chapters/{name}" in text
        assert f"tinygpt chapter {number}." in text
        assert page.locator("#learn-lesson math").count() >= 1
        page.click("#learn-lesson details summary")
        assert page.inner_text("#learn-lesson .predict details p >> nth=0")


CUT_OFF = """() => [...document.querySelectorAll('#learn-lesson svg text')].filter(text => {
    const inner = text.getBoundingClientRect(), outer = text.closest('svg.chart').getBoundingClientRect();
    return inner.width && (inner.left < outer.left - 1 || inner.right > outer.right + 1);
}).map(text => text.textContent)"""


@pytest.mark.parametrize("width", [320, 1280])
def test_nothing_is_cut_off(visit, server, width):
    page = visit(server.address, "learn", viewport={"width": width, "height": 640})
    for number in range(1, NUM_LESSONS + 1):
        show(page, number)
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width, number
        assert find_overflowing(page, "learn") == [], number
        assert page.evaluate(CUT_OFF) == [], number


def test_accessibility(visit, server):
    page = visit(server.address, "learn")
    # Copies of the lessons, one below the other: axe-core takes a second for each page it is run on.
    for number in range(1, NUM_LESSONS + 1):
        show(page, number)
        page.evaluate(
            """() => {
                const copy = document.querySelector('#learn-lesson').cloneNode(true);
                for (const element of [copy, ...copy.querySelectorAll('[id]')]) element.removeAttribute('id');
                document.querySelector('#main').append(copy);
            }"""
        )
    assert page.locator("#main > article math").count() > NUM_LESSONS
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert find_violations(page) == [], scheme


def test_lessons_are_loaded_when_they_are_first_shown(visit, server):
    page = visit(server.address)
    loaded = "performance.getEntriesByType('resource').map(e => e.name).filter(n => n.includes('lesson'))"
    page.wait_for_load_state("networkidle")
    assert page.evaluate(loaded) == []
    page.click("header a[href='#learn']")
    page.wait_for_selector("#learn-lesson .lab dd")
    assert len(page.evaluate(loaded)) >= 4
