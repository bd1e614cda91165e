"""Rows from files, data sets and functions become tasks; splits are made, mixed and checked.

A row is `{"prompt": str | [messages], "answer"?, "context"?, "id"?}`. TRL's names are understood
as well: `messages` for a conversation, `privileged_context` for the context. Knows nothing of
tokens.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from opcd.config.inputs import SPLITS, Generator, HubDataset, Jsonl, Public, Source
from opcd.config.inputs import Tasks as TasksConfig
from opcd.errors import TaskError
from opcd.public_sets import convert, find_set
from opcd.targets import resolve
from opcd.types import Message, Role, Task

Row = TypeVar("Row")

ALIASES = {"messages": "prompt", "privileged_context": "context"}


def load_splits(
    config: TasksConfig,
    seed: int,
    notes: list[str] | None = None,
    problems: Sequence[Source] = (),
) -> dict[str, list[Task]]:
    """All tasks of a run by split name, with the leak check done.

    Args:
        config: the `[tasks]` table.
        seed: of the rows that are drawn and the shares that are taken.
        notes: what a source left out is added to it, for people.
        problems: the rows that experience is gathered from: the split `extraction`.

    Raises:
        TaskError: a row is malformed, a split is empty, or splits share a row or a group.
    """
    splits = {
        name: mix(getattr(config, name), name, config.group_by, seed, notes)
        for name in SPLITS
        if getattr(config, name)
    }
    for name in ("test", "validation", "extraction"):
        if share := getattr(config, f"{name}_share"):
            splits["train"], splits[name] = split_groups(splits["train"], share, seed)
    if problems:
        splits["extraction"] = mix(problems, "extraction", config.group_by, seed, notes)
    check_leaks(splits)
    return splits


def mix(
    sources: Sequence[Source],
    split: str,
    group_by: str | None,
    seed: int,
    notes: list[str] | None = None,
) -> list[Task]:
    """The tasks of several sources, one after the other, each cut to its `rows`."""
    tasks: list[Task] = []
    for number, source in enumerate(sources):
        prefix = split if len(sources) == 1 else f"{split}.{number}"
        rows = [
            read_row(row, f"{prefix}-{index:05d}", f"{_name(source)}, row {index + 1}", group_by)
            for index, row in enumerate(_read(source, seed, [] if notes is None else notes))
        ]
        if source.rows is not None and len(rows) < source.rows:
            raise TaskError(
                f"{_name(source)} has {len(rows)} rows, but rows = {source.rows} are asked for; "
                "lower the number or leave it out"
            )
        tasks += rows if source.rows is None else shuffle(rows, seed)[: source.rows]
    if not tasks:
        key = "experience.problems" if split == "extraction" else f"tasks.{split}"
        raise TaskError(f"{key} has no rows; put at least one in, or name another source")
    _check_ids(tasks, split)
    return tasks


def read_row(row: Mapping[str, Any], task_id: str, where: str, group_by: str | None) -> Task:
    """One row as a task.

    Raises:
        TaskError: there is no prompt, or it is not a text or a conversation ending with a user.
    """
    row = {ALIASES.get(key, key): value for key, value in row.items()}
    prompt = row.get("prompt")
    if prompt is None:
        raise TaskError(
            f"{where}: no prompt; its columns are {sorted(row)}. Name the column "
            '"prompt", or map it with columns = {prompt = "your name"}'
        )
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise TaskError(
            f"{where}: its prompt is empty, so there is nothing to answer; write one, or delete "
            "the row"
        )
    if group_by and row.get(group_by) is None:
        raise TaskError(
            f"{where}: no {group_by!r} column, but tasks.group_by asks for it; "
            "add the column or leave group_by out"
        )
    context = row.get("context")
    if context is not None and not isinstance(context, str):
        raise TaskError(f"{where}: context is a {type(context).__name__}; it must be a text")
    return Task(
        id=task_id if row.get("id") is None else str(row["id"]),
        messages=read_messages(row["prompt"], where),
        answer=row.get("answer"),
        context=context,
        group=f"{group_by}={row[group_by]}" if group_by else None,
    )


def read_messages(prompt: Any, where: str) -> tuple[Message, ...]:
    """A text or a conversation as messages.

    Raises:
        TaskError: it is neither, or a conversation that does not end with the user.
    """
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    try:
        messages = tuple(Message(turn["role"], turn["content"]) for turn in prompt)
        if not all(isinstance(message.content, str) for message in messages):
            raise TypeError("a turn's content is no text")
        if not messages[-1].content.strip():
            raise TypeError("the last turn is blank")
    except (TypeError, KeyError) as error:
        raise TaskError(
            f'{where}: prompt is neither a text nor a list of {{"role", "content"}} turns ({error})'
        ) from error
    roles = [message.role for message in messages]
    if set(roles) - set(get_args(Role)) or "system" in roles[1:] or roles[-1] != "user":
        raise TaskError(
            f"{where}: the turns are {roles}; they must be system (first only), user and "
            "assistant, and end with the user"
        )
    return messages


def shuffle(tasks: Sequence[Row], seed: int, epoch: int = 0) -> list[Row]:
    """The tasks in an order that depends on seed and epoch alone."""
    order = list(tasks)
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def split_groups(tasks: Sequence[Task], share: float, seed: int) -> tuple[list[Task], list[Task]]:
    """Take whole groups (rows, where there are no groups) away until `share` is reached."""
    groups: dict[str, list[Task]] = {}
    for task in shuffle(tasks, seed):
        groups.setdefault(task.group or _text(task), []).append(task)
    taken: list[Task] = []
    while groups and len(taken) < share * len(tasks):
        taken += groups.pop(next(iter(groups)))
    kept = [task for group in groups.values() for task in group]
    if not kept or not taken:
        raise TaskError(
            f"a share of {share} of {len(tasks)} rows in {len(groups)} groups leaves a split "
            "empty; give more rows or smaller groups"
        )
    return kept, taken


def draw(tasks: Sequence[Row], count: int, step: int, seed: int) -> list[Row]:
    """The tasks of one step: every epoch is shuffled anew, and a step may span two.

    A pure function of its arguments, so that a resumed run sees what it would have seen.
    """
    places: list[int] = []
    start = step * count
    while len(places) < count:
        epoch, offset = divmod(start + len(places), len(tasks))
        order = shuffle(range(len(tasks)), seed, epoch)
        places += order[offset : offset + count - len(places)]
    # Only what is drawn is looked at: a pool renders its rows then.
    return [tasks[place] for place in places]


def check_leaks(splits: Mapping[str, Sequence[Task]]) -> None:
    """Refuse splits that share a prompt (case and white space aside) or a group.

    Raises:
        TaskError: naming both rows.
    """
    seen: dict[str, tuple[str, str]] = {}
    for split, tasks in splits.items():
        for task in tasks:
            keys = [f"prompt {_text(task)!r}"] + ([f"group {task.group!r}"] if task.group else [])
            for key in keys:
                other_split, other_id = seen.setdefault(key, (split, task.id))
                if other_split != split:
                    raise TaskError(
                        f"{split} row {task.id!r} and {other_split} row {other_id!r} share the "
                        f"{key[:120]}, so the result would be measured on what was trained on; "
                        "remove one of the two rows"
                    )


def _read(source: Source, seed: int, notes: list[str]) -> Iterator[Mapping[str, Any]]:
    match source:
        case Jsonl():
            rows: Any = _read_jsonl(source.path)
        case HubDataset():
            rows = _read_hub(source.path, source.name, source.split)
        case Public():
            public, note = convert(source.name, source.split, _read_public(source))
            notes += [note] if note else []
            yield from public
            return
        case Generator():
            yield from resolve(source.target)(seed=seed, **source.arguments)
            return
    names = {theirs: ours for ours, theirs in source.columns.items()}
    for row in rows:
        yield {names.get(str(key), str(key)): value for key, value in row.items()}


def _read_hub(path: str, name: str | None, split: str, revision: str | None = None) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(path, name, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise TaskError(
            f"{path}, split {split!r}: datasets cannot read it ({error}); correct the name, or "
            "download its files and give their path"
        ) from error


def _read_public(source: Public) -> Iterator[dict[str, Any]]:
    if source.path is None:
        known = find_set(source.name, source.split)
        return iter(_read_hub(known.hub_id, known.config, source.split, source.revision))
    if source.path.suffix == ".parquet":
        return _read_parquet(source.path)
    return _read_jsonl(source.path)


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except ArrowException as error:
        raise TaskError(f"{path.name}: not a parquet file ({error}); name another") from error


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise TaskError(
                    f"{path.name}, line {number}: not JSON ({error.msg} at character "
                    f"{error.pos + 1}); each line is one whole row, such as "
                    '{"prompt": "...", "answer": "..."}'
                ) from error
            if not isinstance(row, dict):
                raise TaskError(f"{path.name}, line {number}: not a JSON object")
            yield row


def _check_ids(tasks: Sequence[Task], split: str) -> None:
    seen: set[str] = set()
    for task in tasks:
        if task.id in seen:
            raise TaskError(f"tasks.{split}: two rows have the id {task.id!r}; make ids unique")
        seen.add(task.id)


def _text(task: Task) -> str:
    return " ".join(" ".join(m.content for m in task.messages).lower().split())


def _name(source: Source) -> str:
    if isinstance(source, Generator):
        return source.target
    if isinstance(source, Public):
        return f"{source.name} {source.split}"
    return str(source.path).rsplit("/", 1)[-1]
