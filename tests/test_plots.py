"""Plots draw the numbers that they say, checked by slow references on what the axes hold."""

import math
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import varify
from varify import plots


@pytest.fixture
def ax() -> object:
    return Figure().subplots()


@pytest.fixture
def vnet() -> varify.VariationalModule:
    torch.manual_seed(0)
    vnet = varify.variationalize(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))
    with torch.no_grad():
        for rho in vnet.rho.parameters():
            rho.add_(torch.randn_like(rho))
    return vnet


def test_the_posterior_is_the_mixture_of_the_weights_posteriors(vnet: varify.VariationalModule, ax: object) -> None:
    assert plots.posterior(vnet, "0.weight", ax=ax) is ax
    grid, density = ax.lines[0].get_data()
    q = vnet.posteriors["0.weight"]
    weights = torch.distributions.Normal(q.mu.detach().double().flatten(), q.sigma.detach().double().flatten())
    for i in (0, 150, 399):
        expected = weights.log_prob(torch.tensor(float(grid[i]), dtype=torch.float64)).exp().mean()
        assert float(density[i]) == pytest.approx(float(expected), rel=1e-9)
    counts = [patch.get_height() * patch.get_width() for patch in ax.patches]
    assert sum(counts) == pytest.approx(1)
    with pytest.raises(varify.UnknownNameError):
        plots.posterior(vnet, "9.weight")


def test_reliability_counts_as_a_loop_does(ax: object) -> None:
    torch.manual_seed(1)
    p, y = torch.randn(500, 12).softmax(1), torch.randint(12, (500,))
    plots.reliability(p, y, n_bins=5, label="one", ax=ax)
    rows: dict[int, list[tuple[float, bool]]] = {}
    for probabilities, label in zip(p.tolist(), y.tolist(), strict=True):
        top = max(probabilities)
        rows.setdefault(math.ceil(top * 5), []).append((top, probabilities.index(top) == label))
    drawn = np.asarray(ax.lines[1].get_data()).T
    expected = [np.mean(rows[bin_], axis=0) for bin_ in sorted(rows)]
    np.testing.assert_allclose(drawn, expected, rtol=1e-5)
    areas = ax.collections[0].get_sizes()
    np.testing.assert_allclose((areas - 8) / 200, [len(rows[bin_]) / 500 for bin_ in sorted(rows)], rtol=1e-5)
    plots.reliability(p, y, ax=ax)
    assert len(ax.lines) == 3  # the diagonal once


def test_reliability_of_a_prediction_without_bins_of_few(ax: object) -> None:
    prediction = varify.Prediction(torch.tensor([[[3.0, 0.0]] * 8 + [[0.1, 0.0]] * 2]))
    y = torch.tensor([0] * 9 + [1])
    plots.reliability(prediction, y, ax=ax)
    tops = [prediction.probabilities()[i].max().item() for i in (8, 0)]
    np.testing.assert_allclose(np.asarray(ax.lines[1].get_data()).T, [(tops[0], 0.5), (tops[1], 1.0)], rtol=1e-5)
    plots.reliability(prediction, y, least=3, ax=ax)
    np.testing.assert_allclose(np.asarray(ax.lines[2].get_data()).T, [(tops[1], 1.0)], rtol=1e-5)
    assert "bins of fewer than 3 data left out" in ax.get_xlabel()


def test_uncertainty_draws_means(ax: object) -> None:
    torch.manual_seed(2)
    prediction = varify.Prediction(torch.randn(20, 7, 3))
    diagonals = [c.diagonal(dim1=-2, dim2=-1) for c in prediction.covariances()]
    plots.uncertainty(*diagonals, ["a", "b", "c"], ax=ax)
    heights = np.asarray([bar.get_height() for bar in ax.patches]).reshape(2, 3)
    np.testing.assert_allclose(heights, [d.mean(0) for d in diagonals], rtol=1e-6)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", "c"]


def test_intervals_are_sorted_and_count_what_is_outside(ax: object) -> None:
    torch.manual_seed(3)
    x = torch.randn(50, 1)
    prediction = varify.Prediction(x + 0.5 * torch.randn(400, 50, 1))
    likelihood = varify.GaussianLikelihood(0.5)
    y = x + torch.randn(50, 1)
    plots.intervals(x, prediction, y, level=0.8, likelihood=likelihood, ax=ax)
    at, mean = ax.lines[0].get_data()
    assert (np.diff(at) >= 0).all()
    np.testing.assert_allclose(mean, prediction.mean[x.flatten().argsort(), 0], atol=1e-6)
    inside, outside = (len(line.get_xdata()) for line in ax.lines[1:])
    assert inside / (inside + outside) == pytest.approx(float(prediction.coverage(y, 0.8, likelihood)), abs=1e-6)
    wide, narrow = (band.get_paths()[0].get_extents() for band in ax.collections)
    assert wide.height > narrow.height


