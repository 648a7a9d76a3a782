"""The server on a file's `home`, and a browser at it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.web.home import LiveHome
from tests.web.server import Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def server(home: LiveHome) -> Iterator[Server]:
    server = Server(home.root)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Page]:
    """A page of a headless Chromium at the server; the test is skipped where there is none and none is required."""
    if CHROMIUM is None and os.environ.get("DISTILL_REQUIRE_BROWSER") != "1":
        pytest.skip("no Chromium here; on Debian: apt-get install chromium")
    assert CHROMIUM is not None, (
        "DISTILL_REQUIRE_BROWSER=1, but there is no Chromium; on Debian: apt-get install chromium"
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1600, "height": 1000}, base_url=server.url)
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)  # which the page's does not cover
        yield page
        browser.close()
