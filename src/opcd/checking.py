"""Is this a run that can be started? Answered without torch, in a fraction of a second."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from opcd.anchors import load_anchors
from opcd.config import Run, check_files, load_config
from opcd.config.games import GameConfig
from opcd.config.inputs import Coach, Column, ContextConfig, HubDataset, Lessons, Public, Source
from opcd.config.servers import check_waits
from opcd.contexts import load_context, pool_of
from opcd.envs.games import openings_of
from opcd.errors import ConfigError
from opcd.graders import Grader, build_grader
from opcd.memory import Layout, memory_lines, shape_of
from opcd.public_sets import find_set
from opcd.tasks import load_splits
from opcd.types import Context, Message, Task

GAME_METRICS = ("correct", "kl_nats_per_token")
"""What weights can be chosen by, where games are played: the share that is solved, or the KL."""

CHARACTERS_A_TOKEN = 4
USUAL_TOKENS = {"tasks": 250, "game": 600}
"""Of a prompt that cannot be looked at: a question, or the history of a game."""
NOBODYS = Task("", (Message("user", ""),))
"""A row to ask for a context that is the same for all."""


def check_run(path: Path, overrides: Sequence[str] = ()) -> tuple[Run, list[str]]:
    """Load a run and everything local it names; returns it with facts for people.

    Raises:
        InputError: naming what is wrong, why, and what to write instead.
    """
    run = load_config(path, overrides)
    check_files(run)
    train_anchors, test_anchors = load_anchors(run.anchor.path)
    grader = build_grader(run.grader) if run.grader else None
    asked, more = ("episodes", f" of up to {run.game.turns} turns") if run.game else ("tasks", "")
    facts = [
        f"run {run.name}: {run.steps} steps of {run.tasks_per_step} {asked}{more}, "
        f"{run.anchors_per_step} anchors and {run.returns_per_step} {asked} with the context",
        f"anchors: {len(train_anchors.systems)} x {len(train_anchors.prompts)} to train on, "
        f"{len(test_anchors.systems)} x {len(test_anchors.prompts)} to test on",
        *warnings(run),
    ]
    if run.game:
        check_select_by(run, None, [])
        return run, [*facts, boards_fact(run.game, run.context)]
    assert run.tasks, "a run has tasks or a game"
    problems = run.experience.problems if run.experience else ()
    sources = (*run.tasks.train, *run.tasks.validation, *run.tasks.test, *problems)
    if any([_is_far(source) for source in sources]):
        return run, [*facts, "tasks: from a data set, read when the run starts"]
    notes: list[str] = []
    splits = load_splits(run.tasks, run.seed, notes, problems)
    check_select_by(run, grader, splits.get("validation", []))
    told = run.experience is not None and run.experience.feedback != "none"
    graded = ("validation", "test", *(["extraction"] if told else []))
    longest = 0
    for split, tasks in splits.items():
        for task in tasks:
            context = load_context(run.context, task)
            if split == "train":
                longest = max(longest, _characters(task) + _shown(context))
            if grader and split in graded:
                grader(task, "")
    counts = "tasks: " + ", ".join(f"{len(t)} {s}" for s, t in splits.items())
    return run, [*facts, *notes, *room_warnings(run, longest), counts]


def room_warnings(run: Run, characters: int) -> list[str]:
    """Whether the longest prompt with its context, and a response, fit into the model, roughly."""
    try:
        positions = shape_of(run.model.path).positions
    except ConfigError:
        return []
    response = max(run.rollout.max_new_tokens, run.anchor.max_new_tokens)
    prompt = characters // CHARACTERS_A_TOKEN
    # What a coach will write is not known yet.
    if isinstance(run.context, Coach) or not positions or prompt + response <= positions:
        return []
    return [
        f"warning: a prompt with its context of about {prompt} tokens (at {CHARACTERS_A_TOKEN} "
        f"characters a token) and a response of {response} are more than the {positions} that "
        f"{run.model.path} takes; shorten one of them, or take another model"
    ]


def check_launch(run: Run, processes: int) -> None:
    """What can be said before a launch of so many processes.

    Raises:
        ConfigError: one of them could wait longer for a server than the others wait for it.
    """
    if processes > 1:
        check_waits({"rollout": run.rollout, "teacher": run.teacher}, run.launch.timeout_s)


def memory_facts(run: Run, processes: int = 1, sharded: bool = False) -> list[str]:
    """What each process of a run will hold in memory, part by part; no model is loaded.

    Lengths are those of the longest prompt and of every context that prompts share, at four
    characters a token; of prompts that are not in a file here, a usual one is taken.

    Raises:
        ConfigError: the model's shape is not known without loading it.
    """
    tasks = _train_tasks(run)
    prompt, contexts = _longest_prompt(run, tasks), _context_tokens(run, tasks)
    at = Layout(
        processes,
        sharded,
        element=4 if run.model.dtype == "float32" else 2,
        prompt_tokens=prompt,
        context_tokens=sum(contexts),
    )
    facts = memory_lines(run, at)
    if run.model.dtype == "auto":
        facts.append(
            'model.dtype = "auto" is taken for bfloat16, which a GPU computes in; a processor that '
            "cannot takes float32 instead: model.dtype=float32 shows that, bfloat16 fixes this"
        )
    several = f"{len(contexts)} contexts" if len(contexts) > 1 else "a context"
    together = " together" if len(contexts) > 1 else ""
    facts.append(
        f"taken for it: prompts of {prompt} tokens, {several} of {sum(contexts)}{together}, "
        f"responses of {run.rollout.max_new_tokens}"
    )
    return facts


def _longest_prompt(run: Run, tasks: Sequence[Task]) -> int:
    """Tokens of the longest prompt, roughly; of tasks that are not here, a usual one's."""
    if not tasks:
        return USUAL_TOKENS["game" if run.game else "tasks"]
    return max(map(_characters, tasks)) // CHARACTERS_A_TOKEN


