"""`opcd.launch`: two processes give what one gives; they stop, fail and resume together.

One pair of gloo processes does all runs of a plan; the same runs are done here by one process.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

from opcd import checkpoint
from opcd.config import Run, dump_config, load_config
from opcd.errors import ConfigError
from opcd.launch import (
    check_dtypes,
    check_processes,
    check_shardable,
    interleave,
    on_main,
    own,
    read_fsdp,
    read_zero,
)
from opcd.runs import RunFolder, open_run, read_jsonl
from opcd.training import train
from tiny import make_run
from worlds import tiny_llama, tokenizer

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))

LORA = ('model.tuning={type="lora", rank=4}', "optimizer.lr=0.003")
FULL = ('model.tuning={type="full"}', 'teacher={type="frozen"}', "optimizer.lr=0.001")
UNEVEN = ("batch.prompts_per_step=7", "rollout.teacher_fraction=0.25")
"""Five tasks and two anchors, some answered by their teachers: nothing divides by two."""
BFLOAT16 = ("model.dtype=bfloat16", "steps=2", "rollout.max_new_tokens=1")
"""In longer responses rounding draws another token sooner or later, and then all are others."""
RUNS: dict[str, tuple[str, ...]] = {
    "ddp_lora": (*LORA, *UNEVEN),
    "ddp_full": (*FULL, "anchor.context_return=0.25", 'loss.reduction="token"'),
    "fsdp_lora": (*LORA, *UNEVEN),
    "fsdp_full": (*FULL, *UNEVEN, "model.gradient_checkpointing=true"),
    "fsdp_ema": (*LORA, 'teacher={type="ema", decay=0.8}', "batch.prompts_per_step=5"),
    "fsdp_bf16": (*FULL, *BFLOAT16),
    "ddp_bf16": (*LORA, *BFLOAT16),
    "ddp_stopped": (*LORA, "model.gradient_checkpointing=true"),
    "fsdp_resumed": (*FULL, *UNEVEN),
    "ddp_killed": (*LORA, "launch.timeout_s=60"),
}
STOPS = {"stopped": ("SIGTERM", 1), "killed": ("SIGKILL", 2)}
"""The signal that one process is sent, and when, by the last word of a run's name."""
SYSTEM = "Answer in verse, or not at all. " * 4
"""Long enough to be read once."""
TIED = ("fsdp_full", "ddp_full", "zero_full")
"""Runs whose model has one matrix for embeddings and head."""


class Ends:
    """How the runs of the plan ended, in both processes and in one."""

    def __init__(
        self, folder: Path, models: dict[bool, Path], runs: Mapping[str, Sequence[str]]
    ) -> None:
        """Nothing has run yet."""
        self.folder, self.models, self.runs = folder, models, runs
        self.codes: list[int] = []
        self.said = ["", ""]

    def run(self, name: str, processes: int) -> Run:
        more = self.runs[name]
        overrides = (f"name={name}", *more)
        folder, model = self.folder / str(processes), self.models[name in TIED]
        return make_run(folder, model, *overrides, system=SYSTEM)

    def folder_of(self, name: str, processes: int) -> RunFolder:
        return RunFolder(self.folder / str(processes) / "runs" / name)

    def of(self, name: str) -> list[dict[str, Any]]:
        """What each process says."""
        place = list(self.runs).index(name)
        files = [self.folder / f"ends-{process}.json" for process in range(2)]
        # One that was killed in its first run has written nothing.
        ends = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
        return [one[place] for one in ends if len(one) > place]

    def plan(self) -> Path:
        entries: list[dict[str, Any]] = []
        for name in self.runs:
            config = self.folder / f"{name}.json"
            config.write_text(dump_config(self.run(name, 2)), encoding="utf-8")
            stop = STOPS.get(name.partition("_")[2])
            entries.append(
                {
                    "config": str(config),
                    "cut": name.partition("_")[0],
                    "resume": name.endswith("_resumed"),
                    "signal": stop and stop[0],
                    "step": stop and stop[1],
                }
            )
        path = self.folder / "plan.json"
        path.write_text(json.dumps(entries), encoding="utf-8")
        return path


