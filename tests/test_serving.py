"""`opcd.serving`: whole runs with servers, and what becomes of a run when they fail."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opcd import checkpoint
from opcd.assembly import assemble
from opcd.config import Run, dump_config, load_config
from opcd.errors import ConfigError, ModelError, RolloutError, ServerError
from opcd.items import render_splits
from opcd.programs import open_baked
from opcd.rendering import Renderer
from opcd.responses import ask, respond
from opcd.runs import RunFolder, read_jsonl
from opcd.serving import longest_prompt, longest_tokens
from opcd.training import check_resumable, train
from test_launch import assert_same_numbers, launch
from tiny import acting, make_game_run, make_run
from vllm_fake import FakeVllm, failing, serving
from worlds import tiny_llama, tokenizer

COLD = "rollout.temperature=0.001"
"""Answers are then the likeliest tokens, whoever draws them."""
FAST = ("optimizer.lr=0.01", "optimizer.warmup_steps=0")
FOUR = "batch.prompts_per_step=4"


@pytest.fixture
def fake(tiny_model_path: Path) -> Iterator[FakeVllm]:
    with serving(FakeVllm(tiny_model_path, tokenizer())) as running:
        yield running


def served(tmp_path: Path, model: Path, fake: FakeVllm, *overrides: str) -> Run:
    rollout = f"rollout={{type='vllm', servers=['{fake.url}'], max_new_tokens=5, retries=0}}"
    return make_run(tmp_path, model, rollout, COLD, *FAST, *overrides)


def rows_of(run: Run, name: str = "metrics") -> list[dict[str, Any]]:
    text = (run.out / run.name / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def column(run: Run, name: str) -> list[float]:
    return [row[name] for row in rows_of(run)]


@pytest.mark.parametrize("tuning", ["model.tuning={rank=4, alpha=8}", "model.tuning={type='full'}"])
def test_a_run_with_servers_is_the_run_without(
    tmp_path: Path, tiny_model_path: Path, fake: FakeVllm, tuning: str
) -> None:
    teacher = "teacher.type=frozen" if "full" in tuning else "teacher.type=adapter_off"
    near = make_run(tmp_path / "near", tiny_model_path, COLD, *FAST, tuning, teacher)
    far = served(tmp_path / "far", tiny_model_path, fake, tuning, teacher)
    for run in (near, far):
        train(run)
    for name in ("loss_nats", "grad_norm", "kl_nats_per_token", "response_tokens"):
        assert column(far, name) == pytest.approx(column(near, name), rel=2e-3), name
    assert max(column(far, "engine_logprob_difference_nats")) < 1e-3
    assert column(far, "server_troubles") == [0, 0, 0, 0]


def test_a_remote_teacher_trains_as_a_local_one(
    tmp_path: Path, tiny_model_path: Path, fake: FakeVllm
) -> None:
    support = "loss.support={type='top_k', of='teacher', k=8}"
    near = make_run(tmp_path / "near", tiny_model_path, COLD, *FAST, support)
    teacher = f"teacher={{type='remote', servers=['{fake.url}'], retries=0}}"
    far = make_run(tmp_path / "far", tiny_model_path, COLD, *FAST, support, teacher)
    for run in (near, far):
        train(run)
    for name in ("loss_nats", "grad_norm", "teacher_mass_in_support"):
        assert column(far, name) == pytest.approx(column(near, name), rel=2e-3), name


@pytest.mark.parametrize("trouble", ["gone while training", "gone while validating"])
def test_a_run_whose_server_fails_goes_on_where_it_was(
    tmp_path: Path, tiny_model_path: Path, fake: FakeVllm, trouble: str
) -> None:
    """Nothing is trained twice, and no validation is left out."""
    every = "checkpoint.every_steps=4"  # so that only the stop itself can have saved the steps
    whole = served(tmp_path / "whole", tiny_model_path, fake, every)
    outcome = train(whole)
    cut = served(tmp_path / "cut", tiny_model_path, fake, every)
    # 4 prompts a step and 1 probe at 2 temperatures; then 3 validation rows after every 2 steps.
    good = 2 + 4 * 2 + (3 + 4 if "training" in trouble else 1)
    fake.faults["/v1/completions"] = [lambda _: None] * good + [failing(500)] * 9
    with pytest.raises(ServerError, match=r"HTTP 500.*--resume"):
        train(cut)
    fake.faults.clear()
    saved = [path.name for path in (cut.out / cut.name / "checkpoints").iterdir()]
    assert saved == (["step-3"] if "training" in trouble else ["step-2"])
    resumed = train(cut, resume=True)
    for name in ("step", "loss_nats", "grad_norm"):
        assert column(cut, name) == pytest.approx(column(whole, name)), name
    assert [row["step"] for row in rows_of(cut, "validation")] == [1, 3]
    assert resumed.best == pytest.approx(outcome.best)


def test_a_server_with_other_weights_is_caught_within_the_step(
    tmp_path: Path, tiny_model_path: Path, fake: FakeVllm
) -> None:
    run = served(tmp_path, tiny_model_path, fake)

    def stale(own: FakeVllm) -> None:
        for name in own.adapters:  # as if the newest had the weights of the base
            own.adapters[name] = tiny_llama(seed=7)

    fake.faults["/v1/completions"] = [lambda _: None] * 6 + [stale]
    with pytest.raises(RolloutError, match=r"nats from the trainer's.*not trained on"):
        train(run)
    assert column(run, "step") == [0]
    checkpoints = run.out / run.name / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-1"]
    train(run, resume=True)
    assert column(run, "step") == [0, 1, 2, 3]


def test_troubles_are_counted_with_their_step(
    tmp_path: Path, tiny_model_path: Path, fake: FakeVllm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = served(tmp_path, tiny_model_path, fake, "rollout.retries=1")
    fake.faults["/v1/completions"] = [lambda _: None] * 6 + [lambda own: own.restart()]
    train(run)
    assert column(run, "server_troubles") == [0, 1, 0, 0]
    assert "lost the student's weights" in capsys.readouterr().err.replace("\n", " ")


def other_weights(fake: FakeVllm) -> None:
    fake.model = tiny_llama(seed=7)


def low_rank(fake: FakeVllm) -> None:
    fake.max_lora_rank = 2


def little_room(fake: FakeVllm) -> None:
    fake.max_model_len = 30


def processed(fake: FakeVllm) -> None:
    fake.processed = True


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (other_weights, ModelError, r"serves other weights.*model\.path"),
        (low_rank, ConfigError, r"--max-lora-rank.*model\.tuning\.rank"),
        (little_room, ConfigError, r"--max-model-len.*rollout\.max_new_tokens"),
        (processed, ConfigError, "--logprobs-mode raw_logprobs"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_model_path: Path, fake: FakeVllm, wrong: Any, error: Any, message: str
) -> None:
    wrong(fake)
    run = served(tmp_path, tiny_model_path, fake)
    with pytest.raises(error, match=message) as caught:
        train(run)
    assert caught.value.exit_code == 2
    assert not run.out.exists()


@pytest.mark.parametrize("short", [0, 1])
def test_a_teachers_server_has_room_for_prompt_and_response(
    tmp_path: Path, tiny_model_path: Path, fake: FakeVllm, short: int
) -> None:
    """It reads the response as a part of its prompt, and writes one token that nobody wants."""
    teacher = f"teacher={{type='remote', servers=['{fake.url}'], retries=0}}"
    support = "loss.support={type='top_k', of='teacher', k=8}"
    run = make_run(tmp_path, tiny_model_path, support, teacher, "steps=1")
    items, _ = render_splits(run, Renderer(tokenizer(), run.rendering, 400))
    fake.max_model_len = len(longest_prompt(items)) + run.rollout.max_new_tokens + 1 - short
    refused = pytest.raises(ConfigError, match="--max-model-len") if short else nullcontext()
    with refused:
        train(run)
    assert run.out.exists() == (not short)


def test_a_finished_run_is_asked_and_resumed_without_its_old_servers(
    tmp_path: Path, tiny_model_path: Path, fake: FakeVllm
) -> None:
    run = served(tmp_path, tiny_model_path, fake, "steps=2")
    train(run)
    other = run.rollout.model_copy(update={"servers": ("http://127.0.0.1:9",)})
    moved = run.model_copy(update={"rollout": other})
    assert check_resumable(moved).path == run.out / run.name
    asked = len(fake.asked)
    _, parts, step = open_baked(run.out / run.name)
    pairs = [item.pair for item in parts.items["test"]]
    assert (step, len(ask(parts, pairs, "baked"))) == (2, len(pairs))
    assert len(fake.asked) == asked


def test_a_servers_room_is_asked_for_the_last_turn_of_a_game(
    tmp_path: Path, player_path: Path
) -> None:
    """Not the first, which is the shortest; where that does not fit, for all that does."""
    parts = assemble(make_game_run(tmp_path, player_path, "rollout.max_new_tokens=30"))
    parts.engine = acting(parts.renderer, lambda _, n: "[down]" if n % 2 else "[up]")
    first = len(longest_prompt(parts.items))
    told = longest_tokens(parts.config, parts.renderer, parts.items)
    played = respond(parts, parts.items["validation"], "in_context")
    longest = max(len(turn.pair.teacher_ids) for one in played for turn in one.turns)
    assert {len(one.turns) for one in played} == {parts.config.game.turns}  # type: ignore[union-attr]
    assert first < 0.9 * told and 0.9 * told < longest <= told
    small = replace(parts.renderer, max_prompt_tokens=first + 5)
    assert longest_tokens(parts.config, small, parts.items) == first + 5


def test_a_fallback_to_the_sampled_token_changes_the_loss(
    tmp_path: Path, tiny_model_path: Path, fake: FakeVllm
) -> None:
    fake.max_logprobs = 4
    teacher = f"teacher={{type='remote', servers=['{fake.url}'], retries=0}}"
    support = "loss.support={type='top_k', of='teacher', k=8}"
    parts = assemble(make_run(tmp_path, tiny_model_path, support, teacher))
    assert parts.config.loss.support.type == "sampled"
    assert any("loss.support is sampled" in note for note in parts.notes)
    assert torch.isfinite(torch.tensor(parts.context_tokens))


# --- several processes

UNEVEN = ("batch.prompts_per_step=7", "rollout.teacher_fraction=0.25", "checkpoint.every_steps=4")
WAITS = ("rollout.timeout_s=10", "launch.timeout_s=60")
FULL = ("model.tuning={type='full'}", "teacher={type='frozen'}", "optimizer.lr=0.001")
OF_TEACHER = "loss.support={type='top_k', of='teacher', k=8}"
LOADS = "/v1/load_lora_adapter"
RELOADS = "/collective_rpc"
KNOWN = 2
"""A text by which each process knows the teacher again, at the start and with every step."""
GOOD = 2 + KNOWN + 2 * (5 + KNOWN)
"""Requests to a teacher: a probe of each process, and 5 tasks in each of two steps; then a
validation of 3 rows."""


def after(good: int) -> list[Any]:
    """Faults: so many requests are answered, and no more."""
    return [*[lambda _: None] * good, *[failing(500)] * 99]


def once_loaded(loads: int, times: int) -> list[Any]:
    """Faults: so many requests fail once an adapter was loaded so often."""
    fired: list[int] = []

    def fail(own: FakeVllm) -> Any:
        if own.paths_asked().count(LOADS) < loads or len(fired) >= times:
            return None
        fired.append(1)
        return failing(500)(own)

    return [fail] * 999


@dataclass
class Case:
    """A run of two processes."""

    overrides: tuple[str, ...] = ()
    servers: int = 1
    faults: Callable[[int], list[Any]] = lambda _: []
    """Of the last server's answers, by the number of processes."""
    teacher: bool = False
    """Whether the server is a teacher's, and not one that answers."""
    cut: str = "ddp"
    like: str = ""
    """The run it would have been, if its server had not failed."""


