"""Claims about the report's page in a browser: it draws, its controls work, it asks for nothing, it fits a phone.

`check` looks at a page as a whole; that it would notice what can go wrong is a claim of its own, at the end.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from prismaquant_ray.formatting import with_error
from prismaquant_ray.report.findings import Findings
from prismaquant_ray.report.page import page as page_of
from tests.reported import add_measurements, enlarged, findings_of, measured_run
from tests.tiny import make_checkpoint

pytestmark = pytest.mark.browser

ARGUMENTS = [
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SECTIONS = (
    "frontier", "map", "bits", "sensitivity", "cost", "rounding", "experts", "draft", "timings", "settings",
)  # fmt: skip
TABLES = ("plans", "modules", "parts", "sensitive", "codecs", "linears", "passes", "workers", "machines", "versions")
PHONE, NARROW, DESKTOP = (390, 844), (360, 640), (1280, 900)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert found, "no Chromium: apt-get install chromium, or leave these tests out with -m 'not browser'"
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, families: Mapping[str, Path]) -> dict[str, Findings]:
    """Everything a model can have, with measurements; a dense one without; and that with 64 layers and a bad name."""
    directory = tmp_path_factory.mktemp("pages")
    whole = measured_run(directory / "whole", families["qwen3_5_moe"], "model.quantize_lm_head=true", images=2)
    add_measurements(whole, draft=True)
    dense = measured_run(directory / "dense", make_checkpoint(directory / "source", "llama"))
    limits = ("formats=[NVFP4, BF16]", "allocation.limits.prefill=2")
    limited = measured_run(directory / "limited", make_checkpoint(directory / "small", "llama"), *limits)
    found = {"whole": findings_of(whole), "dense": findings_of(dense), "limited": findings_of(limited)}
    return found | {"large": enlarged(found["dense"], 64)}


@pytest.fixture(scope="module")
def pages(reports: dict[str, Findings], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("html")
    for name, found in reports.items():
        (directory / f"{name}.html").write_text(page_of(found), encoding="utf-8")
    return {name: directory / f"{name}.html" for name in reports}


@contextmanager
def opened(
    browser: Browser, path: Path, size: tuple[int, int] = DESKTOP, scheme: str = "light", scripts: bool = True
) -> Iterator[Page]:
    """The page in a window; it must end without a word on the console and without having asked for anything."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme=scheme,  # type: ignore[arg-type]
        java_script_enabled=scripts,
        has_touch=size[0] < 600,
    )
    try:
        page = context.new_page()
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        yield page
        own = (path.as_uri(), "data:,")
        assert [url for url in asked if url.partition("#")[0] not in own] == []
        assert said == []
    finally:
        context.close()


def check(page: Page) -> None:
    """The page as a whole."""
    fits(page)
    draws(page)
    axis_works(page)
    marks_answer(page)
    target_works(page)
    colouring_works(page)
    cells_answer(page)
    tables_sort(page)
    details_open(page)
    fits(page)


# Parts of the check ---------------------------------------------------------------------------------------------


def fits(page: Page) -> None:
    """Nothing is wider than the window, but what scrolls in a box of its own."""
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]  # type: ignore[index]
    wide = page.evaluate(
        """() => [...document.querySelectorAll("main *, header *, footer *")].filter((element) => {
            if (element.closest(".scroll")) return false;
            const box = element.getBoundingClientRect();
            return box.width > 0 && (box.right > innerWidth + 1 || box.left < -1);
        }).map((element) => element.outerHTML.slice(0, 80))"""
    )
    assert wide == []


