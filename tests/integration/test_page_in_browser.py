"""The page in a browser: on telephones and on desks, by day and by night, on paper, and without a network."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest
from tests import documents

pytest.importorskip("matplotlib", reason="charts need matplotlib")
pytest.importorskip("jinja2", reason="the page needs jinja2")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

NAMES = ("twelve", "single", "bare", "deep", "hostile")
VIEWS = [(width, scheme) for width in (380, 1400) for scheme in ("light", "dark")]
HEIGHT = 900


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    from bitwright.report.page import render_page

    folder = tmp_path_factory.mktemp("pages")
    for name in NAMES:
        (folder / f"{name}.html").write_text(render_page(getattr(documents, name)()), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        # The sandbox of chromium needs rights that containers do not give.
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()


@pytest.fixture
def visit(browser, pages):
    """Open a page; afterwards nothing may have been complained of, and nothing fetched."""
    opened, complaints, requests = [], [], []

    def call(name: str, width: int = 1400, scheme: str = "light", **options: object):
        context = browser.new_context(viewport={"width": width, "height": HEIGHT}, color_scheme=scheme, **options)
        opened.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto((pages / f"{name}.html").as_uri())
        return tab

    yield call
    for context in opened:
        context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in requests if url.startswith("file:")]) == len(opened)


def dimensions(picture: bytes) -> tuple[int, int]:
    """Width and height of a PNG file."""
    return struct.unpack(">II", picture[16:24])


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
@pytest.mark.parametrize("name", NAMES)
def test_page_fits_the_window(visit, name, width, scheme):
    tab = visit(name, width, scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("getComputedStyle(document.body).fontSize") == "16px"
    # Nothing but what scrolls within its own frame reaches beyond the window's edges.
    beyond = tab.evaluate("""() => [...document.querySelectorAll("body *")].filter(e => {
        const box = e.getBoundingClientRect();
        return box.width && (box.right > innerWidth + 1 || box.left < -1) && !e.closest(".scroll, pre, nav, .hidden");
    }).map(e => e.outerHTML.slice(0, 120))""")
    assert beyond == []
    picture = tab.screenshot()
    assert dimensions(picture) == (width, HEIGHT)
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]


@pytest.mark.parametrize("width", [380, 700, 900, 1400])
def test_text_on_charts_is_large_enough_to_read(visit, width):
    tab = visit("twelve", width)
    sizes = tab.evaluate("""() => [...document.querySelectorAll("svg text")].filter(e => e.getClientRects().length)
        .map(e => parseFloat(getComputedStyle(e).fontSize) * e.ownerSVGElement.getBoundingClientRect().width
            / e.ownerSVGElement.viewBox.baseVal.width)""")
    assert len(sizes) > 300
    assert min(sizes) >= 9


@pytest.mark.parametrize("width", [380, 1400])
@pytest.mark.parametrize("name", ["twelve", "hostile", "deep"])
def test_names_on_charts_do_not_lie_on_each_other(visit, name, width):
    tab = visit(name, width)
    found = tab.evaluate("""() => [...document.querySelectorAll("svg")].map(svg =>
        [...svg.querySelectorAll(".label text")].filter(e => e.getClientRects().length)
        .map(e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; }))""")
    charts = [boxes for boxes in found if boxes]
    assert len(charts) >= 2
    for boxes in charts:
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
                # Boxes of text are a little higher than its letters.
                assert across <= 0 or down <= 4, (a, b)


def test_charts_change_with_the_theme(visit):
    def colours(scheme: str) -> list[str]:
        tab = visit("twelve", 1400, scheme)
        return tab.evaluate("""() => [...document.querySelectorAll("svg .label text")]
            .filter(e => e.getClientRects().length).map(e => getComputedStyle(e).fill)""")

    light, dark = colours("light"), colours("dark")
    assert len(light) == len(dark) > 20
    assert all(a != b for a, b in zip(light, dark, strict=True))


def test_without_scripts_everything_is_there(visit):
    with_script, without = visit("twelve"), visit("twelve", java_script_enabled=False)
    # Evaluating needs no script of the page's own.
    count = 'document.querySelectorAll("section, table, svg, tr, li").length'
    assert without.evaluate(count) == with_script.evaluate(count) > 200


def test_a_click_sorts_a_column_and_leaves_the_original_on_top(visit):
    tab = visit("twelve")
    head = tab.locator("#quality table").first.locator("thead th[data-column='1']")

    def column() -> list[float]:
        cells = tab.locator("#quality table").first.locator("tbody tr td:nth-child(2)").all_inner_texts()
        return [float(cell) for cell in cells]

    head.get_by_role("button").click()
    assert column()[1:] == sorted(column()[1:])
    assert column()[0] == 15.78
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").focus()
    tab.keyboard.press("Enter")
    assert column()[1:] == sorted(column()[1:], reverse=True)
    assert column()[0] == 15.78


@pytest.mark.parametrize("name", ["twelve", "bare", "hostile"])
def test_on_paper_it_is_light_and_nothing_is_cut(visit, name, tmp_path):
    tab = visit(name, 1400, "dark")
    file = tmp_path / "page.pdf"
    tab.pdf(path=str(file), prefer_css_page_size=True)
    assert file.read_bytes().startswith(b"%PDF-")
    tab.emulate_media(media="print")
    # What chromium's landscape letter leaves between the margins.
    tab.set_viewport_size({"width": 965, "height": 700})
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("getComputedStyle(document.querySelector('h1')).color") == "rgb(22, 25, 29)"
    assert tab.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    wide = tab.evaluate("""() => [...document.querySelectorAll("figure svg")].filter(e => e.getClientRects().length)
        .map(e => e.getBoundingClientRect()).filter(b => b.right > innerWidth + 1 || b.height > 700).length""")
    assert wide == 0
    if name == "twelve":
        assert tab.evaluate("getComputedStyle(document.querySelector('section')).breakBefore") == "page"
        assert tab.evaluate("getComputedStyle(document.querySelector('figure')).breakInside") == "avoid"
        assert tab.evaluate("document.documentElement.scrollWidth") <= 965


def test_saved_files_open_alone(visit, pages):
    tab = visit("single")
    assert sorted(path.name for path in Path(pages).iterdir()) == sorted(f"{name}.html" for name in NAMES)
    assert tab.title() == "storylm-gptq · bitwright"
