"""What a conversion copies: everything that leads to the network, by whatever way; and nothing of it is shared."""

import copy
import functools
from collections import deque
from collections.abc import Callable, Iterator
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import varify
from varify.network.copies import copy_network
from varify.network.reachable import children, reachable, replaced

GLOBAL = nn.Linear(3, 3)  # which functions here know by this name
Given = Callable[[Tensor], Tensor]


def through_global(x: Tensor) -> Tensor:
    return GLOBAL(x)


class Held(nn.Module):
    """Two layers, of which `run`, an attribute that each test sets, does what it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.run: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class Slotted:
    __slots__ = ("function", "unset")

    def __init__(self, function: Given) -> None:
        self.function = function

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)


class Methods:
    def __init__(self, net: Held) -> None:
        self.inside = lambda x: net.b(net.a(x))

    def call(self, x: Tensor) -> Tensor:
        return self.inside(x)


def stages(net: Held) -> None:
    layers = [lambda x: net.a(x), lambda x: net.b(x)]
    net.layers = layers
    net.run = lambda x: layers[1](layers[0](x))


def forward_itself(net: Held) -> None:
    net.forward = lambda x: net.b(net.a(x))


def forward_of_a_layer(net: Held) -> None:
    before = net.a.forward
    net.a.forward = lambda x: net.b(before(x))
    net.run = net.a


def defaults(net: Held) -> None:
    def run(x: Tensor, a: nn.Module = net.a, *, b: nn.Module = net.b) -> Tensor:
        return b(a(x))

    net.run = run


def partials(net: Held) -> None:
    net.run = functools.partial(lambda b, x, *, a: b(a(x)), net.b, a=lambda x: net.a(x))


def bound_function(net: Held) -> None:
    net.run = MethodType(lambda self, x: net.b(self.a(x)), net)


def bound_method_of_a_helper(net: Held) -> None:
    net.run = Methods(net).call


def method_of_a_layer(net: Held) -> None:
    a, b = net.a.forward, net.b.forward
    net.run = lambda x: b(a(x))


def decorated(net: Held) -> None:
    def doubled(function: Given) -> Given:
        @functools.wraps(function)
        def wrapper(*args: Any) -> Tensor:
            return 2 * function(*args)

        return wrapper

    net.run = doubled(lambda x: net.b(net.a(x)))


def nested(net: Held) -> None:
    def inner(x: Tensor) -> Tensor:
        return net.b(net.a(x))

    def outer() -> Given:
        return lambda x: inner(x) + 1

    net.run = outer()


def recursive(net: Held) -> None:
    def run(x: Tensor, times: int = 2) -> Tensor:
        return run(net.a(x), times - 1) if times else net.b(x)

    net.run = run


def tuples_in_helpers(net: Held) -> None:
    net.helper = SimpleNamespace(functions=deque([(lambda x: net.a(x), {"b": lambda x: net.b(x)})]))
    net.run = lambda x: net.helper.functions[0][1]["b"](net.helper.functions[0][0](x))


def slots(net: Held) -> None:
    net.run = Slotted(lambda x: net.b(net.a(x)))


def attributes_of_functions(net: Held) -> None:
    def run(x: Tensor) -> Tensor:
        return run.then(net.a(x))  # type: ignore[attr-defined]

    run.then = net.b  # type: ignore[attr-defined]
    net.run = run


def containers_within_cells(net: Held) -> None:
    table = {"layers": (net.a, net.b)}
    net.run = lambda x: table["layers"][1](table["layers"][0](x))


def hooks(net: Held) -> None:
    net.run = net.a
    net.a.register_forward_hook(lambda module, args, output: net.b(output))
    net.b.register_forward_pre_hook(lambda module, args: (args[0] + net.a.weight.sum(),))


def whole_models(net: Held) -> None:
    outer = SimpleNamespace(net=net)
    net.run = lambda x: outer.net.b(outer.net.a(x))


WAYS = [
    *(stages, forward_itself, forward_of_a_layer, defaults, partials, bound_function, bound_method_of_a_helper),
    *(method_of_a_layer, decorated, nested, recursive, tuples_in_helpers, slots, attributes_of_functions),
    *(containers_within_cells, hooks, whole_models),
]


def holding(way: Callable[[Held], None]) -> Held:
    torch.manual_seed(0)
    net = Held()
    way(net)
    return net


def owned_by(copied: nn.Module, original: nn.Module) -> bool:
    """Whether nothing of the original is reached from the copy."""
    theirs = {id(part) for part in (*original.modules(), *original.parameters())}
    return not any(id(found) in theirs for found in reachable([copied]))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_functions_lead_to_the_copy(way: Callable[[Held], None]) -> None:
    net, x = holding(way), torch.randn(5, 3)
    held = {id(found) for found in reachable([net])}
    before = net(x)
    vnet = varify.variationalize(net)
    assert torch.equal(vnet.eval()(x), before)
    vnet.train()
    assert not torch.equal(vnet(x), vnet(x))
    vnet(x).sum().backward()
    assert all(p.grad is not None for p in vnet.parameters())
    assert all(p.grad is None for p in net.parameters())
    assert (vnet.predict(x).std > 0).all()
    assert {id(found) for found in reachable([net])} == held
    for copied in (vnet.module, vnet.mean_model(), vnet.sample_model(), copy.deepcopy(vnet).module):
        assert owned_by(copied, net)
    with torch.no_grad():
        vnet.module.b.bias += 1
    assert torch.equal(net(x), before)
    assert not torch.equal(vnet.eval()(x), before)


def test_two_functions_share_the_copys_variable() -> None:
    def way(net: Held) -> None:
        current = net.a

        def switch() -> None:
            nonlocal current
            current = net.b

        net.run, net.switch = lambda x: current(x), switch

    net, x = holding(way), torch.randn(2, 3)
    copied = copy_network(net)
    assert torch.equal(copied(x), copied.a(x))
    copied.switch()
    assert torch.equal(copied(x), copied.b(x))
    assert torch.equal(net(x), net.a(x))


def test_a_variable_that_does_not_lead_to_the_network_stays_shared() -> None:
    calls, seen = 0, []

    def way(net: Held) -> None:
        def run(x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            seen.append(net.a.weight.shape)
            return net.a(x)

        net.run = run
        net.plain = way

    net = holding(way)
    copied = copy_network(net)
    copied(torch.zeros(1, 3))
    net(torch.zeros(1, 3))
    assert calls == len(seen) == 2
    assert copied.plain is way


def test_a_rebuilt_function_is_otherwise_the_same() -> None:
    def way(net: Held) -> None:
        def run(x: Tensor, scale: float = 2.0, *, shift: int = 1) -> Tensor:
            """Told."""
            return net.a(x) * scale + shift

        run.mark = "kept"  # type: ignore[attr-defined]
        net.run = net.again = run

    net = holding(way)
    run = copy_network(net).run
    assert run is not net.run
    assert (run.__doc__, run.__qualname__, run.__module__) == ("Told.", net.run.__qualname__, __name__)
    assert (run.__defaults__, run.__kwdefaults__, run.__annotations__["x"]) == ((2.0,), {"shift": 1}, Tensor)
    assert vars(run) == {"mark": "kept"}
    assert copy_network(net).again is not run
    copied = copy_network(net)
    assert copied.again is copied.run


def test_a_parameter_and_its_methods_are_the_copys() -> None:
    def way(net: Held) -> None:
        weight = net.a.weight
        net.run = lambda x: x @ weight
        net.times = net.b.weight.mul

    net = holding(way)
    copied = copy_network(net)
    assert copied.run.__closure__[0].cell_contents is copied.a.weight
    assert copied.times.__self__ is copied.b.weight
    vnet, x = varify.variationalize(net), torch.randn(2, 3)
    assert not torch.equal(vnet(x), vnet(x))


def test_an_empty_variable_is_no_obstacle() -> None:
    def way(net: Held) -> None:
        net.run = lambda x: net.a(x) if x is not None else missing
        if net is None:
            missing = 0

    assert copy_network(holding(way))(torch.zeros(1, 3)).shape == (1, 3)


# --- what can't be done


def by_name(net: Held) -> None:
    net.run = lambda x: GLOBAL(x)


def by_name_of_a_function(net: Held) -> None:
    net.run = lambda x: [through_global(part) for part in x]


def by_name_of_a_hook(net: Held) -> None:
    net.b.register_forward_hook(lambda *_: GLOBAL.bias)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (
            by_name,
            r"Held.run holds the function by_name.<locals>.<lambda> \(.*\), .* global variable GLOBAL.*GLOBAL=GLO",
        ),
        (by_name_of_a_function, r"Held.run holds .* global variable through_global"),
        (by_name_of_a_hook, r"Held.b._forward_hooks holds .* global variable GLOBAL"),
    ],
)
def test_a_global_that_leads_to_the_network_is_refused(way: Callable[[Held], None], message: str) -> None:
    net = holding(way)
    net.a = GLOBAL
    with pytest.raises(varify.ModelError, match=message):
        varify.variationalize(net)


def test_the_way_out_of_globals_is_one_and_other_globals_are_no_obstacle() -> None:
    def way(net: Held) -> None:
        net.run = lambda x, GLOBAL=GLOBAL: GLOBAL(x)

    net = holding(way)
    net.a = GLOBAL
    assert owned_by(varify.variationalize(net).module, net)
    apart = holding(by_name)  # which is not a layer of this one
    assert varify.variationalize(apart).module.run is apart.run


def test_what_shares_itself_and_calls_the_network_is_refused() -> None:
    def way(net: Held) -> None:
        net.run = functools.lru_cache(lambda x: net.a(x))

    with pytest.raises(varify.ModelError, match=r"Held.run holds a function .* within a _lru_cache_wrapper"):
        varify.variationalize(holding(way))


def test_a_function_whose_variables_cannot_be_copied_is_named() -> None:
    def way(net: Held) -> None:
        def steps() -> Iterator[int]:
            yield 1

        trainer = SimpleNamespace(net=net, steps=steps())
        net.run = lambda x: trainer.net.a(x)

    with pytest.raises(varify.ModelError, match=r"Held.run holds the function .*way.* by trainer, .*cannot pickle"):
        varify.variationalize(holding(way))


# --- computed tensors, and the walk


def test_computed_tensors_are_found_wherever_they_are() -> None:
    net = nn.Linear(3, 3)
    net.recent = deque([net.weight * 2])
    net.helper = SimpleNamespace(cached=(net.weight * 3, Slotted(net.weight * 4)))  # type: ignore[arg-type]
    copied = varify.variationalize(net).module
    assert torch.equal(copied.recent[0], net.weight * 2)
    assert torch.equal(copied.helper.cached[0], net.weight * 3)
    assert torch.equal(copied.helper.cached[1].function, net.weight * 4)
    assert copied.recent[0].is_leaf


class Watchful:
    """Everything that Python may call of it says so."""

    __slots__ = ("__dict__", "slot")

    def __init__(self) -> None:
        self.slot, self.part = object(), object()

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(name)

    @property
    def asked(self) -> None:
        raise AssertionError


class Counting(dict):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Any]:
        raise AssertionError

    values = keys = items = __iter__


def test_children_are_found_without_running_code() -> None:
    watchful, thing = Watchful(), object()
    assert len(list(children(watchful))) == 2
    assert list(children(Counting(a=thing))) == [thing]
    assert list(children(frozenset({thing, 1}))) == [thing]
    for closed in (int, torch, nn.Parameter(torch.ones(2)), "text", 3):
        assert not list(children(closed))


def test_replaced_keeps_what_does_not_change() -> None:
    old, new = object(), object()
    change = lambda part: new if part is old else part  # noqa: E731
    for value in ((1, 2), frozenset({3}), [4], {5: 6}, {7}, deque([8], maxlen=3), functools.partial(print, 9), "text"):
        same = copy.copy(value)
        assert replaced(value, change) is value
        assert type(value) is functools.partial or value == same
    assert replaced((old, 1), change) == (new, 1)
    assert replaced(frozenset({old}), change) == {new}
    assert replaced({1: old, old: 2}, change) == {1: new, new: 2}
    assert list(replaced(deque([old], maxlen=1), change)) == [new]
    deep = lambda part: replaced(change(part), change)  # noqa: E731
    assert replaced(functools.partial(print, old), deep).args == (new,)
    assert isinstance(replaced(Slotted(old), change), Slotted)
    assert replaced(SimpleNamespace(a=old), change).a is new
