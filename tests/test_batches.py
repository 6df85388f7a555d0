"""Which tensors of a batch belong to single data: against explicit gradients of one datum at a time."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import varify
from varify import ELBO

PRIOR_STD = 0.7
NUM_DATA = 1000


def sigma_by_hand(network: nn.Module, nlls: Iterable[Callable[[nn.Module], Tensor]]) -> dict[str, Tensor]:
    """From the loss of each datum alone: (N·mean of the squared gradients + 1/std²)^(-½)."""
    gradients = [torch.autograd.grad(nll(network), list(network.parameters())) for nll in nlls]
    squares = [torch.stack(column).square().mean(0) for column in zip(*gradients, strict=True)]
    names = [name for name, _ in network.named_parameters()]
    return {n: (NUM_DATA * s + PRIOR_STD**-2).rsqrt() for n, s in zip(names, squares, strict=True)}


def fitted(network: nn.Module, loader: Any, criterion: Any = F.mse_loss, **options: Any) -> dict[str, Tensor]:
    vnet = varify.variationalize(network, prior=varify.priors.Gaussian(std=PRIOR_STD))
    varify.fit_sigma(vnet, loader, criterion, num_data=NUM_DATA, temperature=1, **options)
    return {name: q.sigma for name, q in vnet.posteriors.items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, sigma in expected.items():
        torch.testing.assert_close(found[name], sigma, rtol=1e-4, atol=1e-7)


class Masked(nn.Module):
    """x (B, T, 3) and a mask (T, T), (B, T) or none, to (B, 2)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (mask @ self.fc(x)).sum(1)


