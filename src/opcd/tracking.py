"""Where a run's figures go: `metrics.jsonl`, a bar on a terminal, accelerate's trackers."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from accelerate import Accelerator
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from opcd.config import Run
from opcd.errors import ConfigError
from opcd.runs import RunFolder, append_jsonl


class Tracker:
    """Writes what a run reports; only the main process does."""

    def __init__(self, config: Run, folder: RunFolder, accelerator: Accelerator) -> None:
        """Open the accelerate trackers that the run names.

        Raises:
            ConfigError: accelerate does not know one of them, or its package is missing.
        """
        self._folder = folder
        self._accelerator = accelerator
        self._console = Console(stderr=True)
        self._main = accelerator.is_main_process
        self._bar = _progress_bar(self._console, disable=not self._main)
        self._task = self._bar.add_task("baking", total=config.steps, kl="", rate="")
        self._steps = config.steps
        if config.tracking.trackers:
            _open_trackers(config, folder, accelerator)

    def __enter__(self) -> Self:
        """Show the bar, if there is a terminal to show it on."""
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the terminal as it was, and close the trackers."""
        self._bar.stop()
        for tracker in self._accelerator.trackers:
            tracker.finish()

    def step(self, metrics: Mapping[str, Any], rollouts: Sequence[Mapping[str, Any]]) -> None:
        """One step is done."""
        if self._main:
            append_jsonl(self._folder.metrics, [metrics])
            append_jsonl(self._folder.rollouts, rollouts)
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
        self._accelerator.log(numbers, step=metrics["step"])
        self._bar.update(
            self._task,
            completed=metrics["step"] + 1,
            kl=f"KL {metrics['kl_nats_per_token']:.3f}",
            rate=f"{metrics['response_tokens'] / metrics['wall_s']:.0f} tok/s",
        )

    def validated(self, metrics: Mapping[str, Any]) -> None:
        """A validation is done."""
        if self._main:
            append_jsonl(self._folder.validation, [metrics])
        numbers = {f"validation/{k}": v for k, v in metrics.items() if k != "step"}
        self._accelerator.log(numbers, step=metrics["step"])
        measured = {k: v for k, v in metrics.items() if k != "step" and not k.startswith("rows")}
        shown = ", ".join(f"{k} {v:.3f}" for k, v in measured.items())
        self.say(f"step {metrics['step'] + 1} of {self._steps}, validation: {shown}")

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if self._main:
            self._console.print(text, highlight=False, markup=False)


def _progress_bar(console: Console, disable: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[kl]}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=disable or not console.is_terminal,
    )


def _open_trackers(config: Run, folder: RunFolder, accelerator: Accelerator) -> None:
    try:
        accelerator.project_configuration.set_directories(str(folder.path))
        # It takes the names when it is made, before there is a run's folder to log into.
        opened: Any = accelerator
        opened.log_with = list(config.tracking.trackers)
        accelerator.init_trackers("opcd", init_kwargs={})
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"tracking.trackers = {list(config.tracking.trackers)}: {error}; install the "
            "tracker's package or remove its name"
        ) from error
