"""A run's tree and its files: load it from TOML, override keys, check its paths, dump it.

People write TOML; the resolved tree is written back as `config.json`.
"""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from opcd.config.run import Run
from opcd.errors import ConfigError, ContextError, TaskError

ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "max_steps": "steps",
    "per_device_train_batch_size": "batch.rows_per_forward",
    "lora_r": "model.tuning.rank",
    "lora_alpha": "model.tuning.alpha",
}
"""What other trainers call some keys."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read a run from TOML (written by people) or JSON (written by a run).

    Relative paths inside the file are taken from the folder the file lies in, so that a recipe
    can be started from anywhere; those of overrides, from the working directory.

    Args:
        path: the `.toml` or `.json` file.
        overrides: `key.path=value` strings; the value is read as TOML, else as plain text.

    Raises:
        ConfigError: the file is missing or malformed, or a key or value in it is wrong.
    """
    path = Path(path)
    tree = _read_tree(path)
    tree = _absolute_paths(_parse(tree, path), path.parent)
    for override in overrides:
        _apply_override(tree, override)
    return _parse(_absolute_paths(_parse(tree, path), Path.cwd()), path)


def derive(run: Run, **changes: Any) -> Run:
    """The run with other values; a table's keys are changed one by one, the rest stay.

    Raises:
        ConfigError: the changed run is impossible.
    """
    tree = run.model_dump(mode="json")
    for key, value in changes.items():
        tree[key] = {**(tree[key] or {}), **value} if isinstance(value, dict) else value
    return _parse(tree, run.out / str(tree["name"]))


def read_rates(text: str) -> tuple[float, ...]:
    """Learning rates written as `1e-4,5e-4`.

    Raises:
        ConfigError: there are fewer than two, or one is no positive number.
    """
    try:
        rates = tuple(dict.fromkeys(float(part) for part in text.split(",") if part.strip()))
    except ValueError:
        rates = ()
    if len(rates) < 2 or not all(0.0 < rate < 1.0 for rate in rates):
        raise ConfigError(
            f"--lr {text!r}: a search takes two or more different learning rates between 0 and 1; "
            "write for example --lr 1e-4,3e-4,1e-3"
        )
    return rates


def dump_config(run: Run) -> str:
    """The resolved tree as JSON text, which `load_config` reads back to an equal tree."""
    return json.dumps(run.model_dump(mode="json"), indent=1) + "\n"


def check_files(run: Run) -> None:
    """Check that every local file that the run names is there and not empty.

    Raises:
        ContextError: a context file is missing or empty.
        TaskError: a task file is missing or empty.
    """
    for key, path in _paths_of(run):
        if key in ("experience.instructions", "context.instructions", "rollout.weights_folder") or (
            key == "experience.store" and not _starts_from_store(run)
        ):
            continue
        error = ContextError if key.startswith("context") else TaskError
        if not path.is_file():
            raise error(f"{key} = {str(path)!r}: there is no such file; correct the path")
        if not path.read_bytes().strip():
            raise error(
                f"{key} = {str(path)!r}: the file is empty, so there is nothing to train on; "
                "put its text in, or name another file"
            )


def _starts_from_store(run: Run) -> bool:
    """Whether all traces are there before the run starts: it has no problems to solve."""
    if run.experience is None:
        return False
    if run.game:
        return not run.game.boards.extraction
    return not (run.experience.problems or (run.tasks and run.tasks.extraction_share))


def differences(ours: Run, theirs: Run) -> list[str]:
    """The keys in which two runs differ, as `key.path: ours -> theirs`."""
    return flat_differences(*(run.model_dump(mode="json") for run in (ours, theirs)))


