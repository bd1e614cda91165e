"""The page: one table of verdicts, one figure of all differences, and the same bytes each time."""

import re
from pathlib import Path
from xml.etree import ElementTree

from opcd.intervals import Estimate
from opcd.lab.page import draw, write_page
from opcd.lab.setups import Finding, Line
from opcd.lab.verdicts import Comparison, over_seeds

HALF = Estimate(0.5, 0.4, 0.6, 96)
LONG = "top 4, renormalised, lr 0.0005 and some more words"
FINDINGS = {
    "supports": Finding(
        "A few tokens are enough",
        "code_book",
        [Line("base", {"right": HALF}), Line(LONG, {"kl_nats_per_token": over_seeds([0.25])})],
        [
            Comparison(LONG, f"{LONG} still", "right", Estimate(0.1, 0.02, 0.2, 96)),
            Comparison("b", "c", "right", Estimate(-0.1, -0.2, -0.01, 96), -0.05),
            Comparison("b", "d", "kl_nats_per_token", Estimate(1.25, 0.5, 2.0, 96), -0.02),
            Comparison("p: e", "p: f", "others", Estimate(0.1, 0.02, 0.2, 96)),
        ],
        ["a note"],
    ),
    "gains": Finding("Nothing compared", "lake", [Line("base", {"solved": HALF})], []),
}


def test_the_page_shows_every_claim_and_figure(tmp_path: Path) -> None:
    text = write_page(tmp_path, FINDINGS, "Some facts.").read_text(encoding="utf-8")
    assert "| A few tokens are enough | code book | **undecided** |" in text
    assert "| Nothing compared | lake | **undecided** |" in text
    assert "Some facts." in text and text.count("![") == 1 and "- a note" in text
    assert "| base | 50.0 % [40.0, 60.0] |  |" in text
    assert "+10.0 points [+2.0, +20.0]: holds" in text
    assert "-10.0 points [-20.0, -1.0], allowed -5: undecided" in text
    assert "b > d, KL: +1.250 nats a token less [+0.500, +2.000], allowed -0.02: holds" in text
    assert "p: e > f, others: +10.0 points" in text


def test_one_seed_has_a_mean_and_no_interval(tmp_path: Path) -> None:
    """Student's interval of one value is endless; neither page nor figure shows it."""
    text = write_page(tmp_path, FINDINGS, "").read_text(encoding="utf-8")
    assert f"| {LONG} |  | 0.250 |" in text
    assert "inf" not in re.sub("information", "", text)


def test_an_endless_difference_can_be_drawn() -> None:
    endless = Comparison("a", "b", "right", over_seeds([0.1]))
    svg = draw({"gains": Finding("x", "lake", [], [endless])})
    assert "a &gt; b" in svg and "gains" in svg


def test_the_same_findings_give_the_same_bytes(tmp_path: Path) -> None:
    pages = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        page = write_page(tmp_path / name, FINDINGS, "")
        pages.append((page.read_bytes(), (tmp_path / name / "claims.svg").read_bytes()))
    assert pages[0] == pages[1]


def test_every_difference_is_drawn_and_no_label_is_cut() -> None:
    """Labels end at the axis: the leftmost letter must still be on the picture."""
    svg = draw(FINDINGS)
    root = ElementTree.fromstring(svg)
    width = float(root.attrib["viewBox"].split()[2])
    texts = [e for e in root.iter() if e.tag.endswith("text") and (e.text or "").strip()]
    labels = {e.text: e for e in texts if " > " in (e.text or "")}
    assert len(labels) == 4 and "p: e > f (others)" in labels
    for text, element in labels.items():
        found = re.search(r"([\d.-]+)", element.attrib.get("x", "") or "0")
        moved = re.search(r"translate\(([\d.-]+)", element.attrib.get("transform", ""))
        x = float(moved[1]) if moved else float(found[1]) if found else 0.0
        assert text and 0 <= x <= width
        if "text-anchor: end" not in element.attrib.get("style", ""):
            # Letters of size 10 are about 5 wide: the label begins where it fits.
            assert x + 4 * len(text) <= width
        else:
            assert x - 4 * len(text) >= 0


def test_nats_are_not_drawn_as_points() -> None:
    """A KL has an axis of its own; without one there is one panel."""
    assert "nats a token nearer" in draw(FINDINGS)
    shares = FINDINGS["supports"].comparisons[:2]
    assert "nats" not in draw({"a": Finding("x", "lake", [], shares)})


def test_a_verdict_is_drawn_in_more_than_colour() -> None:
    """Each verdict has a mark of its own."""
    estimates = Estimate(0.1, 0.02, 0.2, 9), Estimate(-0.1, -0.2, -0.01, 9), Estimate(0, -1, 1, 9)
    drawn = [
        re.sub(
            "#[0-9a-f]{6}",
            "",
            draw({"a": Finding("x", "lake", [], [Comparison("a", "b", "c", e)])}),
        )
        for e in estimates
    ]
    marks = [set(re.findall(r'<path id="m[0-9a-f]+" d="([^"]+)"', svg)) for svg in drawn]
    assert len({frozenset(found) for found in marks}) == 3
