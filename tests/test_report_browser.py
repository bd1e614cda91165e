"""The page in a real Chromium: quiet, offline, filtered, printed, and readable on a phone."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from measured import COSTS, HOSTILE, TEXTS, measured_run, trace
from opcd.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
REQUIRED = os.environ.get("OPCD_REQUIRE_BROWSER") == "1"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (BROWSER and DRIVER) and not REQUIRED,
        reason="apt-get install chromium chromium-driver",
    ),
]

CONTRAST = """
const parse = (c) => c.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (e) => {
  for (; e; e = e.parentElement) {
    const found = parse(getComputedStyle(e).backgroundColor);
    if (found.length < 4 || found[3] > 0) return found;
  }
  return [255, 255, 255];
};
return [...document.querySelectorAll(arguments[0])].map((e) => {
  const two = [light(parse(getComputedStyle(e).color)), light(behind(e))].sort((a, b) => a - b);
  return (two[1] + 0.05) / (two[0] + 0.05);
});
"""
"""The contrast of each element's text, by the definition of WCAG 2."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium that logs its console and what it requests."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
    for flag in flags:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report whose second answer is hostile and whose words are long."""
    baked = ("word0", HOSTILE, "w" * 500, "word3")
    run = measured_run(tmp_path_factory.mktemp("run") / ("desk_" * 20), TEXTS | {"baked": baked})
    trace(run, [HOSTILE, "t" * 300, *"abcd"], [0.02, 0.2, 1.0, 3.0, 9.0, None])
    trace_file = run / "token_kl.jsonl"
    trace_file.write_text(trace_file.read_text("utf-8") * 20)
    wide = COSTS | {"prefill": [{f"column_{i}_s": i for i in range(30)}]}
    (run / "costs.json").write_text(json.dumps(wide))
    return write_report([run], None, None).file


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, whole_run_path: Path) -> Path:
    """A report of a run beside which every other file lies."""
    return write_report([whole_run_path], tmp_path_factory.mktemp("page") / "whole.html", None).file


@pytest.fixture(params=["page", "whole"])
def either(request: pytest.FixtureRequest) -> Path:
    """Both pages, for what must hold of any."""
    return request.getfixturevalue(request.param)


def open_page(browser: Any, page: Path, width: int = 1280, **media: str) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": media.get("scheme", "light")}]
    wanted = {"features": features, "media": media.get("media", "")}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(page.as_uri())


def visible(browser: Any, selector: str) -> list[Any]:
    return [e for e in browser.find_elements("css selector", selector) if e.is_displayed()]


def test_it_is_quiet_and_asks_for_nothing(browser: Any, either: Path) -> None:
    open_page(browser, either)
    assert browser.get_log("browser") == []
    messages = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    asked = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith("data:")] == [either.as_uri()]


def test_hostile_text_is_shown_and_not_run(browser: Any, page: Path) -> None:
    open_page(browser, page)
    shown = browser.execute_script(
        "return document.querySelectorAll('.answer')[1].querySelector('.baked .text').textContent"
    )
    assert shown == HOSTILE
    assert browser.execute_script("return document.scripts.length") == 1


def test_an_injected_script_would_be_refused(browser: Any, page: Path, tmp_path: Path) -> None:
    """The page's policy allows its own script alone, should the escaping ever fail."""
    broken = tmp_path / "broken.html"
    html = page.read_text("utf-8").replace("</main>", "<script>window.ran = 1</script></main>")
    broken.write_text(html, encoding="utf-8")
    open_page(browser, broken)
    assert browser.execute_script("return window.ran") is None
    assert len(visible(browser, ".answer")) == 4


