"""Who samples the responses, and how."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from opcd.config.section import Count, Positive, Section, Share
from opcd.config.servers import Servers


class Responses(Section):
    """How responses are sampled, whoever does it."""

    max_new_tokens: Count = 64
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    batch_rows: Count = 64
    """Sequences decoded together."""
    teacher_fraction: Share = 0.0
    """Share of the prompts answered by their teachers, tasks by the one that sees the context and
    anchors by the base model: 1 is off-policy."""
    max_truncated_fraction: Share = 1.0
    """Stop the run where more responses of a step than this are cut by `max_new_tokens`."""


class Rollout(Responses):
    """The process that trains samples them too, with transformers."""

    type: Literal["hf"] = "hf"


class VllmRollout(Responses, Servers):
    """vLLM servers sample them; each step they get the student's new weights."""

    type: Literal["vllm"] = "vllm"
    weights_folder: Path | None = None
    """Where new weights are put for the servers to read, under this very path: for servers on other
    machines, a folder that they share. Default: the system's folder for temporary files."""
    max_logprob_difference_nats: Positive = 0.2
    """Stop the run where the servers' log-probabilities of a step's sampled tokens are on average
    further than this from the trainer's: they answer with other weights. The same weights in
    bfloat16 are 0.05 apart (docs/vllm.md)."""


RolloutConfig = Annotated[Rollout | VllmRollout, Field(discriminator="type")]
