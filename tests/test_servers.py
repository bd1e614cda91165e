"""`opcd.servers`: asked again after what may pass, never for ever; checked before they are used."""

import os
import signal
import threading
import time

import pytest

from opcd.config.servers import Remote, check_waits
from opcd.errors import ConfigError, ModelError, ServerError
from opcd.interruption import Interruption
from opcd.servers import (
    Refusal,
    Server,
    check_room,
    check_tokenizer,
    connect,
    find_model,
    spread,
)
from vllm_fake import FakeVllm, failing, garbage, impatient, serving, slow
from worlds import tokenizer


@pytest.fixture
def fake(tiny_model_path):
    with serving(FakeVllm(tiny_model_path, tokenizer())) as running:
        yield running


def test_what_may_pass_is_asked_again_and_counted(fake: FakeVllm) -> None:
    fake.faults["/v1/models"] = [failing(500), failing(503)]
    server = impatient(fake.url)
    assert find_model(server, None).model == "base"
    troubles = server.take_troubles()
    assert [t.split(": ")[1].split(" (")[0] for t in troubles] == ["HTTP 500", "HTTP 503"]
    assert server.take_troubles() == []


@pytest.mark.parametrize("reply", ["null", "[1]", '{"data": "x"}', '{"data": [null]}', "[" * 10**5])
def test_an_answer_of_another_shape_is_nonsense(fake: FakeVllm, reply: str) -> None:
    """Whatever reading it stumbles over: the run ends with a checkpoint, not with a traceback."""
    fake.faults["/v1/models"] = [lambda _: (200, reply.encode())]
    server = impatient(fake.url)
    assert find_model(server, None).model == "base"
    assert "nonsense in answer to /v1/models" in server.take_troubles()[0]


@pytest.mark.parametrize("fault", [failing(500), garbage])
def test_no_trouble_is_waited_out_for_ever(fake: FakeVllm, fault) -> None:
    fake.faults["/v1/models"] = [fault] * 9
    with pytest.raises(ServerError, match=r"and so 3 times.*--resume.*rollout\.retries"):
        find_model(impatient(fake.url, retries=2), None)
    assert len(fake.asked) == 3


def test_who_waits_says_for_what_and_once(
    fake: FakeVllm, capsys: pytest.CaptureFixture[str]
) -> None:
    """Many requests wait for one server: one line; short waits are shown with their step alone."""
    server = impatient(fake.url, retries=3)
    for _ in range(2):
        fake.faults["/v1/models"] = [failing(503)] * 3
        find_model(server, None)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].endswith("asked again in 2 s") and "503" in lines[0]


def test_pauses_double_and_end_at_thirty_seconds(fake: FakeVllm) -> None:
    pauses: list[float] = []
    fake.faults["/v1/models"] = [failing(500)] * 9
    server = Server(fake.url, "rollout", retries=7, pause=pauses.append)
    with pytest.raises(ServerError):
        find_model(server, None)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_a_slow_server_is_given_up_in_time(fake: FakeVllm) -> None:
    fake.faults["/v1/models"] = [slow(0.4)]
    server = impatient(fake.url, timeout_s=0.1)
    assert find_model(server, None).model == "base"
    assert "no answer within 0.1 s (rollout.timeout_s)" in server.take_troubles()[0]


def test_a_server_that_is_gone_is_an_error_of_the_run() -> None:
    with pytest.raises(ServerError, match=r"no connection.*that rollout\.servers has its address"):
        impatient("http://127.0.0.1:9", retries=1).ask("/v1/models")


def test_an_address_that_has_answered_is_not_doubted(fake: FakeVllm) -> None:
    server = impatient(fake.url, retries=0)
    server.ask("/v1/models")
    fake.faults["/v1/models"] = [failing(500)]
    with pytest.raises(ServerError) as caught:
        server.ask("/v1/models")
    assert "rollout.servers" not in str(caught.value)


def test_a_refusal_is_not_asked_again(fake: FakeVllm) -> None:
    with pytest.raises(Refusal) as caught:
        impatient(fake.url).ask("/v1/completions", {"model": "other", "prompt": [5]})
    assert (caught.value.status, len(fake.asked)) == (404, 1)


def test_a_host_that_is_none_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"no such host.*correct rollout\.servers"):
        impatient("http://no-such-host.invalid").ask("/v1/models")


