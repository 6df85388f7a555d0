"""The parts of a view: one module of the network each, and its like that has a call's weights."""

from collections.abc import Iterator, Mapping
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from varify.network.parameters import is_variational
from varify.network.replacing import PLAIN, Replacing, beneath

Theta = Mapping[str, Any]
# What nn.Module keeps in tables of its own; a view has tables of its own, too.
_TABLES = frozenset({"_parameters", "_buffers", "_modules"})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Stale(Exception):
    """The network has changed in a way that needs a new view."""


class Part:
    """One module of the network and its like in the view, the shell.

    Attributes:
        varying: attributes that lead to a parameter of the call other than by a module, such as a list of weights.
    """

    def __init__(
        self,
        live: nn.Module,
        shell: nn.Module,
        leads: Mapping[str, frozenset[int]],
        names: Mapping[int, str],
        copies: Replacing,
        whole: bool,
    ) -> None:
        self.live, self.shell = live, shell
        self._whole = whole
        self._own, self._seen = vars(live), vars(shell)
        self._names = list(live._parameters)
        self._slots = [(key, names.get(id(p), "")) for key, p in live._parameters.items()]
        self._ids = [id(p) for p in live._parameters.values()]
        self._children = list(live._modules.items())
        self._hooks = _hooks(live)
        self._apart = _transient(live)
        self.varying = [attr for attr, reached in leads.items() if not reached.isdisjoint(names)]
        self._record()
        self._seen.update(self._own)
        # of what leads to none of the view's modules `copies` is the thing itself
        self._seen.update({attr: copies(self._own[attr]) for attr in leads if attr not in self.varying})
        self._seen["_parameters"] = dict(live._parameters)
        self._seen["_modules"] = {key: copies(child) for key, child in live._modules.items()}
        self._remember()

    def _record(self) -> None:
        self._met = self._own.copy()

    def parameters(self) -> Iterator[tuple[Any, str]]:
        """Those that a call may replace, with their names."""
        return ((self.live._parameters[key], name) for key, name in self._slots if name)

    def drawn(self) -> Iterator[tuple[Any, Any]]:
        """What stands in the place of a parameter, and the parameter."""
        return ((self._seen["_parameters"].get(key), self.live._parameters[key]) for key, name in self._slots if name)

    def refresh(self) -> None:
        """Follow the live module.

        Raises:
            Stale: it holds other modules, parameters or hooks, or something new that leads to one.
        """
        own, live = self._own, self.live
        if not _same(own, self._met):
            self._follow()
        if list(live._parameters) != self._names or list(live._modules.items()) != self._children:
            raise Stale
        if self.varying and self._ids != [id(p) for p in live._parameters.values()]:
            raise Stale
        if (self._hooks or any(map(own.get, _HOOKS))) and self._hooks != _hooks(live):
            raise Stale

    def _follow(self) -> None:
        before = self._met
        for attr, value in self._own.items():
            if (attr in before and before[attr] is value) or attr in self._apart:
                continue
            copied = attr in before and self._seen.get(attr) is not before[attr] and attr != "training"
            leads = any(isinstance(thing, (nn.Module, nn.Parameter)) for thing in beneath(value))
            if copied or leads or attr in _TABLES:
                raise Stale
        for attr in before.keys() - self._own.keys():
            del self._seen[attr]
        new = {attr: value for attr, value in self._own.items() if attr not in before or before[attr] is not value}
        self._seen.update({attr: value for attr, value in new.items() if attr not in self._apart})
        self._record()

    def put(
        self, theta: Theta, training: bool | None, buffers: dict[int, Tensor] | None, call: Replacing | None
    ) -> None:
        """Take the weights of a call, or with none the live ones."""
        seen, live = self._seen, self.live._parameters
        table = seen["_parameters"]
        for key, name in self._slots:
            table[key] = theta.get(name, live[key])
        for attr in self.varying:
            seen[attr] = self._own[attr] if call is None else call(self._own[attr])
        if "training" in self._own:  # of a compiled module it is that of the module within
            seen["training"] = self._own["training"] if training is None else training
        if self._apart:
            seen.update(self.live.state_of_a_view())  # type: ignore[operator]
        if buffers is not None:
            for buffer in self._own["_buffers"].values():
                if buffer is not None and id(buffer) not in buffers:
                    buffers[id(buffer)] = buffer.clone()
            seen["_buffers"] = {k: None if b is None else buffers[id(b)] for k, b in self._own["_buffers"].items()}
        elif self._whole:
            seen["_buffers"] = dict(self._own["_buffers"])
        self._remember()

    def _remember(self) -> None:
        self._loaded = self._seen.copy()

    def has_set(self) -> bool:
        """Whether forward has set, added or deleted something."""
        seen = self._seen
        return (
            not _same(seen, self._loaded)
            or len(seen["_parameters"]) != len(self._slots)
            or len(seen["_modules"]) != len(self._children)
        )

    def give_back(self, back: Replacing) -> None:
        """Set in the live module what forward has set in the view's, as `back` has it."""
        own, seen, before = self._own, self._seen, self._loaded
        for attr in before.keys() - seen.keys():
            own.pop(attr, None)
        for attr, value in seen.items():
            if attr in _TABLES or attr in self._apart or (attr in before and before[attr] is value):
                continue
            own[attr] = back(value)  # also a parameter: registered, it could not be set to a draw by the next call
        for table in ("_parameters", "_modules"):
            for key in seen[table].keys() ^ own[table].keys():
                if key in seen[table]:
                    own[table][key] = back(seen[table][key])
                else:
                    del own[table][key]

    def forget(self) -> None:
        """Be again what the call met."""
        self._seen.clear()
        self._seen.update(self._loaded)
        for table, keys in (("_parameters", [key for key, _ in self._slots]), ("_modules", dict(self._children))):
            for key in self._seen[table].keys() - set(keys):
                del self._seen[table][key]


