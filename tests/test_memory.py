"""`opcd.memory`: arithmetic that agrees with real models, and that shards what is cut."""

import json
from pathlib import Path

import pytest
import torch

from opcd.adapters import trainable, tune
from opcd.checking import memory_facts
from opcd.config import Run, load_config
from opcd.config.training import Full, Lora
from opcd.errors import ConfigError
from opcd.memory import (
    SHAPES,
    Layout,
    Part,
    adapter_parameters,
    checkpoint_bytes,
    held,
    memory_lines,
    parts_of,
    peak_bytes,
    peak_loading,
    read_shape,
    shape_of,
)
from tiny import make_run
from worlds import tiny_llama, write_jsonl

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
RECIPE = Path(__file__).parents[1] / "recipes" / "support_desk" / "run.toml"


def run_of(*overrides: str) -> Run:
    return load_config(RECIPE, [f"model.path={LLAMA}", *overrides])


FULL = ('model.tuning={type="full"}', 'teacher={type="frozen"}')


def sizes(parts: list[Part]) -> dict[str, float]:
    return {part.name: part.bytes for part in parts}


@pytest.mark.parametrize(
    ("name", "billions"),
    [(LLAMA, 8.03), ("Qwen/Qwen3-8B", 8.19), ("Qwen/Qwen3-1.7B", 1.72), ("smollm2-135m", 0.1345)],
)
def test_known_shapes_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    assert SHAPES[name].parameters / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("last", [None, 2])
def test_parameters_are_those_of_a_real_model(tmp_path: Path, tied: bool, last: int | None) -> None:
    """But for its norms; an adapter's to the last one."""
    model = tiny_llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert shape.parameters == sum(p.numel() for p in model.parameters()) - norms
    lora = Lora(rank=4, last_layers=last)
    moved = sum(p.numel() for p in trainable(tune(model, lora, 0)).values())
    run = make_run(tmp_path, tmp_path)
    run = run.model_copy(update={"model": run.model.model_copy(update={"tuning": lora})})
    assert adapter_parameters(run, shape) == moved
    full = run.model_copy(update={"model": run.model.model_copy(update={"tuning": Full()})})
    assert adapter_parameters(full, shape) == 0


def test_full_tuning_takes_16_bytes_a_parameter_and_two_for_each_copy() -> None:
    found, many = sizes(held(run_of(*FULL), Layout())), SHAPES[LLAMA].parameters
    trained = ("weights, float32", "gradients", "AdamW")
    assert sum(found[name] for name in trained) == 16 * many
    assert found["copy that answers"] == found["base model"] == 2 * many


def test_shards_are_a_share_of_what_is_cut_and_nothing_else() -> None:
    """What answers is whole in every process, and so is a frozen head."""
    one = sizes(held(run_of(*FULL), Layout()))
    eighth = sizes(held(run_of(*FULL), Layout(processes=8, sharded=True)))
    for name in ("weights, float32", "gradients", "AdamW"):
        assert eighth[name] == one[name] / 8
    assert eighth["copy that answers"] == one["copy that answers"]
    shape = SHAPES[LLAMA]
    outside = shape.parameters - shape.of_layers
    assert eighth["base model"] == 2 * (shape.of_layers / 8 + outside)
    spread = sizes(held(run_of(*FULL), Layout(processes=8)))
    buckets = {"gradients on their way (DDP)": one["gradients"]}
    assert spread == one | buckets, "DDP cuts nothing, and copies gradients to sum them"
    whole = peak_loading(run_of(*FULL), Layout(processes=8, sharded=True))
    assert whole == one["weights, float32"] + one["base model"]


def test_float32_needs_no_second_head() -> None:
    found = sizes(held(run_of(), Layout(element=4)))
    assert "heads in float32" not in found
    assert found["weights"] == 4 * SHAPES[LLAMA].parameters


def test_an_own_teacher_counts_with_its_head() -> None:
    other = 'teacher={type="frozen", path="Qwen/Qwen3-8B"}'
    found, plain = (sizes(held(run_of(*more), Layout())) for more in ([other], []))
    assert found["teacher"] == 2 * SHAPES["Qwen/Qwen3-8B"].parameters
    extra = 4 * SHAPES["Qwen/Qwen3-8B"].embedding
    assert found["heads in float32"] - plain["heads in float32"] == extra


def test_the_peak_is_what_is_held_and_the_largest_that_passes() -> None:
    parts = [Part("a", 5.0), Part("b", 2.0, passing=True), Part("c", 3.0, passing=True)]
    assert peak_bytes(parts) == 8.0


def test_checkpointed_layers_and_fewer_rows_take_less() -> None:
    at = Layout(prompt_tokens=500)

    def activations(*overrides: str) -> float:
        return sizes(parts_of(run_of(*overrides), at))["training a portion: activations"]

    assert activations("model.gradient_checkpointing=true") < 0.5 * activations()
    assert activations("batch.rows_per_forward=2") < 0.5 * activations()


def test_a_shape_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nobody/nothing.*config\.json"):
        shape_of("nobody/nothing")
    with pytest.raises(ConfigError, match="hidden_size"):
        read_shape({"num_attention_heads": 4, "num_hidden_layers": 2}, str(tmp_path))