class Weighted(Masked):
    """With a weight (B, T) for each position of each datum."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (mask.unsqueeze(-1) * self.fc(x)).sum(1)


class Unused(Masked):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.fc(x).sum(1)


def problem(n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, 3, generator=generator), torch.randn(n, 2, generator=generator)


MASK = torch.tril(torch.ones(4, 4))


@pytest.mark.parametrize("batch", [8, 7, 5, 4, 3, 2, 1])
@pytest.mark.parametrize("mask_first", [False, True])
def test_a_mask_of_the_batchs_length_is_not_cut(batch: int, mask_first: bool) -> None:
    x, y = problem()
    expected = sigma_by_hand(
        Masked(), [lambda net, i=i: F.mse_loss(net(x[i : i + 1], MASK), y[i : i + 1]) for i in range(8)]
    )
    parts = [(x[i : i + batch], y[i : i + batch]) for i in range(0, 8, batch)]
    loader = [({"mask": MASK, "x": a} if mask_first else (a, MASK), b) for a, b in parts]
    assert_close(fitted(Masked(), loader), expected)
    assert_close(fitted(Masked(), iter(loader)), expected)


def test_what_belongs_to_single_data_is_cut_also_where_it_is_square() -> None:
    x, y = problem(4)
    weights = torch.rand(4, 4)
    nlls = [lambda net, i=i: F.mse_loss(net(x[i : i + 1], weights[i : i + 1]), y[i : i + 1]) for i in range(4)]
    assert_close(fitted(Weighted(), [((x, weights), y)]), sigma_by_hand(Weighted(), nlls))


def test_a_layer_that_starts_at_zero_does_not_hide_the_mask() -> None:
    class Gated(Masked):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.fc(x).sum(1) + self.gate * super().forward(x, mask)

    x, y = problem(4)
    nlls = [lambda net, i=i: F.mse_loss(net(x[i : i + 1], MASK), y[i : i + 1]) for i in range(4)]
    assert_close(fitted(Gated(), [((x, MASK), y)]), sigma_by_hand(Gated(), nlls))


def test_lengths_over_the_loader_tell_what_the_network_cannot() -> None:
    x, y = problem(7)
    expected = sigma_by_hand(
        Unused(), [lambda net, i=i: F.mse_loss(net(x[i : i + 1], MASK), y[i : i + 1]) for i in range(7)]
    )
    loader = [((x[i : i + 4], MASK), y[i : i + 4]) for i in (0, 4)]  # four data, then three
    assert_close(fitted(Unused(), loader), expected)
    message = r"which of inputs\[0\] \(4, 4, 3\), inputs\[1\] \(4, 4\), targets \(4, 2\) have an entry .* say batched="
    for ambiguous in (loader[:1], iter(loader)):
        with pytest.raises(ValueError, match=message):
            fitted(Unused(), ambiguous)
    assert_close(fitted(Unused(), iter(loader), batched=((True, False), True)), expected)


def test_batched_decides_and_is_checked() -> None:
    x, y = problem(4)
    loader = [((x, MASK), y)]
    nlls = [lambda net, i=i: F.mse_loss(net(x[i : i + 1], MASK[i : i + 1]), y[i : i + 1]) for i in range(4)]
    assert_close(fitted(Masked(), loader, batched=True), sigma_by_hand(Masked(), nlls))  # as if it were
    by_name = [({"x": x, "mask": MASK}, y)]
    nlls = [lambda net, i=i: F.mse_loss(net(x[i : i + 1], MASK), y[i : i + 1]) for i in range(4)]
    expected = sigma_by_hand(Masked(), nlls)
    assert_close(fitted(Masked(), by_name, batched=({"mask": False, "x": True}, True)), expected)
    for batched, message in (
        ((True, False), "True for no tensor of the targets"),
        (((False, False), True), "True for no tensor of the inputs"),
        (((True,), True), r"batched has \(True,\) for a tuple of 2"),
        (({"x": True}, True), r"batched has \{'x': True\} for a tuple of 2"),
        ("x", "batched has 'x' for a tuple of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            fitted(Masked(), loader, batched=batched)
    with pytest.raises(ValueError, match=r"inputs\[0\] \(4, 4, 3\), inputs\[1\] \(3, 4\) should each have an entry"):
        fitted(Masked(), [((x, MASK[:3]), y)], batched=True)
    with pytest.raises(ValueError, match=r"targets \(3, 2\) can't be cut into 4 data.*say batched="):
        fitted(Masked(), [((x, MASK), y[:3])], batched=((True, False), True))


@pytest.mark.parametrize("use", [varify.fit_sigma, varify.fit_temperature, varify.description_length])
def test_batches_that_are_no_pairs_or_do_not_belong_together_are_refused(use: Any) -> None:
    vnet = varify.variationalize(nn.Linear(4, 3)).eval()
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    options = {"num_data": 6} if use is varify.fit_sigma else {}
    before = {name: q.sigma for name, q in vnet.posteriors.items()}
    for batch, message in (
        (x[:3], r"a batch must be \(inputs, targets\), got a Tensor"),
        ((x, y, y), r"a batch must be \(inputs, targets\), got a tuple of 3"),
        ((x, y[:5]), r"targets \(5,\) can't be cut into 6 data, as many as the inputs have"),
    ):
        if use is varify.description_length and len(batch) == 2:
            continue  # whose nll is the batch's as a whole: the criterion itself refuses such a pair
        with pytest.raises(varify.ArgumentError, match=message):
            use(vnet, [batch], F.cross_entropy, **options)
    assert all(torch.equal(q.sigma, before[name]) for name, q in vnet.posteriors.items())


def test_a_structure_found_in_one_batch_must_hold_in_the_next() -> None:
    x, y = problem(5)
    weights = torch.rand(5, 4)
    with pytest.raises(ValueError, match=r"inputs\[0\] \(3, 4, 3\), inputs\[1\] \(1, 4\) should each have an entry"):
        fitted(Weighted(), [((x[:2], weights[:2]), y[:2]), ((x[2:], weights[:1]), y[2:])])


def test_class_weights_among_the_targets() -> None:
    """Three classes in batches of three: the lengths tell nothing, and a weighted mean is no mean of the data's."""
    torch.manual_seed(0)
    network, x, y = nn.Linear(3, 3), torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 0, 1])
    weights = torch.tensor([0.2, 1.0, 3.0])
    sum_of = lambda o, t: F.cross_entropy(o, t[0], t[1], reduction="sum") / len(o)  # noqa: E731
    mean_of = lambda o, t: F.cross_entropy(o, t[0], t[1])  # noqa: E731
    loader = [(x[i : i + 3], (y[i : i + 3], weights)) for i in (0, 3)]
    for criterion, options in ((sum_of, {}), (mean_of, {"batched": (True, (True, False))})):
        nlls = [lambda net, i=i, c=criterion: c(net(x[i : i + 1]), (y[i : i + 1], weights)) for i in range(6)]
        assert_close(fitted(network, loader, criterion, **options), sigma_by_hand(network, nlls))
    with pytest.raises(ValueError, match=r"targets\[0\] \(3,\), targets\[1\] \(3,\) .* say batched="):
        fitted(network, loader, mean_of)