def draws(page: Page) -> None:
    for name in SECTIONS:
        section = page.locator(f"section#{name}")
        assert section.count() == 1, name
        assert area(section) > 0
        assert section.locator("h2").inner_text().strip()
    assert page.locator("h1").count() == 1
    assert page.locator("#summary .tile").count() == 4
    for name in TABLES:
        table = page.locator(f"table#{name}")
        assert table.count() == 1, name
        assert table.locator("tbody tr").count() > 0, name
    assert page.locator("table:has(tbody):not(:has(caption))").count() == page.locator(".map table").count()
    chart = page.locator("#frontier-chart").bounding_box()
    assert chart is not None
    chart["y"] += page.evaluate("scrollY")
    line = page.locator(".line.on-linear polyline").bounding_box()
    assert line is not None
    assert line["width"] > 0.5 * chart["width"]
    assert line["height"] > 0.3 * chart["height"]
    for mark in page.locator(".mark").all():
        x, y = middle(mark)
        assert chart["x"] - 1 <= x <= chart["x"] + chart["width"] + 1
        assert chart["y"] - 1 <= y <= chart["y"] + chart["height"] + 1
    assert page.locator('.mark[data-series="budget"]').count() == 1
    data = data_of(page)
    assert page.locator(".cell").count() == len(data["groups"])
    shown = letters(page)
    assert shown == data["plans"][data["budget"]]["choice"]
    colours = set(colours_of_cells(page))
    assert len(colours) == len(set(shown)), "a colour for every format that is there"
    assert "rgba(0, 0, 0, 0)" not in colours


def axis_works(page: Page) -> None:
    budget = page.locator('.mark[data-series="budget"]')
    linear = middle(budget)[1]
    assert page.locator(".tick.on-linear").first.is_visible()
    page.locator("label[for=axis-log]").click()
    assert abs(middle(budget)[1] - linear) > 5
    assert page.locator(".tick.on-log").first.is_visible()
    assert not page.locator(".tick.on-linear").first.is_visible()
    tops = [middle(mark)[1] for mark in page.locator(".mark[data-series=plan]").all()]
    assert tops == sorted(tops), "less loss with more bits, further down"
    page.locator("label[for=axis-linear]").click()
    assert middle(budget)[1] == pytest.approx(linear)


def marks_answer(page: Page) -> None:
    readout = page.locator("#frontier-readout")
    for series in ("plan", "uniform", "budget"):
        mark = page.locator(f'.mark[data-series="{series}"]').first
        mark.dispatch_event("click")
        text = mark.get_attribute("aria-label")
        assert text is not None
        assert re.search(r"\d nats per token at \d", text)
        assert readout.inner_text() == text


def target_works(page: Page) -> None:
    data = data_of(page)
    choice = page.locator("#map-target")
    summary = page.locator("#map-summary")
    for place, plan in enumerate(data["plans"]):
        choice.select_option(str(place))
        assert letters(page) == plan["choice"]
        assert summary.inner_text() == plan["text"]
        label = page.locator('.cell[data-g="0"]').get_attribute("aria-label")
        name = {entry["letter"]: entry["name"] for entry in data["formats"]}[plan["choice"][0]]
        assert label is not None
        assert label.endswith(f": {name}")
    assert len({plan["choice"] for plan in data["plans"]}) > 1
    choice.select_option(str(data["budget"]))


def colouring_works(page: Page) -> None:
    before = colours_of_cells(page)
    assert not page.locator("#heat-legend").is_visible()
    page.locator("#map-colour").select_option("0")
    assert page.locator("#heat-legend").is_visible()
    heated = colours_of_cells(page)
    assert heated != before
    costs = data_of(page)["cost"][0]
    order = page.evaluate(
        "[...document.querySelectorAll('.cell')].map((cell) => [Number(cell.dataset.g), cell.classList[1]])"
    )
    steps = dict(order)
    by_cost = sorted((row for row in steps if costs[row] is not None), key=lambda row: costs[row])
    ranks = [steps[row] for row in by_cost]
    assert ranks == sorted(ranks), "what costs more is no lighter"
    assert len(set(ranks)) > 1
    page.locator("#map-colour").select_option("-1")
    assert colours_of_cells(page) == before