CASES = {
    # Adapters are loaded at the start, before each later step, and for the validations after two
    # and four; of two processes also before the first, for which DDP gives all the same weights.
    "lora": Case(("rollout.retries=2",), 2, lambda processes: once_loaded(1 + processes, 2)),
    "full": Case((*FULL,), cut="fsdp"),
    "remote": Case((OF_TEACHER,), teacher=True),
    "gone": Case((), 2, lambda _: once_loaded(5, 99), like="lora"),
    "gone_validating": Case((), 2, lambda _: once_loaded(4, 99), like="lora"),
    "teacher_gone": Case((OF_TEACHER,), 1, lambda _: after(GOOD + 3 + KNOWN), True, like="remote"),
    "teacher_gone_validating": Case((OF_TEACHER,), 1, lambda _: after(GOOD), True, like="remote"),
}
ALONE = tuple(name for name, case in CASES.items() if not case.like)


class Pair:
    """The runs of all cases in two processes, and of those without a failure in one."""

    def __init__(self, folder: Path, model: Path, stack: ExitStack) -> None:
        """Start the servers, and make the runs of one process."""
        self.folder, self.model, self.stack = folder, model, stack
        self.fakes: dict[tuple[str, int], list[FakeVllm]] = {}
        for name in ALONE:
            train(self.run(name, 1))
        entries = [
            {
                "config": str(self.write(name)),
                "cut": case.cut,
                "resume": False,
                "signal": None,
                "step": 0,
            }
            for name, case in CASES.items()
        ]
        plan = folder / "plan.json"
        plan.write_text(json.dumps(entries), encoding="utf-8")
        self.said = [text for _, text in launch(plan)]
        files = [folder / f"ends-{process}.json" for process in range(2)]
        self.ends = [json.loads(file.read_text(encoding="utf-8")) for file in files]

    def run(self, name: str, processes: int) -> Run:
        case = CASES[name]
        fakes = [FakeVllm(self.model, tokenizer()) for _ in range(case.servers)]
        self.fakes[name, processes] = [self.stack.enter_context(serving(f)) for f in fakes]
        fakes[-1].faults["/v1/completions"] = case.faults(processes)
        urls = [fake.url for fake in fakes]
        asked = f"{{type='vllm', servers={urls}, max_new_tokens=5, retries=0}}"
        table = f"rollout={asked}"
        if case.teacher:
            table = f"teacher={{type='remote', servers={urls}, retries=0, timeout_s=20}}"
        waits = WAITS[1:] if case.teacher else WAITS
        uneven = [one for one in UNEVEN if not (case.teacher and "fraction" in one)]
        more = (table, COLD, *uneven, *waits, *case.overrides, f"name={name}")
        return make_run(self.folder / f"{processes}-{name}", self.model, *more)

    def write(self, name: str) -> Path:
        path = self.folder / f"{name}.json"
        path.write_text(dump_config(self.run(name, 2)), encoding="utf-8")
        return path

    def folder_of(self, name: str, processes: int) -> RunFolder:
        return RunFolder(self.folder / f"{processes}-{name}" / "runs" / name)

    def of(self, name: str) -> list[dict[str, Any]]:
        place = list(CASES).index(name)
        return [one[place] for one in self.ends]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(tmp_path_factory.mktemp("pair"), tiny_model_path, stack)


