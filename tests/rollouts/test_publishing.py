"""`opcd.rollouts.publishing`: weights reach every server whole, and old ones leave."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opcd.adapters import tune
from opcd.config.training import Full, Lora
from opcd.errors import ServerError
from opcd.rollouts.publishing import AdapterPublisher, Shelf, WeightPublisher
from opcd.weights import load_model
from tiny import LORA, full_disk, nudge, tuned
from vllm_fake import FakeVllm, failing, impatient, serving
from worlds import tokenizer


@pytest.fixture
def fake(tiny_model_path: Path) -> Iterator[FakeVllm]:
    with serving(FakeVllm(tiny_model_path, tokenizer())) as running:
        yield running


def adapters_for(
    fake: FakeVllm, path: Path, folder: Path | None = None, tuning: Lora = LORA
) -> AdapterPublisher:
    student = tune(load_model(str(path), torch.float32), tuning, 0)
    return AdapterPublisher(
        [impatient(fake.url)], "base", student, Shelf(folder), lambda act: act()
    )


def weights_for(fake: FakeVllm, path: Path, folder: Path) -> WeightPublisher:
    student = tune(load_model(str(path), torch.float32), Full(), 0)
    servers = [impatient(fake.url)]
    return WeightPublisher(servers, "base", student, str(path), Shelf(folder), lambda act: act())


def test_only_the_newest_adapter_is_loaded_and_kept(
    fake: FakeVllm, tiny_model_path: Path, tmp_path: Path
) -> None:
    publisher = adapters_for(fake, tiny_model_path, tmp_path)
    for version in range(3):
        publisher.publish("student", version)
    assert [*fake.adapters] == [path.name for path in tmp_path.iterdir()] == [publisher.model]


def test_what_is_published_is_not_sent_again(fake: FakeVllm, tiny_model_path: Path) -> None:
    publisher = adapters_for(fake, tiny_model_path)
    for policy in ("student", "base", "student"):
        publisher.publish(policy, 0)
    assert fake.paths_asked() == ["/v1/load_lora_adapter"]
    assert publisher.model in fake.adapters
    nudge(publisher._student)  # weights may be loaded between two steps
    publisher.publish("student", 0)
    assert fake.paths_asked().count("/v1/load_lora_adapter") == 2


def test_a_load_whose_answer_was_lost_is_a_load(fake: FakeVllm, tiny_model_path: Path) -> None:
    def lost(own: FakeVllm) -> tuple[int, bytes]:
        own.answer(*own.asked[-1])
        return 500, b"{}"

    fake.faults["/v1/load_lora_adapter"] = [lost]
    publisher = adapters_for(fake, tiny_model_path)
    publisher.publish("student", 0)
    assert [*fake.adapters] == [publisher.model]


def test_an_adapter_is_there_whole_or_not_at_all(
    fake: FakeVllm, tiny_model_path: Path, tmp_path: Path
) -> None:
    gone = tmp_path / "a file"
    gone.write_text("")
    with pytest.raises(ServerError, match=r"could not be written.*rollout\.weights_folder"):
        adapters_for(fake, tiny_model_path, gone).publish("student", 0)
    assert fake.asked == []


@pytest.mark.parametrize("tuning", [LORA, Full()], ids=["lora", "full"])
def test_a_disk_that_fills_up_midway_leaves_no_half(tmp_path: Path, tuning: Lora | Full) -> None:
    """Nothing that a server could load, and room again; the next attempt goes through."""
    shelf, student = Shelf(tmp_path), tuned(tuning)
    with full_disk(), pytest.raises(ServerError, match=r"could not be written.*--resume"):
        shelf.put(student)
    assert list(tmp_path.iterdir()) == []
    assert [shelf.put(student)] == list(tmp_path.iterdir())


def test_weights_have_their_name_once_they_are_all_there(tmp_path: Path) -> None:
    """A server that looks meanwhile sees no folder by the name that it will be told."""
    student, seen = tuned(LORA), list[str]()
    write = student.save_pretrained

    def watched(folder: Path, **more: Any) -> None:
        write(folder, **more)
        seen.extend(path.name for path in tmp_path.iterdir())

    student.save_pretrained = watched
    put = Shelf(tmp_path).put(student)
    assert seen == [f".{put.name}"]
    modes = {file.name: file.stat().st_mode & 0o777 for file in put.iterdir()}
    assert modes.keys() >= {"adapter_config.json", "adapter_model.safetensors"}
    assert set(modes.values()) == {0o644}, "a server may be another user's"


@pytest.mark.parametrize(
    ("change", "way"),
    [
        ({"max_lora_rank": 2}, r"--max-lora-rank of at least model\.tuning\.rank"),
        ({"takes_adapters": False}, r"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
    ],
)
def test_why_an_adapter_is_not_taken_is_explained(
    fake: FakeVllm, tiny_model_path: Path, change: dict[str, object], way: str
) -> None:
    for name, value in change.items():
        setattr(fake, name, value)
    with pytest.raises(ServerError, match=way):
        adapters_for(fake, tiny_model_path).publish("student", 0)
    assert fake.paths_asked() == ["/v1/load_lora_adapter"], "asking again does not help"


def test_a_server_without_adapters_is_not_asked_again(
    fake: FakeVllm, tiny_model_path: Path
) -> None:
    why = "Call to add_lora method failed: Worker failed with error 'LoRA is not enabled.'"
    fake.faults["/v1/load_lora_adapter"] = [failing(500, why)]
    with pytest.raises(ServerError, match="start it with --enable-lora"):
        adapters_for(fake, tiny_model_path).publish("student", 0)


def test_a_folder_that_the_server_does_not_see_is_named(
    fake: FakeVllm, tiny_model_path: Path
) -> None:
    fake.faults["/v1/load_lora_adapter"] = [failing(404, "Loading failed: No adapter found for /x")]
    with pytest.raises(ServerError, match=r"cannot read .*rollout\.weights_folder"):
        adapters_for(fake, tiny_model_path).publish("student", 0)


def test_weights_are_replaced_between_pause_and_resume(
    fake: FakeVllm, tiny_model_path: Path, tmp_path: Path
) -> None:
    publisher = weights_for(fake, tiny_model_path, tmp_path)
    nudge(publisher._student)
    publisher.publish("student", 0)
    order = ["/pause?mode=wait", "/collective_rpc", "/update_weight_version", "/resume"]
    assert fake.paths_asked() == order
    served = dict(fake.model.named_parameters())
    for name, weight in publisher._student.named_parameters():
        assert torch.equal(served[name], weight), name


def test_policies_take_turns_on_one_server(
    fake: FakeVllm, tiny_model_path: Path, tmp_path: Path
) -> None:
    publisher = weights_for(fake, tiny_model_path, tmp_path)
    for policy in ("student", "base", "student", "student"):
        publisher.publish(policy, 0)
    assert fake.paths_asked().count("/collective_rpc") == 3
    assert len(list(tmp_path.iterdir())) == 1, "the student's weights are written once"
    assert not publisher.has_lost(publisher._servers[0])
    fake.restart()
    assert publisher.has_lost(publisher._servers[0])


def test_a_server_without_its_weight_api_is_explained(
    fake: FakeVllm, tiny_model_path: Path, tmp_path: Path
) -> None:
    fake.dev_mode = False
    with pytest.raises(ServerError, match=r"VLLM_SERVER_DEV_MODE=1"):
        weights_for(fake, tiny_model_path, tmp_path).publish("student", 0)


def test_a_server_answers_again_after_an_update_that_failed(
    fake: FakeVllm, tiny_model_path: Path, tmp_path: Path
) -> None:
    fake.faults["/collective_rpc"] = [failing(500)] * 9
    with pytest.raises(ServerError):
        weights_for(fake, tiny_model_path, tmp_path).publish("student", 0)
    assert fake.paths_asked()[-1] == "/resume"
