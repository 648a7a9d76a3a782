"""The pages a person looks at, and the README's pictures of them.

    DISTILL_PICTURES_HOME=data pytest tests/web/test_pages.py

takes them anew of a home that is up to date, the demo's. Without the variable the pages are those of a tiny home,
and their pictures are thrown away.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests import tiny
from tests.web.home import LiveHome
from tests.web.server import Server

pytestmark = pytest.mark.timeout(900)
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
PLOTTED = ("rows captured", "rows reused", "tokens", "bytes", "tokens per second", "mean entropy (nats)")
GIVEN = os.environ.get("DISTILL_PICTURES_HOME")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> LiveHome:
    root = tmp_path_factory.mktemp("pictures") / "home"
    if GIVEN:
        shutil.copytree(GIVEN, root, symlinks=True)
        return LiveHome(root)
    home = LiveHome(tiny.make_home(root, teacher_folder, shards=2))
    home.distill("run", "--device", "cpu")
    return home


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(__file__).parent / "pictures" if GIVEN else tmp_path_factory.mktemp("taken")


def take(page: Page, file: Path, height: int = 1000) -> None:
    """A picture of the page down to `height`."""
    page.wait_for_timeout(2_000)  # what is drawn last has no name to wait for
    width = page.viewport_size["width"] if page.viewport_size else 1600
    page.screenshot(path=file, clip={"x": 0, "y": 0, "width": width, "height": height})
    assert file.stat().st_size > 10_000


def test_the_graph(server: Server, page: Page, folder: Path) -> None:
    page.set_viewport_size({"width": 2400, "height": 1000})  # drawn smaller, the assets lose their names
    page.goto(f"/asset-groups?expanded={EXPANDED}", wait_until="domcontentloaded")
    for asset in ASSETS:
        expect(page.get_by_text(asset, exact=True).first).to_be_visible()
    take(page, folder / "graph.png")
    page.set_viewport_size({"width": 1600, "height": 1000})


def test_the_partitions(server: Server, page: Page, home: LiveHome, folder: Path) -> None:
    first = min(home.on_disk())
    page.goto(f"/assets/teacher_capture?view=partitions&partition={first}", wait_until="domcontentloaded")
    for key in home.on_disk():
        expect(page.get_by_text(key, exact=True).first).to_be_visible()
    expect(page.get_by_text("mean kept mass").first).to_be_visible()
    take(page, folder / "partitions.png", height=755)  # above the file's path, which is the picture-taker's


def test_the_captures_columns_code_and_figures_over_partitions_and_time(server: Server, page: Page) -> None:
    page.goto("/assets/teacher_capture", wait_until="domcontentloaded")
    expect(page.get_by_text("list<list<uint8>>", exact=True)).to_be_visible()
    code = page.get_by_role("link", name=re.compile("assets.py in editor"))
    expect(code).to_have_attribute("href", re.compile(r"orchestration/assets\.py:\d+$"))
    page.get_by_role("button", name="Plots").click()
    for over in ("Partitions", "Events"):
        page.get_by_role("button", name=over).click()
        for figure in PLOTTED:
            titled = re.compile(f"^{re.escape(figure)}$")
            expect(page.locator("div", has=page.locator("canvas"), has_text=titled).first).to_be_visible()


@pytest.mark.parametrize("asset", ["capture_catalog", "student_model", "student_evaluation"])
def test_summaries_have_pictures(server: Server, page: Page, asset: str) -> None:
    page.goto(f"/assets/{asset}", wait_until="domcontentloaded")
    page.get_by_text("[Show Markdown]").first.click()
    picture = page.get_by_role("dialog").locator("img").first
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.naturalWidth") > 300


def test_runs_say_why(server: Server, page: Page) -> None:
    page.goto("/runs", wait_until="domcontentloaded")
    expect(page.get_by_text(re.compile(r"distill/why: new: \d+ of \d+ rows")).first).to_be_visible()
    expect(page.get_by_text(re.compile(r"distill/captured: \d+ of \d+ rows")).first).to_be_visible()


def test_the_evaluation(server: Server, page: Page, folder: Path) -> None:
    page.goto("/assets/student_evaluation", wait_until="domcontentloaded")
    expect(page.get_by_text("held-out positions").first).to_be_visible()
    take(page, folder / "evaluation.png")


def test_the_report(page: Page, home: LiveHome, folder: Path) -> None:
    page.goto(Path(home.distill("report")["path"]).as_uri())
    expect(page.get_by_text("Held-out captures").first).to_be_visible()
    take(page, folder / "report.png")


PAPER, PHONE = 680, 390  # pixels: A4 within its margins; a narrow screen
RIGHTMOST = "Math.max(...[...document.querySelectorAll('main *')].map(e => e.getBoundingClientRect().right))"


def test_reports_fit_on_paper_and_on_a_phone(page: Page, home: LiveHome) -> None:
    """Nothing is cut off where nobody can scroll; on a phone what is wide is scrolled by itself, not the page."""
    students = [file.parent.name for file in (home.root / "students").glob("*/distillation.json")]
    for arguments in ((), ("--compare", *students)):
        page.goto(Path(home.distill("report", *arguments)["path"]).as_uri())
        page.emulate_media(media="print")
        page.set_viewport_size({"width": PAPER, "height": 1000})
        assert page.evaluate(RIGHTMOST) <= PAPER
        page.emulate_media(media="screen")
        page.set_viewport_size({"width": PHONE, "height": 1000})
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE
    page.set_viewport_size({"width": 1600, "height": 1000})
