"""A real browser, and pages in it that must have no errors."""

import contextlib
import shutil

import pytest

DEADLINE = 120  # seconds to wait for what takes a moment, on a machine that stalls
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"),
    "--no-first-run",
]


@contextlib.contextmanager
def chromium():
    """Start the browser; skip the test where there is none."""
    api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        pytest.skip("Chromium is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def checked_pages(browser):
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
            page.wait_for_selector(f"#{view.partition('-')[0]}:not([hidden])")
            return page

        yield open_view
        assert not errors


def set_slider(page, selector, value):
    page.eval_on_selector(
        selector,
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input', {bubbles: true})) }",
        str(value),
    )


def find_overflowing(page, view):
    """Return the controls of a view that a narrow screen cuts off; those in a scrolled area are not."""
    return page.evaluate(
        """view => [...document.querySelectorAll(`header a, header button, #${view} button, #${view} select, #${view} input, #${view} textarea`)]
            .filter(e => e.checkVisibility()).filter(e => {
                const box = e.getBoundingClientRect();
                const scrolls = e.closest('nav, .scroll-x, .checkboxes');
                return !scrolls && (box.left < -1 || box.right > innerWidth + 1);
            }).map(e => e.outerHTML.slice(0, 80))""",
        view,
    )


def find_violations(page):
    """Return the serious accessibility violations that axe-core finds, and the elements that have them."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    violations = axe.Axe().run(page).response["violations"]
    return [
        (v["id"], [node["html"][:120] for node in v["nodes"]][:3])
        for v in violations
        if v["impact"] in ("serious", "critical")
    ]
