"""The parts of a view: for each live module a shell, a shallow copy that has the weights of a call."""

from collections.abc import Iterator, Mapping
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from varify.network.parameters import is_variational
from varify.network.replacing import PLAIN, Substitution, referenced_by

Theta = Mapping[str, Any]
# The tables of an nn.Module. A shell has its own, since its parameters and children are not those of the live module.
_TABLES = frozenset({"_parameters", "_buffers", "_modules"})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Stale(Exception):
    """The network has changed since the view was made, in a way that needs a new view."""


class Part:
    """One module of the network and its shell.

    Args:
        live: the module.
        shell: from `shell_of`.
        references: by attribute, the ids of the modules and parameters that it leads to; see `references_of`.
        names: of the parameters that a call may replace, by id.
        static: from an object to its counterpart in the view, the same in each call.
        whole: see `View`.

    Attributes:
        varying: attributes that lead to a replaced parameter other than by a module, such as a list of weights. They
            are copied for each call; other attributes that lead to shells are copied once, for all calls.
    """

    def __init__(
        self,
        live: nn.Module,
        shell: nn.Module,
        references: Mapping[str, frozenset[int]],
        names: Mapping[int, str],
        static: Substitution,
        whole: bool,
    ) -> None:
        self.live, self.shell = live, shell
        self._whole = whole
        self._live_vars, self._shell_vars = vars(live), vars(shell)
        self._names = list(live._parameters)
        self._slots = [(key, names.get(id(p), "")) for key, p in live._parameters.items()]
        self._ids = [id(p) for p in live._parameters.values()]
        self._children = list(live._modules.items())
        self._hooks = _hooks(live)
        self._transient = _transient_attributes(live)
        self.varying = [attr for attr, reached in references.items() if not reached.isdisjoint(names)]
        # but for the tables of parameters and children, and copies that serve all calls
        self._shares_all = not (self.varying or self._transient or whole)
        self._remember_live()
        self._shell_vars.update(self._live_vars)
        for attr in references:
            if attr not in self.varying:
                self._shell_vars[attr] = static(self._live_vars[attr])
        self._shell_vars["_parameters"] = dict(live._parameters)
        self._shell_vars["_modules"] = {key: static(child) for key, child in live._modules.items()}
        self._remember_shell()

    def _remember_live(self) -> None:
        self._live_before = self._live_vars.copy()

    def parameters(self) -> Iterator[tuple[Any, str]]:
        """The parameters that a call may replace, with their names."""
        return ((self.live._parameters[key], name) for key, name in self._slots if name)

    def drawn(self) -> Iterator[tuple[Any, Any]]:
        """Pairs of what the shell has for a parameter, a draw or a stand-in, and the live parameter."""
        table = self._shell_vars["_parameters"]
        return ((table.get(key), self.live._parameters[key]) for key, name in self._slots if name)

    def refresh(self) -> None:
        """Take over attributes that were set in the live module since the last call.

        Raises:
            Stale: it has other modules, parameters or hooks than when the view was made, or an attribute that needs
                a copy has changed.
        """
        live = self.live
        if not _same(self._live_vars, self._live_before):
            self._follow()
        if list(live._parameters) != self._names or list(live._modules.items()) != self._children:
            raise Stale
        if self.varying and self._ids != [id(p) for p in live._parameters.values()]:
            raise Stale
        if (self._hooks or any(map(self._live_vars.get, _HOOKS))) and self._hooks != _hooks(live):
            raise Stale

    def _follow(self) -> None:
        before = self._live_before
        for attr, value in self._live_vars.items():
            if (attr in before and before[attr] is value) or attr in self._transient:
                continue
            # The shell had a copy, or the new value needs one: a shared one would lead from the view to live weights.
            copied = attr in before and self._shell_vars.get(attr) is not before[attr] and attr != "training"
            leads = any(isinstance(part, (nn.Module, nn.Parameter)) for part in referenced_by(value))
            if copied or leads or attr in _TABLES:
                raise Stale
        for attr in before.keys() - self._live_vars.keys():
            del self._shell_vars[attr]
        for attr, value in self._live_vars.items():
            if attr not in self._transient and (attr not in before or before[attr] is not value):
                self._shell_vars[attr] = value
        self._remember_live()
        self._remember_shell()

    def load(
        self, theta: Theta, training: bool | None, buffers: dict[int, Tensor] | None, call: Substitution | None
    ) -> None:
        """Load the weights of a call into the shell; a parameter that is not in `theta` is the live one."""
        shell_vars, live_vars, live = self._shell_vars, self._live_vars, self.live._parameters
        table = shell_vars["_parameters"]
        for key, name in self._slots:
            table[key] = theta.get(name, live[key])
        if self._shares_all and buffers is None:  # the most of them, and what is remembered of the shell still holds
            mode = live_vars.get("training") if training is None else training
            if "training" in live_vars and shell_vars["training"] is not mode:
                shell_vars["training"] = self._shell_before["training"] = mode
            return
        for attr in self.varying:
            shell_vars[attr] = live_vars[attr] if call is None else call(live_vars[attr])
        if "training" in live_vars:  # a compiled module has none: it asks the module within
            shell_vars["training"] = live_vars["training"] if training is None else training
        if self._transient:
            shell_vars.update(self.live.state_of_a_view())  # type: ignore[operator]
        if buffers is not None:
            for buffer in live_vars["_buffers"].values():
                if buffer is not None and id(buffer) not in buffers:
                    buffers[id(buffer)] = buffer.clone()
            shell_vars["_buffers"] = {
                k: None if b is None else buffers[id(b)] for k, b in live_vars["_buffers"].items()
            }
        elif self._whole:
            shell_vars["_buffers"] = dict(live_vars["_buffers"])
        self._remember_shell()

    def unload(self) -> None:
        """Load the live weights again."""
        if self._shares_all:
            table, live = self._shell_vars["_parameters"], self.live._parameters
            for key, _ in self._slots:
                table[key] = live[key]
        else:
            self.load({}, None, None, None)

    def _remember_shell(self) -> None:
        self._shell_before = self._shell_vars.copy()

    def has_changes(self) -> bool:
        """Whether forward has set, added or deleted an attribute, a parameter or a child."""
        shell_vars = self._shell_vars
        return (
            not _same(shell_vars, self._shell_before)
            or len(shell_vars["_parameters"]) != len(self._slots)
            or len(shell_vars["_modules"]) != len(self._children)
        )

    def write_back(self, back: Substitution) -> None:
        """Set in the live module what forward has set in the shell; `back` maps objects of the view to live ones."""
        live_vars, shell_vars, before = self._live_vars, self._shell_vars, self._shell_before
        for attr in before.keys() - shell_vars.keys():
            live_vars.pop(attr, None)
        for attr, value in shell_vars.items():
            if attr in _TABLES or attr in self._transient or (attr in before and before[attr] is value):
                continue
            # Into `__dict__` and not by setattr(), also a parameter: if it were registered, the next call could not set
            # the same attribute to a draw, since nn.Module takes no plain tensor for a registered parameter.
            live_vars[attr] = back(value)
        for table in ("_parameters", "_modules"):
            for key in shell_vars[table].keys() ^ live_vars[table].keys():
                if key in shell_vars[table]:
                    live_vars[table][key] = back(shell_vars[table][key])
                else:
                    del live_vars[table][key]

    def undo(self) -> None:
        """Undo what forward has set in the shell."""
        self._shell_vars.clear()
        self._shell_vars.update(self._shell_before)
        for table, keys in (("_parameters", [key for key, _ in self._slots]), ("_modules", dict(self._children))):
            for key in self._shell_vars[table].keys() - set(keys):
                del self._shell_vars[table][key]