def cells_answer(page: Page) -> None:
    data = data_of(page)
    readout = page.locator("#map-readout")
    first = page.locator(".cell").first
    row = int(first.get_attribute("data-g") or -1)
    first.click()
    text = readout.inner_text()
    assert text.startswith(data["groups"][row])
    assert f"{data['parameters'][row]:,} parameters" in text
    # The script writes figures as the tables do.
    assert f"NVFP4 {with_error(data['cost'][0][row], data['error'][0][row])}" in text
    page.keyboard.press("ArrowRight")
    focused = page.evaluate("document.activeElement.dataset.g")
    assert focused not in (None, str(row))
    assert readout.inner_text().startswith(data["groups"][int(focused)])
    box = first.bounding_box()
    assert box is not None
    assert min(box["width"], box["height"]) >= 24


def tables_sort(page: Page) -> None:
    for name in ("plans", "modules", "sensitive"):
        table = page.locator(f"table#{name}")
        count = table.locator("thead th").count()
        columns = [i for i in range(count) if len({value for value in values(table, i) if value is not None}) > 1]
        assert columns, name
        column = columns[-1]
        header = table.locator("thead th").nth(column)
        for direction in ("ascending", "descending"):
            header.locator("button").dispatch_event("click")
            assert header.get_attribute("aria-sort") == direction
            there = [value for value in values(table, column) if value is not None]
            assert there == sorted(there, reverse=direction == "descending"), name
            rest = values(table, column)[len(there) :]
            assert rest == [None] * len(rest), "what was not measured comes last"


def details_open(page: Page) -> None:
    for details in page.locator("details").all():
        if details.get_attribute("open") is not None:
            continue
        inner = details.locator(".scroll").first
        assert not inner.is_visible()
        details.locator("summary").first.dispatch_event("click")
        assert inner.is_visible()


def values(table: Locator, column: int) -> list[float | None]:
    """What a column is sorted by, where that is a number."""
    found = table.evaluate(
        "(table, column) => [...table.tBodies[0].rows].map((row) => row.cells[column]?.dataset.v ?? '')", column
    )
    return [float(value) if value else None for value in found]


def data_of(page: Page) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(page.locator("#data").text_content() or "")
    return found


def letters(page: Page) -> str:
    """Letters of the map in the groups' order."""
    pairs = page.evaluate("[...document.querySelectorAll('.cell')].map((c) => [Number(c.dataset.g), c.textContent])")
    return "".join(letter for _, letter in sorted(pairs))


def colours_of_cells(page: Page) -> list[str]:
    found: list[str] = page.evaluate(
        "[...document.querySelectorAll('.cell')].map((cell) => getComputedStyle(cell).backgroundColor)"
    )
    return found


def area(found: Locator) -> float:
    box = found.bounding_box()
    return 0.0 if box is None else box["width"] * box["height"]


def middle(found: Locator) -> tuple[float, float]:
    """Where it is on the page, however far that is scrolled."""
    assert found.is_visible(), "it is not to be seen"
    x, y = found.evaluate(
        """(element) => {
            const box = element.getBoundingClientRect();
            return [box.x + box.width / 2 + scrollX, box.y + box.height / 2 + scrollY];
        }"""
    )
    return x, y


# Claims -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [DESKTOP, PHONE, NARROW], ids=["desktop", "phone", "narrow"])
@pytest.mark.parametrize("name", ["whole", "dense", "large"])
def test_the_page_draws_fits_and_its_controls_work(
    browser: Browser, pages: dict[str, Path], name: str, size: tuple[int, int]
) -> None:
    with opened(browser, pages[name], size, "dark" if size == PHONE else "light") as page:
        check(page)