def test_a_shape_inside_another_models_configuration_is_found() -> None:
    inner = {
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "vocab_size": 100,
    }
    shape = read_shape({"text_config": inner}, "a")
    assert (shape.key_heads, shape.head_width, shape.tied) == (4, 16, False)


def test_lengths_are_those_of_the_longest_prompt_and_its_context(tmp_path: Path) -> None:
    run = make_run(tmp_path, tmp_path, system="Be brief. " * 40)
    tiny_llama().save_pretrained(tmp_path)
    facts = memory_facts(run, processes=2, sharded=True)
    assert "a context of 101," in facts[-1]
    assert any("while loading" in line for line in facts)
    assert "each of 2 processes" in facts[0] and "32 bits" in facts[0]


def test_a_context_counts_where_the_rows_are_far_away(tmp_path: Path) -> None:
    """Rows of a hub are read when the run starts; the file of their context is here."""
    tiny_llama().save_pretrained(tmp_path)
    far = 'tasks={train={type="hf", path="far/away"}}'
    facts = memory_facts(make_run(tmp_path, tmp_path, far, system="Be brief. " * 40))
    assert "prompts of 250 tokens, a context of 101," in facts[-1]


def test_every_context_that_prompts_share_counts(tmp_path: Path) -> None:
    """Ten experiences are ten caches; a row's own text that no other row has is none."""
    tiny_llama().save_pretrained(tmp_path)
    files = [tmp_path / f"{number}.md" for number in range(10)]
    for file in files:
        file.write_text(f"{file.stem}: be brief. " * 40, encoding="utf-8")
    table = {"path": list(map(str, files)), "placement": "system", "template": "{experience}"}
    told = ", ".join(f"{key}={value!r}" for key, value in {"type": "experience", **table}.items())
    pool = make_run(tmp_path, tmp_path, f"context={{{told}}}")
    assert "10 contexts of 1310 together" in memory_facts(pool)[-1]
    rows = [{"prompt": f"{i}?", "context": f"{'ab!'[min(i // 2, 2)]} {'c' * 78}"} for i in range(5)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    column = ("context={type='column'}", f"tasks={{train='{tmp_path}/rows.jsonl'}}")
    assert "2 contexts of 44 together" in memory_facts(make_run(tmp_path, tmp_path, *column))[-1]


def test_contexts_take_no_more_than_their_budget() -> None:
    at = Layout(context_tokens=10**6)
    found = [sizes(held(run_of(f"batch.prefix_gib={n}"), at)) for n in (2, 1000)]
    taken = [one["contexts, each read once"] for one in found]
    assert taken == [2 * 2**30, 10**6 * SHAPES[LLAMA].kv_elements * 2]


def test_a_mixture_of_experts_is_refused_rather_than_counted_as_one(tmp_path: Path) -> None:
    config = tiny_llama().config.to_dict() | {"num_experts": 8}
    with pytest.raises(ConfigError, match="mixture of experts"):
        read_shape(config, str(tmp_path))


def test_lines_add_up() -> None:
    lines = memory_lines(run_of(), Layout())
    shown = {line.split(" GB  ")[1]: float(line.split(" GB")[0]) for line in lines[1:]}
    at_times = max(value for name, value in shown.items() if name.startswith("at times"))
    apart = ("at times", "together", "in the memory of the host")
    always = sum(value for name, value in shown.items() if not name.startswith(apart))
    (together,) = (value for name, value in shown.items() if name.startswith("together"))
    assert together == pytest.approx(always + at_times, abs=0.05)


def test_a_config_of_transformers_reads_as_the_model_does(tmp_path: Path) -> None:
    tiny_llama(torch_dtype=torch.float32).config.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert read_shape(found, "x") == shape_of(str(tmp_path))


def test_a_checkpoint_is_whole_in_the_main_process_alone() -> None:
    """Weights and two moments of what is trained, in the host's memory; on a device, one weight."""
    many = SHAPES[LLAMA].parameters
    assert checkpoint_bytes(run_of(*FULL)) == 12 * many
    assert (
        checkpoint_bytes(
            run_of(FULL[0], 'teacher={type="ema"}', "loss.warmup={steps=1, teacher_fraction=0.0}")
        )
        == 16 * many
    )
    assert checkpoint_bytes(run_of()) == 12 * adapter_parameters(run_of(), SHAPES[LLAMA])
    sharded = sizes(parts_of(run_of(*FULL), Layout(processes=8, sharded=True)))
    assert sharded["a checkpoint: one weight made whole"] == 4 * SHAPES[LLAMA].embedding
    assert (
        f"{12 * many / 1e9:.2f} GB  in the memory of the host"
        in memory_lines(run_of(*FULL), Layout())[-1]
    )


def test_the_dtype_that_was_taken_is_said_and_how_to_set_it() -> None:
    said = {dtype: memory_facts(run_of(f"model.dtype={dtype}")) for dtype in ("auto", "float32")}
    assert "16 bits" in said["auto"][0] and "32 bits" in said["float32"][0]
    assert any("taken for bfloat16" in fact and "float32 shows" in fact for fact in said["auto"])
    assert not any("taken for bfloat16" in fact for fact in said["float32"])
