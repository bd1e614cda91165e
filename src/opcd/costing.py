"""What a finished run's context costs a request, and what baking it in cost: `costs.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from opcd import weights
from opcd.adapters import merged_weights, share_frozen
from opcd.alternatives import Alternatives, measure_alternatives
from opcd.assembly import Parts
from opcd.attention import why_no_prefix
from opcd.costs import (
    KvShape,
    Prices,
    Request,
    StepPrompts,
    break_even,
    kv_rows,
    mean_tokens,
    prompt_figures,
    training_rows,
)
from opcd.drawing import draw_pairs
from opcd.errors import CostsError, RunFolderError
from opcd.items import Item
from opcd.openings import MIN_PREFIX_TOKENS, Openings
from opcd.prefix_cache import read_prefix
from opcd.programs import open_baked, read_evaluation
from opcd.rendering import common_prefix
from opcd.responses import rows_of
from opcd.runs import RunFolder, open_run, read_best, read_jsonl, write_json
from opcd.timing import REPETITIONS, Served, describe_machine, time_conditions
from opcd.types import Origin

Row = dict[str, Any]
NO_ALTERNATIVES = Alternatives()
BUSY = 2.0
"""A slowest repetition this many times the median says that the machine did other things."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """The tokens that all test prompts with the context begin with, and whether to keep them."""

    ids: tuple[int, ...]
    why_not: str | None
    """The reason why a server would not read them once; `None` if it would."""

    @property
    def tokens(self) -> int:
        """How many tokens a request finds read already."""
        return 0 if self.why_not else len(self.ids)


def cost_run(
    path: Path,
    prices: Prices,
    batch_sizes: Sequence[int],
    alternatives: Alternatives = NO_ALTERNATIVES,
) -> Row:
    """Measure what a run's context costs, and write it to `costs.json`.

    Args:
        path: the run's folder.
        prices: with which to compute the break-even.
        batch_sizes: requests answered together, when times are taken.
        alternatives: what else to measure on the test rows.

    Raises:
        InputError: the path is no run, or lacks best weights, metrics or a test split; or what
            an alternative takes is missing; or the run plays a game.
    """
    alternatives.check()
    folder, config = open_run(path)
    if config.game:
        raise CostsError(
            f"{path} plays a game, whose prompts grow from turn to turn and depend on how it is "
            "played, so it has no request whose cost could be measured; give a run with [tasks]"
        )
    read_best(folder)
    metrics = read_metrics(folder)
    _, parts, _ = open_baked(path)
    items = rows_of(parts, "test", parts.config.evaluation.test_rows)
    base, baked = plain_models(parts)
    sharing = find_sharing(base, items)
    requests = mean_requests(items, sharing, response_tokens(path, metrics))
    training = count_training(parts, metrics, config.teacher.type == "remote")
    prompt = prompt_figures([item.pair for item in items], len(sharing.ids))
    served = serve(base, baked, items, sharing)
    tokens = parts.config.rollout.max_new_tokens
    said = notes(prices, base, sharing, parts)
    if read_evaluation(path, "test") is None:
        said.append(("kv_cache", "answers are as long as in training; opcd evaluate measures them"))
    found: Row = {
        "prompt_tokens": prompt,
        "prefill": time_conditions(served, batch_sizes, tokens),
        "kv_cache": kv_rows(kv_shape(base), requests),
        "training": training,
        "break_even": break_even(prices, requests, training[-1]["wall_s"]),
    }
    found["notes"] = [{"about": k, "note": v} for k, v in said]
    found["notes"] += _busy(found["prefill"])
    # Alternatives take minutes; what is measured by now stays if they are interrupted.
    write_json(folder.costs, found)
    if alternatives.any:
        found["alternatives"] = measure_alternatives(parts, base, items, alternatives)
        if alternatives.soft_prompt and (reason := why_no_prefix(base)):
            found["notes"].append({"about": "alternatives", "note": f"no soft prompt: {reason}"})
        write_json(folder.costs, found)
    return found


def plain_models(parts: Parts) -> tuple[Any, Any]:
    """The base model and the baked one as a server would load them: no adapter left in either."""
    config = parts.config.model
    device = parts.accelerator.device
    base, baked = (
        weights.load_model(config.path, parts.dtype, config.revision).to(device) for _ in range(2)
    )
    own = dict(baked.named_parameters())
    for name, weight in merged_weights(parts.student):
        own[name].data.copy_(weight)
    share_frozen(parts.student, baked)
    return base.requires_grad_(False), baked.requires_grad_(False)


def find_sharing(model: Any, items: Sequence[Item]) -> Sharing:
    """What a server with prefix caching would read once for all test rows."""
    prompts = [item.pair.teacher_ids for item in items]
    ids = prompts[0][: common_prefix(prompts)]
    if len(ids) < MIN_PREFIX_TOKENS:
        return Sharing(
            ids,
            f"the test prompts share their first {len(ids)} tokens only, fewer than the "
            f"{MIN_PREFIX_TOKENS} that are worth keeping",
        )
    return Sharing(ids, why_no_prefix(model))


def mean_requests(
    items: Sequence[Item], sharing: Sharing, responses: Mapping[str, Fraction]
) -> dict[str, Request]:
    """The mean request of each condition; with cached context only where it can be."""
    without, with_context = mean_tokens([item.pair for item in items])
    found = {"in_context": Request(with_context, responses["in_context"])}
    if sharing.tokens:
        shared = Request(with_context, responses["in_context"], sharing.tokens)
        found["in_context_cached"] = shared
    return found | {"baked": Request(without, responses["baked"])}


def response_tokens(path: Path, metrics: Sequence[Row]) -> dict[str, Fraction]:
    """Mean tokens of an answer with the context and baked: measured, else those of training."""
    evaluation = read_evaluation(path, "test")
    if evaluation is None:
        mean = sum(row["tokens_per_response"] for row in metrics) / len(metrics)
        return dict.fromkeys(("in_context", "baked"), Fraction(str(mean)))
    task = evaluation.summary["suites"]["task"]
    return {
        condition: Fraction(str(task[condition]["response_tokens"]["mean"]))
        for condition in ("in_context", "baked")
    }


def serve(base: Any, baked: Any, items: Sequence[Item], sharing: Sharing) -> dict[str, Served]:
    """The conditions as a server holds them."""
    with_context = [item.pair.teacher_ids for item in items]
    found = {"in_context": Served(base, with_context)}
    if sharing.tokens:
        prefix = read_prefix(base, sharing.ids)
        found["in_context_cached"] = Served(base, with_context, prefix)
    return found | {"baked": Served(baked, [item.pair.student_ids for item in items])}


def kv_shape(model: Any) -> KvShape:
    """What the model keeps of each token, from its configuration."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return KvShape(
        layers=config.num_hidden_layers,
        key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
        bytes_per_value=model.dtype.itemsize,
    )