def _same(now: dict[str, Any], then: dict[str, Any]) -> bool:
    # in order, as lists of strings compare faster than sets of them; another order may be a change as well
    return len(now) == len(then) and all(map(is_, now.values(), then.values())) and list(now) == list(then)


def references_of(network: nn.Module) -> dict[nn.Module, dict[str, frozenset[int]]]:
    """By module that the network reaches: its attributes that lead to modules or parameters, and the ids of these."""
    found: dict[nn.Module, dict[str, frozenset[int]]] = {}
    pending = [network]
    while pending:
        module = pending.pop()
        if module in found or _is_around(module, network):
            continue
        references: dict[str, frozenset[int]] = {}
        found[module] = references
        pending.extend(child for child in module._modules.values() if child is not None)
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for attr, value in vars(module).items():
            if attr in _TABLES or isinstance(value, (*PLAIN, Tensor)) or attr in _transient_attributes(module):
                continue
            reached = [part for part in referenced_by(value) if isinstance(part, (nn.Module, nn.Parameter))]
            if reached:
                references[attr] = frozenset(map(id, reached))
                pending.extend(part for part in reached if isinstance(part, nn.Module))
    return found


def modules_reaching(parameters: set[int], references: Mapping[nn.Module, Mapping[str, frozenset[int]]]) -> set[int]:
    """The ids of the modules that lead to one of the parameters, which are given by id."""
    holders: dict[int, list[int]] = {}
    for module, attributes in references.items():
        below = {id(part) for table in (module._parameters, module._modules) for part in table.values()}
        for part in below.union(*attributes.values()):
            holders.setdefault(part, []).append(id(module))
    reaching: set[int] = set()
    pending = list(parameters)
    while pending:
        for holder in holders.get(pending.pop(), ()):
            if holder not in reaching:
                reaching.add(holder)
                pending.append(holder)
    return reaching


def _is_around(module: nn.Module, network: nn.Module) -> bool:
    """Whether it is the variational module of this very network, to which a hook may refer.

    It is not copied: calling it from within a call is a new call, with its own draw.
    """
    return is_variational(module) and any(part is network for part in module._modules.values())


def can_be_copied(module: nn.Module) -> bool:
    """Whether a view can have a shell of it; TorchScript modules cannot be copied shallowly and are shared."""
    return not isinstance(module, torch.jit.ScriptModule)


def shell_of(module: nn.Module) -> nn.Module:
    """An object of its class, still without attributes."""
    shell: nn.Module = object.__new__(_class_equal_to(module) if _hooks(module) else type(module))
    return shell


def _transient_attributes(module: nn.Module) -> tuple[str, ...]:
    """Attributes of which a shell has its own values: a variational module within has some."""
    return module.transient if is_variational(module) else ()  # type: ignore[return-value]


def _hooks(module: nn.Module) -> list[Any]:
    own = vars(module)
    return [hook for kind in _HOOKS for hook in own[kind].values()]


def _class_equal_to(live: nn.Module) -> type:
    """A subclass of the live module's class whose objects equal the live module and hash alike.

    A hook is called with the shell, and often looks it up in a dict keyed by the user's modules. `__class__` is still
    the user's class, for code that compares types, and `__init_subclass__` is silenced, since the user's may register
    every subclass in a table.
    """

    class Same:
        __slots__ = ()
        __hash__ = live.__hash__  # type: ignore[assignment]
        _stands_for = live

        def __init_subclass__(cls) -> None:
            """Hide this subclass from the user's `__init_subclass__`."""

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
    subclass: type = metaclass(name, (Same, type(live)), {"__module__": type(live).__module__, "__slots__": ()})
    return subclass