def test_two_targets_for_each_datum() -> None:
    torch.manual_seed(0)
    network, x = nn.Linear(3, 3), torch.randn(6, 3)
    targets = {"class": torch.tensor([0, 1, 0, 0, 0, 1]), "size": torch.randn(6)}
    criterion = lambda o, t: F.cross_entropy(o[:, :2], t["class"]) + F.mse_loss(o[:, 2], t["size"])  # noqa: E731
    cut = lambda i: {name: value[i : i + 1] for name, value in targets.items()}  # noqa: E731
    nlls = [lambda net, i=i: criterion(net(x[i : i + 1]), cut(i)) for i in range(6)]
    assert_close(fitted(network, [(x, targets)], criterion), sigma_by_hand(network, nlls))


def language_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7), nn.Flatten(0, 1))


def test_flattened_tokens_go_with_their_sequence() -> None:
    network, ids = language_model(), torch.randint(7, (8, 5))
    nlls = [lambda net, i=i: F.cross_entropy(net(ids[i : i + 1]), ids[i]) for i in range(8)]
    expected = sigma_by_hand(network, nlls)
    for batch in (8, 4, 3, 1):
        loader = [(ids[i : i + batch], ids[i : i + batch].flatten()) for i in range(0, 8, batch)]
        assert_close(fitted(network, loader, F.cross_entropy), expected)


class ByPosition(nn.Module):
    """Scores of all first tokens, of all second tokens, ...: `(T·B, 7)`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = language_model()

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids.T)


def test_targets_flattened_in_another_order_are_not_cut() -> None:
    ids = torch.randint(7, (8, 5))
    for loader in ([(ids, ids.T.flatten())], [(ids[:5], ids[:5].T.flatten()), (ids[5:], ids[5:].T.flatten())]):
        with pytest.raises(ValueError, match=r"inputs \(\d, 5\), targets \(\d+,\) have an entry .* say batched="):
            fitted(ByPosition(), loader, F.cross_entropy)


# --- loaders


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(3, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.fc(a + b)


class Several(nn.Module):
    """One argument, which is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.fc(torch.stack(images, 1).sum(1))


class Optional(Two):
    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        return self.fc(a if b is None else a + b)


def test_a_dataset_of_pairs_by_a_plain_loader() -> None:
    torch.manual_seed(0)
    a, b, y = torch.randn(8, 3), torch.randn(8, 3), torch.randn(8, 2)
    loader = DataLoader([((a[i], b[i]), y[i]) for i in range(8)], 4)
    assert isinstance(next(iter(loader))[0], list)
    nlls = [lambda net, i=i: F.mse_loss(net(a[i : i + 1], b[i : i + 1]), y[i : i + 1]) for i in range(8)]
    assert_close(fitted(Two(), loader), sigma_by_hand(Two(), nlls))
    vnet = varify.variationalize(Two())
    assert varify.description_length(vnet, loader, F.mse_loss).num_data == 8
    vnet(a, b)  # the first call of its kind draws all weights
    found = []
    for inputs in ([a, b], (a, b)):
        torch.manual_seed(0)
        found.append(ELBO(num_data=8)(nn.DataParallel(vnet), F.mse_loss, inputs, y).nll.item())
    assert found[0] == found[1]


