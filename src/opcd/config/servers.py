"""Servers of models, as vLLM runs them: where they are, and how patiently they are asked."""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from opcd.config.section import Count, NonNegative, Positive, Section
from opcd.errors import ConfigError

LONGEST_PAUSE_S = 30.0


def pause_s(failures: int) -> float:
    """How long to wait before something is asked again that has failed so many times."""
    return min(2.0 ** (failures - 1), LONGEST_PAUSE_S)


def is_address(url: str) -> bool:
    """Whether a server may be at an address, which holds no user name, key or query."""
    if not re.fullmatch(r"https?://[^\s@?#/]+(/[^\s@?#]*)?", url):
        return False
    try:
        found = urlsplit(url)
        return bool(found.hostname) and found.port != 0
    except ValueError:  # a port that is no number or too large, half a bracket
        return False


def check_key_name(key_env: Any, example: str) -> None:
    """Refuse what is no name of an environment variable, without showing it: it may be the key.

    Raises:
        ValueError: it is none.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", str(key_env or "unset"), re.ASCII):
        raise ValueError(
            "key_env is no name of an environment variable; put the key into one and write "
            f'its name, for example key_env = "{example}"'
        )


class Servers(Section):
    """One server or many of the same model; requests are spread over them."""

    servers: Annotated[tuple[str, ...], Field(min_length=1)]
    """Such as `["http://localhost:8000"]`; no user name or key in it."""
    model: str | None = None
    """The name the servers know the model by; needed only where they serve several."""
    key_env: str | None = None
    """The environment variable that holds the key; the key itself is never written anywhere."""
    timeout_s: Positive = 240.0
    """How long one answer may take. With all retries it has to be less than what other processes
    wait (`launch.timeout_s`), if there are any."""
    retries: NonNegative = 6
    """How often a request is sent again after a failure that may pass, 1, 2, 4 ... 30 s later."""
    parallel: Count = 64
    """Requests under way together at each server."""

    @property
    def longest_wait_s(self) -> float:
        """How long a request may be under way until it is given up, retries and pauses included."""
        return self.timeout_s * (self.retries + 1) + sum(map(pause_s, range(1, self.retries + 1)))

    @model_validator(mode="before")
    @classmethod
    def _holds_no_secret(cls, data: Any) -> Any:
        # Before the fields: their own errors would show what was written, which may be the key.
        if not isinstance(data, Mapping):
            return data
        listed = data.get("servers", ())
        urls = (listed,) if isinstance(listed, str) else tuple(listed)
        if not all(is_address(str(url)) for url in urls):
            raise ValueError(
                "servers holds something that is no address of a server: each must begin with "
                "http:// or https:// and have no user name, key or query; write for example "
                'servers = ["http://localhost:8000"], and key_env for a key'
            )
        check_key_name(data.get("key_env"), "VLLM_API_KEY")
        return {**data, "servers": urls} if urls else data


class Remote(Servers):
    """A model on a server scores the responses, with as much as the server can tell of it."""

    type: Literal["remote"] = "remote"
    ask: Literal["auto", "student_top_k", "teacher_top_k", "sampled"] = "auto"
    """What is asked of each token: the log-probabilities of the student's own likeliest tokens
    (`prompt_logprob_token_ids`, on a GPU), of the teacher's (`prompt_logprobs`), or of the sampled
    token alone. `auto` takes the first of these that `loss.support` wants and the server can do."""


def check_waits(tables: Mapping[str, Any], others_wait_s: float) -> None:
    """Refuse servers on which one process would wait longer than the others wait for it.

    Args:
        tables: those of a run that may name servers.
        others_wait_s: `launch.timeout_s`.

    Raises:
        ConfigError: naming the settings to change.
    """
    for name, table in tables.items():
        if isinstance(table, Servers) and table.longest_wait_s >= others_wait_s:
            raise ConfigError(
                f"{name}.timeout_s = {table.timeout_s:g} and {name}.retries = {table.retries} let "
                f"a process wait {table.longest_wait_s:,.0f} s for a server in trouble, but the "
                f"other processes take it for gone after launch.timeout_s = {others_wait_s:g}, and "
                f"no checkpoint would be written; lower the two, or write launch.timeout_s = "
                f"{math.ceil(table.longest_wait_s / 600) * 600 + 600}"
            )
