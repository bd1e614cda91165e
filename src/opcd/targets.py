"""Users' own functions, named in TOML as `package.module:function`."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opcd.errors import ConfigError


def resolve(target: str) -> Callable[..., Any]:
    """Import the function that `package.module:function` names; the working directory counts.

    Raises:
        ConfigError: the string has another form, or names nothing that can be called.
    """
    module_name, colon, function_name = target.partition(":")
    if not colon or not module_name or not function_name:
        raise ConfigError(f"target = {target!r} names no function; write package.module:function")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"target = {target!r} cannot be imported ({error}); install its package or start "
            "opcd in the folder where it lies"
        ) from error
    if not callable(function):
        raise ConfigError(f"target = {target!r} is not a function; name one")
    return function
