"""On-policy context distillation: train a prompt into a model's weights.

    import opcd

    run = opcd.load_config("recipes/support_desk/run.toml")
    outcome = opcd.train(run)
    print(opcd.evaluate_run(outcome.folder.path).summary)

Names are imported when they are first used, so that `import opcd` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opcd.assembly import Parts, assemble
    from opcd.checking import check_run
    from opcd.config import Run, load_config
    from opcd.distill import StepReport, Trainer
    from opcd.divergence import token_stats
    from opcd.errors import OpcdError
    from opcd.evaluation import Evaluation, evaluate
    from opcd.exporting import export_run
    from opcd.programs import evaluate_run, sample_run
    from opcd.rollouts.engine import Prompt, RolloutEngine, Sampling
    from opcd.rollouts.scripted import ScriptedEngine
    from opcd.teachers import Teacher
    from opcd.training import Outcome, prepare, train
    from opcd.types import Context, Message, PromptPair, Rollout, Score, Task

HOMES = {
    "Context": "types",
    "Evaluation": "evaluation",
    "Message": "types",
    "OpcdError": "errors",
    "Outcome": "training",
    "Parts": "assembly",
    "Prompt": "rollouts.engine",
    "PromptPair": "types",
    "Rollout": "types",
    "RolloutEngine": "rollouts.engine",
    "Run": "config",
    "Sampling": "rollouts.engine",
    "Score": "types",
    "ScriptedEngine": "rollouts.scripted",
    "StepReport": "distill",
    "Task": "types",
    "Teacher": "teachers",
    "Trainer": "distill",
    "assemble": "assembly",
    "check_run": "checking",
    "evaluate": "evaluation",
    "evaluate_run": "programs",
    "export_run": "exporting",
    "load_config": "config",
    "prepare": "training",
    "sample_run": "programs",
    "token_stats": "divergence",
    "train": "training",
}
"""Public name -> the module it lives in."""

__all__ = [
    "Context",
    "Evaluation",
    "Message",
    "OpcdError",
    "Outcome",
    "Parts",
    "Prompt",
    "PromptPair",
    "Rollout",
    "RolloutEngine",
    "Run",
    "Sampling",
    "Score",
    "ScriptedEngine",
    "StepReport",
    "Task",
    "Teacher",
    "Trainer",
    "assemble",
    "check_run",
    "evaluate",
    "evaluate_run",
    "export_run",
    "load_config",
    "prepare",
    "sample_run",
    "token_stats",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'opcd' has no attribute {name!r}")
    return getattr(importlib.import_module(f"opcd.{HOMES[name]}"), name)
