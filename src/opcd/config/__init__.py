"""A whole run as one typed tree: load, override, check, dump."""

from opcd.config import inputs, training
from opcd.config.files import (
    check_files,
    derive,
    differences,
    dump_config,
    flat_differences,
    load_config,
    read_rates,
)
from opcd.config.run import Run

__all__ = [
    "Run",
    "check_files",
    "derive",
    "differences",
    "dump_config",
    "flat_differences",
    "inputs",
    "load_config",
    "read_rates",
    "training",
]
