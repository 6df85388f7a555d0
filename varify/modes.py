"""What state a variational module is in for the moment, also for many threads: held in eval, drawing in eval."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class Modes:
    """One module's. What one thread enters holds for all, until the last one leaves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_eval = self._sampling = 0
        self._to_train: list[nn.Module] = []  # again when the last one leaves

    @property
    def draws(self) -> bool:
        """Whether weights are drawn in eval, too."""
        return self._sampling > 0

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Within, `draws` is true."""
        with self._lock:
            self._sampling += 1
        try:
            yield
        finally:
            with self._lock:
                self._sampling -= 1

    @contextmanager
    def in_eval(self, module: nn.Module) -> Iterator[None]:
        """Within, all parts of `module` are in eval mode; as they were afterwards, also after an exception."""
        with self._lock:
            if not self._in_eval:
                self._to_train = [part for part in module.modules() if part.training]
                for part in self._to_train:
                    part.training = False
            self._in_eval += 1
        try:
            yield
        finally:
            with self._lock:
                self._in_eval -= 1
                if not self._in_eval:
                    for part in self._to_train:
                        part.training = True
                    self._to_train = []

    def train_later(self, module: nn.Module, mode: bool) -> bool:
        """Whether the module is held in eval; if so, `mode` is what it will be in afterwards."""
        with self._lock:
            if self._in_eval:
                self._to_train = list(module.modules()) if mode else []
            return self._in_eval > 0
