"""Our kernels in another library's place for a time: what several can ask for at once, and each can end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

__all__ = ["Acceleration", "Place"]


class Place:
    """A place in another library where our kernels stand while at least one acceleration goes on.

    `put` puts them there and returns what takes them away again.
    """

    def __init__(self, put: Callable[[], Callable[[], None]]) -> None:
        self._put = put
        self._lock = threading.Lock()
        self._active: list[Acceleration] = []
        self._take_away: Callable[[], None] | None = None

    def begin(self, acceleration: Acceleration) -> None:
        """Put our kernels there, if they are not."""
        with self._lock:
            if acceleration not in self._active:
                if self._take_away is None:
                    self._take_away = self._put()
                self._active.append(acceleration)

    def end(self, acceleration: Acceleration) -> None:
        """Take our kernels away, if no other acceleration goes on."""
        with self._lock:
            if acceleration in self._active:
                self._active.remove(acceleration)
                if not self._active and self._take_away is not None:
                    self._take_away()
                    self._take_away = None


class Acceleration:
    """What the functions `accelerate_...` return: `undo()` ends it, and so does leaving its `with` block.

    Another `with` begins it again.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        place.begin(self)

    def undo(self) -> None:
        """Give the library its own kernels back, if no other acceleration of it goes on. Doing it twice does nothing."""
        self._place.end(self)

    def __enter__(self) -> Acceleration:
        self._place.begin(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.undo()
