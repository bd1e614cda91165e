"""A request to stop, by Ctrl-C or SIGTERM, that waits for the end of the step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from opcd.launch import most


@dataclass
class Interruption:
    """Whether somebody asked the run to stop, by Ctrl-C or SIGTERM."""

    signals: list[int] = field(default_factory=list)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals as requests to stop after the step; a second one stops at once."""
        before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def heard(self, accelerator: Any) -> bool:
        """Whether any process was asked to stop; they all hear of it at the same step."""
        asked = int(most(accelerator, [max(self.signals, default=0)])[0])
        if asked and not self.signals:
            self.signals.append(asked)
        return bool(asked)

    def _note(self, number: int, _: Any) -> None:
        if self.signals:
            raise KeyboardInterrupt
        self.signals.append(number)
