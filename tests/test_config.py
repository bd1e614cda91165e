"""A run as one typed tree: load, override, refuse, dump, compare."""

import json
from pathlib import Path

import pytest

from opcd.config import Run, check_files, differences, dump_config, inputs, load_config
from opcd.config.training import Frozen, TopK
from opcd.errors import ConfigError, ContextError, TaskError
from worlds import RUN, write_run


def load(folder: Path, *overrides: str, top: str = "", tables: str = "") -> Run:
    return load_config(write_run(folder, top, tables), overrides)


def system_path(run: Run) -> Path:
    assert run.context.type == "system_prompt"
    return run.context.path


def train_paths(run: Run) -> list[Path | str]:
    assert run.tasks
    sources = run.tasks.train
    return [s.path for s in sources if isinstance(s, inputs.Jsonl | inputs.HubDataset)]


# --- loading


def test_a_small_file_gets_the_defaults_of_the_design(tmp_path: Path) -> None:
    """Exact reverse KL, the adapter-off teacher, LoRA and a third of anchors."""
    run = load(tmp_path)
    assert (run.name, run.steps, run.seed, run.out) == ("desk", 4, 0, Path("runs"))
    assert (run.loss.direction, run.loss.support.type) == ("reverse_kl", "exact")
    assert (run.teacher.type, run.model.tuning.type) == ("adapter_off", "lora")
    assert (run.tasks_per_step, run.anchors_per_step) == (12, 6)
    assert run.rendering.over_long == "error"