def launch(plan: Path) -> list[tuple[int, str]]:
    """Exit codes and messages of two processes, started as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    there |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    there |= {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    script = Path(__file__).with_name("launched.py")
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(plan)],
            env=os.environ | there | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Ends:
    return run_all(tmp_path_factory, RUNS)


def run_all(tmp_path_factory: pytest.TempPathFactory, runs: Mapping[str, Sequence[str]]) -> Ends:
    """Each run in one process, then all of them in two; `_resumed` goes on in two from one."""
    models: dict[bool, Path] = {}
    for tied in (False, True):
        models[tied] = tmp_path_factory.mktemp("launched") / "model"
        # Odd, so that a share of its rows is more than another.
        tiny_llama(tie_word_embeddings=tied, intermediate_size=49).save_pretrained(models[tied])
        tokenizer().save_pretrained(models[tied])
    found = Ends(tmp_path_factory.mktemp("runs"), models, runs)
    for name in runs:
        train(found.run(name, 1))
        if name.endswith("_resumed"):
            begun = found.folder_of(name, 2)
            shutil.copytree(found.folder_of(name, 1).path, begun.path)
            shutil.rmtree(checkpoint.latest(begun.checkpoints))
            begun.config.write_text(dump_config(found.run(name, 2)), encoding="utf-8")
    both = launch(found.plan())
    found.codes, found.said = [code for code, _ in both], [text for _, text in both]
    return found


def rows_of(folder: RunFolder) -> list[dict[str, Any]]:
    return list(read_jsonl(folder.metrics))


def assert_same_numbers(ours: RunFolder, wanted: RunFolder, within: float = 1e-5) -> None:
    """Metrics of every step, validations, and the weights that came out."""
    rows, others = rows_of(ours), rows_of(wanted)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys() and row["direction"] == other["direction"]
        for key in row.keys() - {"peak_bytes", "direction"}:
            if not key.endswith("_s"):
                assert row[key] == pytest.approx(other[key], rel=within, abs=within), key
    checks = [list(read_jsonl(folder.validation)) for folder in (ours, wanted)]
    assert len(checks[0]) == len(checks[1])
    for check, other in zip(*checks, strict=True):
        assert check == pytest.approx(other, rel=within, abs=within)
    assert_same_weights(ours, wanted, within)


def assert_same_weights(ours: RunFolder, wanted: RunFolder, within: float = 1e-5) -> None:
    for stem in ("model", "optimizer", "teacher"):
        ends = [checkpoint.latest(folder.checkpoints) for folder in (ours, wanted)]
        assert ends[0].name == ends[1].name
        tensors, others = (load_file(end / f"{stem}.safetensors") for end in ends)
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            assert tensor.shape == others[name].shape, name
            torch.testing.assert_close(tensor, others[name], rtol=within, atol=within)


@pytest.mark.parametrize("name", ["ddp_lora", "ddp_full", "fsdp_lora", "fsdp_full", "fsdp_ema"])
def test_two_processes_give_what_one_gives(ends: Ends, name: str) -> None:
    assert ends.of(name) == [{"steps": 4, "interrupted_by": None}] * 2, ends.said
    assert_same_numbers(ends.folder_of(name, 2), ends.folder_of(name, 1))
    best, other = (load_best(ends.folder_of(name, count)) for count in (2, 1))
    assert best.keys() == other.keys()
    for key, weight in best.items():
        torch.testing.assert_close(weight, other[key], rtol=1e-5, atol=1e-5)


def load_best(folder: RunFolder) -> dict[str, torch.Tensor]:
    (file,) = folder.best.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("name", ["ddp_bf16", "fsdp_bf16"])
def test_bfloat16_in_two_stays_near_one_process(ends: Ends, name: str) -> None:
    """Shards are put together in bfloat16, where one process rounds at each product."""
    assert ends.of(name) == [{"steps": 2, "interrupted_by": None}] * 2, ends.said
    assert_same_first_step(*(rows_of(ends.folder_of(name, n))[0] for n in (2, 1)))
    saved = load_file(checkpoint.latest(ends.folder_of(name, 2).checkpoints) / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}


def assert_same_first_step(row: dict[str, Any], other: dict[str, Any]) -> None:
    for key in ("loss_nats", "kl_nats_per_token", "grad_norm"):
        assert row[key] == pytest.approx(other[key], rel=0.05), key


def test_a_signal_to_one_stops_both_at_one_step_and_one_goes_on(ends: Ends) -> None:
    """The checkpoint of two processes resumes in one."""
    assert_one_goes_on(ends, "ddp_stopped")


def assert_one_goes_on(ends: Ends, name: str) -> None:
    """Two processes stopped at one step; a single one ends as if it had made all steps."""
    assert ends.of(name) == [{"steps": 2, "interrupted_by": signal.SIGTERM}] * 2
    folder, run = open_run(ends.folder_of(name, 2).path)
    assert train(run, resume=True).steps == 4
    assert_same_numbers(folder, ends.folder_of(name, 1))


def test_a_checkpoint_of_one_resumes_in_two(ends: Ends) -> None:
    """In shards: optimiser, weights and schedule."""
    assert_two_go_on(ends, "fsdp_resumed")


def assert_two_go_on(ends: Ends, name: str) -> None:
    """Two processes took over the checkpoint of one, and end as one that made all steps."""
    assert ends.of(name) == [{"steps": 4, "interrupted_by": None}] * 2
    assert_same_numbers(ends.folder_of(name, 2), ends.folder_of(name, 1))


def test_when_one_is_killed_the_other_says_so_and_the_run_goes_on(ends: Ends) -> None:
    assert_the_rest_goes_on(ends, "ddp_killed")


def test_the_same_where_weights_are_in_shards(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A pair of its own, since who is killed does nothing afterwards."""
    runs = {"fsdp_killed": (*FULL, "launch.timeout_s=60")}
    assert_the_rest_goes_on(run_all(tmp_path_factory, runs), "fsdp_killed")