def count_training(parts: Parts, metrics: Sequence[Row], on_server: bool) -> list[Row]:
    """Tokens and seconds of the steps that were done; their prompts are drawn once more.

    As one process draws them: several, whose shares are rounded apart, may have had the teacher
    answer a prompt more or less.

    Args:
        parts: the run.
        metrics: a row of each step.
        on_server: whether the teacher was a server, which reads each prompt whole.
    """
    steps = [StepPrompts(*draw_pairs(parts, row["step"])) for row in metrics]
    most: dict[Origin, int] = {
        "anchor": parts.config.anchor.max_new_tokens,
        "context_return": parts.config.rollout.max_new_tokens,
    }
    openings = Openings() if on_server else parts.teacher.openings
    return training_rows(steps, metrics, lambda ids: ids[: openings.of(ids)], most)


def notes(prices: Prices, model: Any, sharing: Sharing, parts: Parts) -> list[tuple[str, str]]:
    """What the figures are about, and what is left out of them."""
    machine = describe_machine(model)
    found = [
        ("prefill", f"times are {machine}: medians of {REPETITIONS}, with lowest and highest"),
        (
            "training",
            "prompts and tasks' responses are counted, other responses are at most so many; "
            "where student and teacher shared the tasks of a step, its response tokens are "
            "divided by their numbers of tasks, an estimate; loading, validation "
            "and checkpoints are in neither tokens nor seconds",
        ),
    ]
    if sharing.why_not:
        found.append(("prefill", f"in_context_cached is left out: {sharing.why_not}"))
    reason = why_no_prefix(model)
    if reason:
        found.append(("kv_cache", f"counted as if all layers kept every token, but {reason}"))
    if prices.missing:
        given = " and ".join(prices.missing)
        found.append(("break_even", f"left out; {given} would give it"))
    elif prices.cached_per_million_tokens is None and sharing.tokens:
        found.append(("break_even", "--cached-price would compare with cached prompts too"))
    if prices.output_per_million_tokens is None and not prices.missing:
        found.append(("break_even", "--output-price would count the answers; they are left out"))
    found += [("run", note) for note in parts.notes]
    return found


def read_metrics(folder: RunFolder) -> list[Row]:
    """What each training step reported.

    Raises:
        RunFolderError: nothing is there.
    """
    metrics = list(read_jsonl(folder.metrics))
    if not metrics:
        raise RunFolderError(
            f"{folder.path} has no rows in {folder.metrics.name}, so what training cost is not "
            "known; give a folder as opcd train left it"
        )
    return metrics


def _busy(rows: Sequence[Row]) -> list[Row]:
    unsteady = sum(row["prefill_wall_s_highest"] > BUSY * row["prefill_wall_s"] for row in rows)
    if not unsteady:
        return []
    return [
        {
            "about": "prefill",
            "note": f"in {unsteady} of {len(rows)} rows the slowest repetition took more than "
            f"{BUSY:g} x the median: the machine was busy with something else, measure again",
        }
    ]