def test_paths_are_taken_from_the_files_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe can be started from anywhere."""
    write_run(tmp_path / "recipe")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = load_config("../recipe/run.toml")
    assert system_path(run) == tmp_path / "recipe" / "system.md"
    assert train_paths(run) == [tmp_path / "recipe" / "train.jsonl"]
    check_files(run)


def test_a_model_folder_beside_the_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    table = '[model]\npath = "tiny"\n'
    assert load(tmp_path, tables=table).model.path == str(tmp_path / "tiny")


def test_a_hub_id_and_an_alias_are_left_alone(tmp_path: Path) -> None:
    assert load(tmp_path).model.path == "smollm2-135m"
    assert load(tmp_path, tables='[model]\npath = "org/name"').model.path == "org/name"


def test_a_gguf_beside_the_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").touch()
    table = '[model]\npath = "tiny.gguf"\n'
    assert load(tmp_path, tables=table).model.path == str(tmp_path / "tiny.gguf")


def test_a_teachers_folder_beside_the_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    run = load(tmp_path, tables='[teacher]\ntype = "frozen"\npath = "big"\n')
    assert isinstance(run.teacher, Frozen)
    assert run.teacher.path == str(tmp_path / "big")


def test_the_name_defaults_to_the_folders(tmp_path: Path) -> None:
    path = write_run(tmp_path / "shop", toml=RUN.replace('name = "desk"', ""))
    assert load_config(path).name == "shop"


def test_the_name_defaults_to_the_working_directorys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "shop", toml=RUN.replace('name = "desk"', ""))
    monkeypatch.chdir(tmp_path / "shop")
    assert load_config("run.toml").name == "shop"


def test_a_split_may_be_a_path_a_table_or_a_list(tmp_path: Path) -> None:
    mixed = '["a.jsonl", { path = "b.jsonl", rows = 5 }, { type = "hf", path = "org/set" }]'
    path = write_run(tmp_path, toml=RUN.replace('"train.jsonl"', mixed))
    run = load_config(path)
    assert train_paths(run) == [tmp_path / "a.jsonl", tmp_path / "b.jsonl", "org/set"]
    assert run.tasks and [(s.type, s.rows) for s in run.tasks.train] == [
        ("jsonl", None),
        ("jsonl", 5),
        ("hf", None),
    ]


# --- overrides


def test_overrides_reach_nested_keys_and_new_tables(tmp_path: Path) -> None:
    run = load(tmp_path, "steps=9", "loss.warmup.steps=3", "model.tuning={type='lora', rank=8}")
    assert run.steps == 9
    assert run.loss.warmup is not None
    assert run.loss.warmup.steps == 3
    assert run.model.tuning.type == "lora"
    assert run.model.tuning.rank == 8


def test_overrides_take_lists_booleans_and_plain_text(tmp_path: Path) -> None:
    run = load(
        tmp_path,
        'tracking.trackers=["tensorboard"]',
        "optimizer.betas=[0.5, 0.75]",
        "model.gradient_checkpointing=true",
        "name=other run",
    )
    assert run.tracking.trackers == ("tensorboard",)
    assert run.optimizer.betas == (0.5, 0.75)
    assert run.model.gradient_checkpointing is True
    assert run.name == "other run"


def test_white_space_around_an_override_is_left_out(tmp_path: Path) -> None:
    assert load(tmp_path, "evaluation.select_by = valid").evaluation.select_by == "valid"


def test_a_later_override_wins(tmp_path: Path) -> None:
    assert load(tmp_path, "steps=5", "steps=6").steps == 6


def test_a_value_may_hold_an_equals_sign(tmp_path: Path) -> None:
    assert load(tmp_path, "name=a=b").name == "a=b"


def test_an_override_may_replace_the_kind_of_a_table(tmp_path: Path) -> None:
    run = load(tmp_path, 'loss.support={type="top_k", k=16}')
    assert run.loss.support == TopK(k=16)


def test_paths_of_overrides_are_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to the working directory, as a shell completes them."""
    path = write_run(tmp_path / "recipe")
    monkeypatch.chdir(tmp_path)
    assert system_path(load_config(path, ["context.path=mine.md"])).resolve() == (
        tmp_path / "mine.md"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", r"'steps' is not an override; write key\.path=value"),
        ("=3", r"is not an override"),
        ("steps.more=3", r"steps is a value, not a table"),
        ("loss.directon=jsd", r"loss\.directon: there is no such key"),
        ("loss.support.k=16", r"loss\.support: .* write loss\.support\.type = \.\.\. beside it"),
        ("steps=0", r"steps = 0: .*greater than or equal to 1"),
        ("loss.direction=forward", r"loss\.direction = 'forward'"),
        ('model.tuning.targets=["a", 3]', r"model\.tuning\.targets\.1 = 3"),
        ("optimizer.betas=[0.9]", r"optimizer\.betas\.1: it is missing"),
        ("grader.type=exakt", r"grader\.type = 'exakt': there is no such kind; .*'exact'"),
    ],
)
def test_a_bad_override_is_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, override)


# --- refusals


@pytest.mark.parametrize(
    ("top", "tables", "message"),
    [
        ("stepz = 3", "", r"run\.toml:\n  stepz: there is no such key; did you mean steps\?"),
        ("xyzzy = 3", "", r"xyzzy: there is no such key; check its spelling and its table"),
        ("learning_rate = 1", "", r"learning_rate: .*did you mean optimizer\.lr\?"),
        (
            "",
            "[rollout]\nmax_new_token = 1",
            r"  rollout\.max_new_token: .*max_new_tokens\?",
        ),
        ("", '[rollout]\ntype = "vllm"', r"  rollout\.servers: it is missing, and has no default"),
        ("", "[loss]\ntemprature = 1", r"loss\.temprature: there is no such key"),
        (
            "",
            "[model.tuning]\ntype='lora'\nrnk = 8",
            r"  model\.tuning\.rnk: .*model\.tuning\.rank\?",
        ),
        ("", "[teacher]\ntype = 'oracle'", r"teacher\.type = 'oracle': .*'adapter_off'"),
        ("", "[loss]\nsupport = {type = 'top_k', k = 0}", r"loss\.support\.k = 0"),
    ],
)
def test_an_unknown_key_or_value_is_named(
    tmp_path: Path, top: str, tables: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, top=top, tables=tables)


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, top="stepz = 3", tables="[batch]\nprompts_per_step = -1")
    assert "stepz" in str(caught.value)
    assert "batch.prompts_per_step = -1" in str(caught.value)


