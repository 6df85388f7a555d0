"""The network with other weights: a view, which runs the user's own code and leaves the live network alone.

A view is a shallow copy of the module tree. Its modules have the classes of the network's modules and share their
buffers, hooks and attributes; their parameters are those of one call. What leads back into the tree by another way (a
list of layers, a bound method, a closure, a helper object) is copied as far as it does so, so that no way leads from
the view to a parameter that it replaces. What forward sets is set in the network when the call is over.
"""

import copy
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from operator import is_
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from varify.errors import at_users_line
from varify.replacing import PLAIN, Replacing, beneath, contents_of, fill
from varify.selection import Site

Theta = Mapping[str, Any]
# What nn.Module keeps in tables of its own; a view has tables of its own, too.
_TABLES = frozenset({"_parameters", "_buffers", "_modules"})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Stale(Exception):
    """The network has changed in a way that needs a new view."""


class Discarded(BaseException):
    """A call is to be as if it had not been. Not an `Exception`: the network's own `except` is not meant by it."""


class Views:
    """Views of one network, kept between calls: each call takes a free one, or makes one.

    So each thread has a view of its own, and so has a call within a call; and the parts of a view are the same objects
    from call to call, as caches by a module's identity ask.

    Args:
        network: the live one.
        sites: of the parameters that a call may replace, by name.
        whole: see `View`.
    """

    def __init__(self, network: nn.Module, sites: Mapping[str, Site], *, whole: bool) -> None:
        self.network, self._sites, self._whole = network, sites, whole
        self._free: list[View] = []

    def run(
        self,
        call: Callable[[nn.Module], Any],
        theta: Theta,
        training: bool | None = None,
        buffers: dict[int, Tensor] | None = None,
    ) -> Any:
        """`call(network)` with a network whose parameters are `theta`, a tensor by name; see `View.enter`.

        Args:
            call: runs it. Where it raises `Discarded`, nothing that forward has set is set in the network.
            theta: see `View.enter`, as are `training` and `buffers`.
            training: likewise.
            buffers: likewise.
        """
        view = self._entered(theta, training, buffers)
        try:
            output = call(view.network)
        except Discarded:
            view.keeps = False
            raise
        except Exception as error:
            raise at_users_line(error)  # noqa: B904  # it is the same one
        finally:
            is_free = view.leave()
            if is_free:
                self._free.append(view)
        return output if is_free else view.following(output)

    def _entered(self, theta: Theta, training: bool | None, buffers: dict[int, Tensor] | None) -> "View":
        while True:
            try:
                view, is_new = self._free.pop(), False  # in one step, so that no two threads have the same
            except IndexError:
                names = {id(site.parameter): name for name, site in self._sites.items()}
                view, is_new = View(self.network, names, self._whole), True
            try:
                view.enter(theta, training, buffers)
                return view
            except Stale:
                if is_new:
                    raise


