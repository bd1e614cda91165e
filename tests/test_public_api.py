"""The public contract: names and signatures that users build on."""

import importlib
import inspect
import pkgutil

import pytest

import opcd

NAMES = [
    "Context",
    "Evaluation",
    "Message",
    "OpcdError",
    "Outcome",
    "Parts",
    "Prompt",
    "PromptPair",
    "Rollout",
    "RolloutEngine",
    "Run",
    "Sampling",
    "Score",
    "ScriptedEngine",
    "StepReport",
    "Task",
    "Teacher",
    "Trainer",
    "assemble",
    "check_run",
    "evaluate",
    "evaluate_run",
    "export_run",
    "load_config",
    "prepare",
    "sample_run",
    "token_stats",
    "train",
]
"""Adding a name is a choice made here; removing one breaks users."""

SIGNATURES = {
    "assemble": ["config"],
    "check_run": ["path", "overrides"],
    "evaluate": ["parts", "split", "checkpoint"],
    "evaluate_run": ["path", "split"],
    "export_run": ["path", "target"],
    "load_config": ["path", "overrides"],
    "prepare": ["parts"],
    "sample_run": ["path", "prompt"],
    "token_stats": ["student_logits_CV", "teacher_logits_CV", "response_C", "loss"],
    "train": ["config", "resume", "overwrite"],
}


def test_public_names_are_pinned() -> None:
    assert sorted(opcd.__all__) == NAMES
    assert sorted(opcd.HOMES) == NAMES


def test_no_name_is_shadowed_by_a_submodule() -> None:
    """Importing a submodule sets it as an attribute of the package, over a lazy name."""
    for module in pkgutil.walk_packages(opcd.__path__, "opcd."):
        importlib.import_module(module.name)
    assert [name for name in NAMES if inspect.ismodule(getattr(opcd, name))] == []


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_the_object_of_its_home(name: str) -> None:
    home = importlib.import_module(f"opcd.{opcd.HOMES[name]}")
    assert getattr(opcd, name) is getattr(home, name)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_pinned(name: str) -> None:
    assert list(inspect.signature(getattr(opcd, name)).parameters) == SIGNATURES[name]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        getattr(opcd, "distil")  # noqa: B009
