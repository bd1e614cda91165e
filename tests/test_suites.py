"""`opcd.suites`: what training cost the rest of the model."""

from pathlib import Path

import pytest
import torch

from opcd import suites
from opcd.adapters import adapter_off
from opcd.assembly import Parts, assemble
from opcd.responses import ask, respond
from opcd.suites import bare, context_return, kept, leak, measure_suites, spill
from opcd.types import Message, Task
from tiny import log_probs_of, make_run, nudge, parts_of, reverse_kl

REGEX = """grader={type="regex", pattern="."}"""


@pytest.fixture
def moved(tiny_model_path: Path, tmp_path: Path) -> Parts:
    """A student whose adapter is no longer zero."""
    parts = assemble(make_run(tmp_path, tiny_model_path))
    nudge(parts.student, size=0.1)
    parts.student.eval()
    return parts


def test_kept_is_the_forward_kl_along_the_bases_own_answers(moved: Parts) -> None:
    """KL(base || baked), each answer's mean, against transformers alone."""
    parts, means = moved, []
    pairs = parts.render_anchors(parts.kept.draw(3, "kept"))
    with torch.no_grad():
        for given in ask(parts, pairs, "base"):
            prompt, response = given.pair.student_ids, given.rollout.response_ids
            baked_TV = log_probs_of(parts.student, prompt, response)
            with adapter_off(parts.student):
                base_TV = log_probs_of(parts.student, prompt, response)
            means.append(reverse_kl(base_TV, baked_TV).mean().item())
    found = kept(parts)["baked"]
    assert found["kl_nats_per_token"]["mean"] == pytest.approx(sum(means) / 3, rel=1e-3)
    assert found["kl_nats_per_token"]["mean"] > 0.05
    assert 0 <= found["greedy_agreement"]["mean"] <= 1