def _same(now: dict[str, Any], then: dict[str, Any]) -> bool:
    return now.keys() == then.keys() and all(map(is_, now.values(), then.values()))


def leads_of(network: nn.Module) -> dict[nn.Module, dict[str, frozenset[int]]]:
    """Every module that the network reaches; by its attributes, which modules and parameters they lead to, if any."""
    found: dict[nn.Module, dict[str, frozenset[int]]] = {}
    pending = [network]
    while pending:
        module = pending.pop()
        if module in found or _is_around(module, network):
            continue
        leads: dict[str, frozenset[int]] = {}
        found[module] = leads
        pending.extend(child for child in module._modules.values() if child is not None)
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for attr, value in vars(module).items():
            if attr in _TABLES or isinstance(value, (*PLAIN, Tensor)) or attr in _transient(module):
                continue
            reached = [thing for thing in beneath(value) if isinstance(thing, (nn.Module, nn.Parameter))]
            if reached:
                leads[attr] = frozenset(map(id, reached))
                pending.extend(thing for thing in reached if isinstance(thing, nn.Module))
    return found


def that_reach(names: set[int], leads: Mapping[nn.Module, Mapping[str, frozenset[int]]]) -> set[int]:
    """Identities of the modules that lead to a parameter of `names`."""
    holders: dict[int, list[int]] = {}
    for module, attributes in leads.items():
        below = {id(thing) for table in (module._parameters, module._modules) for thing in table.values()}
        for thing in below.union(*attributes.values()):
            holders.setdefault(thing, []).append(id(module))
    reaching: set[int] = set()
    pending = list(names)
    while pending:
        for holder in holders.get(pending.pop(), ()):
            if holder not in reaching:
                reaching.add(holder)
                pending.append(holder)
    return reaching


def _is_around(module: nn.Module, network: nn.Module) -> bool:
    """Whether it is the variational module of this network: who calls that calls it anew, with weights of its own."""
    return is_variational(module) and any(part is network for part in module._modules.values())


def can_be_copied(module: nn.Module) -> bool:
    """Whether a view may have a like of it; TorchScript is shared as it is."""
    return not isinstance(module, torch.jit.ScriptModule)


def shell_of(module: nn.Module) -> nn.Module:
    """Its like, without attributes as yet."""
    shell: nn.Module = object.__new__(_taken_for(module) if _hooks(module) else type(module))
    return shell


def _transient(module: nn.Module) -> tuple[str, ...]:
    """Attributes that a view of this module has of its own, as of a variational module."""
    return module.transient if is_variational(module) else ()  # type: ignore[return-value]


def _hooks(module: nn.Module) -> list[Any]:
    own = vars(module)
    return [hook for kind in _HOOKS for hook in own[kind].values()]


def _taken_for(live: nn.Module) -> type:
    """The live module's class, of objects that are equal to it: hooks look up a module's name in a dict."""

    class Same:
        __slots__ = ()
        __hash__ = live.__hash__  # type: ignore[assignment]
        _stands_for = live

        def __init_subclass__(cls) -> None:
            """Tell no class of the user's that it has a subclass."""

        def __eq__(self, other: object) -> bool:
            return other is live or (hasattr(other, "_stands_for") and other._stands_for is live)

        @property
        def __class__(self) -> Any:
            return type(live)

        @__class__.setter
        def __class__(self, kind: type) -> None:
            object.__setattr__(self, "__class__", kind)

    name = type(live).__name__
    metaclass: Any = type(type(live))
    made: type = metaclass(name, (Same, type(live)), {"__module__": type(live).__module__, "__slots__": ()})
    return made