def flat_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The keys in which two trees differ, as `key.path: ours -> theirs`."""
    left, right = dict(_leaves(ours)), dict(_leaves(theirs))
    keys = sorted(left.keys() | right.keys())
    return [
        f"{key}: {left.get(key)!r} -> {right.get(key)!r}"
        for key in keys
        if left.get(key) != right.get(key)
    ]


def _read_tree(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{str(path)!r}: there is no such file; give the path of a run's TOML")
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name}: not valid {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path.name}: a run is a table of keys, not a {type(tree).__name__}")
    return tree


def _parse(tree: Mapping[str, Any], path: Path) -> Run:
    try:
        return Run.model_validate({"name": path.resolve().parent.name, **tree})
    except ValidationError as error:
        lines = [_explain(item, tree) for item in error.errors()]
        raise ConfigError(f"{path.name}:\n" + "\n".join(lines)) from error


def _explain(item: Any, tree: Mapping[str, Any]) -> str:
    where = _written(item, tree)
    if item["type"] == "extra_forbidden":
        return f"  {where}: there is no such key{_advise(where, item['loc'])}"
    if item["type"] == "missing":
        return f"  {where}: it is missing, and has no default; write it"
    if item["type"] == "union_tag_invalid":
        kind, kinds = item["ctx"]["tag"], item["ctx"]["expected_tags"]
        return f"  {where}.type = {kind!r}: there is no such kind; write one of {kinds}"
    if item["type"] == "union_tag_not_found":
        return f"  {where}: it does not say which kind it is; write {where}.type = ... beside it"
    message = str(item["msg"]).removeprefix("Value error, ")
    if isinstance(item["input"], dict):
        return f"  {where or 'the run'}: {message}"
    return f"  {where} = {item['input']!r}: {message}"


def _written(item: Any, tree: Any) -> str:
    """The place of an error as whoever wrote the file knows it: without the kinds in between."""
    found: list[str] = []
    for part in item["loc"]:
        if isinstance(tree, dict):
            is_there = part in tree
        else:
            is_there = isinstance(tree, list) and isinstance(part, int) and part < len(tree)
        if is_there:
            found.append(str(part))
            tree = tree[part]
    missing = [str(item["loc"][-1])] if item["type"] == "missing" else []
    return ".".join([*found, *missing])


def _advise(key: str, place: Sequence[Any]) -> str:
    """What to do about a key that is not there."""
    table, _, leaf = key.rpartition(".")
    if key in _keys_of(Run):
        kinds = [part for part in place[:-1] if part not in table.split(".")]
        if kinds:
            return f" with {table}.type = {kinds[-1]!r}; another type has it"
    near = ELSEWHERE.get(leaf) or _nearest(key)
    return f"; did you mean {near}?" if near else "; check its spelling and its table"


def _nearest(key: str) -> str:
    """A key that there is and that looks like this one; its table counts less than its name."""
    leaf = key.rpartition(".")[2]
    known = dict.fromkeys(_keys_of(Run))
    leaves = get_close_matches(leaf, [one.rpartition(".")[2] for one in known], n=1)
    same = [one for one in known if leaves and one.rpartition(".")[2] == leaves[0]]
    return max(same, key=lambda one: SequenceMatcher(None, one, key).ratio(), default="")


def _keys_of(kind: Any, table: str = "") -> Iterator[str]:
    """All keys that a run may have, of whatever kinds its tables are."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        for name, field in kind.model_fields.items():
            yield f"{table}{name}"
            yield from _keys_of(field.annotation, f"{table}{name}.")
    for inner in get_args(kind):
        yield from _keys_of(inner, table)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{override!r} is not an override; write key.path=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *tables, leaf = key.strip().split(".")
    for table in tables:
        tree = tree.setdefault(table, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{override!r}: {table} is a value, not a table of keys")
    tree[leaf] = value


def _absolute_paths(run: Run, folder: Path) -> dict[str, Any]:
    """The tree with its relative paths taken from a folder; `out` stays the user's place."""
    tree = json.loads(json.dumps(run.model_dump(mode="json", exclude_unset=True)))
    for key, path in _paths_of(run):
        node: Any = tree
        *parents, leaf = [int(part) if part.isdigit() else part for part in key.split(".")]
        for part in parents:
            node = node[part]
        node[leaf] = str((folder / path).resolve())
    # A model may also be a hub id or an alias: only what lies there is a path.
    extractor = run.experience.extractor if run.experience else None
    coach = getattr(run.context, "coach", None)
    for keys, named in (
        (("model",), run.model),
        (("teacher",), run.teacher),
        (("experience", "extractor"), extractor),
        (("context", "coach"), coach),
    ):
        name = getattr(named, "path", None)
        if name and (folder / name).exists():
            table = tree
            for key in keys:
                table = table.setdefault(key, {})
            table["path"] = str((folder / name).resolve())
    return tree


def _paths_of(run: Run) -> Iterator[tuple[str, Path]]:
    def walk(node: Any, key: str) -> Iterator[tuple[str, Path]]:
        if isinstance(node, BaseModel):
            for name in type(node).model_fields:
                yield from walk(getattr(node, name), f"{key}.{name}".lstrip("."))
        elif isinstance(node, tuple):
            for index, item in enumerate(node):
                yield from walk(item, f"{key}.{index}")
        elif isinstance(node, Path) and key != "out":
            yield key, node

    yield from walk(run, "")


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _leaves(child, f"{key}.{name}".lstrip("."))
    else:
        yield key, node
