"""A person opens the web UI: a real server, a real headless Chromium, the seven assets."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from tests import tiny

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ASSETS = (
    "dataset_shards",
    "tokenizer_compatibility",
    "teacher_capture",
    "capture_catalog",
    "student_model",
    "control_student",
    "student_evaluation",
)
# Groups are drawn closed; this is what clicking all three open puts into the address.
EXPANDED = "%2C".join(f"global%40global%3A{group}" for group in ("data", "capture", "students"))

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("DISTILL_REQUIRE_BROWSER") != "1",
    reason="no Chromium here; on Debian: apt-get install chromium",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def web_ui(tmp_path: Path, teacher_folder: Path) -> Iterator[str]:
    """`distill ui` of a fresh home, as a process group of its own that is ended whole."""
    home = tiny.make_home(tmp_path / "home", teacher_folder)
    port = free_port()
    log = (tmp_path / "ui.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "distill_assets.cli", "ui", "--home", str(home), "--port", str(port)],
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, (tmp_path / "ui.log").read_text()
            try:
                urllib.request.urlopen(f"{url}/server_info", timeout=2).close()
                break
            except OSError:
                assert time.monotonic() < deadline, (tmp_path / "ui.log").read_text()
                time.sleep(0.3)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        log.close()


def test_the_asset_graph_shows_the_seven_assets(web_ui: str) -> None:
    assert CHROMIUM is not None, (
        "DISTILL_REQUIRE_BROWSER=1, but there is no Chromium; on Debian: apt-get install chromium"
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 2400, "height": 1400})
        page.goto(f"{web_ui}/asset-groups?expanded={EXPANDED}", wait_until="domcontentloaded")
        for asset in ASSETS:
            expect(page.get_by_text(asset, exact=True).first).to_be_visible(timeout=60_000)
        browser.close()
