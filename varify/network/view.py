"""The network with other weights: a view, which runs the user's own code and leaves the live network alone.

A view is a shallow copy of the module tree. Its modules have the classes of the network's modules and share their
buffers, hooks and attributes; their parameters are those of one call. What leads back into the tree by another way (a
list of layers, a bound method, a closure, a helper object) is copied as far as it does so, so that no way leads from
the view to a parameter that it replaces. What forward sets is set in the network when the call is over.
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
from varify.network.parts import Part, Stale, Theta, can_be_copied, leads_of, shell_of, that_reach
from varify.network.replacing import Replacing, beneath, contents_of, fill


class Discarded(BaseException):
    """A call is to be as if it had not been. Not an `Exception`: the network's own `except` is not meant by it."""


class Views:
    """Views of one network, kept between calls: each call takes a free one, or makes one.

    So each thread has a view of its own, and so has a call within a call; and the parts of a view are the same objects
    from call to call, as caches by a module's identity ask.

    Args:
        network: the live one.
        slots: of the parameters that a call may replace, by name.
        whole: see `View`.
    """

    def __init__(self, network: nn.Module, slots: Mapping[str, Slot], *, whole: bool) -> None:
        self.network, self._sites, self._whole = network, slots, whole
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
                names = {id(slot.parameter): name for name, slot in self._sites.items()}
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
        leads = leads_of(network)
        drawn = that_reach(set(names), leads)
        live = [module for module in leads if (whole or id(module) in drawn) and can_be_copied(module)]
        shells = {id(module): shell_of(module) for module in live}
        self._shells: dict[int, Any] = dict(shells)
        self._static = Replacing(self._shells)
        self._parts = [Part(m, shells[id(m)], leads[m], names, self._static, whole) for m in live]
        self._varying = any(part.varying for part in self._parts)
        self._scripted = [module for module in leads if not can_be_copied(module)]
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
