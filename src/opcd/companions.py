"""What stands beside a run's own measurement, as tables of texts.

Other ways to train it (`comparison.json`, `search.json`), what was expected of it (`gap.json`),
public benchmarks before and after (`harness.json`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from opcd.columns import digits, estimate_texts, number
from opcd.glossary import metric_name
from opcd.intervals import SIGNIFICANT
from opcd.tables import COMPARED, Grid, is_share

HARNESS_SHARES = ("acc", "exact_match", "em", "f1", "mc", "pass", "prompt_level", "inst_level")
"""Beginnings of lm_eval's metrics that are shares; others are shown as they are."""
DISTANCES = {
    "kl_nats_per_token": "KL of in_context from base, nats per token",
    "kl_nats_per_response": "KL of in_context from base, nats per answer",
    "margin_nats": "lead of the likeliest token where it is smallest, nats",
}
"""Keys of `gap.json` that are no metrics of a grader, and their names."""


def spread_grid(comparison: Mapping[str, Any]) -> Grid | None:
    """Mean and deviation over training runs; `None` where each kind was trained once."""
    kinds = {k: v for k, v in comparison["seeds"].items() if v["runs"] > 1}
    if not kinds:
        return None
    names = dict.fromkeys(name for found in kinds.values() for name in found if name != "runs")
    rows = [
        [metric_name(n), *(_spread(n, found.get(n)) for found in kinds.values())] for n in names
    ]
    headings = [f"{kind}, {found['runs']} training runs" for kind, found in kinds.items()]
    return Grid("Over training runs that differ in their seed", ["metric", *headings], rows)


def search_grid(search: Mapping[str, Any]) -> Grid:
    """Learning rates with what they reached on validation rows."""
    names = [n for n, v in search["rows"][0].items() if isinstance(v, float) and n != "lr"]
    rows = [
        [
            f"{row['lr']:g}{', chosen' if row['lr'] == search['chosen'] else ''}",
            f"{row['step']:,}",
            *(number(name, row[name]) for name in names),
        ]
        for row in search["rows"]
    ]
    title = f"Learning rates, chosen on validation by {metric_name(search['selected_by'])}"
    return Grid(title, ["learning rate", "best step", *map(metric_name, names)], rows)


def gap_grids(gap: Mapping[str, Any]) -> list[Grid]:
    """What the context changed before training: metrics, distances, how sure each answer is."""
    grids: list[Grid] = []
    if gap["metrics"]:
        headings = ["metric", "base", "in_context", "difference", "p"]
        rows = [_gap_row(name, found) for name, found in gap["metrics"].items()]
        grids.append(Grid("What the context changes", headings, rows))
    rows = [[name, _estimate(key, gap[key])] for key, name in DISTANCES.items()]
    grids.append(Grid("How far it moves the model, and how sure the teacher is", ["", ""], rows))
    if margins := gap["margin_nats_by_answer"]:
        rows = [[answer, f"{nats:.2f}"] for answer, nats in margins.items()]
        headings = ["right answer", "lead, nats"]
        grids.append(Grid("How sure the teacher is of each answer", headings, rows))
    return grids


def harness_grid(harness: Mapping[str, Any]) -> Grid:
    """Each benchmark under the conditions that it was asked under, with standard errors."""
    tasks = harness["tasks"]
    conditions = [c for c in COMPARED if any(c in sides for sides in tasks.values())]
    rows = [
        [
            task,
            metric,
            *(_with_stderr(metric, sides.get(c, {}).get(metric)) for c in conditions),
            _change(metric, sides),
        ]
        for task, sides in tasks.items()
        for metric in sides["base"]
    ]
    headings = ["benchmark", "metric", *conditions, "baked less base"]
    return Grid("Before and after, ± standard error", headings, rows)


def paired_sentences(tests: Sequence[Mapping[str, Any]]) -> list[str]:
    """Paired tests in words."""
    return [_paired_sentence(test) for test in tests]


def _gap_row(name: str, found: Mapping[str, Any]) -> list[str]:
    sides = [_estimate(name, found[side]) for side in ("base", "in_context")]
    return [metric_name(name), *sides, _difference(name, found["difference"]), _p(found["p"])]


def _estimate(metric: str, found: Mapping[str, Any]) -> str:
    texts = estimate_texts(metric, found)
    return f"{texts['mean']} {texts['interval']}"


def _difference(metric: str, found: Mapping[str, Any]) -> str:
    if not is_share(metric):
        return _estimate(metric, found)
    interval = estimate_texts(metric, found)["interval"]
    return f"{100 * found['mean']:+.1f} points {interval}"


def _spread(metric: str, found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    mean, deviation = number(metric, found["mean"]), found["deviation"]
    if is_share(metric):
        return f"{mean.removesuffix(' %')} ± {100 * deviation:.1f} %"
    return f"{mean} ± {deviation:.{digits(found['mean'])}f}"


def _with_stderr(metric: str, found: Mapping[str, Any] | None, sign: str = "") -> str:
    """Empty where the harness has no number; without an error where it knows none."""
    if found is None or found["mean"] is None:
        return ""
    share = metric.startswith(HARNESS_SHARES)
    scale, form = (100, ".1f") if share else (1, ".3f")
    unit = (" points" if sign else " %") if share else ""
    error = "" if found["stderr"] is None else f" ± {scale * found['stderr']:{form}}"
    return f"{scale * found['mean']:{sign}{form}}{error}{unit}"


def _change(metric: str, sides: Mapping[str, Any]) -> str:
    # Its error is that of the rows' differences, which the two sides' errors do not tell.
    if "difference" in sides:
        return _with_stderr(metric, sides["difference"][metric], "+")
    base, baked = (sides[side][metric]["mean"] for side in ("base", "baked"))
    mean = None if base is None or baked is None else baked - base
    return _with_stderr(metric, {"mean": mean, "stderr": None}, "+")


def _paired_sentence(test: Mapping[str, Any]) -> str:
    points = 100 * test["difference"]
    sure = test["p"] < SIGNIFICANT
    chance = "more than chance explains" if sure else "chance alone could explain it"
    where = "above" if points > 0 else "below"
    distance = f"{abs(points):.1f} points {where}" if points else "level with"
    p = _p(test["p"]) if test["p"] < 0.001 else f"= {_p(test['p'])}"
    p = f"p {p}".replace(" ", "\N{NO-BREAK SPACE}")
    return (
        f"{test['first']} is {distance} {test['second']} in {metric_name(test['metric'])}: "
        f"{chance} ({p}, {test['test']})."
    )


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.2g}"