@pytest.mark.parametrize("name", ALONE)
def test_two_processes_with_servers_give_what_one_gives(pair: Pair, name: str) -> None:
    """Troubles are counted over both: two for LoRA, whichever process met them."""
    assert pair.of(name) == [{"steps": 4, "interrupted_by": None}] * 2, pair.said
    assert_same_numbers(pair.folder_of(name, 2), pair.folder_of(name, 1))
    if name == "lora":
        rows = read_jsonl(pair.folder_of(name, 2).metrics)
        assert [row["server_troubles"] for row in rows] == [0, 2, 0, 0]


@pytest.mark.parametrize(("name", "path"), [("lora", LOADS), ("full", RELOADS)])
def test_weights_are_published_by_one_process_to_all_servers(
    pair: Pair, name: str, path: str
) -> None:
    counts = [
        [fake.paths_asked().count(path) for fake in pair.fakes[name, processes]]
        for processes in (1, 2)
    ]
    # Where all weights are replaced: the base's too, at the start and for the teacher's answers.
    assert counts == ([[6, 6], [7, 7]] if name == "lora" else [[9], [9]])
    assert all(len(fake.adapters) == (name == "lora") for fake in pair.fakes[name, 2])


def test_each_prompt_is_answered_once(pair: Pair) -> None:
    """Of whichever process it is: the same prompts with the same seeds as of one."""
    asked = [
        [
            (tuple(body["prompt"]), body["seed"])
            for fake in pair.fakes["lora", processes]
            for path, body in fake.asked
            if path == "/v1/completions" and body["max_tokens"] == 5
        ]
        for processes in (1, 2)
    ]
    assert len(asked[0]) == len(asked[1]) > 20
    assert set(asked[0]) == set(asked[1])


@pytest.mark.parametrize("name", [name for name in CASES if name not in ALONE])
def test_a_server_that_dies_stops_both_with_a_checkpoint(pair: Pair, name: str) -> None:
    """Also one that only one of them was asking; and the run goes on as if nothing had been."""
    for end in pair.of(name):
        assert end["error"].startswith("RolloutError: http://127.0.0.1"), pair.said
        assert "--resume" in end["error"]
    folder, like = pair.folder_of(name, 2), pair.folder_of(CASES[name].like, 1)
    assert [path.name for path in checkpoint.complete(folder.checkpoints)] == ["step-2"]
    for fake in pair.fakes[name, 2]:
        fake.faults.clear()
    assert train(load_config(pair.folder / f"{name}.json"), resume=True).steps == 4
    if CASES[name].like == "remote":
        assert_same_numbers(folder, like)
        return
    # Greedy answers of another process' batch, so the same to rounding.
    for row, other in zip(read_jsonl(folder.metrics), read_jsonl(like.metrics), strict=True):
        for key in ("step", "loss_nats", "grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
