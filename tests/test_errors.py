"""The tree of exceptions: as drawn, with its exit codes, and fit to cross process borders."""

import inspect
import pickle
import re

import pytest

from opcd import errors
from opcd.errors import InputError, OpcdError, RunError

CLASSES = [
    member
    for _, member in inspect.getmembers(errors, inspect.isclass)
    if issubclass(member, Exception)
]


def drawn_tree() -> dict[str, str]:
    """Class -> its parent, as drawn in the module's docstring."""
    parents: dict[str, str] = {}
    branch: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"([\s|`-]*)([A-Z]\w+Error)\b", line):
            depth = len(found.group(1))
            branch = [entry for entry in branch if entry[0] < depth]
            parents[found.group(2)] = branch[-1][1] if branch else "Exception"
            branch.append((depth, found.group(2)))
    return parents


def test_the_drawn_tree_is_the_class_tree() -> None:
    assert drawn_tree() == {c.__name__: c.__bases__[0].__name__ for c in CLASSES}


def test_the_drawn_exit_codes_are_the_classes() -> None:
    drawn = dict(re.findall(r"(\w+Error) \(also a \w+\) +exit (\d)", errors.__doc__ or ""))
    assert drawn == {"InputError": "2", "RunError": "1"}
    assert (InputError.exit_code, RunError.exit_code) == (2, 1)


@pytest.mark.parametrize("error", CLASSES)
def test_exit_codes_follow_the_branch(error: type[OpcdError]) -> None:
    """2 means that nothing was started: only `InputError` and what is below it may say so."""
    assert error.exit_code == (2 if issubclass(error, InputError) else 1)


def test_branches_are_also_the_builtin_errors() -> None:
    assert issubclass(InputError, ValueError)
    assert issubclass(RunError, RuntimeError)
    assert not issubclass(InputError, RunError)


@pytest.mark.parametrize("error", CLASSES)
def test_errors_survive_pickling(error: type[OpcdError]) -> None:
    """Data workers and launched processes hand errors over as pickles."""
    copy = pickle.loads(pickle.dumps(error("what, why, way out")))
    assert (type(copy), str(copy)) == (error, "what, why, way out")