def test_the_band_of_the_mean_is_in_the_units_of_the_targets(ax: object) -> None:
    torch.manual_seed(4)
    x, outputs = torch.arange(20.0), torch.randn(400, 20, 2)
    cases = [
        (varify.HeteroscedasticGaussianLikelihood(), outputs, outputs[..., :1]),  # a mean and a rho
        (varify.PoissonLikelihood(), outputs[..., :1], outputs[..., :1].exp()),  # the logarithm of a rate
    ]
    for likelihood, samples, means in cases:
        ax.clear()
        plots.intervals(x, varify.Prediction(samples), level=0.8, likelihood=likelihood, ax=ax)
        np.testing.assert_allclose(ax.lines[0].get_ydata(), means.numpy().mean(0)[:, 0], rtol=1e-4, atol=1e-6)
        band = ax.collections[1].get_paths()[0].get_extents()
        low, high = np.quantile(means.numpy()[..., 0], (0.1, 0.9), axis=0)
        assert (band.y0, band.y1) == pytest.approx((low.min(), high.max()), rel=1e-5)


def test_snr_leaves_out_means_next_to_0(ax: object) -> None:
    vnet = varify.variationalize(torch.nn.Linear(30, 10))
    with torch.no_grad():
        vnet.module.weight.view(-1)[:3] = 1e-30
    plots.snr(vnet, ax=ax)
    assert ax.get_xlim()[0] > -100
    assert "without the least 2 %" in ax.get_xlabel()


def test_snr_and_pruning_agree(vnet: varify.VariationalModule, ax: object) -> None:
    plots.snr(vnet, unit="log10", ax=ax)
    share = ax.figure.axes[1].lines[0]
    ratios = np.concatenate([(q.mu.abs() / q.sigma).detach().numpy().ravel() for q in vnet.posteriors.values()])
    np.testing.assert_allclose(share.get_xdata(), np.sort(np.log10(ratios)), rtol=1e-4)
    varify.prune(vnet, 0.5)
    other = Figure().subplots()
    plots.snr(vnet, unit="log10", ax=other)
    kept = other.figure.axes[1].lines[0].get_xdata()
    np.testing.assert_allclose(kept, np.sort(np.log10(ratios))[round(0.5 * len(ratios)) :], rtol=1e-4)
    curve = varify.pruning_curve(vnet, lambda pruned: 0.25, (0.5, 1.0))
    last = Figure().subplots()
    plots.pruning_curve(curve, label="x", ax=last)
    shares, figures = last.lines[0].get_data()
    assert shares == pytest.approx([50, 100], abs=1)
    assert list(figures) == [0.25, 0.25]


BAD = {
    "no probabilities": (lambda v: plots.reliability(torch.randn(5, 3), torch.zeros(5)), "prediction.probabilities"),
    "shapes": (lambda v: plots.reliability(torch.ones(5, 3), torch.zeros(4)), r"got \(5, 3\) and \(4,\)"),
    "covariances": (lambda v: plots.uncertainty(torch.ones(5, 3, 3), torch.ones(5, 3, 3)), "take .diagonal"),
    "names": (lambda v: plots.uncertainty(torch.ones(3), torch.ones(3), ["a"]), "names must be 3"),
    "inputs": (lambda v: plots.intervals(torch.ones(4, 2), varify.Prediction(torch.ones(2, 4))), "x must have shape"),
    "lengths": (lambda v: plots.intervals(torch.ones(4), varify.Prediction(torch.ones(2, 5))), r"shape \(4,\)"),
    "nothing": (lambda v: plots.snr(v, where="9*"), "matches no parameter"),
    "unit": (lambda v: plots.snr(v, unit="db"), "unit must be one of"),
    "no curve": (lambda v: plots.pruning_curve([]), "curve must be pairs"),
    "a plain network": (lambda v: plots.snr(v.module), "variational"),
}


@pytest.mark.parametrize(("call", "told"), BAD.values(), ids=BAD)
def test_what_can_not_be_drawn_is_said(call: object, told: str, vnet: varify.VariationalModule) -> None:
    from matplotlib import pyplot

    with pytest.raises(varify.VarifyError, match=told):
        call(vnet)
    assert not pyplot.get_fignums()  # refused before a figure was made


def test_without_an_axis_a_new_figure_is_made(vnet: varify.VariationalModule) -> None:
    from matplotlib import pyplot

    with pyplot.rc_context({"backend": "agg"}):
        first, second = plots.posterior(vnet, "0.weight"), plots.snr(vnet)
        assert first.figure is not second.figure
        pyplot.close("all")


def test_without_matplotlib_it_says_what_to_install(
    vnet: varify.VariationalModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "torch-varify\[plots\]"'):
        plots.snr(vnet)