def test_what_was_measured_is_drawn_and_what_was_not_says_so(browser: Browser, pages: dict[str, Path]) -> None:
    with opened(browser, pages["whole"]) as page:
        assert page.locator('.mark[data-series="measured"]').count() > 3
        assert page.locator('.mark[data-series="mixture"]').count() > 3
        assert page.locator("#frontier-unmeasured").count() == 0
        assert page.locator("#coverage tbody tr").count() == 5
        assert page.locator("#draft-table tbody tr").count() == 3
        assert page.locator("#split tbody tr").count() > 5
    with opened(browser, pages["dense"]) as page:
        assert page.locator('.mark[data-series^="measured"]').count() == 0
        assert "not measured: run sweep --measure" in page.locator("#frontier-unmeasured").inner_text()
        assert "not measured" in page.locator("#summary").inner_text()
        assert "no routed experts" in page.locator("#experts").inner_text()
        assert "no draft head" in page.locator("#draft").inner_text()


def test_the_page_can_be_read_without_scripts(browser: Browser, pages: dict[str, Path]) -> None:
    with opened(browser, pages["whole"], PHONE, scripts=False) as page:
        assert not page.locator("#map-target").is_visible()
        assert page.locator(".cell").first.is_visible()
        assert page.locator("table#plans tbody tr").count() > 5
        budget = page.locator('.mark[data-series="budget"]')
        linear = middle(budget)[1]
        page.locator("label[for=axis-log]").click()
        assert abs(middle(budget)[1] - linear) > 5, "the axis needs no script"
        page.locator("details summary").first.click()
        assert page.locator("details").first.locator(".scroll").is_visible()
        assert "Point at" not in page.locator("main").inner_text()


def test_a_bad_name_stays_a_name(browser: Browser, pages: dict[str, Path]) -> None:
    with opened(browser, pages["large"]) as page:
        assert page.locator("h1").inner_text().startswith("</script><script>")
        assert "caught" in page.title()
        assert page.title() != "caught"
        assert page.locator("img").count() == 0


def test_loss_against_bytes_and_time_is_drawn_where_formats_have_the_same_bytes(
    browser: Browser, pages: dict[str, Path]
) -> None:
    with opened(browser, pages["limited"]) as page:
        names = page.locator("#surface-chart .lbl.limit").all_inner_texts()
        assert names == [*(f"prefill ≤ {most}" for most in ("1", "1.1", "1.25", "1.5", "2")), "no limit"]
        assert page.locator("#surface-chart polyline").count() == 6
        fits(page)
    with opened(browser, pages["limited"], PHONE, "dark") as page:
        assert not page.locator("#surface-chart .lbl.limit").first.is_visible(), "the legend has the names there"
        fits(page)
    with opened(browser, pages["dense"]) as page:
        assert page.locator("#surface-chart").count() == 0


