"""Noise on several threads: it is normal, independent, the same for any number of threads, and follows torch's seed."""

import multiprocessing
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import varify
from varify.weights import noise
from varify.weights.noise import CHUNK, LARGE, normal_like, normals_like

N = 8 * CHUNK + 1001


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drawn(seed: int, shape: tuple[int, ...] = (N,), dtype: torch.dtype = torch.float32, threads: int = 1) -> Tensor:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    return normal_like(torch.empty(shape, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_standard_normal(dtype: torch.dtype) -> None:
    eps = drawn(0, dtype=dtype, threads=2).double().numpy()
    # standard errors of mean, variance, third and fourth moment of N(0, 1): variances 1, 2, 15, 96; five of them are
    # passed by 1 choice of the seed in 220,000, here of eight, as is the level of the test of Kolmogorov and Smirnov
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((eps**power).mean() - expected) < 5 * (variance / N) ** 0.5
    assert scipy.stats.kstest(eps, "norm").pvalue > 1e-6


def test_chunks_are_independent_of_each_other_and_of_the_next_draw() -> None:
    torch.manual_seed(0)
    first, second = (normal_like(torch.empty(N)).double() for _ in range(2))
    chunks = torch.stack([*first[: 8 * CHUNK].split(CHUNK), *second[: 8 * CHUNK].split(CHUNK)])
    for shift in (0, 1, 624):  # the generator's state has 624 words
        for values in (chunks, chunks.square().sub(1).div(2**0.5)):
            found = values @ values.roll(shift, 1).T / CHUNK**0.5  # each ~ N(0, 1), off the diagonal
            if shift == 0:
                found.fill_diagonal_(0.0)
            # 5.5 standard errors: 6 tables of 256, 1 false alarm in 17,000 choices of the seed
            assert found.abs().max() < 5.5


@pytest.mark.parametrize("shape", [(LARGE,), (CHUNK + 5,), (3, 2 * CHUNK + 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_the_same_for_any_number_of_threads(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    one = drawn(3, shape, dtype, threads=1)
    assert one.shape == shape
    assert one.dtype == dtype
    for number in (2, 4):
        assert torch.equal(one, drawn(3, shape, dtype, threads=number))
    assert not torch.equal(one, drawn(4, shape, dtype))
    assert not torch.equal(one, normal_like(one))


def test_several_tensors_are_filled_as_each_by_itself_would_be() -> None:
    tensors = [torch.empty(shape) for shape in ((3,), (LARGE,), (2, CHUNK), (7, 7), (CHUNK + 1,))]
    torch.manual_seed(0)
    each = [normal_like(tensor) for tensor in tensors]
    after = torch.rand(3)
    torch.set_num_threads(2)
    torch.manual_seed(0)
    together = normals_like(tensors)
    assert all(map(torch.equal, each, together))
    assert torch.equal(after, torch.rand(3))


def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The helpers that each call has from here on."""
    helpers: list[int] = []
    pool = noise.ThreadPoolExecutor
    monkeypatch.setattr(noise, "ThreadPoolExecutor", lambda number: helpers.append(number) or pool(number))
    return helpers


def test_it_has_as_many_threads_as_torch_and_no_more_than_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    helpers = started(monkeypatch)
    for number in (1, 2, 4, 64):
        drawn(0, threads=number)
    assert helpers == [1, 3, 7]
    drawn(0, (LARGE,), threads=4)
    assert helpers == [1, 3, 7]


def test_the_noise_of_a_network_is_filled_together(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Linear(400, 500), nn.Linear(500, 400))
    vnet = varify.variationalize(network, estimator="weights").train()
    torch.set_num_threads(2)
    torch.manual_seed(1)
    expected = {name: q.rsample() for name, q in vnet.posteriors.items()}
    helpers = started(monkeypatch)
    torch.manual_seed(1)
    found = vnet.posteriors.draw()
    assert helpers == [1]
    assert all(torch.equal(found[name], theta) for name, theta in expected.items())


def test_it_has_the_strides_of_dense_tensors() -> None:
    like = torch.empty(8, 16, 64, 64).to(memory_format=torch.channels_last)
    for tensor in (like, torch.empty(300, 500).T, torch.empty(1, 500).expand(300, 500)):
        eps = normal_like(tensor)
        assert eps.stride() == torch.empty_like(tensor).stride()
        assert eps.shape == tensor.shape
        assert abs(eps.double().square().mean() - 1) < 5 * (2 / eps.numel()) ** 0.5  # false alarm: 1 in 1.7 million


def test_it_asks_for_no_gradient_and_can_be_made_in_inference_mode() -> None:
    parameter = nn.Parameter(torch.zeros(N))
    expected = drawn(0)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        torch.set_num_threads(2)
        with mode():
            torch.manual_seed(0)
            eps = normal_like(parameter)
        assert not eps.requires_grad
        assert torch.equal(eps, expected)


def test_a_default_device_does_not_matter() -> None:
    expected = drawn(0)
    with torch.device("meta"):
        torch.manual_seed(0)
        assert torch.equal(normal_like(expected), expected)


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Watching(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class OfTheUser(Tensor):
    pass


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_what_watches_operations_or_is_no_tensor_of_torchs_own_meets_one_operation() -> None:
    from torch._subclasses import FakeTensorMode

    like, torchs = torch.empty(N), torch.randn_like

    def equal_to_torchs(like: Tensor = like) -> bool:
        torch.manual_seed(0)
        expected, after = torchs(like), torch.rand(1)
        torch.manual_seed(0)
        found = normal_like(like)
        return torch.equal(torch.rand(1), after) and (found.is_meta or torch.equal(found, expected))

    assert not equal_to_torchs()
    with Watching():
        assert not equal_to_torchs()
    with Dispatching():  # which only looks on: what is computed again outside of it is the same
        assert not equal_to_torchs()
    with FakeTensorMode():
        assert normal_like(torch.empty(N)).shape == (N,)
    assert equal_to_torchs(like.to("meta"))
    assert equal_to_torchs(like.as_subclass(OfTheUser))
    torch.manual_seed(0)
    expected = torch.func.vmap(lambda x: torchs(x), randomness="different")(like.expand(2, N))
    torch.manual_seed(0)
    assert torch.equal(torch.func.vmap(normal_like, randomness="different")(like.expand(2, N)), expected)
    traced = torch.jit.trace(normal_like, like, check_trace=False)
    assert not torch.equal(traced(like), traced(like))  # its seeds are no constants


def test_the_first_failure_of_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    here, torchs = threading.get_ident(), torch.Generator

    def fails(device: str) -> torch.Generator:
        if threading.get_ident() != here:
            raise RuntimeError("of a helper")
        return torchs(device)

    before = set(threading.enumerate())  # other tests may have left some
    monkeypatch.setattr(torch, "Generator", fails)
    with pytest.raises(RuntimeError, match="of a helper"):
        drawn(0, threads=2)
    assert set(threading.enumerate()) <= before


def test_where_no_thread_can_be_started_one_fills_all(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = drawn(0)

    def no_more(self: Any, function: Any) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(noise.ThreadPoolExecutor, "submit", no_more)
    assert torch.equal(drawn(0, threads=2), expected)


def _put_into(queue: Any) -> None:
    # no operation of torch's that runs in parallel, which hangs where the parent has run one
    queue.put(float(normal_like(torch.empty(N)).numpy().sum()))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # of Python 3.12
def test_it_works_in_a_fork_of_a_process_that_has_used_threads() -> None:
    expected = float(drawn(0, threads=2).numpy().sum())
    torch.manual_seed(0)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_put_into, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == expected
    process.join(60)
    assert process.exitcode == 0


def test_threads_of_the_user_draw_at_once() -> None:
    torch.set_num_threads(2)
    found: list[np.ndarray] = []
    users = [threading.Thread(target=lambda: found.append(normal_like(torch.empty(N)).numpy())) for _ in range(4)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert len(found) == 4
    assert len({eps.tobytes() for eps in found}) == 4
