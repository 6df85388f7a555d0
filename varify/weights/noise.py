"""Standard normal noise, of large tensors on several threads: torch fills a tensor on one, whatever it may use."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

from varify.weights.fused import is_ordinary, is_plain

LARGE = 2**16  # elements from which on a tensor has generators of its own
CHUNK = 2**17  # elements that one of them fills; what comes out depends on it
WORTH_A_THREAD = 2**17  # elements, of half a millisecond; a thread starts within a tenth of one
SEEDS = 2**32  # torch's generator on a CPU heeds the low 32 bits of a seed
Chunk = tuple[Tensor, int]


def normal_like(tensor: Tensor) -> Tensor:
    """Eps ~ N(0, 1) of the shape, dtype, device and strides of `tensor`, without gradient."""
    (eps,) = normals_like([tensor])
    return eps


def normals_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Eps ~ N(0, 1) for each tensor, filled together; the same as if each were filled by itself.

    The numbers depend on the state of torch's default generator alone, and not on how many threads fill: a large
    tensor on a CPU takes one number of it, and its chunks of `CHUNK` elements have generators of their own.
    """
    found: list[Tensor] = []
    chunks: list[Chunk] = []
    plain = (
        is_plain()
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None
        and not torch._C._is_tracing()
    )
    for tensor in tensors:
        cut = plain and _is_cut(tensor)
        eps = torch.empty_like(tensor, requires_grad=False) if cut else None
        if eps is not None and is_ordinary(eps):  # within a mode of torch's it may be a fake
            chunks += _cut(eps)
        else:
            eps = torch.randn_like(tensor, requires_grad=False)
        found.append(eps)
    if chunks:
        _fill(chunks)
    return found


def _is_cut(tensor: Tensor) -> bool:
    if tensor.numel() < LARGE or tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.is_nested:
        return False
    return tensor.is_floating_point() and is_ordinary(tensor)


def _cut(eps: Tensor) -> list[Chunk]:
    """The chunks of a dense tensor in the order of its memory, with their seeds."""
    # Consecutive seeds from a random one on: those of one tensor differ, up to 2^48 elements. Two tensors of m chunks
    # share one with a probability of 2m/2^32, as two calls of torch.manual_seed would. By name a CPU, for there may be
    # another default device.
    first = int(torch.randint(SEEDS, (), device="cpu"))
    parts = eps.as_strided((eps.numel(),), (1,)).split(CHUNK)
    return [(part, (first + i) % SEEDS) for i, part in enumerate(parts)]


def _fill(chunks: list[Chunk]) -> None:
    left = iter(chunks)  # of which each thread takes the next

    def work() -> None:
        generator = torch.Generator("cpu")
        with torch.inference_mode():  # outside of it nobody may write into a tensor that was made within
            for part, seed in left:
                part.normal_(generator=generator.manual_seed(seed))  # which releases the interpreter

    others = min(torch.get_num_threads(), sum(len(part) for part, _ in chunks) // WORTH_A_THREAD) - 1
    if others < 1:
        work()
        return
    # Threads that end with the call: a pool that lives on would be dead in a fork, and hold up an exit.
    with ThreadPoolExecutor(others) as pool:
        helping: list[Future[None]] = []
        with suppress(RuntimeError):  # which starts no more threads when it is about to exit
            helping += (pool.submit(work) for _ in range(others))
        work()
        for helper in helping:
            helper.result()
