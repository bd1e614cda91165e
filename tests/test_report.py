"""The page says what the files say, needs nothing from elsewhere, and runs nothing of a model's."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from measured import HOSTILE, TEXTS, measured_run, rewrite, trace
from opcd.charts import Chart
from opcd.errors import InputError
from opcd.figures import inline_svg
from opcd.report import write_report


class Page(HTMLParser):
    """The elements of a page and its text, as a browser would read them."""

    def __init__(self, html: str) -> None:
        """Read the whole page."""
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("td", "th", "tr"):
            self.words.append(" ")

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


DRAWN: dict[str, str] = {}


@pytest.fixture(autouse=True)
def drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a report's time, and most tests have the same curves."""

    def draw(chart: Chart) -> str:
        if repr(chart) not in DRAWN:
            DRAWN[repr(chart)] = inline_svg(chart)
        return DRAWN[repr(chart)]

    monkeypatch.setattr("opcd.report.inline_svg", draw)


def page_of(*runs: Path, out: Path | None = None) -> Page:
    return Page(write_report(runs, out, None).file.read_text(encoding="utf-8"))


def test_one_run_gets_its_page_in_its_folder(tmp_path: Path) -> None:
    run = measured_run(tmp_path / "desk")
    written = write_report([run], None, None)
    assert written.file == run / "report.html"
    assert written.size_bytes == written.file.stat().st_size
    assert written.figures == []


def test_several_runs_get_their_page_where_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [measured_run(tmp_path / name) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    assert write_report(runs, None, None).file == Path("report.html")
    assert (tmp_path / "report.html").is_file()


def test_the_headline_names_what_was_measured(tmp_path: Path) -> None:
    text = page_of(measured_run(tmp_path / "desk")).text
    assert "1,234 context tokens are gone from every request." in text
    assert "baked model without the context 75.0 %, the base model with it 75.0 %" in text
    assert "the base model without it 25.0 %" in text
    assert "baked is 25.0 points above base in correct" in text
    assert "p = 0.5, McNemar, exact, 4 rows" in text
    for fact in ("checkpoint step-4", "split test", "seed 7", "context tokens gone 1,234"):
        assert fact in text


def test_a_difference_is_named_as_more_than_chance_only_if_it_is(tmp_path: Path) -> None:
    tests = [
        {"first": "baked", "second": "base", "difference": d, "p": p, "metric": "correct"}
        for d, p in ((-0.5, 0.0001), (0.1, 0.2), (0.0, 1.0))
    ]
    paired = [{"suite": "task", "test": "McNemar, exact"} | test for test in tests]
    text = page_of(measured_run(tmp_path / "desk", paired=paired)).text
    assert "50.0 points below base in correct: more than chance explains (p < 0.001" in text
    assert "10.0 points above base in correct: chance alone could explain it" in text
    assert "baked is level with base" in text


def test_training_is_summed_over_the_steps(tmp_path: Path) -> None:
    text = page_of(measured_run(tmp_path / "desk")).text
    assert "steps 4 " in text
    assert "response tokens trained on 400" in text
    assert "wall, s 10.0" in text
    assert "peak memory, GiB 1.00" in text


def test_what_is_missing_says_how_to_get_it(tmp_path: Path) -> None:
    run = measured_run(tmp_path / "desk")
    text = page_of(run).text
    assert f"opcd evaluate {run} --again writes it" in text
    assert "no costs.json" in text
    trace(run, ["a"], [1.0])
    (run / "costs.json").write_text('{"training": {"teacher_tokens": 310000}}')
    text = page_of(run).text
    assert "--again" not in text
    assert "no costs.json" not in text
    assert "teacher tokens 310,000" in text


def test_text_of_models_and_rows_stays_text(tmp_path: Path) -> None:
    """Answers, prompts, notes, tokens, costs and names of folders come from elsewhere."""
    texts = TEXTS | {"baked": (HOSTILE, HOSTILE, HOSTILE, HOSTILE)}
    run = measured_run(tmp_path / "<script>alert(2)", texts)
    trace(run, [HOSTILE, HOSTILE], [0.1, 9.0])
    (run / "costs.json").write_text(json.dumps({HOSTILE: {HOSTILE: HOSTILE}}))
    file = run / "answers.jsonl"
    file.write_text(file.read_text("utf-8").replace("question 1?", "<img src=x onerror=alert(3)>"))
    page = page_of(run)
    tags = [tag for tag, _ in page.elements]
    assert (tags.count("script"), tags.count("img"), tags.count("b")) == (1, 0, 3)
    assert page.text.count("{{ 7 * 7 }} $x$") >= 4 + 4
    raw = "".join(page.words)
    assert HOSTILE in raw
    assert "<img src=x onerror=alert(3)>" in raw


def test_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    page = page_of(measured_run(tmp_path / "desk"))
    links = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "action", "data", "poster")
    ]
    assert links
    assert [link for link in links if not (link or "").startswith(("#", "data:,"))] == []
    html = (tmp_path / "desk" / "report.html").read_text("utf-8")
    assert "@import" not in html
    assert re.findall(r"url\((?!#)", html) == []


