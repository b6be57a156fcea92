"""A headless Chromium for tests, and a page that fails a test if it does what it should not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ELSEWHERE = "tts.test"
"""A name of this machine that a browser treats as another machine."""
LIMIT_S = 60.0
"""Limit of every wait for a page. It is long, because machines are busy."""
EXPECTED = "the server responded with a status of"
"""Part of the console's line about a refused request. The page shows the refusal in its own words."""


@contextmanager
def open_browser(microphone: Path | None = None) -> Iterator:
    """Chromium through Playwright. The test skips if one of them is missing.

    Args:
        microphone: a WAV file that the microphone hears, over and over.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="needs tests/requirements.txt")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    arguments = [
        "--no-sandbox",  # tests may run as root
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1",
    ]
    if microphone is not None:
        arguments.append(f"--use-file-for-fake-audio-capture={microphone}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


def take_picture(page, name: str) -> None:
    """Save a PNG of the whole page for people to look at, if `PAGE_PICTURES` names a folder."""
    if folder := os.environ.get("PAGE_PICTURES"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


@contextmanager
def watched_page(browser, url: str, **options) -> Iterator:
    """A page at an address. The test fails if the page logs an error or asks another host for anything.

    Args:
        browser: of `open_browser`.
        url: where the page is.
        options: of Playwright's `new_context`, such as `viewport` and `color_scheme`.
    """
    context = browser.new_context(**options)
    context.set_default_timeout(LIMIT_S * 1000)
    page = context.new_page()
    faults: list[str] = []

    def check_host(address: str) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("data", "blob") and parts.netloc != urlsplit(url).netloc:
            faults.append(f"request to {address}")

    page.on("request", lambda request: check_host(request.url))
    page.on("websocket", lambda socket: check_host(socket.url))
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on(
        "console",
        lambda message: (
            faults.append(message.text)
            if message.type == "error" and EXPECTED not in message.text
            else None
        ),
    )
    try:
        page.goto(url)
        yield page
        assert faults == []
    finally:
        context.close()
