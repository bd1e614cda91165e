"""Every exception that opcd raises on purpose.

Each message says what was found, why it is wrong, and what to write instead.
The tree, with the exit code that the command line gives it:

    OpcdError
    |-- InputError (also a ValueError)       exit 2: the input is wrong, nothing was started
    |   |-- ConfigError                      a key, a value or a pair of values in the TOML
    |   |-- TaskError                        a row of a task file, or two files together
    |   |-- ContextError                     the context file, column or examples
    |   |-- RenderingError                   chat template, thinking mode
    |   |   `-- OverLongError                a prompt that does not fit
    |   |-- ModelError                       weights, tokenizer, vocabularies that differ
    |   |-- RunFolderError                   a run folder that exists, or lacks what is asked of it
    |   |-- CostsError                       a price, a batch size or a package of a comparison
    |   |-- AuthoringError                   instructions, examples or output of opcd prompts
    |   |-- HarnessError                     a task of opcd harness, or the package it takes
    |   |-- GameError                        boards of a text game, or the package it takes
    |   `-- TraceError                       a trajectory store, or a row of it
    `-- RunError (also a RuntimeError)       exit 1: the run failed, what was saved stays
        |-- CheckpointError                  a checkpoint that cannot be written or trusted
        |-- DivergedError                    loss or gradient not finite too often
        |-- RolloutError                     an engine gave responses that cannot be trained on
        |-- ExtractorError                   a model that was to write items cannot be asked
        |-- NothingLearnedError              no experience is seen to help, so none is baked in
        |-- ExportError                      an exported model that does not answer like its run
        `-- LaunchError                      one of several processes lost the others
"""


class OpcdError(Exception):
    """Base of all deliberate errors; `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(OpcdError, ValueError):
    """The input is wrong; nothing was started and nothing was lost."""

    exit_code = 2


class ConfigError(InputError):
    """A key, a value or a pair of values of the run configuration is wrong."""


class TaskError(InputError):
    """A task row is malformed, or splits share rows."""


class ContextError(InputError):
    """The context is missing, empty or malformed."""


class RenderingError(InputError):
    """A conversation cannot be rendered to token ids the way the run needs it."""


class OverLongError(RenderingError):
    """A prompt has more tokens than fit before the response."""


class ModelError(InputError):
    """A model or tokenizer cannot be loaded, or two of them do not fit each other."""


class RunFolderError(InputError):
    """A run folder exists already, or lacks what a command asks of it."""


class CostsError(InputError):
    """A price or a batch size means nothing, or a comparison lacks its package."""


class AuthoringError(InputError):
    """What `opcd prompts` is to write from, or where it is to write, cannot be used."""


class HarnessError(InputError):
    """What `opcd harness` is to run is unknown, cannot be loaded, or lacks its package."""


class GameError(InputError):
    """A text game, or boards of it, cannot be made as asked, or lack their package."""


class TraceError(InputError):
    """A trajectory store has a row that is no trace, or nothing that is needed of it."""


class RunError(OpcdError, RuntimeError):
    """The run failed after it had started."""


class CheckpointError(RunError):
    """A checkpoint could not be written, or cannot be trusted."""


class DivergedError(RunError):
    """Loss or gradients were not finite more often than the configuration allows."""


class RolloutError(RunError):
    """An engine returned responses that cannot be trained on."""


class ExtractorError(RunError):
    """The model that was to write items of experience cannot be asked."""


class NothingLearnedError(RunError):
    """No experience is seen to help, so that there is nothing to bake in."""


class ExportError(RunError):
    """An exported model does not answer like the run it came from."""


class LaunchError(RunError):
    """One of several processes was left alone by the others."""