def test_a_key_is_sent_and_never_shown(fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPCD_TEST_KEY", "hunter2")
    (server,) = connect(Remote(servers=(f"{fake.url}/v1",), key_env="OPCD_TEST_KEY"), "teacher")
    assert server.url == fake.url
    fake.faults["/v1/models"] = [failing(401, "no such key: hunter2")]
    with pytest.raises(ConfigError, match=r"teacher\.key_env names") as caught:
        server.ask("/v1/models")
    assert "hunter2" not in f"{caught.value} {server!r}"


def test_a_key_that_is_not_set_is_named() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.key_env = 'NO_SUCH_KEY'"):
        connect(Remote(servers=("http://x",), key_env="NO_SUCH_KEY"), "teacher")


def test_things_asked_are_spread_and_come_back_in_order() -> None:
    servers = [Server(f"http://{name}", "rollout") for name in "ab"]
    found = spread(servers, range(5), 2, lambda server, n: (server.url[-1], n))
    assert found == [("a", 0), ("b", 1), ("a", 2), ("b", 3), ("a", 4)]


def test_the_first_failure_ends_it_once_what_is_under_way_is_done() -> None:
    sent: list[int] = []
    begun, ended = threading.Event(), threading.Event()

    def ask(_: Server, thing: int) -> int:
        sent.append(thing)
        if thing == 0:
            begun.wait(20)
            raise ServerError("gone")
        begun.set()
        ended.wait(0.2)
        ended.set()
        return thing

    with pytest.raises(ServerError, match="gone"):
        spread([Server("http://a", "rollout")], range(9), 2, ask)
    assert ended.is_set() and len(sent) < 9


def test_a_second_ctrl_c_waits_for_no_retries() -> None:
    """Nor does the program's end: what a server that is gone is still asked is left behind."""
    begun, hold = threading.Event(), threading.Event()
    ended: list[int] = []

    def ask(_: Server, thing: int) -> None:
        begun.set()
        hold.wait(20)
        ended.append(thing)

    interruption = Interruption()

    def press() -> None:
        begun.wait(20)
        os.kill(os.getpid(), signal.SIGINT)
        while not interruption.signals:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = set(threading.enumerate())
    pressing = threading.Thread(target=press)
    with interruption.listening(), pytest.raises(KeyboardInterrupt):
        pressing.start()
        spread([Server("http://a", "rollout")], range(4), 2, ask)
    assert not ended
    pressing.join()
    left = set(threading.enumerate()) - before
    assert left and all(thread.daemon for thread in left)
    hold.set()
    for thread in left:
        thread.join()


def test_a_wait_for_a_server_must_end_before_the_other_processes_give_up() -> None:
    """With the pauses between retries; what is written instead is enough."""
    patient = Remote(servers=("http://x",), timeout_s=300.0)
    assert patient.longest_wait_s == 7 * 300 + 1 + 2 + 4 + 8 + 16 + 30
    tables = {"rollout": None, "teacher": patient}
    with pytest.raises(
        ConfigError, match=r"teacher\.timeout_s = 300.* launch\.timeout_s = "
    ) as told:
        check_waits(tables, 1800.0)
    check_waits(tables, float(str(told.value).rpartition(" ")[2]))
    check_waits({"teacher": Remote(servers=("http://x",))}, 1800.0)


def test_another_model_is_refused_by_name(fake: FakeVllm) -> None:
    with pytest.raises(ConfigError, match=r"serves \['base'\], not 'other'.*rollout\.model"):
        find_model(impatient(fake.url), "other")


def test_adapters_are_no_models_to_choose_from(fake: FakeVllm) -> None:
    fake.adapters["left-behind"] = None
    assert find_model(impatient(fake.url), None).model == "base"


def test_another_tokenizer_is_refused(fake: FakeVllm) -> None:
    fake.tokenizer = tokenizer(specials=("<x>", "<y>", "<z>"))
    check = (impatient(fake.url), "base", tokenizer(), ["What is the capital?"])
    with pytest.raises(ModelError, match=r"another tokenizer.*rollout\.servers"):
        check_tokenizer(*check)
    fake.tokenizer = tokenizer()
    check_tokenizer(*check)


def test_a_run_that_does_not_fit_the_server_is_refused(fake: FakeVllm) -> None:
    fake.max_model_len = 20
    server = impatient(fake.url)
    check_room(server, find_model(server, None), 15, 5)
    with pytest.raises(ConfigError, match=r"holds 20 tokens.*--max-model-len 21 or more"):
        check_room(server, find_model(server, None), 16, 5)
