"""`opcd.interruption`: a first signal waits for the step, a second one does not."""

import os
import signal
from types import SimpleNamespace

import pytest

from opcd.interruption import Interruption

ALONE = SimpleNamespace(num_processes=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_is_only_noted(number: signal.Signals) -> None:
    interruption = Interruption()
    before = signal.getsignal(number)
    with interruption.listening():
        assert not interruption.heard(ALONE)
        os.kill(os.getpid(), number)
        assert interruption.heard(ALONE)
    assert interruption.signals == [number]
    assert signal.getsignal(number) is before


def test_a_second_signal_stops_at_once() -> None:
    interruption = Interruption()
    with interruption.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
