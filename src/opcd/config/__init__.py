"""A whole run as one typed tree: load, override, check, dump."""

from opcd.config import inputs, training
from opcd.config.run import Run, check_files, differences, dump_config, load_config

__all__ = [
    "Run",
    "check_files",
    "differences",
    "dump_config",
    "inputs",
    "load_config",
    "training",
]