def _context_tokens(run: Run, tasks: Sequence[Task]) -> list[int]:
    """Tokens of each context that is read once for all prompts behind it, roughly."""
    if isinstance(run.context, Column):
        found = Counter(load_context(run.context, task) for task in tasks)
        shared = [context for context, rows in found.items() if rows > 1]
    elif isinstance(run.context, Coach):
        shared = []  # written for each response
    else:
        shared = pool_of(run.context) or [load_context(run.context, NOBODYS)]
    return [_shown(context) // CHARACTERS_A_TOKEN for context in shared if not context.is_empty]


def _shown(context: Context) -> int:
    """Characters of a context."""
    examples = sum(len(message.content) for message in context.examples)
    return len(context.system) + len(context.user_template) + examples


def _train_tasks(run: Run) -> Sequence[Task]:
    """Those that can be looked at here."""
    if run.game or run.tasks is None or any([_is_far(source) for source in run.tasks.train]):
        return ()
    return load_splits(run.tasks, run.seed, [])["train"]


def _characters(task: Task) -> int:
    return sum(len(message.content) for message in task.messages)


def check_context(run: Run) -> None:
    """Refuse to train on, or to measure, a context that is still to be gathered.

    Raises:
        ConfigError: the run learns its context from experience.
    """
    if isinstance(run.context, Lessons) and not run.context.files:
        raise ConfigError(
            "[context] is missing and [experience] takes its place: there is nothing to bake in "
            "before that is gathered; use opcd experience, or opcd accumulate and then give an "
            'experience as [context] with type = "experience" and its path'
        )


def check_select_by(run: Run, grader: Grader | None, validation: Sequence[Task]) -> None:
    """Refuse a metric to select by that the grader, or the game, does not give.

    Raises:
        ConfigError: naming those it gives.
    """
    if run.game and run.evaluation.select_by not in GAME_METRICS:
        raise ConfigError(
            f"evaluation.select_by = {run.evaluation.select_by!r} is nothing that a game's weights "
            f"are chosen by; write one of {GAME_METRICS}"
        )
    if grader is None or not validation:
        return
    # Some metrics are of one class alone, and only its rows have them.
    rows = validation[: run.evaluation.validation_rows]
    metrics = {name for task in rows for name in grader(task, "").metrics} | {"kl_nats_per_token"}
    if run.evaluation.select_by not in metrics:
        raise ConfigError(
            f"evaluation.select_by = {run.evaluation.select_by!r} is no metric of the grader; it "
            f"has {sorted(metrics)}"
        )


def boards_fact(game: GameConfig, context: ContextConfig) -> str:
    """How many boards each split has, once each could be written and given the context.

    Raises:
        InputError: there are too few, the game's package is missing, or a context is wrong.
    """
    boards = openings_of(game)
    for openings in boards.values():
        for id_, opening in openings.items():
            load_context(context, opening.task(id_))
    return f"{game.type}: " + ", ".join(f"{len(found)} {s}" for s, found in boards.items())


def _is_far(source: Source) -> bool:
    """Whether rows come from a hub; what can be said of those without it, is checked."""
    if isinstance(source, Public) and source.path is None:
        find_set(source.name, source.split)
        return True
    return isinstance(source, HubDataset)


def warnings(run: Run) -> list[str]:
    """Choices that are allowed, and known to go wrong."""
    found: list[str] = []
    support = run.loss.support
    if support.type == "top_k" and support.tail == "drop":
        found.append(
            "warning: tail = 'drop' is no divergence: the student can empty its top-k mass while "
            "the loss falls. Watch student_mass_in_support, or write tail = 'bucket'"
        )
    if run.teacher.type == "live":
        found.append("warning: a live teacher moves with the student and may collapse with it")
    if run.rollout.teacher_fraction == 1.0 and run.loss.direction != "forward_kl":
        found.append(
            "warning: classic off-policy distillation takes loss.direction = 'forward_kl'; on the "
            "teacher's own responses another direction has no such reading"
        )
    if not run.has_validation:
        found.append("warning: no validation split, so the last step is kept instead of the best")
    if not run.has_test:
        found.append(
            "warning: no test split, so that opcd evaluate can only measure --split validation, "
            "which the weights were chosen on"
        )
    return found