def assert_the_rest_goes_on(ends: Ends, name: str) -> None:
    """One of two was killed: the other ends with what to do, and one alone ends the run."""
    (left,) = ends.of(name)
    assert left["error"].startswith("LaunchError: process 0 of 2 lost the others")
    assert "--resume" in left["error"]
    assert ends.codes == [0, -signal.SIGKILL]
    folder, run = open_run(ends.folder_of(name, 2).path)
    assert checkpoint.latest(folder.checkpoints).name == "step-2"
    assert train(run, resume=True).steps == 4
    assert_same_numbers(folder, ends.folder_of(name, 1))


def test_only_the_main_process_speaks_and_writes(ends: Ends) -> None:
    assert "validation:" in ends.said[0] and ends.said[1] == ""
    for name in ("ddp_lora", "fsdp_full"):
        folder = ends.folder_of(name, 2)
        assert [row["step"] for row in rows_of(folder)] == [0, 1, 2, 3]
        assert not list(folder.path.rglob(".*")), "no draft is left"


# --- without a launch


def accelerator(index: int, count: int) -> Any:
    return SimpleNamespace(
        process_index=index,
        num_processes=count,
        distributed_type="MULTI_CPU",
        is_main_process=not index,
    )


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_rows_are_dealt_out_evenly_and_put_together_again(count: int) -> None:
    rows, more = list("abcdefg"), list("xyz")
    shares = [own(accelerator(i, count), rows) for i in range(count)]
    assert interleave(shares) == rows
    both = [
        len(share) + len(own(accelerator(i, count), more, after=len(rows)))
        for i, share in enumerate(shares)
    ]
    assert sum(both) == 10 and max(both) - min(both) <= 1, "the turn goes on"


def test_what_one_process_does_alone_needs_no_others() -> None:
    assert on_main(accelerator(0, 1), lambda: 7) == 7


def settings(tmp_path: Path, *overrides: str) -> Run:
    return make_run(tmp_path, tmp_path, *overrides)


def test_more_processes_than_prompts_are_refused(tmp_path: Path) -> None:
    """Four prompts a step: four processes have one each, five do not."""
    run = settings(tmp_path)
    with pytest.raises(ConfigError, match=r"5 processes share 4 prompts.*batch\.prompts_per_step"):
        check_processes(run, accelerator(0, 5), torch.float32)


def test_a_server_that_outlasts_the_others_patience_is_refused(tmp_path: Path) -> None:
    rollout = "rollout={type='vllm', servers=['http://x'], retries=9}"
    check_processes(settings(tmp_path, rollout), accelerator(0, 1), torch.float32)
    with pytest.raises(ConfigError, match=r"rollout\.retries = 9.*launch\.timeout_s"):
        check_processes(settings(tmp_path, rollout), accelerator(0, 2), torch.float32)


