"""Users' functions named in TOML."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from opcd.errors import ConfigError
from opcd.targets import resolve


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the working directory, which is not on the import path."""
    (tmp_path / "my_graders_7.py").write_text("LIMIT = 3\ndef rows(seed): return [seed]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield "my_graders_7"
    sys.modules.pop("my_graders_7", None)


def test_a_function_of_the_working_directory_is_found(own_module: str) -> None:
    assert resolve(f"{own_module}:rows")(4) == [4]


def test_an_installed_function_is_found() -> None:
    assert resolve("json:dumps")([1]) == "[1]"


@pytest.mark.parametrize("target", ["json.dumps", "json:", ":dumps", "", ":"])
def test_another_form_is_refused_with_the_right_one(target: str) -> None:
    with pytest.raises(ConfigError, match=r"names no function; write package\.module:function"):
        resolve(target)


@pytest.mark.parametrize("target", ["no_such_package_7:f", "json:no_such_function"])
def test_what_cannot_be_imported_says_why(target: str) -> None:
    with pytest.raises(ConfigError, match=rf"target = '{target}' cannot be imported \(.*no_such"):
        resolve(target)


def test_a_value_is_not_a_function(own_module: str) -> None:
    with pytest.raises(ConfigError, match="LIMIT' is not a function"):
        resolve(f"{own_module}:LIMIT")


def test_a_relative_module_is_refused() -> None:
    with pytest.raises(ConfigError, match="json"):
        resolve(".json:dumps")
