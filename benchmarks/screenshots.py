"""Take screenshots of the web page of a running server: light and dark, desktop and mobile.

make serve RUN=one ARGS=two &
python -m benchmarks.screenshots http://127.0.0.1:8000
"""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, ViewportSize, sync_playwright

VIEWPORTS: dict[str, tuple[ViewportSize, float]] = {
    "desktop": ({"width": 1180, "height": 960}, 1.5),
    "mobile": ({"width": 390, "height": 844}, 2),
}
"""Each with its pixels per CSS pixel."""
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


def generate(page: Page, view: str, prompt: str, max_tokens: int) -> None:
    """Fill in a view's form and wait for the end of its generation."""
    page.fill(f"#{view} [name=temperature]", "0.6")
    page.fill(f"#{view}-prompt", prompt)
    page.fill(f"#{view} [name=max_tokens]", str(max_tokens))
    page.fill(f"#{view} [name=seed]", "1")
    page.click(f"#{view}-run")
    page.wait_for_selector(f"#{view}-stop:disabled")


def playground(page: Page) -> None:
    """Generate a completion and select one of its tokens."""
    generate(page, "playground", "    def __init__(self, ", 80)
    page.click("#playground-output .token:not(.from-prompt, .newline) >> nth=13")
    page.wait_for_selector("#playground-candidates .selected")


def compare(page: Page) -> None:
    """Generate a completion with every model."""
    generate(page, "compare", "    def __init__(self, ", 60)


def xray(page: Page) -> None:
    """Show the last layer and head."""
    page.fill("#xray-text", "def add(left, right):\n    return left + right")
    page.click("#xray-run")
    page.wait_for_selector("#xray-summary")
    page.locator("#xray .maps button").last.click()


def ladder(page: Page) -> None:
    """Show the chart."""
    page.wait_for_selector("#ladder-rung h3")


def runs(page: Page) -> None:
    """Show the curves of the newest runs."""
    page.wait_for_selector("#runs-chart svg")


VIEWS: dict[str, Callable[[Page], None]] = {
    view.__name__: view for view in (playground, compare, xray, ladder, runs)
}


def main() -> None:
    """Take a screenshot of each view in each viewport and color scheme."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="of the server, without a trailing slash")
    parser.add_argument("--output", type=Path, default=Path("docs/screenshots"))
    parser.add_argument("--views", nargs="*", choices=VIEWS, default=list(VIEWS))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for name in options.views:
            for device, (viewport, scale) in VIEWPORTS.items():
                for scheme in ("light", "dark"):
                    page = browser.new_page(
                        viewport=viewport, color_scheme=scheme, device_scale_factor=scale
                    )
                    page.goto(f"{options.address}/#{name}")
                    page.wait_for_selector(f"#{name}:not([hidden])")
                    # Closed on mobile.
                    page.eval_on_selector_all(
                        ".sampling", "elements => elements.forEach(e => { e.open = true })"
                    )
                    VIEWS[name](page)
                    page.mouse.move(0, 0)
                    page.wait_for_timeout(400)  # the end of the bars' transition
                    path = options.output / f"{name}-{device}-{scheme}.png"
                    page.screenshot(path=path, full_page=device == "mobile")
                    print(path, flush=True)
                    page.close()
        browser.close()


if __name__ == "__main__":
    main()
