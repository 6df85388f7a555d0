"""Threads take turns at a network: many that read its parameters, or one that has put others in their place."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

_taken = threading.local()  # .writing: the turns that this thread writes in, the innermost last


class Turns:
    """One network's. A thread may enter again what it is in, and read while it writes."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers: Counter[int] = Counter()
        self._writer: int | None = None
        self._waiting = self._upgrading = 0

    @staticmethod
    def taken() -> "Turns | None":
        """Those of the network that this thread is putting weights into, if it is."""
        writing: tuple[Turns, ...] = getattr(_taken, "writing", ())
        return writing[-1] if writing else None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within, the network's parameters are its own."""
        me = threading.get_ident()
        with self._changed:
            # a reader that waits for waiting writers while it reads already would wait for itself
            self._changed.wait_for(
                lambda: self._writer in (None, me) and (not self._waiting or me in (self._writer, *self._readers))
            )
            self._readers[me] += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers[me] -= 1
                self._readers += Counter()  # forgets those at 0
                self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within, no other thread reads or writes."""
        me = threading.get_ident()
        with self._changed:
            again = self._writer == me
            if me in self._readers and self._upgrading and not again:
                raise RuntimeError("two threads that run a network at its means both ask it for draws, from within")
            self._upgrading += me in self._readers
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: self._writer in (None, me) and not set(self._readers) - {me})
            finally:
                self._waiting -= 1
                self._upgrading -= me in self._readers
            self._writer = me
        before = getattr(_taken, "writing", ())
        _taken.writing = (*before, self)
        try:
            yield
        finally:
            _taken.writing = before
            with self._changed:
                self._writer = me if again else None
                self._changed.notify_all()
