"""The page says what the files say, needs nothing from elsewhere, and runs nothing of a model's."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from measured import COSTS, HOSTILE, TEXTS, measured_run, rewrite, trace
from opcd.charts import Chart
from opcd.cost_tables import cost_grids, notes_lines
from opcd.errors import InputError
from opcd.figures import inline_svg
from opcd.report import losses, write_report
from opcd.verdict import verdict


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
    assert "p = 0.5, McNemar, exact)" in text
    assert "On the same 4 rows" in text
    for fact in ("checkpoint step-4", "split test", "seed 7", "context tokens gone 1,234"):
        assert fact in text


def test_what_was_not_baked_in_is_said_at_the_top(tmp_path: Path) -> None:
    """Only where it is more than chance, and only of the task's own metric."""
    test = {"suite": "task", "first": "baked", "second": "in_context", "metric": "correct"}
    lost = {**test, "difference": -0.182, "p": 0.001}
    assert losses([lost], "correct") == [
        "Not all of it was baked in: 18.2 points are missing to the model with the context "
        "(p = 0.001)."
    ]
    others = ({"p": 0.3}, {"difference": 0.2}, {"suite": "spill"}, {"second": "base"})
    assert losses([{**lost, **other} for other in others], "correct") == []
    assert losses([lost], "valid") == []
    text = page_of(measured_run(tmp_path / "desk", paired=[{**lost, "test": "McNemar"}])).text
    assert text.index("Not all of it") < text.index("context tokens are gone")


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
    assert "time, s 10.0" in text
    assert "peak memory, GiB 1.00" in text


def test_the_page_holds_every_file_of_a_run(whole_run_path: Path, tmp_path: Path) -> None:
    """As the commands write them; numbers are compared with the files' own."""
    page = page_of(whole_run_path, out=tmp_path / "whole.html")
    text = page.text
    sections = [found["id"] for tag, found in page.elements if tag == "section"]
    assert sections[:5] == ["measured", "compared", "expected", "benchmarks", "costs"]
    links = [found.get("href") for tag, found in page.elements if tag == "a"]
    assert links == [f"#{section}" for section in sections]
    assert "metric base in_context off_policy baked rows" in text
    assert "off_policy is level with base" in text or "above base" in text
    assert "metric baked, 2 training runs off_policy, 2 training runs" in text
    for line in verdict(json.loads((whole_run_path / "gap.json").read_text("utf-8"))):
        assert line in text
    assert "Learning rates, chosen on validation by correct" in text
    assert "arc_easy acc 55.3 ± 1.0 % 50.0 ± 1.0 % 54.9 ± 1.0 % -0.4 ± 0.4 points" in text
    assert "at most 500 rows of each benchmark" in text
    costs = json.loads((whole_run_path / "costs.json").read_text("utf-8"))
    for told in (*(grid.title for grid in cost_grids(costs)), *notes_lines(costs)):
        assert told in text


def test_no_key_of_a_file_is_left_raw(whole_run_path: Path, tmp_path: Path) -> None:
    """But for conditions, suites, files and settings, which the documentation calls so too."""
    text = page_of(whole_run_path, out=tmp_path / "whole.html").text
    text = text[: text.index("Curves Over the steps")] if "Curves Over the steps" in text else text
    text = text.split("config.json")[0]
    keys = set(re.findall(r"\b[a-z]+_[a-z_]+\b", text))
    known = {"in_context", "off_policy", "in_context_cached", "soft_prompt", "system_prompt"}
    assert (
        keys - known - {"token_kl", "lm_eval", "arc_easy", "word_perplexity", "max_new_tokens"}
        == set()
    )


def test_what_is_not_there_has_no_section(tmp_path: Path) -> None:
    page = page_of(measured_run(tmp_path / "desk"))
    sections = [found["id"] for tag, found in page.elements if tag == "section"]
    assert sections == ["measured", "costs", "curves", "answers", "tokens", "settings"]


def test_several_runs_are_each_beside_their_own_files(whole_run_path: Path, tmp_path: Path) -> None:
    """The run again under another name: every heading of a file says whose it is."""
    other = tmp_path / "again"
    shutil.copytree(whole_run_path, other)
    page = page_of(whole_run_path, other, out=tmp_path / "both.html")
    for heading in ("What was expected", "Notes on these figures", "Paired tests"):
        assert f"{heading} · tiny" in page.text
        assert f"{heading} · again" in page.text


def test_what_is_missing_says_how_to_get_it(tmp_path: Path) -> None:
    run = measured_run(tmp_path / "desk")
    text = page_of(run).text
    assert f"opcd evaluate {run} --again writes it" in text
    assert "no costs.json" in text
    trace(run, ["a"], [1.0])
    (run / "costs.json").write_text(json.dumps(COSTS | {"training": [{"prompt_tokens": 310000}]}))
    text = page_of(run).text
    assert "--again" not in text
    assert "no costs.json" not in text
    assert "prompt tokens 310,000" in text


def test_text_of_models_and_rows_stays_text(tmp_path: Path) -> None:
    """Answers, prompts, notes, tokens, costs and names of folders come from elsewhere."""
    texts = TEXTS | {"baked": (HOSTILE, HOSTILE, HOSTILE, HOSTILE)}
    run = measured_run(tmp_path / "<script>alert(2)", texts)
    trace(run, [HOSTILE, HOSTILE], [0.1, 9.0])
    notes = [{"about": HOSTILE, "note": HOSTILE}]
    costs = COSTS | {"training": [{HOSTILE: HOSTILE}], "notes": notes}
    (run / "costs.json").write_text(json.dumps(costs))
    sides = {side: {HOSTILE: {"mean": 0.5, "stderr": 0.1}} for side in ("base", "baked")}
    harness = {"tasks": {HOSTILE: sides}, "lm_eval": HOSTILE, "limit": HOSTILE}
    (run / "harness.json").write_text(json.dumps(harness))
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
    assert "metric base in_context baked · a baked · b rows" in text


def test_a_run_that_nothing_grades_is_reported_all_the_same(tmp_path: Path) -> None:
    run = measured_run(tmp_path / "desk", graded=False, paired=[])
    page = page_of(run)
    assert "Agreement: the baked model without the context" in page.text
    assert "Nothing grades these answers" in page.text
    tags = [attributes.get("data-tag") for tag, attributes in page.elements if tag == "button"]
    assert tags == ["", "differs"]


def test_off_policy_is_a_column_where_it_was_measured(tmp_path: Path) -> None:
    run = measured_run(tmp_path / "desk", TEXTS | {"off_policy": TEXTS["base"]})
    assert "metric base in_context off_policy baked rows" in page_of(run).text


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
