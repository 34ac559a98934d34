"""Pictures of the page, from a server that runs: light and dark, on a desk and on a phone.

make serve RUN='runs/one runs/two' &
python -m benchmarks.pictures http://127.0.0.1:8000 --output docs/pictures
"""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, ViewportSize, sync_playwright

DESK: ViewportSize = {"width": 1180, "height": 960}
PHONE: ViewportSize = {"width": 390, "height": 844}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


def write(page: Page, view: str, prompt: str, tokens: int) -> None:
    """Let a view write a text, to its end."""
    page.fill(f"#{view} [name=temperature]", "0.6")
    page.fill(f"#{view}-prompt", prompt)
    page.fill(f"#{view} [name=max_tokens]", str(tokens))
    page.fill(f"#{view} [name=seed]", "1")
    page.click(f"#{view}-go")
    page.wait_for_selector(f"#{view}-stop:disabled")


def play(page: Page) -> None:
    """A text, and what one of its tokens could have been."""
    write(page, "play", "    def __init__(self, ", 80)
    page.click("#play-text .token:not(.given, .line) >> nth=13")
    page.wait_for_selector("#play-next .chosen")


def compare(page: Page) -> None:
    """The same beginning, from all that are served."""
    write(page, "compare", "    def __init__(self, ", 60)


def xray(page: Page) -> None:
    """Where the last token looks."""
    page.fill("#xray-text", "def add(left, right):\n    return left + right")
    page.click("#xray-go")
    page.wait_for_selector("#xray-says")
    page.locator("#xray .maps button").last.click()


def ladder(page: Page) -> None:
    """Every model, if they were measured."""
    page.wait_for_selector("#ladder-rung h3")


def runs(page: Page) -> None:
    """The curves of the newest runs."""
    page.wait_for_selector("#runs-chart svg")


VIEWS: dict[str, Callable[[Page], None]] = {
    view.__name__: view for view in (play, compare, xray, ladder, runs)
}


def main() -> None:
    """Visit each view in each light and size, and keep what is seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="of a server, without its last slash")
    parser.add_argument("--output", type=Path, default=Path("docs/pictures"))
    parser.add_argument("--views", nargs="*", choices=VIEWS, default=list(VIEWS))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for name in options.views:
            for size, viewport in (("desk", DESK), ("phone", PHONE)):
                for scheme in ("light", "dark"):
                    page = browser.new_page(
                        viewport=viewport,
                        color_scheme=scheme,
                        device_scale_factor=2 if size == "phone" else 1.5,
                    )
                    page.goto(f"{options.address}/#{name}")
                    page.wait_for_selector(f"#{name}:not([hidden])")
                    opened = "every => every.forEach(knobs => { knobs.open = true })"
                    page.eval_on_selector_all(".knobs", opened)  # on a phone they are closed
                    VIEWS[name](page)
                    page.mouse.move(0, 0)
                    page.wait_for_timeout(400)  # bars move to their places
                    path = options.output / f"{name}-{size}-{scheme}.png"
                    page.screenshot(path=path, full_page=size == "phone")
                    print(path, flush=True)
                    page.close()
        browser.close()


if __name__ == "__main__":
    main()
