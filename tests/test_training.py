"""`opcd.training`: a run that is interrupted, resumed, refused; what it keeps."""

import json
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opcd import checkpoint, training
from opcd.assembly import assemble
from opcd.config import Run, load_config
from opcd.config.files import derive
from opcd.config.training import Checkpoint, Loss, TopK, Tracking
from opcd.errors import CheckpointError, ConfigError, RunFolderError
from opcd.runs import RunFolder, append_jsonl, open_run, read_best, read_jsonl
from opcd.training import Outcome, is_better, train
from tiny import at_step, full_disk, make_game_run, make_run, terminate

STEPS = 6
MOVING = (
    f"steps={STEPS}",
    'model.tuning={type="lora", rank=4, dropout=0.1}',
    'teacher={type="ema", decay=0.8}',
    "optimizer.lr=0.01",
    "optimizer.schedule=cosine",
)


def run_of(tmp_path: Path, model: Path, *overrides: str) -> Run:
    return make_run(tmp_path, model, *MOVING, *overrides)


def crash() -> None:
    raise RuntimeError("the power went off")


def measured(folder: RunFolder) -> list[dict[str, Any]]:
    """Metrics without what no two runs have in common."""
    return [
        {k: v for k, v in row.items() if not k.endswith("_s") and k != "peak_bytes"}
        for row in read_jsonl(folder.metrics)
    ]


def assert_same_end(ours: Outcome, wanted: Outcome) -> None:
    """Bitwise: weights, moments, teacher, generator; metrics, validations, texts, the choice."""
    assert measured(ours.folder) == measured(wanted.folder)
    assert [row["step"] for row in measured(ours.folder)] == list(range(STEPS))
    for name in ("validation", "rollouts"):
        texts = [getattr(o.folder, name).read_text(encoding="utf-8") for o in (ours, wanted)]
        assert texts[0] == texts[1]
    assert ours.best == wanted.best == read_best(ours.folder)
    for file in ("model", "optimizer", "teacher", "random"):
        tensors = [
            load_file(o.folder.checkpoints / f"step-{STEPS}" / f"{file}.safetensors")
            for o in (ours, wanted)
        ]
        assert tensors[0].keys() == tensors[1].keys() and tensors[0]
        for name, tensor in tensors[0].items():
            assert torch.equal(tensor, tensors[1][name]), f"{file}: {name}"
    kept = [load_file(o.folder.best / "adapter_model.safetensors") for o in (ours, wanted)]
    assert all(torch.equal(weight, kept[1][name]) for name, weight in kept[0].items())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Outcome:
    return train(run_of(tmp_path_factory.mktemp("whole"), tiny_model_path))


def copy_of(outcome: Outcome, tmp_path: Path, **changes: Any) -> tuple[Run, RunFolder]:
    """A finished run in another place, where a test may do with it what it likes."""
    _, run = open_run(outcome.folder.path)
    shutil.copytree(outcome.folder.path, tmp_path / "runs" / run.name)
    folder = RunFolder(tmp_path / "runs" / run.name)
    return run.model_copy(update={"out": tmp_path / "runs", **changes}), folder