REMOTE = "teacher={type='remote', servers='http://x'}"
OF_TEACHER = "loss.support={type='top_k', of='teacher'}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([REMOTE], r"exact but teacher\.type is remote.*write"),
        ([REMOTE, OF_TEACHER, "loss.temperature=2.0"], r"temperature = 2\.0 but .* = 1\.0"),
        ([REMOTE, "loss.support={type='top_k', of='union'}"], r'"union" but .*of = "teacher"'),
        (
            ["teacher={type='remote', servers='http://x', ask='student_top_k'}", OF_TEACHER],
            r'ask = "student_top_k" but .*of = "student"',
        ),
        (
            ["teacher={type='remote', servers='http://x', ask='sampled'}", OF_TEACHER],
            r'ask = "sampled" tells one.*type = "sampled"',
        ),
        (["rollout={type='vllm', servers=['localhost:8000']}"], r"no address of a server.*write"),
        (["rollout={type='vllm', servers=['http://x:port']}"], r"no address of a server.*write"),
        (["rollout={type='vllm', servers=['http://x:99999']}"], r"no address of a server.*write"),
        (["teacher={type='remote', servers='http://[::1'}"], r"no address of a server.*write"),
        (["rollout={type='vllm', servers=['http://me:pw@x']}"], r"no address of a server.*key_env"),
        (["rollout={type='vllm', servers=[]}"], r"  rollout\.servers"),
        (["rollout={type='vllm'}"], r"  rollout\.servers"),
        (
            ["rollout.servers=['http://x']"],
            r"no such key with rollout\.type = 'hf'; another",
        ),
        (["teacher={type='ema', decay=0.0}"], r"teacher\.decay = 0\.0: .*greater than 0"),
        (["teacher={type='ema', decay=1.0}"], r"teacher\.decay = 1\.0: .*less than 1"),
        (["teacher={type='ema', decay=1.5}"], r"teacher\.decay = 1\.5: .*less than 1"),
        (["model.tuning={type='full'}"], r"adapter_off but model\.tuning is full.*frozen"),
        (["loss.support={type='sampled'}", "loss.direction=forward_kl"], "sampled estimates"),
        (["loss.support={type='sampled'}", "loss.warmup={}"], "sampled estimates the reverse"),
        (
            ["anchor.share=0.99"],
            r"anchor\.share = 0\.99 and anchor\.context_return = 0\.0 leave no task among 18",
        ),
        (["anchor.share=1.0"], r"anchor\.share = 1\.0"),
        (["tasks.validation_share=0.1"], "validation and validation_share are both set"),
        (["tasks.test_share=0.1"], "test and test_share are both set"),
        (
            ["tasks={train='a.jsonl', test_share=0.5, validation_share=0.5}"],
            "leave no rows to train on",
        ),
        (
            ["context={type='document', path='a.md', template='x'}"],
            r"template lacks \{document\}.*write for example",
        ),
        (
            ["context={type='document', path='a', placement='user', template='{document}'}"],
            r"template lacks \{prompt\}",
        ),
    ],
)
def test_impossible_pairs_are_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, *overrides)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "overrides",
    [
        [REMOTE, OF_TEACHER],
        ["rollout={type='vllm', servers='https://x:8000/v1', max_new_tokens=3}"],
        ["teacher={type='ema', decay=0.001}"],
        ["teacher={type='ema', decay=0.999}"],
        ["model.tuning={type='full'}", "teacher.type=frozen"],
        ["loss.support={type='sampled'}"],
        ["anchor.share=0.0"],
        ["batch.prompts_per_step=1", "anchor.share=0.2"],
    ],
)
def test_possible_pairs_are_not_refused(tmp_path: Path, overrides: list[str]) -> None:
    load(tmp_path, *overrides)