def test_a_list_that_is_the_argument_and_one_that_may_be() -> None:
    a, b, y = torch.randn(8, 3), torch.randn(8, 3), torch.randn(8, 2)
    assert ELBO(num_data=8)(varify.variationalize(Several()), F.mse_loss, [a, b], y).loss.isfinite()
    assert fitted(Several(), [([a, b], y)])["fc.weight"].isfinite().all()
    vnet = varify.variationalize(Optional())
    message = r"a list of 2, which for Optional\.forward\(a.*, b.*\) may be its first argument or all .* give a tuple"
    for call in (
        lambda: ELBO(num_data=8)(vnet, F.mse_loss, [a, b], y),
        lambda: varify.fit_sigma(vnet, [([a, b], y)], F.mse_loss, num_data=8),
        lambda: varify.description_length(vnet, [([a, b], y)], F.mse_loss),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert ELBO(num_data=8)(vnet, F.mse_loss, (a, b), y).loss.isfinite()


def test_num_data_counts_inputs_and_not_labels() -> None:
    ids = torch.randint(7, (8, 64))
    model = varify.variationalize(language_model())
    for num_data in (8, 100):
        assert ELBO(num_data=num_data)(model, F.cross_entropy, ids, ids.flatten()).loss.isfinite()
    with pytest.raises(ValueError, match="num_data=7, but this batch alone has 8"):
        ELBO(num_data=7)(model, F.cross_entropy, ids, ids.flatten())
    recurrent = varify.variationalize(nn.Linear(3, 2))
    x, y = torch.randn(50, 6, 3), torch.randn(50, 6, 2)  # fifty steps of six sequences
    assert ELBO(num_data=6)(recurrent, F.mse_loss, x, y).loss.isfinite()
    with pytest.raises(ValueError, match="num_data=5, but this batch alone has 6"):
        ELBO(num_data=5)(recurrent, F.mse_loss, x, y)


def test_description_length_weights_batches_by_their_data() -> None:
    torch.manual_seed(0)
    network, ids = language_model(), torch.randint(7, (5, 4))
    vnet = varify.variationalize(network)
    for name in vnet.posteriors:
        vnet.get_parameter(f"rho.{name}").data.fill_(-60.0)  # the draws are the means
    criterion = lambda o, t: F.cross_entropy(o, t, reduction="sum") * 4 / len(t)  # noqa: E731
    loader = [(ids[i : i + 3], ids[i : i + 3].flatten()) for i in (0, 3)]
    found = varify.description_length(vnet, loader, criterion, n_samples=1)
    bits = -network(ids).log_softmax(1).gather(1, ids.reshape(-1, 1)).sum().item() / math.log(2)
    assert found.num_data == 5
    assert found.data == pytest.approx(bits, rel=1e-5)  # of all twenty tokens


def test_description_length_of_a_network_with_a_mask() -> None:
    x, y = problem(7)
    vnet = varify.variationalize(Masked())
    for batch in (7, 4, 3):
        loader = [({"mask": MASK, "x": x[i : i + batch]}, y[i : i + batch]) for i in range(0, 7, batch)]
        assert varify.description_length(vnet, loader, F.mse_loss, n_samples=1).num_data == 7
    unused = varify.variationalize(Unused())
    loader = [((x[:3], MASK), y[:3])]
    assert varify.description_length(unused, loader, F.mse_loss, n_samples=1).num_data == 3
