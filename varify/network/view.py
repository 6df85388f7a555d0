"""Views: run the user's own code with other weights, without changing the live network.

A view is a shallow copy of the module tree. Its modules, the shells, have the classes of the live modules and share
their buffers, hooks and attributes; their parameters are those of one call. Attributes that lead back into the tree (a
list of layers, a bound method, a closure, a helper object) are copied as far as they do, so that nothing in the view
leads to a live parameter that the call replaces. What forward sets is written back to the network after the call.
"""

import copy
import sys
from collections import deque
from collections.abc import Callable, Generator, Mapping
from types import GeneratorType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from varify.errors import at_users_line
from varify.network.parameters import Slot
from varify.network.parts import Part, Stale, Theta, can_be_copied, modules_reaching, references_of, shell_of
from varify.network.replacing import Substitution, contents_of, fill, referenced_by


class Discarded(BaseException):
    """Aborts a call and drops its effects. No `Exception`, so that an `except Exception` in the network misses it."""


class Views:
    """A pool of views of one network: each call takes a free view, or makes one.

    So concurrent calls, in threads or nested, have different views and need no lock. Views are reused since caches
    keyed by `id(module)` in the user's code must meet the same modules again, and would grow with each call otherwise.

    Args:
        network: the live network.
        slots: of the parameters that a call may replace, by name.
        whole: see `View`.
    """

    def __init__(self, network: nn.Module, slots: Mapping[str, Slot], *, whole: bool) -> None:
        self.network, self._slots, self._whole = network, slots, whole
        self._free: list[View] = []

    def run(
        self,
        call: Callable[[nn.Module], Any],
        theta: Theta,
        training: bool | None = None,
        buffers: dict[int, Tensor] | None = None,
    ) -> Any:
        """The output of `call(view)`, the view having the parameters `theta`.

        Args:
            call: runs the network that it is given. If it raises `Discarded`, nothing is written back.
            theta: see `View.enter`, as are `training` and `buffers`.
            training: likewise.
            buffers: likewise.
        """
        view = self._entered(theta, training, buffers)
        try:
            output = call(view.network)
        except Discarded:
            view.writes_back = False
            raise
        except Exception as error:
            raise at_users_line(error)  # noqa: B904  # the same error
        finally:
            is_free = view.leave()
            if is_free:
                self._free.append(view)
        return output if is_free else view.with_write_back(output)

    def _entered(self, theta: Theta, training: bool | None, buffers: dict[int, Tensor] | None) -> "View":
        while True:
            try:
                view, is_new = self._free.pop(), False  # atomic, so that no two threads get the same view
            except IndexError:
                names = {id(slot.parameter): name for name, slot in self._slots.items()}
                view, is_new = View(self.network, names, self._whole), True
            try:
                view.enter(theta, training, buffers)
                return view
            except Stale:
                if is_new:
                    raise