def test_dtypes_that_differ_between_processes_are_refused() -> None:
    check_dtypes(["float32", "float32"])
    with pytest.raises(ConfigError, match=r"bfloat16 in some .* float32 in others.*model\.dtype"):
        check_dtypes(["float32", "bfloat16"])


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("FSDP_VERSION", "1", "fsdp_version: 2"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "model.gradient_checkpointing"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: false"),
    ],
)
def test_what_fsdp_is_told_and_does_not_do_here_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    assert read_fsdp() is None
    for name, given in {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        variable: value,
    }.items():
        monkeypatch.setenv(name, given)
    with pytest.raises(ConfigError, match=said):
        read_fsdp()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("DEEPSPEED_ZERO_STAGE", "2", "zero_stage: 3"),
        ("DEEPSPEED_CONFIG_FILE", "ds.json", "leave deepspeed_config_file out"),
        ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "offload_optimizer_device: none"),
        ("DEEPSPEED_OFFLOAD_PARAM_DEVICE", "nvme", "offload_param_device: none"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", r"batch\.rows_per_forward"),
        ("GRADIENT_CLIPPING", "0.5", r"optimizer\.clip_norm"),
    ],
)
def test_what_deepspeed_is_told_and_does_not_do_here_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    assert not read_zero()
    for name, given in {
        "USE_DEEPSPEED": "true",
        "DEEPSPEED_ZERO_STAGE": "3",
        variable: value,
    }.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", given)
    with pytest.raises(ConfigError, match=said):
        read_zero()


def test_deepspeed_with_one_process_is_refused(tmp_path: Path) -> None:
    """Nothing would be cut."""
    with pytest.raises(ConfigError, match="one process"):
        check_processes(settings(tmp_path), accelerator(0, 1), torch.float32, by_zero=True)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_that_are_shipped_are_understood(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By accelerate's launcher, which hands them over as it does here, and then by us."""
    command = ["--config_file", str(path), "--module", "opcd", "train", "run.toml"]
    told = launcher_takes(command)
    assert (told.num_processes, told.module, told.mixed_precision) == (8, True, "no")
    by_zero = path.stem == "zero3"
    assert told.use_deepspeed == by_zero
    if by_zero:
        told.deepspeed_fields_from_accelerate_config = ""
    env = prepare_deepspeed_cmd_env(told)[1] if by_zero else prepare_multi_gpu_env(told)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    found = read_fsdp()
    assert (found is not None) == (path.stem == "fsdp2")
    assert found is None or found.reshard_after_forward is True
    if by_zero and find_spec("deepspeed") is None:
        with pytest.raises(ConfigError, match="not installed: pip install"):
            read_zero()
    else:
        assert read_zero() == by_zero


def launcher_takes(command: Sequence[str]) -> Any:
    """What accelerate's launcher makes of a command line and the config that it names."""
    return _validate_launch_command(launch_command_parser().parse_args(command))[0]


def written_commands() -> list[str]:
    """The commands of docs/scale.md that `accelerate launch` begins."""
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8").replace("\\\n", " ")
    places = {"RANK": "1", "ADDRESS": "10.0.0.1", "...": ""}
    for place, value in places.items():
        text = text.replace(place, value)
    return [line for line in text.splitlines() if line.startswith("    accelerate launch ")]


@pytest.mark.parametrize("command", written_commands())
def test_the_commands_of_the_guide_can_be_launched(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate takes their flags, and the recipe of the guide's own table their overrides."""
    monkeypatch.chdir(ROOT)
    told = launcher_takes(shlex.split(command)[2:])
    prepare_multi_gpu_env(told)
    several = told.num_machines > 1
    assert (told.nproc_per_node, told.module) == ("8", True)
    assert not several or (told.nnodes, told.node_rank) == ("2", 1)
    program, verb, run, *overrides = told.training_script, *told.training_script_args
    assert (program, verb, run) == ("opcd", "train", "run.toml")
    config = load_config(ROOT / "recipes" / "support_desk" / run, overrides)
    assert (config.model.tuning.type == "full") == ("full" in command)


def test_a_moving_teacher_of_all_weights_is_refused_in_shards(tmp_path: Path) -> None:
    tables = ('model.tuning={type="full"}', 'teacher={type="ema"}')
    with pytest.raises(ConfigError, match="launch without FSDP"):
        check_shardable(settings(tmp_path, *tables))
    check_shardable(settings(tmp_path, 'teacher={type="ema"}'))
    with pytest.raises(ConfigError, match="DeepSpeed"):
        check_shardable(settings(tmp_path, 'teacher={type="ema"}'), by_zero=True)
    check_shardable(settings(tmp_path), by_zero=True)


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """Another one would be taken without a word."""
    from opcd.launch import build_accelerator

    missing = "cuda" if torch.backends.mps.is_available() else "mps"
    with pytest.raises(ConfigError, match=f"model.device = '{missing}', but torch finds none"):
        build_accelerator(settings(tmp_path, f"model.device={missing}"))


def test_a_precision_that_accelerate_would_force_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opcd.launch import build_accelerator

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ConfigError, match=r"mixed_precision is 'fp16'.*model\.dtype"):
        build_accelerator(settings(tmp_path))
