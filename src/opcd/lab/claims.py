"""The paper's claims, each as trials in a world of the lab and inequalities between them."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from opcd.intervals import Estimate
from opcd.lab.minds import MINDS, mind_folder
from opcd.lab.setups import FORWARD, OFF_POLICY, REVERSE, WARMED, Finding, Line, Setup
from opcd.lab.trials import Marks, Measured
from opcd.lab.verdicts import Comparison, over_seeds, paired, pooled
from opcd.lab.worlds import WorldName

KEEPS_SHARE = -0.05
"""Not worse by more than this share of the rows counts as kept."""
KEEPS_NATS = -0.05
"""And not further by more nats a token."""
RATES = (5e-4, 2e-3)
"""Learning rates that supports are tried at."""
SUPPORTS: dict[str, dict[str, Any]] = {
    "exact": {"type": "exact"},
    "top 16, bucket": {"type": "top_k", "k": 16, "tail": "bucket"},
    "top 4, bucket": {"type": "top_k", "k": 4, "tail": "bucket"},
    "top 4, renormalised": {"type": "top_k", "k": 4, "tail": "renormalise"},
    "top 16, dropped": {"type": "top_k", "k": 16, "tail": "drop"},
    "top 4, dropped": {"type": "top_k", "k": 4, "tail": "drop"},
}


def gains(setup: Setup) -> Finding:
    """OPCD > off-policy > in-context > base."""
    places: dict[str, tuple[WorldName, Mapping[str, Any]]] = {
        "lake, large": ("lake", {}),
        "lake, middle": ("lake", _student("middle")),
        "rulebook": ("rulebook", {}),
    }
    lines: list[Line] = []
    comparisons: list[Comparison] = []
    for place, (world, changes) in places.items():
        on = setup.measure(world, f"on-policy, {place}", changes)
        off = setup.measure(world, f"off-policy, {place}", changes, OFF_POLICY, FORWARD)
        marks = {
            "baked": [m.baked for m in on],
            "off_policy": [m.baked for m in off],
            "in_context": [m.in_context for m in on],
            "base": [m.base for m in on],
        }
        kl_nats = {"off_policy": _kl(off), "baked": _kl(on)}
        for name, several in reversed(marks.items()):
            figures = {"right": pooled(several)}
            if name in kl_nats:
                figures["kl_nats_per_token"] = kl_nats[name]
            lines.append(Line(f"{place}: {name}", figures))
        for a, b in pairwise(marks):
            better = paired(marks[a], marks[b])
            comparisons.append(Comparison(f"{place}: {a}", f"{place}: {b}", "right", better))
    return Finding(
        "OPCD beats off-policy distillation, which beats the context in the prompt, which beats "
        "nothing",
        "lake and rulebook",
        lines,
        comparisons,
        ["right: rows, or boards that were solved; the best step was chosen on validation boards"],
    )


def factorial(setup: Setup) -> Finding:
    """On-policy and reverse KL each matter: the 2 x 2."""
    cells = {
        "on, reverse": (REVERSE,),
        "on, forward": (FORWARD,),
        "off, reverse": (OFF_POLICY, REVERSE),
        "off, forward": (OFF_POLICY, FORWARD),
    }
    found = {name: setup.measure("rulebook", name, *changes) for name, changes in cells.items()}
    pairs = (
        ("on, reverse", "off, reverse"),
        ("on, forward", "off, forward"),
        ("on, reverse", "on, forward"),
        ("off, reverse", "off, forward"),
    )
    return Finding(
        "Being on-policy and the reverse direction each help by themselves",
        "rulebook",
        _task_lines(found),
        [_right(found, a, b) for a, b in pairs],
    )


def teachers(setup: Setup) -> Finding:
    """A frozen teacher beats a live one; EMA lies between; refresh."""
    longer = {"steps": 120}
    kinds = {
        "frozen": {"type": "frozen"},
        "ema": {"type": "ema", "decay": 0.95},
        "refresh": {"type": "refresh", "every_steps": 20},
        "live": {"type": "live"},
    }
    found = {
        kind: setup.measure("rulebook", f"{kind} teacher", longer, {"teacher": table})
        for kind, table in kinds.items()
    }
    return Finding(
        "A frozen teacher beats a live one, and a running mean lies between them",
        "rulebook",
        [
            Line(
                kind,
                {
                    "right": pooled([m.baked for m in several]),
                    "returned": pooled([m.returned for m in several]),
                    "collapsed": pooled([[float(_has_collapsed(m))] for m in several]),
                },
            )
            for kind, several in found.items()
        ],
        [
            _right(found, "frozen", "live"),
            _right(found, "frozen", "ema"),
            _right(found, "ema", "live"),
        ],
        ["collapsed: the share of runs that end with fewer rows right than their teacher's half"],
    )


def sizes(setup: Setup) -> Finding:
    """Small students cannot use the lessons in context but can have them baked."""
    teacher = {"teacher": {"type": "frozen", "path": str(mind_folder(MINDS["large"]))}}
    lines: list[Line] = []
    comparisons: list[Comparison] = []
    found: dict[str, tuple[list[Measured], list[Measured]]] = {}
    # The small one first: by then another process has measured what `gains` has of the middle one.
    for size in ("small", "middle"):
        student = _student(size)
        own = setup.measure("lake", f"on-policy, lake, {size}", student)
        cross = setup.measure("lake", f"{size} student, large teacher", student, teacher)
        found[size] = own, cross
    for size in ("middle", "small"):
        own, cross = found[size]
        marks = {
            f"{size}, base": [m.base for m in own],
            f"{size}, in_context": [m.in_context for m in own],
            f"{size}, baked by itself": [m.baked for m in own],
            f"{size}, baked by large": [m.baked for m in cross],
        }
        lines += [Line(name, {"solved": pooled(several)}) for name, several in marks.items()]
        *others, best = marks
        for other in others:
            better = paired(marks[best], marks[other])
            comparisons.append(Comparison(best, other, "solved", better))
    return Finding(
        "Small students that gain less from a context in their prompt can have it baked in by a "
        "large teacher",
        "lake",
        lines,
        comparisons,
    )


def forgetting(setup: Setup) -> Finding:
    """On-policy forgets less."""
    anchored = {"anchor": {"share": 0.34}, "batch": {"prompts_per_step": 24}}
    ways: dict[str, Sequence[Mapping[str, Any]]] = {
        "on, reverse": (REVERSE,),
        "on, forward, then reverse": (WARMED,),
        "on, forward": (FORWARD,),
        "off, reverse": (OFF_POLICY, REVERSE),
        "off, forward": (OFF_POLICY, FORWARD),
        "on, forward, then reverse, anchors": (WARMED, anchored),
        "off, forward, anchors": (OFF_POLICY, FORWARD, anchored),
    }
    found = {name: setup.measure("code_book", name, *changes) for name, changes in ways.items()}
    before = found["on, reverse"]
    untrained = {
        "others": pooled([m.others_before for m in before]),
        "other_task": pooled([m.other_task_before for m in before]),
    }
    lines = [
        Line(
            name,
            {
                "others": pooled([m.others for m in several]),
                "other_task": pooled([m.other_task for m in several]),
                "kl_nats_per_token": over_seeds([m.kept_kl_nats_per_token for m in several]),
                "right": pooled([m.baked for m in several]),
            },
        )
        for name, several in found.items()
    ]
    on, off = found["on, reverse"], found["off, forward"]
    pairs = {
        "others": paired([m.others for m in on], [m.others for m in off]),
        "other_task": paired([m.other_task for m in on], [m.other_task for m in off]),
    }
    return Finding(
        "On-policy distillation forgets less: other contexts can still be followed",
        "code_book",
        [Line("before", untrained), *lines],
        [Comparison("on, reverse", "off, forward", name, found) for name, found in pairs.items()],
        [
            "others: questions under other code books, told in the prompt (the `kept` suite, "
            "graded); its KL is from the base along the base's answers",
            "other task: messages under rulebooks told in the prompt (the `other_context` suite)",
        ],
    )


def supports(setup: Setup) -> Finding:
    """A few tokens of support are enough; bare top-k is no divergence."""
    found: dict[str, list[Measured]] = {}
    comparisons: list[Comparison] = []
    for lr in RATES:
        names = {kind: f"{kind}, lr {lr:g}" for kind in SUPPORTS}
        for kind, name in names.items():
            changes = {"loss": {"support": SUPPORTS[kind]}, "optimizer": {"lr": lr}}
            found[name] = setup.measure("rulebook", name, REVERSE, changes)
        few, exact = names["top 16, bucket"], names["exact"]
        comparisons += [
            _right(found, few, exact, KEEPS_SHARE),
            _nearer(found, few, exact, KEEPS_NATS),
            _nearer(found, names["top 4, bucket"], names["top 4, dropped"]),
            _right(found, names["top 4, bucket"], names["top 4, dropped"]),
        ]
    return Finding(
        "A small top-k with a bucket for the rest is as good as the whole vocabulary; bare top-k "
        "is no divergence, and worse",
        "rulebook",
        _task_lines(found),
        comparisons,
        [
            "the vocabulary has about a hundred tokens where the paper's has 150,000: 16 and 4 of "
            "them stand for its 256"
        ],
    )


def returning(setup: Setup) -> Finding:
    """The context given again does harm, and the remedy works."""
    term = {"anchor": {"context_return": 0.34}, "batch": {"prompts_per_step": 24}}
    found = {
        "without the term": setup.measure("rulebook", "on, reverse", REVERSE),
        "with the term": setup.measure("rulebook", "context_return", REVERSE, term),
    }
    before = [m.in_context for m in found["without the term"]]
    returned = {name: [m.returned for m in several] for name, several in found.items()}
    harmed, mended = returned["without the term"], returned["with the term"]
    return Finding(
        "The context given again does harm after baking, and a term in the loss mends it",
        "rulebook",
        [
            Line("before", {"returned": pooled(before)}),
            *(
                Line(
                    name,
                    {
                        "returned": pooled(returned[name]),
                        "right": pooled([m.baked for m in several]),
                    },
                )
                for name, several in found.items()
            ),
        ],
        [
            Comparison("before", "without the term", "returned", paired(before, harmed)),
            Comparison("with the term", "without the term", "returned", paired(mended, harmed)),
        ],
    )


def _student(size: str) -> dict[str, Any]:
    return {"model": {"path": str(mind_folder(MINDS[size]))}}


def _has_collapsed(measured: Measured) -> bool:
    return sum(measured.baked) < sum(measured.in_context) / 2


def _right(
    found: Mapping[str, Sequence[Measured]], first: str, second: str, margin: float = 0.0
) -> Comparison:
    marks: dict[str, list[Marks]] = {n: [m.baked for m in found[n]] for n in (first, second)}
    return Comparison(first, second, "right", paired(marks[first], marks[second]), margin)


def _nearer(
    found: Mapping[str, Sequence[Measured]], first: str, second: str, margin: float = 0.0
) -> Comparison:
    """How much less the first one's KL is than the second's, on the same rows."""
    nats = {name: [m.kl_nats for m in found[name]] for name in (first, second)}
    less = paired(nats[second], nats[first])
    return Comparison(first, second, "kl_nats_per_token", less, margin)


def _kl(several: Sequence[Measured]) -> Estimate:
    return pooled([measured.kl_nats for measured in several])


def _task_lines(found: Mapping[str, Sequence[Measured]]) -> list[Line]:
    return [
        Line(name, {"right": pooled([m.baked for m in several]), "kl_nats_per_token": _kl(several)})
        for name, several in found.items()
    ]