def test_the_buttons_and_the_search_filter_answers(browser: Any, page: Path) -> None:
    open_page(browser, page)
    shown: dict[str, int] = {}
    for button in browser.find_elements("css selector", "button"):
        button.click()
        shown[button.text] = len(visible(browser, ".answer"))
        assert button.get_attribute("aria-pressed") == "true"
    assert shown == {"all": 4, "differs from in_context": 2, "wrong": 2, "fixed by baking": 2}
    browser.find_element("css selector", "button").click()
    box = browser.find_element("id", "search")
    box.send_keys("QUESTION 2")
    (found,) = visible(browser, ".answer")
    assert "question 2?" in found.text
    assert browser.find_element("id", "count").text == "1 of 4 shown"


def test_every_section_can_be_reached_and_seen(browser: Any, whole: Path) -> None:
    open_page(browser, whole, 360)
    links = visible(browser, "nav a")
    names = [link.text for link in links]
    assert names[:5] == ["What was measured", "Compared", "Before training", "Benchmarks", "Costs"]
    for link in links:
        section = browser.find_element("css selector", link.get_attribute("hash"))
        assert section.find_element("css selector", "h2").is_displayed()
    assert "Notes on these figures" in [e.text for e in visible(browser, "h3")]
    assert len(visible(browser, "#compared [role=listitem]")) == 4


def test_the_names_of_rows_stay_in_sight_on_a_phone(browser: Any, page: Path) -> None:
    """A table that is scrolled inside its box still says what its rows are."""
    open_page(browser, page, 360)
    moved = browser.execute_script(
        "const box = [...document.querySelectorAll('.scroll')]"
        ".find((e) => e.scrollWidth > e.clientWidth);"
        "box.scrollLeft = 40;"
        "const name = box.querySelector('tbody th').getBoundingClientRect().left;"
        "return [box.scrollLeft, Math.round(name - box.getBoundingClientRect().left)];"
    )
    assert moved == [40, 0]


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_scrolls_sideways_but_tables(browser: Any, either: Path, width: int) -> None:
    open_page(browser, either, width)
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    if width == 360:
        inner = (
            "return [...document.querySelectorAll('.scroll')]"
            ".map(e => e.scrollWidth > e.clientWidth)"
        )
        assert any(browser.execute_script(inner))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_schemes(browser: Any, either: Path, scheme: str) -> None:
    open_page(browser, either, scheme=scheme)
    everything = (
        "p, h1, h2, h3, th, td, td .ci, .note, .who span, .value, button, a, summary, li, code"
    )
    found = browser.execute_script(CONTRAST, f".legend span, .tokens span, summary, {everything}")
    assert len(found) > 100
    assert min(found) >= 4.5


def test_the_schemes_differ(browser: Any, page: Path) -> None:
    papers: list[str] = []
    for scheme in ("light", "dark"):
        open_page(browser, page, scheme=scheme)
        ink = "return getComputedStyle(document.querySelector('.charts svg text')).fill"
        paper = "return getComputedStyle(document.body).backgroundColor"
        papers += [browser.execute_script(ink), browser.execute_script(paper)]
    assert len(set(papers)) == 4


def test_numbers_of_tokens_can_be_shown_without_a_pointer(browser: Any, page: Path) -> None:
    open_page(browser, page)
    after = "return getComputedStyle(document.querySelector('[data-kl]'), '::after').content"
    assert browser.execute_script(after) == "none"
    browser.find_element("id", "numbers").click()
    assert "0.020" in browser.execute_script(after)


def test_print_unfolds_everything_and_has_no_controls(browser: Any, page: Path) -> None:
    """What the filter hid is printed too: paper has no button to bring it back."""
    open_page(browser, page, media="print")
    browser.execute_script("document.querySelector('button[data-tag=wrong]').click()")
    assert len(visible(browser, ".answer")) == 4
    folded = (
        "return [...document.querySelectorAll('details > :not(summary)')]"
        ".map(e => e.checkVisibility() && e.getBoundingClientRect().height > 0)"
    )
    found = browser.execute_script(folded)
    assert found
    assert all(found)
    assert visible(browser, "#controls, summary, nav, #numbers") == []
    after = "return getComputedStyle(document.querySelector('[data-kl]'), '::after').content"
    assert "0.020" in browser.execute_script(after)