def test_a_run_never_changes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path).steps = 5  # type: ignore


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.toml", "steps = = 3", r"run\.toml: not valid TOML: .*line 1"),
        ("config.json", "{", r"config\.json: not valid JSON"),
        (
            "run.toml",
            "steps = 3\nsedd = 1",
            r"run\.toml:\n  sedd: there is no such key",
        ),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml': there is no such file"):
        load_config(tmp_path / "none.toml")


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    path.write_bytes(path.read_bytes() + "# Grüße".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"run\.toml"):
        load_config(path)


def test_a_json_file_that_is_no_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_config(tmp_path / "config.json")


# --- dump and compare


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["loss.support={type='top_k', k=8, tail='drop'}", "loss.warmup={}", "out=elsewhere"],
        ["teacher={type='ema', decay=0.5}", "tasks.group_by=template", "grader={type='contains'}"],
        ["grader={type='json', keys={a=[true, 1, 'x', 2.5], b=[]}}"],
    ],
)
def test_a_dumped_run_loads_to_an_equal_one(tmp_path: Path, overrides: list[str]) -> None:
    """`config.json` in a run folder is the run."""
    run = load(tmp_path / "recipe", *overrides)
    dumped = tmp_path / "config.json"
    dumped.write_text(dump_config(run), encoding="utf-8")
    assert load_config(dumped) == run
    assert differences(load_config(dumped), run) == []


def test_a_dumped_run_keeps_paths_given_as_overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run started with `anchor.path=mine.json` can be neither resumed nor evaluated."""
    path = write_run(tmp_path / "recipe")
    monkeypatch.chdir(tmp_path)
    run = load_config(path, ["anchor.path=mine.json"])
    dumped = tmp_path / "runs" / "desk" / "config.json"
    dumped.parent.mkdir(parents=True)
    dumped.write_text(dump_config(run), encoding="utf-8")
    found = load_config(dumped).anchor.path
    assert found is not None
    assert found.resolve() == tmp_path / "mine.json"


def test_the_dump_names_every_key(tmp_path: Path) -> None:
    """A result depends on defaults too, and these may change."""
    tree = json.loads(dump_config(load(tmp_path)))
    assert tree.keys() == Run.model_fields.keys()
    assert tree["optimizer"]["lr"] == 5e-4


def test_differences_are_named_by_key(tmp_path: Path) -> None:
    ours = load(tmp_path, "steps=5", "loss.temperature=2.0")
    theirs = load(tmp_path, "teacher={type='ema'}")
    assert differences(ours, theirs) == [
        "loss.temperature: 2.0 -> 1.0",
        "steps: 5 -> 4",
        "teacher.decay: None -> 0.99",
        "teacher.type: 'adapter_off' -> 'ema'",
    ]
    assert differences(ours, ours) == []


# --- files


def test_a_missing_context_file_is_named(tmp_path: Path) -> None:
    run = load(tmp_path)
    (tmp_path / "system.md").unlink()
    with pytest.raises(
        ContextError, match=r"context\.path = '.*system\.md': there is no such file"
    ):
        check_files(run)


@pytest.mark.parametrize("text", ["", "  \n\n"])
def test_an_empty_context_file_is_named(tmp_path: Path, text: str) -> None:
    run = load(tmp_path)
    (tmp_path / "system.md").write_text(text)
    with pytest.raises(ContextError, match=r"context\.path = '.*system\.md': the file is empty"):
        check_files(run)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_missing_task_file_is_named(tmp_path: Path, split: str) -> None:
    run = load(tmp_path)
    (tmp_path / f"{split}.jsonl").unlink()
    with pytest.raises(TaskError, match=rf"tasks\.{split}\.0\.path = .*there is no such file"):
        check_files(run)


def test_a_missing_anchor_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"anchor\.path = .*none\.json': there is no such file"):
        check_files(load(tmp_path, f"anchor.path={tmp_path / 'none.json'}"))


def test_a_refused_address_is_not_repeated(tmp_path: Path) -> None:
    """It may hold a password."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "rollout={type='vllm', servers=['http://me:hunter2@x']}")
    assert "hunter2" not in str(caught.value)
