"""Snapshots of the state that a call may change, restored before the call is made again."""

import torch
from torch import nn

from varify.graph.reruns import random_state, set_random_state

# Buffers with at most this many elements (counters, running means) are saved even if no recorded call wrote to them.
_SMALL = 2**12


class Snapshots:
    """The places where a network stores what a call may change, looked up once for all snapshots.

    Large buffers are included only if a recorded call wrote to them: cloning each of them in every call would be slow.
    """

    def __init__(self, network: nn.Module, written: set[str]) -> None:
        own = [vars(module) for module in network.modules()]
        self.tables = [module["_buffers"] for module in own if module["_buffers"]]
        self.buffers = [
            (table, key)
            for path, module in network.named_modules()
            for table in [module._buffers]
            for key, b in table.items()
            if b is not None and (b.numel() <= _SMALL or f"{path}.{key}".removeprefix(".") in written)
        ]
        public = [(module, key, value) for module in own for key, value in module.items() if key[0] != "_"]
        self.containers = [(module, key) for module, key, value in public if type(value) in (list, dict)]
        tensors = (*network.parameters(), *network.buffers())
        self.devices = [torch.device("cpu"), *{t.device for t in tensors if t.is_cuda}]

    def take(self) -> "Snapshot":
        """A snapshot of the state now."""
        return Snapshot(self)


class Snapshot:
    """Buffers, lists and dicts of modules, and random states, as they were before a call."""

    def __init__(self, of: Snapshots) -> None:
        self._tables = [(table, dict(table)) for table in of.tables]
        buffers = {id(b): b for table, key in of.buffers if (b := table.get(key)) is not None}
        self._values = [(buffer, buffer.clone()) for buffer in buffers.values()]
        containers = [value for module, key in of.containers if type(value := module.get(key)) in (list, dict)]
        self._lists = [(value, list(value)) for value in containers if type(value) is list]
        self._dicts = [(value, dict(value)) for value in containers if type(value) is dict]
        self._states = [(device, random_state(device)) for device in of.devices]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore all of it."""
        for table, before in (*self._tables, *self._dicts):
            table.clear()
            table.update(before)
        for items, saved in self._lists:
            items[:] = saved
        for buffer, value in self._values:
            buffer.copy_(value)
        for device, state in self._states:
            set_random_state(device, state)
