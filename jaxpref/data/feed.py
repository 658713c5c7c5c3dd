"""Batches transferred to the devices while the previous step is still running."""

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

from jaxpref.data.batch import PreferenceBatch

AHEAD = 2
"""Batches on the devices in addition to the one in use."""


class Stream(Protocol):
    """Where the batches of a training loop come from."""

    def await_state(self, state: Any) -> None:
        """Waits until the state has what the next `draw` reads of it.

        The time is that of the step before, and not a wait for data.
        """
        ...

    def draw(self, state: Any) -> PreferenceBatch:
        """The next batch, on the devices; it may depend on the state."""
        ...

    def get_state(self) -> Any:
        """The position after the last batch drawn, as a JSON value."""
        ...

    def state_before(self) -> Any:
        """The position before the last batch drawn; None if it does not say which."""
        ...

    def metrics(self) -> dict[str, float]:
        """What to log of the last batch drawn, besides the metrics of its step."""
        ...

    def evaluate(self, state: Any) -> dict[str, float]:
        """Metrics of an evaluation besides those of held-out pairs."""
        ...

    def close(self) -> None:
        """Releases what draws the batches."""
        ...


class Feed:
    """Transfers batches in a separate thread, up to `AHEAD` beyond the one in use.

    `get_state` is the position after the last batch returned, however far ahead the
    thread is: a checkpoint of step N restores to batch N + 1.
    """

    def __init__(self, batches: Any, place: Callable[[Any], Any]):
        """Does not start the thread, which starts with the first `draw`.

        Args:
          batches: an iterator with `get_state()`; nothing else may draw from it.
          place: puts a batch on the devices, such as `to_global` with its mesh.
        """
        self._batches, self._place = batches, place
        self._before = self._state = batches.get_state()
        # The thread holds one more batch while the queue is full.
        self._placed: queue.Queue = queue.Queue(maxsize=AHEAD - 1)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._ended: BaseException | None = None

    def await_state(self, state: Any) -> None:
        """Does nothing: batches do not depend on the state."""

    def draw(self, state: Any = None) -> PreferenceBatch:
        """The next batch, on the devices; `state` is ignored.

        Raises:
          Exception: whatever the batches raised; raised again by every later call.
        """
        del state
        if self._ended is not None:
            raise self._ended
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        batch, state, error = self._placed.get()
        if error is not None:
            self._ended = error
            raise error
        self._before, self._state = self._state, state
        return batch

    def get_state(self) -> Any:
        """The position after the last batch returned."""
        return self._state

    def state_before(self) -> Any:
        """The position before the last batch returned."""
        return self._before

    def metrics(self) -> dict[str, float]:
        """Nothing: the step describes its batch."""
        return {}

    def evaluate(self, state: Any) -> dict[str, float]:
        """Nothing: the held-out records are scored like those of the batches."""
        del state
        return {}

    def close(self) -> None:
        """Ends the thread and any processes of the batches."""
        self._stop.set()
        self._ended = self._ended or StopIteration()
        if self._thread is not None:
            self._thread.join()
        if hasattr(self._batches, "close"):
            self._batches.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                placed = self._place(next(self._batches))
                found = (placed, self._batches.get_state(), None)
            except BaseException as error:
                found = (None, None, error)
            while not self._stop.is_set():
                try:
                    self._placed.put(found, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if found[2] is not None:
                return
