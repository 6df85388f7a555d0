"""What a call that is made again must find as it was."""

import torch
from torch import nn

from varify.graph.reruns import random_state, set_random_state

# Buffers of so many elements at most, such as counters and running means, are kept though no call has written them yet.
_FEW = 2**12


class Snapshots:
    """Where a network keeps what a call may change, looked up once: tables of buffers, lists and dicts of modules."""

    def __init__(self, network: nn.Module, written: set[str]) -> None:
        own = [vars(module) for module in network.modules()]
        self.tables = [module["_buffers"] for module in own if module["_buffers"]]
        self.buffers = [
            (table, key)
            for path, module in network.named_modules()
            for table in [module._buffers]
            for key, b in table.items()
            if b is not None and (b.numel() <= _FEW or f"{path}.{key}".removeprefix(".") in written)
        ]
        held = [(module, key, value) for module in own for key, value in module.items() if key[0] != "_"]
        self.places = [(module, key) for module, key, value in held if type(value) in (list, dict)]
        tensors = (*network.parameters(), *network.buffers())
        self.devices = [torch.device("cpu"), *{t.device for t in tensors if t.is_cuda}]

    def take(self) -> "Snapshot":
        """All of that as it is now."""
        return Snapshot(self)


class Snapshot:
    """What a call that is repeated must find as it was: buffers, lists and dicts of modules, and the random numbers."""

    def __init__(self, of: Snapshots) -> None:
        self._tables = [(table, dict(table)) for table in of.tables]
        buffers = {id(b): b for table, key in of.buffers if (b := table.get(key)) is not None}
        self._values = [(buffer, buffer.clone()) for buffer in buffers.values()]
        held = [value for module, key in of.places if type(value := module.get(key)) in (list, dict)]
        self._lists = [(value, list(value)) for value in held if type(value) is list]
        self._dicts = [(value, dict(value)) for value in held if type(value) is dict]
        self._states = [(device, random_state(device)) for device in of.devices]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        for table, was in (*self._tables, *self._dicts):
            table.clear()
            table.update(was)
        for items, had in self._lists:
            items[:] = had
        for buffer, value in self._values:
            buffer.copy_(value)
        for device, state in self._states:
            set_random_state(device, state)
