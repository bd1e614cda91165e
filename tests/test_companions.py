"""`opcd.companions`: the numbers of the files, in texts with units."""

from measured import HARNESS
from opcd.companions import gap_grids, harness_grid, paired_sentences, search_grid, spread_grid


def kind(correct: float, deviation: float | None, runs: int = 3) -> dict[str, object]:
    return {
        "runs": runs,
        "correct": {"mean": correct, "deviation": deviation},
        "response_tokens": {"mean": 12.7, "deviation": deviation},
    }


def test_the_spread_stands_beside_its_mean() -> None:
    grid = spread_grid({"seeds": {"baked": kind(0.956, 0.017), "off_policy": kind(0.8, 0.03)}})
    assert grid is not None
    assert grid.headings == ["metric", "baked, 3 training runs", "off_policy, 3 training runs"]
    assert grid.rows[0] == ["correct", "95.6 ± 1.7 %", "80.0 ± 3.0 %"]
    assert grid.rows[1] == ["answer length, tokens", "12.7 ± 0.0", "12.7 ± 0.0"]


def test_one_run_has_no_spread() -> None:
    assert spread_grid({"seeds": {"baked": kind(0.9, None, 1)}}) is None


def test_the_chosen_rate_is_marked() -> None:
    rows = [{"lr": lr, "run": "x", "step": 24, "correct": lr * 1000} for lr in (2e-4, 5e-4)]
    grid = search_grid({"selected_by": "correct", "chosen": 5e-4, "rows": rows})
    assert grid.title == "Learning rates, chosen on validation by correct"
    assert grid.headings == ["learning rate", "best step", "correct"]
    assert grid.rows == [["0.0002", "24", "20.0 %"], ["0.0005, chosen", "24", "50.0 %"]]


def gap(**more: object) -> dict[str, object]:
    side = {"mean": 0.5, "ci95": [0.4, 0.6], "n": 40}
    found = {"base": side, "in_context": side, "difference": side, "p": 1e-9}
    distances = dict.fromkeys(("kl_nats_per_token", "kl_nats_per_response", "margin_nats"), side)
    metrics = {"correct": found, "length_ratio": found}
    return {"metrics": metrics, "margin_nats_by_answer": {}, **distances, **more}


def test_differences_of_shares_are_points() -> None:
    changes, distances = gap_grids(gap())
    shares = ["50.0 % [40, 60]"] * 2
    assert changes.rows[0] == ["correct", *shares, "+50.0 points [40, 60]", "< 0.001"]
    assert changes.rows[1][3] == "0.500 [0.400, 0.600]"
    assert [row[1] for row in distances.rows] == ["0.500 [0.400, 0.600]"] * 3


def test_sureness_by_answer_is_shown_where_answers_are_labels() -> None:
    *_, sure = gap_grids(gap(margin_nats_by_answer={"yes": 0.4, "no": 1.25}))
    assert sure.rows == [["yes", "0.40"], ["no", "1.25"]]


def test_without_a_grader_there_are_distances_alone() -> None:
    assert len(gap_grids(gap(metrics={}))) == 1


def test_benchmarks_of_shares_are_per_cent_and_others_are_not() -> None:
    grid = harness_grid(HARNESS)
    assert grid.headings[2:] == ["base", "in_context", "baked", "baked less base"]
    acc = ["55.3 ± 1.0 %", "50.0 ± 1.0 %", "54.9 ± 1.0 %", "-0.4 ± 0.4 points"]
    assert grid.rows == [
        ["arc_easy", "acc", *acc],
        ["wikitext", "word_perplexity", "31.420", "", "31.800", "+0.380"],
    ]


def test_a_benchmark_without_a_number_has_an_empty_cell() -> None:
    none = {"f1": {"mean": None, "stderr": None}}
    grid = harness_grid({"tasks": {"squad": {"base": none, "baked": none}}})
    assert grid.rows == [["squad", "f1", "", "", ""]]


def test_a_paired_test_is_a_sentence() -> None:
    test = {"first": "baked", "second": "base", "metric": "correct", "test": "McNemar, exact"}
    cases = ((-0.132, 1e-5), (0.1, 0.049), (0.1, 0.05), (0.0, 1.0))
    told = paired_sentences([test | {"difference": d, "p": p} for d, p in cases])
    assert [line.replace("\N{NO-BREAK SPACE}", " ") for line in told] == [
        "baked is 13.2 points below base in correct: more than chance explains "
        "(p < 0.001, McNemar, exact).",
        "baked is 10.0 points above base in correct: more than chance explains "
        "(p = 0.049, McNemar, exact).",
        "baked is 10.0 points above base in correct: chance alone could explain it "
        "(p = 0.05, McNemar, exact).",
        "baked is level with base in correct: chance alone could explain it "
        "(p = 1, McNemar, exact).",
    ]