def test_several_runs_stand_in_one_table(tmp_path: Path) -> None:
    worse = TEXTS | {"baked": ("word0", "no", "no", "no")}
    runs = [measured_run(tmp_path / "a"), measured_run(tmp_path / "b", worse)]
    text = page_of(*runs, out=tmp_path / "both.html").text
    assert "2 runs compared" in text
    assert "Correct, baked, without the context: a 75.0 %, b 25.0 %." in text
    assert "metric base in_context baked · a baked · b n" in text


def test_a_run_that_nothing_grades_is_reported_all_the_same(tmp_path: Path) -> None:
    run = measured_run(tmp_path / "desk", graded=False, paired=[])
    page = page_of(run)
    assert "Agreement: the baked model without the context" in page.text
    assert "Nothing grades these answers" in page.text
    tags = [attributes.get("data-tag") for tag, attributes in page.elements if tag == "button"]
    assert tags == ["", "differs"]


def test_off_policy_is_a_column_where_it_was_measured(tmp_path: Path) -> None:
    run = measured_run(tmp_path / "desk", TEXTS | {"off_policy": TEXTS["base"]})
    assert "metric base in_context off_policy baked n" in page_of(run).text


def test_answers_beyond_the_limit_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opcd.report.ANSWERS_SHOWN", 3)
    page = page_of(measured_run(tmp_path / "desk"))
    assert "The first 3 of 4 are here" in page.text
    assert sum(tag == "article" for tag, _ in page.elements) == 3


def test_token_rows_beyond_the_limit_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opcd.exhibits.TOKEN_ROWS_SHOWN", 1)
    run = measured_run(tmp_path / "desk")
    trace(run, ["a"], [1.0])
    file = run / "token_kl.jsonl"
    file.write_text(file.read_text("utf-8") * 2)
    assert "1 of 2 answers are here" in page_of(run).text


def test_each_token_carries_its_number(tmp_path: Path) -> None:
    """Colour alone would leave out whoever cannot tell the colours apart."""
    run = measured_run(tmp_path / "desk")
    trace(run, ["a", "b"], [9.0, 0.0])
    spans = [found for tag, found in page_of(run).elements if tag == "span" and "data-kl" in found]
    assert [(s["class"], s["title"]) for s in spans] == [
        ("k5", "9.000 nats"),
        ("k0", "0.000 nats"),
        ("k3", "0.900 nats"),
        ("k0", "0.000 nats"),
    ]


@pytest.mark.parametrize("name", ["run.toml", "report", "none/report.html", "folder.html"])
def test_a_target_that_is_no_page_is_refused(tmp_path: Path, name: str) -> None:
    run = measured_run(tmp_path / "desk")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(InputError, match="--out"):
        write_report([run], tmp_path / name, None)


def test_a_refused_comparison_writes_nothing(tmp_path: Path) -> None:
    runs = [measured_run(tmp_path / name) for name in ("a", "b")]
    rewrite(runs[1] / "evaluation.json", split="validation")
    with pytest.raises(InputError):
        write_report(runs, tmp_path / "both.html", tmp_path / "figures")
    assert not (tmp_path / "both.html").exists()
    assert not (tmp_path / "figures").exists()


def test_a_file_in_the_place_of_the_figures_leaves_no_page(tmp_path: Path) -> None:
    run = measured_run(tmp_path / "desk")
    (tmp_path / "figures").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        write_report([run], None, tmp_path / "figures")
    assert not (run / "report.html").exists()


def test_what_is_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    """Not that its report could not be written there."""
    with pytest.raises(InputError, match="is not a run"):
        write_report([tmp_path / "nowhere"], None, None)


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = measured_run(tmp_path / "desk")
    DRAWN.clear()
    first = write_report([run], None, None).file.read_bytes()
    DRAWN.clear()
    assert write_report([run], None, None).file.read_bytes() == first


def test_no_model_is_needed(tmp_path: Path) -> None:
    """A report takes seconds because nothing that computes is imported."""
    run = measured_run(tmp_path / "desk")
    code = (
        "import pathlib, sys, opcd.report\n"
        f"opcd.report.write_report([pathlib.Path({str(run)!r})], None, None)\n"
        "print(sorted({'torch', 'transformers', 'peft', 'accelerate'} & sys.modules.keys()))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