def test_a_terminated_game_resumes_bitwise(
    player_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On slippery ice, with a teacher that plays a share, and boards given back the context."""
    keys = (
        *MOVING,
        *("game.slippery=true", "game.turns=5", "anchor.context_return=0.25"),
        *('teacher={type="adapter_off"}', "rollout.teacher_fraction=0.5"),
        *("steps=3", "rollout.max_new_tokens=2", "evaluation.validation_rows=1"),
    )
    wanted = train(make_game_run(tmp_path / "whole", player_path, *keys))
    run = make_game_run(tmp_path / "cut", player_path, *keys)
    at_step(monkeypatch, 1, terminate)
    assert train(run).steps == 2
    again = train(run, resume=True)
    assert measured(again.folder) == measured(wanted.folder)
    assert [row["turns"] > 0 for row in measured(again.folder)] == [True] * 3
    assert again.best == wanted.best
    for file in ("model", "optimizer"):
        tensors, others = (
            load_file(o.folder.checkpoints / "step-3" / f"{file}.safetensors")
            for o in (again, wanted)
        )
        assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def test_a_terminated_run_with_a_pool_of_contexts_resumes_bitwise(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not all contexts fit into the budget: what is held when it stops makes no difference."""
    files = [tmp_path / f"{n}.md" for n in range(3)]
    for n, file in enumerate(files):
        file.write_text(f"Lesson {n}: look twice. " * (8 + n), encoding="utf-8")
    context = {"type": "experience", "path": [str(file) for file in files], "placement": "system"}

    def pooled(name: str) -> Run:
        keys = ("model.tuning={type='lora', rank=4}", "steps=3", "batch.prefix_gib=0.00011")
        run = make_run(tmp_path / name, tiny_model_path, *keys, "checkpoint.every_steps=1")
        return derive(run, context={**context, "template": None})

    wanted = train(pooled("whole"))
    at_step(monkeypatch, 1, terminate)
    assert train(pooled("cut")).steps == 2
    again = train(pooled("cut"), resume=True)
    assert any("prefix_gib" in note for note in assemble(pooled("cut")).notes)
    assert measured(again.folder) == measured(wanted.folder)
    tensors, others = (
        load_file(o.folder.checkpoints / "step-3" / "model.safetensors") for o in (again, wanted)
    )
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def test_a_terminated_run_resumes_bitwise(
    tiny_model_path: Path,
    tmp_path: Path,
    uninterrupted: Outcome,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGTERM in the middle of step 3 of 6, with an EMA teacher, dropout and a schedule."""
    run = run_of(tmp_path, tiny_model_path)
    handler = signal.getsignal(signal.SIGTERM)
    at_step(monkeypatch, 2, terminate)
    outcome = train(run)
    assert (outcome.steps, outcome.interrupted_by) == (3, signal.SIGTERM)
    assert checkpoint.latest(outcome.folder.checkpoints).name == "step-3"
    assert signal.getsignal(signal.SIGTERM) == handler, "handlers are put back"
    torch.manual_seed(12345)
    resumed = train(run, resume=True)
    assert (resumed.steps, resumed.interrupted_by) == (STEPS, None)
    assert_same_end(resumed, uninterrupted)


def test_a_crashed_run_resumes_bitwise_from_its_checkpoint(
    tiny_model_path: Path,
    tmp_path: Path,
    uninterrupted: Outcome,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Step 4 was written to metrics.jsonl but not to a checkpoint: its rows are taken back."""
    run = run_of(tmp_path, tiny_model_path, "checkpoint.every_steps=3")
    at_step(monkeypatch, 4, crash)
    with pytest.raises(RuntimeError, match="the power went off"):
        train(run)
    assert checkpoint.latest(run.out / run.name / "checkpoints").name == "step-3"
    assert_same_end(train(run, resume=True), uninterrupted)


def test_a_finished_run_resumes_to_itself(tmp_path: Path, uninterrupted: Outcome) -> None:
    """Elsewhere too, and with other values for what no result depends on."""
    rare = Checkpoint(every_steps=5, keep=1)
    run, _ = copy_of(uninterrupted, tmp_path, checkpoint=rare, tracking=Tracking(trackers=()))
    again = train(run, resume=True)
    assert again.steps == STEPS
    assert_same_end(again, uninterrupted)


def test_two_interrupts_stop_at_once(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 1, twice)
    with pytest.raises(KeyboardInterrupt):
        train(run_of(tmp_path, tiny_model_path))


def test_best_is_chosen_on_validation(uninterrupted: Outcome) -> None:
    """By the grader's metric, or the lower KL; best.json says by what and when."""
    rows = list(read_jsonl(uninterrupted.folder.validation))
    assert [row["step"] for row in rows] == [1, 3, 5]
    # One row of three is more than a standard error, so the KL decides among equals alone.
    wanted = min(rows, key=lambda row: (-row["correct"], row["kl_nats_per_token"]))
    best = read_best(uninterrupted.folder)
    assert best["step"] == wanted["step"] + 1 and best["chosen_by"] == "correct"
    assert best["kl_nats_per_token"] == wanted["kl_nats_per_token"]
    assert not (uninterrupted.folder.path / ".best").exists()


@pytest.mark.parametrize(
    ("correct", "kl_nats", "better"),
    [
        (0.70, 0.4, True),
        (0.64, 0.6, False),
        (0.64, 0.4, True),
        (0.56, 0.4, True),
        (0.5, 0.1, False),
    ],
)
def test_a_few_rows_do_not_make_a_step_better(correct: float, kl_nats: float, better: bool) -> None:
    """One standard error of 0.6 on 48 rows is 0.07; within it the KL decides."""
    best = {"rows": 48, "correct": 0.6, "kl_nats_per_token": 0.5}
    found = {"rows": 48, "correct": correct, "kl_nats_per_token": kl_nats}
    assert is_better(found, best, "correct") == better
    # A step that crept down from a higher one is measured against that one.
    assert not is_better(found, {**best, "highest": 0.9}, "correct")
    assert is_better(found, best, "kl_nats_per_token") == (kl_nats < 0.5)


def test_noise_is_that_of_the_rows_that_have_the_metric() -> None:
    """0.1 is more than one standard error on 60 rows, and less on the 4 that are harmless."""
    best = {"rows": 60, "rows_correct_no": 4, "correct_no": 0.5, "kl_nats_per_token": 0.5}
    found = {**best, "correct_no": 0.6, "kl_nats_per_token": 0.6}
    assert not is_better(found, best, "correct_no")
    assert is_better({**found, "rows_correct_no": 60}, best, "correct_no")


def test_best_may_be_an_earlier_step(tiny_model_path: Path, tmp_path: Path) -> None:
    """A learning rate that ruins the student after its first step: that step's weights stay."""
    overrides = ("optimizer.lr=3.0", "optimizer.warmup_steps=2", "evaluation.every_steps=1")
    overrides = (*overrides, "checkpoint.every_steps=1", "checkpoint.keep=4")
    outcome = train(make_run(tmp_path, tiny_model_path, *overrides))
    kl_nats = [row["kl_nats_per_token"] for row in read_jsonl(outcome.folder.validation)]
    assert kl_nats[0] < min(kl_nats[1:]), "the premise"
    assert outcome.best["step"] == 1
    best = load_file(outcome.folder.best / "adapter_model.safetensors")
    first = load_file(outcome.folder.checkpoints / "step-1" / "model.safetensors")
    assert set(best) == {name.replace(".default", "") for name in first}
    assert all(torch.equal(t, best[name.replace(".default", "")]) for name, t in first.items())


def test_a_full_disk_costs_no_best_weights(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the validation before stay, and the run says how it goes on."""
    real = training.save_weights
    written: list[Path] = []

    def second_on_a_full_disk(model: Any, folder: Path, weights: Any = None) -> None:
        written.append(folder)
        with full_disk() if len(written) == 2 else nullcontext():
            real(model, folder, weights)

    monkeypatch.setattr(training, "save_weights", second_on_a_full_disk)
    monkeypatch.setattr(training, "is_better", lambda *_: True)
    run = make_run(tmp_path, tiny_model_path)
    with pytest.raises(CheckpointError, match=r"best/ could not be written.*--resume"):
        train(run)
    folder = RunFolder(run.out / run.name)
    assert read_best(folder)["step"] == 2
    assert not folder.best.with_name(".best").exists()


def test_without_validation_the_last_step_is_kept_and_said_to_be_no_choice(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    outcome = train(make_run(tmp_path, tiny_model_path, "tasks.validation=[]"))
    assert outcome.best == {"step": 4, "chosen_by": "last step, no validation split"}
    assert read_best(outcome.folder) == outcome.best


def test_selecting_by_a_metric_that_is_not_there(tiny_model_path: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, tiny_model_path, "evaluation.select_by=f1")
    with pytest.raises(ConfigError, match=r"select_by = 'f1' .* has \['correct', 'kl_nats"):
        train(run)


def test_an_unknown_schedule_names_its_key(tiny_model_path: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, tiny_model_path, "optimizer.schedule=zigzag")
    with pytest.raises(ConfigError, match=r"optimizer.schedule = 'zigzag'"):
        train(run)


@pytest.mark.parametrize("key", ["optimizer.lr=0.02", "rollout.temperature=0.9", "seed=1"])
def test_resuming_with_another_value_names_the_key(
    tmp_path: Path, uninterrupted: Outcome, key: str
) -> None:
    name = key.partition("=")[0]
    changed = load_config(uninterrupted.folder.config, [key])
    with pytest.raises(RunFolderError, match=rf"started with other values:(\n.*)*{name}: .* -> "):
        train(changed, resume=True)


def test_an_existing_run_is_refused_and_left_alone(tmp_path: Path, uninterrupted: Outcome) -> None:
    """Until `overwrite` says otherwise; then nothing of the first run is left."""
    run, folder = copy_of(uninterrupted, tmp_path, steps=1)
    before = folder.metrics.read_bytes()
    with pytest.raises(RunFolderError, match=r"exists.* --resume.* --overwrite"):
        train(run)
    assert folder.metrics.read_bytes() == before
    train(run, overwrite=True)
    assert [path.name for path in checkpoint.complete(folder.checkpoints)] == ["step-1"]
    assert len(measured(folder)) == 1


def test_a_folder_that_is_no_run_is_never_deleted(tiny_model_path: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, tiny_model_path)
    diary = run.out / run.name / "diary.txt"
    diary.parent.mkdir(parents=True)
    diary.write_text("dear", encoding="utf-8")
    with pytest.raises(RunFolderError, match="is not a run"):
        train(run, overwrite=True)
    assert diary.read_text(encoding="utf-8") == "dear"


def test_a_wrong_input_leaves_an_existing_run_alone(tmp_path: Path, uninterrupted: Outcome) -> None:
    """Overwriting deletes the old run only after the new one is known to start."""
    broken, folder = copy_of(uninterrupted, tmp_path, loss=Loss(support=TopK(k=9999)))
    with pytest.raises(ConfigError, match=r"loss.support.k = 9999 .*vocabulary of 300"):
        train(broken, overwrite=True)
    assert len(measured(folder)) == STEPS


def test_resuming_nothing_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is not a run"):
        train(make_run(tmp_path, tiny_model_path), resume=True)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "facts.json"])
def test_a_truncated_checkpoint_is_refused_by_name(
    tmp_path: Path, uninterrupted: Outcome, file: str
) -> None:
    run, folder = copy_of(uninterrupted, tmp_path)
    newest = checkpoint.latest(folder.checkpoints)
    whole = (newest / file).read_bytes()
    (newest / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=rf"step-6/{file} cannot be trusted.*bytes instead"):
        train(run, resume=True)


def test_only_the_newest_checkpoints_are_kept(uninterrupted: Outcome) -> None:
    names = [path.name for path in checkpoint.complete(uninterrupted.folder.checkpoints)]
    assert names == ["step-4", "step-6"]


@pytest.mark.parametrize(
    ("keys", "teacher"),
    [
        ('model.tuning={type="full"}', 'teacher={type="frozen"}'),
        ('model.tuning={type="full"}', 'teacher={type="refresh", every_steps=2}'),
    ],
)
def test_full_tuning_resumes_bitwise(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: str, teacher: str
) -> None:
    runs = [
        make_run(tmp_path / name, tiny_model_path, keys, teacher) for name in ("whole", "halves")
    ]
    whole = train(runs[0])
    at_step(monkeypatch, 2, terminate)
    assert train(runs[1]).steps == 3
    halves = train(runs[1], resume=True)
    assert measured(halves.folder) == measured(whole.folder)
    ends = [load_file(o.folder.checkpoints / "step-4/model.safetensors") for o in (halves, whole)]
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())
    assert (halves.folder.best / "model.safetensors").is_file()


def test_gradient_checkpointing_changes_no_number(tiny_model_path: Path, tmp_path: Path) -> None:
    """The layers are recomputed in the backward pass with the attention of the forward pass."""
    losses = []
    for value in ("false", "true"):
        key = f"model.gradient_checkpointing={value}"
        outcome = train(make_run(tmp_path / value, tiny_model_path, key))
        losses.append([row["loss_nats"] for row in measured(outcome.folder)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_metrics_of_a_skipped_step_are_json(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    append_jsonl(tmp_path / "metrics.jsonl", [{"step": 0, "loss_nats": float("nan")}])
    json.loads((tmp_path / "metrics.jsonl").read_text("utf-8"), parse_constant=refuse)
