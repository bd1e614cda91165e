"""`opcd.glossary`: names that people can read, and none for what is not there."""

from typing import get_args

from opcd.config.training import Evaluation
from opcd.glossary import CONDITIONS, SUITES, explanation, metric_name
from opcd.tables import COMPARED, SHARES


def test_a_metric_has_a_name_with_its_unit() -> None:
    found = [metric_name(n) for n in ("kl_nats_per_token", "correct_mood", "correct")]
    assert found == ["KL, nats per token", "correct mood", "correct"]
    assert all("_" not in metric_name(share) for share in SHARES)


def test_the_same_key_may_say_something_else_in_the_task() -> None:
    here, there = explanation("task", "kl_nats_per_token"), explanation("kept", "kl_nats_per_token")
    assert "teacher" in here and "KL(base || trained)" in there
    assert explanation("task", "correct_mood") == ""


def test_every_suite_and_condition_is_named(names: tuple[str, ...] = ("task",)) -> None:
    fields = Evaluation.model_fields["suites"].annotation
    suites = get_args(get_args(fields)[0])
    assert set(SUITES) == {*names, *suites}
    assert tuple(CONDITIONS) == COMPARED