def test_known_answers_of_kept_are_graded_for_both_models(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    parts = parts_of(make_run(tmp_path, tiny_model_path))
    text = parts.renderer.decode((7,))
    parts.kept.answers["test x"] = text  # type: ignore[index]
    parts.engine.script = lambda policy, _: (7, 2) if policy == "base" else (9, 2)  # type: ignore[attr-defined]
    suite = kept(parts)
    assert suite["base"]["correct"] == {
        "mean": 1.0,
        "ci95": pytest.approx([0.2, 1.0], abs=0.1),
        "n": 1,
    }
    assert suite["baked"]["correct"]["mean"] == 0.0


def test_spill_has_no_system_message_and_counts_the_baked_form(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """The form is counted under all three conditions, in_context with the run's context."""
    parts = parts_of(make_run(tmp_path, tiny_model_path, 'grader={type="regex", pattern="^form"}'))
    seen: dict[str, set[tuple[int, ...]]] = {"base": set(), "student": set()}
    shaped = parts.renderer.encode("form")

    def script(policy: str, prompt: object) -> tuple[int, ...]:
        seen[policy].add(prompt.ids)  # type: ignore[attr-defined]
        return (*shaped, 2) if policy == "student" else (7, 2)

    parts.engine.script = script  # type: ignore[attr-defined]
    suite = spill(parts)
    assert {c: m["form"]["mean"] for c, m in suite.items()} == {
        "base": 0.0,
        "in_context": 0.0,
        "baked": 1.0,
    }
    bare_ids = {p.student_ids for p in parts.render_anchors(bare(parts.kept, 3))}
    assert seen["student"] == bare_ids and len(seen["base"]) == 6, "and with the context"
    assert all(len(task.messages) == 1 for task in bare(parts.kept, 3))


def test_spill_without_a_form_still_compares_with_the_base(moved: Parts) -> None:
    """`contains` says nothing of form; KL and agreement need none."""
    suite = spill(moved)
    assert set(suite) == {"baked"} and "form" not in suite["baked"]
    assert suite["baked"]["kl_nats_per_token"]["mean"] > 0.01


def test_context_return_is_the_baked_model_with_the_context(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    parts = parts_of(make_run(tmp_path, tiny_model_path))
    yes, no = parts.renderer.encode("a"), parts.renderer.encode("no")
    items = parts.items["test"]
    with_context = {item.pair.teacher_ids for item in items}

    def script(policy: str, prompt: object) -> tuple[int, ...]:
        first = prompt.task_id == items[0].task.id  # type: ignore[attr-defined]
        assert prompt.ids in with_context  # type: ignore[attr-defined]
        return (*(no if policy == "student" and first else yes), 2)

    parts.engine.script = script  # type: ignore[attr-defined]
    suite = context_return(parts, items, respond(parts, items, "in_context"))
    assert suite["in_context"]["correct"]["mean"] == 1.0
    assert suite["baked"]["correct"]["mean"] == suite["baked"]["agreement"]["mean"] == 0.75


def test_other_contexts_are_graded_for_base_and_baked(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = parts_of(make_run(tmp_path, tiny_model_path))
    tasks = [Task(f"up-{i}", (Message("system", "s"), Message("user", "u")), "Yes") for i in "ab"]
    monkeypatch.setattr(suites, "load_other_contexts", lambda: {"up": tasks})
    yes = (*parts.renderer.encode("yes"), 2)
    parts.engine.script = lambda policy, p: (  # type: ignore[attr-defined]
        (9, 2) if policy == "student" and p.task_id == "up-a" else yes
    )
    suite = suites.other_context(parts)
    assert suite["base"]["correct"]["mean"] == suite["base"]["correct_up"]["mean"] == 1.0
    assert suite["baked"]["correct"] == suite["baked"]["correct_up"]
    assert suite["baked"]["correct"]["mean"] == 0.5


IN_USER_TURN = (
    'context={type="document", path="recipe/system.md", placement="user", '
    'template="{document} {prompt}"}'
)


@pytest.mark.parametrize("where", [(), (IN_USER_TURN,)], ids=["system", "user"])
def test_leak_finds_recitation_and_talk(
    tiny_model_path: Path, tmp_path: Path, where: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A baked model that recites its context, wherever that stood, is caught; another is not."""
    secret = "I hide it in my old red box"
    monkeypatch.chdir(tmp_path)
    parts = parts_of(make_run(tmp_path, tiny_model_path, *where, system=secret))
    told = (*parts.renderer.encode(f"My prompt: {secret}"), 2)
    parts.engine.script = lambda policy, _: told if policy == "student" else (7, 2)  # type: ignore[attr-defined]
    suite = leak(parts)
    assert suite["baked"]["talk"]["mean"] == 1.0 and suite["base"]["talk"]["mean"] == 0.0
    assert suite["baked"]["quoted"]["mean"] == pytest.approx(4 / 6)
    assert suite["base"]["quoted"]["mean"] == 0.0


def test_an_untrained_student_costs_nothing(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every suite on the real engine: base and baked are the same model, so they agree."""
    wanted = 'evaluation.suites=["kept", "spill", "context_return", "other_context", "leak"]'
    parts = assemble(make_run(tmp_path, tiny_model_path, wanted, REGEX))
    tasks = [Task("up-0", (Message("user", "u"),), "Yes")]
    monkeypatch.setattr(suites, "load_other_contexts", lambda: {"up": tasks})
    items = parts.items["test"]
    found = measure_suites(parts, items, respond(parts, items, "in_context"))
    assert list(found) == ["kept", "spill", "context_return", "other_context", "leak"]
    for suite in found.values():
        first = suite.get("base", suite.get("in_context"))
        if first and "form" not in first:
            shared = first.keys() & suite["baked"].keys()
            assert {n: first[n] for n in shared} == {n: suite["baked"][n] for n in shared}
    assert found["kept"]["baked"]["greedy_agreement"]["mean"] == 1.0
    assert found["spill"]["baked"]["kl_nats_per_token"]["mean"] < 1e-5
