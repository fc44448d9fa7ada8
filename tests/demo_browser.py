"""The page of tools/demo.py in a headless browser: its server, tabs, and what a visitor does in them.

    python tests/demo_browser.py docs/demo.png

takes the picture of the README.
"""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from PIL import Image


ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
SECONDS = 120.0  # for anything that a visitor waits for


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


@contextmanager
def served(*arguments):
    """The address of a page that the command serves."""
    command = [sys.executable, str(ROOT / "tools/demo.py"), "--port", str(free_port()), *map(str, arguments)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    printed = []
    try:
        for line in server.stdout:
            printed.append(line)
            if found := re.match(r"MOSS-VL: (http://127\.0\.0\.1:\d+/)", line):
                yield found[1]
                break
        else:
            raise AssertionError("the page was not served: " + "".join(printed))
    finally:
        server.send_signal(signal.SIGTERM)
        rest, _ = server.communicate(timeout=60)
    assert server.returncode == 130 and "Traceback" not in rest, rest


@contextmanager
def opened_browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Tab:
    """A tab of a visitor. All of its requests go to the page.

    Attributes:
        elsewhere: addresses of requests to other hosts, which are refused.
    """

    def __init__(self, browser, address: str):
        self.page = browser.new_page(viewport={"width": 1280, "height": 900})
        self.page.set_default_timeout(1000 * SECONDS)
        self.elsewhere: list[str] = []

        def refuse(route):
            self.elsewhere.append(route.request.url)
            route.abort()

        self.page.route(lambda url: not url.startswith((address, "data:", "blob:")), refuse)
        self.page.goto(address)
        self.page.wait_for_selector("#question textarea")

    def at(self, selector: str):
        return self.page.locator(selector)

    def wait_for(self, selector: str, text: str | re.Pattern) -> None:
        """Waits until an element has a text."""
        self.at(selector).filter(has_text=text).first.wait_for()

    def upload(self, file: Path | str, selector: str = "#question") -> None:
        self.at(f"{selector} input[type=file]").set_input_files(str(file))
        self.at(f"{selector} .thumbnail-item, {selector} .file-preview").first.wait_for()

    def ask(self, question: str) -> None:
        box = self.at("#question textarea")
        box.fill(question)
        box.press("Enter")

    def answers(self, expected: list[str] | None = None) -> list[str]:
        """The answers of the conversation, after a wait until they are the expected ones."""
        deadline = time.monotonic() + SECONDS
        while True:
            shown = [one.strip() for one in self.at("#chat [data-testid=bot]").all_inner_texts()]
            if expected is None or shown == expected or time.monotonic() > deadline:
                return shown
            self.page.wait_for_timeout(100)

    def message(self) -> str:
        """The text of an error that the page shows."""
        shown = self.at(".toast-body").first
        shown.wait_for()
        return shown.inner_text()

    def open_live(self) -> None:
        self.page.get_by_role("tab", name="Live").click()


def take_picture(file: str) -> None:
    with served() as address, opened_browser() as browser:
        tab = Tab(browser, address)
        tab.upload(ROOT / "data/sample_b.mp4")
        tab.ask("What happens?")
        tab.wait_for("#words", "moves")
        tab.at("#words").get_by_text("orange", exact=False).click()
        tab.wait_for("#caption", "orange")
        tab.page.wait_for_timeout(1000)  # pictures are loaded
        picture = Image.open(io.BytesIO(tab.page.screenshot()))
        picture.convert("RGB").crop((0, 0, picture.width, 870)).quantize(256, dither=Image.Dither.NONE).save(file)


if __name__ == "__main__":
    take_picture(sys.argv[1])