class View:
    """One view, for one call at a time.

    Args:
        network: the live network.
        names: of the parameters that a call may replace, by id.
        whole: whether every module gets a shell and nothing is written back. Otherwise only modules that lead to a
            parameter of `names` get one; what forward sets is written back.

    Attributes:
        network: the root shell, to be called.
        writes_back: whether what forward sets in this call is written back.
    """

    def __init__(self, network: nn.Module, names: Mapping[int, str], whole: bool) -> None:
        self.writes_back = self._writes_back = not whole
        references = references_of(network)
        drawn = modules_reaching(set(names), references)
        live = [module for module in references if (whole or id(module) in drawn) and can_be_copied(module)]
        shells = {id(module): shell_of(module) for module in live}
        self._shells: dict[int, Any] = dict(shells)
        # Attributes that lead to shells only are copied once. Those that lead to a replaced parameter are copied for
        # each call, by `_call`, since they must lead to the weights of that call.
        self._static = Substitution(self._shells)
        self._parts = [Part(m, shells[id(m)], references[m], names, self._static, whole) for m in live]
        self._varying = any(part.varying for part in self._parts)
        self._scripted = [module for module in references if not can_be_copied(module)]
        self._modes: list[bool] = []
        self._call: Substitution | None = None
        self._cached: dict[Any, Any] | None = None
        self.network: nn.Module = shells.get(id(network), network)
        # Whoever still refers to one of these after a call (a checkpoint, a generator, the user) may run it later and
        # must then find the weights of that call: recomputed with those of a later call, gradients would be wrong
        # without a sign. So a view is reused only if nobody refers to its parts. Reference counts tell that without the
        # holder's help: they are compared with those of now, when only the view itself does.
        self._counted: list[Any] = [shells[id(m)] for m in live if id(m) in drawn]
        self._counted += [vars(shell)["_modules"] for shell in self._counted]
        self._counted += self._static.copies()
        del shells  # it would count
        self._idle_counts = self._counts()

    def _counts(self) -> list[int]:
        return list(map(sys.getrefcount, self._counted))

    def enter(self, theta: Theta, training: bool | None, buffers: dict[int, Tensor] | None) -> None:
        """Load the weights of a call.

        Args:
            theta: weights by name; a parameter that is missing is the live one.
            training: the training flag of all modules; None: those of the live modules.
            buffers: the view's own buffers by the id of the live ones; missing ones are cloned and added. None: the
                live buffers.

        Raises:
            Stale: the network has changed, so that a new view is needed.
        """
        self.writes_back = self._writes_back
        for part in self._parts:
            part.refresh()
        if self._static.changed():
            raise Stale
        if self._varying:
            draws = {id(p): theta[name] for part in self._parts for p, name in part.parameters() if name in theta}
            self._call = Substitution(self._shells | draws, self._static)
        for part in self._parts:
            part.load(theta, training, buffers, self._call)
        if training is not None:  # TorchScript modules are shared, so their flag is set for the time of the call
            self._modes = [module.training for module in self._scripted]
            for module in self._scripted:
                module.training = training
        self._cached = None
        if parametrize._cache_enabled:  # the live module and all its copies have one key in it
            self._cached = dict(parametrize._cache)
            parametrize._cache.clear()

    def leave(self) -> bool:
        """End the call: write back what forward has set, and load the live weights if the view can be reused.

        Returns:
            Whether it can: nothing that the call left behind refers to the view and needs the weights of this call.
        """
        self._write_back_all()
        for module, mode in zip(self._scripted, self._modes, strict=False):
            module.training = mode
        self._modes = []
        if self._cached is not None:
            parametrize._cache.clear()
            parametrize._cache.update(self._cached)
        self._call = None  # its copies refer to shells, and would count
        if self._counts() != self._idle_counts and not self._released():
            return False
        for part in self._parts:
            part.unload()
        return True

    def _to_live(self) -> Substitution:
        """From objects of the view to the live ones: shells to modules, draws to parameters, copies to originals."""
        pairs = {id(part.shell): part.live for part in self._parts}
        for part in self._parts:
            pairs |= {id(draw): live for draw, live in part.drawn()}
        return Substitution(pairs | self._static.reversed() | (self._call.reversed() if self._call else {}))

    def _write_back_all(self) -> None:
        back: Substitution | None = None
        for part in self._parts:
            if part.has_changes():
                if self.writes_back:
                    back = back or self._to_live()
                    part.write_back(back)
                part.undo()
        for copies in (self._static, self._call):
            if self.writes_back and copies is not None and copies.written():
                back = back or self._to_live()
                copies.write_back(back)

    def _released(self) -> bool:
        """Put live modules for shells in the network's containers; whether nothing refers to the view then.

        A hook may have stored its module, a shell, in a list or as the key of a dict. The user means the live module
        there, and while the shell is in it the view cannot be reused.
        """
        shells = {id(part.shell): part.live for part in self._parts}
        reached = [
            thing for part in self._parts for value in vars(part.live).values() for thing in referenced_by(value)
        ]
        containers = [thing for thing in reached if isinstance(thing, (dict, list, set, deque))]
        del reached  # it may refer to shells, which would count
        for container in containers:
            if any(id(thing) in shells for thing in contents_of(container)):
                fill(container, copy.copy(container), Substitution(shells))
        return self._counts() == self._idle_counts

    def with_write_back(self, output: object) -> Any:
        """The output of a call that still refers to this view, with generators that write back after each step."""
        if not any(isinstance(leaf, GeneratorType) for leaf in pytree.tree_leaves(output)):
            return output
        return pytree.tree_map(lambda leaf: self._stepwise(leaf) if isinstance(leaf, GeneratorType) else leaf, output)

    def _stepwise(self, generator: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        step: Callable[[Any], Any] = generator.send
        sent: Any = None
        while True:
            try:
                value = step(sent)
            except StopIteration as end:
                return end.value
            finally:
                self._write_back_all()
            try:
                step, sent = generator.send, (yield value)
            except GeneratorExit:
                generator.close()
                self._write_back_all()
                raise
            except BaseException as error:
                step, sent = generator.throw, error