class View:
    """One view; serves one call at a time.

    Args:
        network: the live one.
        names: of the parameters that a call may replace, by their identity.
        whole: every module is the view's own, and nothing that forward sets reaches the network; else only modules
            that lead to a parameter of `names` are, and what forward sets is set in the network.

    Attributes:
        network: to be called.
        keeps: whether what forward sets will be set in the network.
    """

    def __init__(self, network: nn.Module, names: Mapping[int, str], whole: bool) -> None:
        self.keeps = self._keeps = not whole
        leads = _leads(network)
        drawn = _that_reach(set(names), leads)
        live = [module for module in leads if (whole or id(module) in drawn) and _can_be_copied(module)]
        shells = {id(module): _shell(module) for module in live}
        self._shells: dict[int, Any] = dict(shells)
        self._static = Replacing(self._shells)
        self._parts = [_Part(m, shells[id(m)], leads[m], names, self._static, whole) for m in live]
        self._varying = any(part.varying for part in self._parts)
        self._scripted = [module for module in leads if not _can_be_copied(module)]
        self._modes: list[bool] = []
        self._call: Replacing | None = None
        self._cached: dict[Any, Any] | None = None
        self.network: nn.Module = shells.get(id(network), network)
        # Whoever keeps one of these after a call (a checkpoint, a generator) may run it with the weights of that call.
        self._watched: list[Any] = [shells[id(m)] for m in live if id(m) in drawn]
        self._watched += [vars(shell)["_modules"] for shell in self._watched]
        self._watched += self._static.copies()
        del shells
        self._unheld = self._references()

    def _references(self) -> list[int]:
        return list(map(sys.getrefcount, self._watched))

    def enter(self, theta: Theta, training: bool | None, buffers: dict[int, Tensor] | None) -> None:
        """Put a call's weights in the place of the parameters.

        Args:
            theta: by name; of one that is missing the view has the live parameter.
            training: the training flag of all parts; None: those of the live ones.
            buffers: those of the view in the place of the network's, by their identity; what is missing is copied and
                put in. None: the network's.

        Raises:
            Stale: the network has changed.
        """
        self.keeps = self._keeps
        for part in self._parts:
            part.refresh()
        if self._static.changed():
            raise Stale
        if self._varying:
            draws = {id(p): theta[name] for part in self._parts for p, name in part.parameters() if name in theta}
            self._call = Replacing(self._shells | draws, self._static)
        for part in self._parts:
            part.put(theta, training, buffers, self._call)
        if training is not None:  # TorchScript can't be copied: its own flag is set meanwhile
            self._modes = [module.training for module in self._scripted]
            for module in self._scripted:
                module.training = training
        self._cached = None
        if parametrize._cache_enabled:  # it knows the modules of all copies by one identity
            self._cached = dict(parametrize._cache)
            parametrize._cache.clear()

    def leave(self) -> bool:
        """Take the weights out again, and set in the network what forward has set, if it `keeps`.

        Returns:
            Whether the view can serve again: nothing that the call left behind needs it as it is.
        """
        self._give_back()
        for module, mode in zip(self._scripted, self._modes, strict=False):
            module.training = mode
        self._modes = []
        if self._cached is not None:
            parametrize._cache.clear()
            parametrize._cache.update(self._cached)
        call, self._call = self._call, None
        del call
        if self._references() != self._unheld and not self._taken_back():
            return False
        for part in self._parts:
            part.put({}, None, None, None)
        return True

    def _back(self) -> Replacing:
        pairs = {id(part.shell): part.live for part in self._parts}
        for part in self._parts:
            pairs |= {id(draw): live for draw, live in part.drawn()}
        return Replacing(pairs | self._static.reversed() | (self._call.reversed() if self._call else {}))

    def _give_back(self) -> None:
        back: Replacing | None = None
        for part in self._parts:
            if part.has_set():
                if self.keeps:
                    back = back or self._back()
                    part.give_back(back)
                part.forget()
        for copies in (self._static, self._call):
            if self.keeps and copies is not None and copies.written():
                back = back or self._back()
                copies.give_back(back)

    def _taken_back(self) -> bool:
        """Whether nothing holds the view once its modules are out of what hooks and helpers wrote into."""
        shells = {id(part.shell): part.live for part in self._parts}
        reached = [one for part in self._parts for value in vars(part.live).values() for one in beneath(value)]
        holders = [one for one in reached if isinstance(one, (dict, list, set, deque))]
        del reached
        for holder in holders:
            if any(id(one) in shells for one in contents_of(holder)):
                fill(holder, copy.copy(holder), Replacing(shells))
        return self._references() == self._unheld

    def following(self, output: Any) -> Any:
        """The output of a call that holds this view; what its generators set later is set in the network as well."""
        if not any(isinstance(leaf, GeneratorType) for leaf in pytree.tree_leaves(output)):
            return output
        return pytree.tree_map(lambda leaf: self._steps(leaf) if isinstance(leaf, GeneratorType) else leaf, output)

    def _steps(self, generator: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        step: Callable[[Any], Any] = generator.send
        given: Any = None
        while True:
            try:
                value = step(given)
            except StopIteration as end:
                return end.value
            finally:
                self._give_back()
            try:
                step, given = generator.send, (yield value)
            except GeneratorExit:
                generator.close()
                self._give_back()
                raise
            except BaseException as error:
                step, given = generator.throw, error


class _Part:
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
        self._slots = [(key, names.get(id(p), "")) for key, p in live._parameters.items()]
        self._ids = [id(p) for p in live._parameters.values()]
        self._children = list(live._modules.items())
        self._hooks = _hooks(live)
        self._apart = _state_of_a_copy(live)
        self.varying = [attr for attr, reached in leads.items() if not reached.isdisjoint(names)]
        self._record()
        self._seen.update(self._own)
        # of what leads to none of the view's modules `copies` is the thing itself
        self._seen.update({attr: copies(self._own[attr]) for attr in leads if attr not in self.varying})
        self._seen["_parameters"] = dict(live._parameters)
        self._seen["_modules"] = {key: copies(child) for key, child in live._modules.items()}
        self._seen.update(self._apart)
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
        if len(live._parameters) != len(self._slots) or list(live._modules.items()) != self._children:
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
    return len(now) == len(then) and all(map(is_, now.values(), then.values()))


def _leads(network: nn.Module) -> dict[nn.Module, dict[str, frozenset[int]]]:
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
            if attr in _TABLES or isinstance(value, (*PLAIN, Tensor)) or attr in _state_of_a_copy(module):
                continue
            reached = [thing for thing in beneath(value) if isinstance(thing, (nn.Module, nn.Parameter))]
            if reached:
                leads[attr] = frozenset(map(id, reached))
                pending.extend(thing for thing in reached if isinstance(thing, nn.Module))
    return found


def _that_reach(names: set[int], leads: Mapping[nn.Module, Mapping[str, frozenset[int]]]) -> set[int]:
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
    return hasattr(type(module), "state_of_a_copy") and any(part is network for part in module._modules.values())


def _can_be_copied(module: nn.Module) -> bool:
    return not isinstance(module, torch.jit.ScriptModule)


def _shell(module: nn.Module) -> nn.Module:
    shell: nn.Module = object.__new__(_taken_for(module) if _hooks(module) else type(module))
    return shell


def _state_of_a_copy(module: nn.Module) -> Mapping[str, Any]:
    """Attributes that a copy of this module is to have of its own, as a variational module has."""
    return module.state_of_a_copy() if hasattr(type(module), "state_of_a_copy") else {}  # type: ignore[operator]


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
