"""Who writes what is to be learned from a trace: the student itself, another model, or a server."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from opcd.config.section import Count, NonNegative, Positive, Section
from opcd.config.servers import check_key_name, is_address


class Student(Section):
    """The run's own model writes, as it is at the start of the round."""

    type: Literal["student"] = "student"


class Local(Section):
    """Another model on this machine writes."""

    type: Literal["local"] = "local"
    path: str
    """A folder, an alias or a hub id, as in `model.path`."""


class Endpoint(Section):
    """A server writes, asked in OpenAI's protocol at `/v1/chat/completions`."""

    type: Literal["endpoint"] = "endpoint"
    url: str
    """Such as `http://localhost:8000/v1`; no user name or key in it."""
    model: str
    """The name the server knows it by."""
    key_env: str | None = None
    """The environment variable that holds the key; the key itself is never written anywhere."""
    timeout_s: Positive = 120.0
    """How long one answer may take."""
    retries: NonNegative = 4
    """How often a prompt is sent again after a failure that may pass."""
    parallel: Count = 8
    """Prompts under way together."""

    @model_validator(mode="before")
    @classmethod
    def _holds_no_secret(cls, data: Any) -> Any:
        # Before the fields: their own errors would show what was written, which may be the key.
        if not isinstance(data, Mapping):
            return data
        if not is_address(str(data.get("url"))):
            raise ValueError(
                "url must begin with http:// or https:// and hold no user name, key or query; "
                'write for example url = "http://localhost:8000/v1", and key_env for the key'
            )
        check_key_name(data.get("key_env"), "OPENAI_API_KEY")
        return data


ExtractorConfig = Annotated[Student | Local | Endpoint, Field(discriminator="type")]