@pytest.mark.parametrize("name", ["whole", "limited"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(
    browser: Browser, pages: dict[str, Path], scheme: str, name: str
) -> None:
    """WCAG 2.1, success criterion 1.4.3: contrast of at least 4.5, for every text of the page, cells included."""
    with opened(browser, pages[name], DESKTOP, scheme) as page:
        page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
        checked = 0
        for colouring in ("-1", "0"):
            page.locator("#map-colour").select_option(colouring)
            for front, back, text in page.evaluate(_COLOURS):
                checked += 1
                assert contrast(front, back) >= 4.5, (text, front, back)
        assert checked > 200
        paper = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert paper < 0.05 if scheme == "dark" else paper > 0.8


_COLOURS = """() => {
  const found = new Map();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    if (!node.textContent.trim() || element.closest("script, style") || !element.getClientRects().length) continue;
    let behind = element;
    while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    const colours = [getComputedStyle(element).color, getComputedStyle(behind || document.body).backgroundColor];
    found.set(element, [...colours, node.textContent.trim().slice(0, 40)]);
  }
  return [...found.values()];
}"""


def luminance(colour: str) -> float:
    """Relative luminance of a computed colour, rgb() or color(srgb …)."""
    numbers = [float(number) for number in re.findall(r"[0-9.]+(?:e-?\d+)?", colour.partition("(")[2])][:3]
    scale = 1.0 if colour.startswith("color(") else 255.0
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (n / scale for n in numbers)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(front: str, back: str) -> float:
    lighter, darker = sorted((luminance(front), luminance(back)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def replaced(old: str, new: str) -> Callable[[str], str]:
    def change(html: str) -> str:
        assert old in html
        return html.replace(old, new)

    return change


def removed(pattern: str) -> Callable[[str], str]:
    def change(html: str) -> str:
        changed, count = re.subn(pattern, "", html, flags=re.DOTALL)
        assert count
        return changed

    return change


#: What may go wrong: the part of the check that has to notice, and how to make it happen.
BREAKAGES: dict[str, tuple[Callable[..., Any], Callable[[str], str]]] = {
    "a section is missing": (draws, removed(r'<section id="rounding".*?</section>')),
    "a table is empty": (draws, removed(r'(?<=<tbody>)<tr><th class="l" scope="row">prismaquant_ray.*?(?=</tbody>)')),
    "the line is not drawn": (draws, replaced("<polyline points=", "<polyline data-points=")),
    "a mark is off the chart": (
        draws,
        replaced('data-series="budget" style="--x:', 'data-series="budget" style="--x:1'),
    ),
    "a format has no colour": (draws, removed(r"\.f-(NVFP4|BF16) \{[^}]*\}")),
    "a script fails": (marks_answer, replaced('"use strict";', '"use strict"; throw new Error("broken");')),
    "a script complains": (opened, replaced('"use strict";', '"use strict"; console.warn("hm");')),
    "a picture is fetched": (opened, replaced("<footer>", '<footer><img src="http://127.0.0.1:9/x.png" alt="">')),
    "a style is fetched": (
        opened,
        replaced("<title>", '<link rel="stylesheet" href="http://127.0.0.1:9/x.css"><title>'),
    ),
    "no policy forbids it": (
        opened,
        lambda html: html.replace('http-equiv="Content-', 'name="Content-').replace(
            "<footer>", '<footer><img src="http://127.0.0.1:9/x.png" alt="">'
        ),
    ),
    "the page is too wide": (fits, replaced("<footer>", '<footer><div style="width:2000px">wide</div>')),
    "a line is cut off": (
        fits,
        replaced("<footer>", '<footer style="overflow:hidden"><div style="width:1400px">wide</div>'),
    ),
    "the axis does nothing": (axis_works, replaced("#axis-log:checked", "#axis-log:disabled")),
    "a mark does not answer": (marks_answer, removed(r'mark\.addEventListener\("click", \(\) => showMark\(mark\)\);')),
    "the target does nothing": (target_works, replaced('target.addEventListener("change", paint);', "")),
    "colours do nothing": (colouring_works, replaced('colouring.addEventListener("change", paint);', "")),
    "a cell does not answer": (cells_answer, removed(r"[^;{]*textContent = describe\(cell\);")),
    "arrows do nothing": (cells_answer, replaced("next.focus();", "")),
    "cells are too small": (
        cells_answer,
        removed(r"(?<=\.cell \{ all: unset; display: block; )width: 24px; height: 24px;"),
    ),
    "tables do not sort": (tables_sort, replaced("body.append(...rows.map(([, row]) => row));", "")),
    "details stay closed": (details_open, replaced("<details>", "<details inert hidden>")),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_the_check_notices(browser: Browser, pages: dict[str, Path], tmp_path: Path, breakage: str) -> None:
    noticing, change = BREAKAGES[breakage]
    broken = tmp_path / "broken.html"
    broken.write_text(change(pages["dense"].read_text(encoding="utf-8")), encoding="utf-8")

    def look() -> None:
        with opened(browser, broken) as page:
            page.set_default_timeout(2000)
            check(page)

    with pytest.raises(AssertionError) as error:
        look()
    assert noticing.__name__ in {entry.name for entry in error.traceback}
