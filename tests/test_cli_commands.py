"""What can be done with a run once it is trained, on a run of a second."""

import json
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

import varify
from varify.analysis.checks import CHECKS
from varify.experiments.cli import parsers, run
from varify.experiments.commands import COMMANDS
from varify.experiments.opened import open_run
from varify.experiments.runs import FORMAT
from varify.experiments.settings import Settings
from varify.experiments.uncertainty import uncertainty_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LeNet and its twin, two epochs, with two layers recorded."""
    folder = tmp_path_factory.mktemp("runs") / "lenet"
    options = ["--epochs", "2", "--n-samples", "4", "--record-per-epoch", "5", "--quiet", "--out", str(folder)]
    assert run(["record", "conv1.weight", "fc3.*", *options]) == 0
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "plain"
    options = [
        "--model",
        "mlp",
        "--size",
        "8",
        "--epochs",
        "1",
        "--batch-size",
        "500",
        "--networks",
        "plain",
        "--quiet",
    ]
    assert run(["train", *options, "--out", str(folder)]) == 0
    return folder


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_compare_is_a_table_of_what_the_runs_wrote(
    trained: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    picture = tmp_path / "comparison.png"
    assert run(["compare", str(trained), str(plain), "--out", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["lenet", "plain"],
        ["lenet", "variational"],
        ["plain", "plain"],
    ]
    columns = zip(*(line.split()[3:] for line in lines[1:4]), strict=True)
    written = [json.loads((f / "metrics.json").read_text())["metrics"] for f in (trained, trained, plain)]
    rows = [w[n] for w, n in zip(written, ("plain", "variational", "plain"), strict=True)]
    for key, cells in zip(("accuracy", "nll", "ece", "brier", "ood_auroc"), columns, strict=False):
        assert [float(cell.strip("*")) for cell in cells] == pytest.approx([row[key] for row in rows], abs=5e-5)
        best = (max if key in ("accuracy", "ood_auroc") else min)(row[key] for row in rows)
        assert [cell.endswith("*") for cell in cells] == [row[key] == best for row in rows]
    assert is_png(picture)


def test_uncertainty_is_that_of_the_draws(trained: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(["uncertainty", str(trained), "--inputs", "2", "--batch", "50"]) == 0
    told = json.loads((trained / "uncertainty-letters.json").read_text())["scores"]
    assert "uncertainty-letters.png" in capsys.readouterr().out
    assert is_png(trained / "uncertainty-letters.png")
    opened = open_run(trained, CPU)
    torch.manual_seed(0)
    draws = opened.variational.predict(opened.images.test[:50], n_samples=4).samples.double()
    loops: dict[str, list[float]] = {"epistemic": [], "aleatoric": []}  # Kwon et al. 2020, eq. 4, by class and draw
    for image in draws.softmax(-1).unbind(1):
        mean = image.mean(0)
        loops["epistemic"].append(float(sum((p - mean).square().sum() for p in image)) / 4)
        loops["aleatoric"].append(float(sum((p - p.square()).sum() for p in image)) / 4)
    for name, values in loops.items():
        assert told[f"{name}, softmax"]["inside"] == pytest.approx(np.mean(values), rel=1e-6)
    # and the entropy tells letters from digits as well as the training's report says
    assert run(["uncertainty", str(trained)]) == 0
    entropy = json.loads((trained / "uncertainty-letters.json").read_text())["scores"]["entropy"]
    report = json.loads((trained / "metrics.json").read_text())["metrics"]["variational"]
    assert entropy["auroc"] == pytest.approx(report["ood_auroc"], abs=1e-9)
    # an input's two parts add up to the variance of a label drawn from the mean prediction
    found = uncertainty_of(opened.variational, opened.images.test[:5], 4, 0)
    p = draws[:, :5].softmax(-1).mean(0)
    np.testing.assert_allclose(found.epistemic["softmax"] + found.aleatoric["softmax"], p - p.square(), atol=1e-9)


def test_plot_draws_what_was_recorded(trained: Path, capsys: pytest.CaptureFixture) -> None:
    recorded = np.load(trained / "record.npz")
    assert set(recorded) == {
        "step",
        *(f"{n}/{v}" for n in ("conv1.weight", "fc3.weight", "fc3.bias") for v in ("mu", "sigma")),
    }
    assert list(recorded["step"]) == list(range(0, 44, 4))  # 22 steps an epoch, five recordings
    opened = open_run(trained, CPU)
    torch.manual_seed(0)
    from varify.experiments.models import LeNet

    start = varify.variationalize(LeNet()).posteriors["fc3.bias"]
    np.testing.assert_array_equal(recorded["fc3.bias/mu"][0], start.mu.detach())
    np.testing.assert_array_equal(recorded["fc3.bias/sigma"][0], start.sigma.detach())
    assert recorded["fc3.weight/mu"].shape == (11, 840)
    end = opened.variational.posteriors["conv1.weight"].mu.detach().flatten()
    last, first = (abs(recorded["conv1.weight/mu"][i] - end.numpy()).mean() for i in (-1, 0))
    assert last < first
    assert run(["plot", str(trained), "--layers", "conv1*", "--values", "sigma"]) == 0
    assert is_png(trained / "lines.png")
    assert is_png(trained / "distributions.png")
    assert run(["plot", str(trained), "--layers", "conv.weight"]) == 2
    assert (
        "the run recorded conv1.weight, fc3.bias, fc3.weight; did you mean 'conv1.weight'?" in capsys.readouterr().err
    )


def test_prune_leaves_the_run_alone(trained: Path, capsys: pytest.CaptureFixture) -> None:
    before = (trained / "checkpoint.pt").read_bytes()
    assert run(["prune", str(trained), "--fractions", "0", "0.5", "1"]) == 0
    rows = json.loads((trained / "pruning.json").read_text())["curve"]
    written = json.loads((trained / "metrics.json").read_text())["metrics"]["variational"]
    assert [row["pruned"] for row in rows] == pytest.approx([0, 0.5, 1])
    assert {name: rows[0][name] for name in written} == written
    assert rows[2]["nll"] == pytest.approx(np.log(10))  # a network of zeros
    assert (trained / "checkpoint.pt").read_bytes() == before
    assert is_png(trained / "pruning.png")


def test_mdl_adds_up(trained: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(["mdl", str(trained), "--n-samples", "1"]) == 0
    bits = json.loads((trained / "mdl.json").read_text())["bits"]
    kl = open_run(trained, CPU).variational.prior_loss().item()
    assert sum(bits["weights"].values()) == pytest.approx(kl / np.log(2), rel=1e-6)
    assert bits["total"] == pytest.approx(sum(bits["weights"].values()) + bits["data"])
    assert bits["labels alone"] == pytest.approx(1348 * np.log2(10))
    assert "1,348 data" in capsys.readouterr().out


def test_diagnose_says_what_it_checked_and_a_run_with_the_defaults_has_nothing(
    trained: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(["diagnose", str(trained)]) == 0
    assert f"LeNet: errors 0, warnings 0, fine {len(CHECKS)}, unknown 0" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["uncertainty", "prune", "mdl", "diagnose", "plot"])
def test_a_plain_run_is_refused_where_posteriors_are_needed(
    command: str, plain: Path, capsys: pytest.CaptureFixture
) -> None:
    before = sorted(plain.iterdir())
    assert run([command, str(plain)]) == 2
    told = capsys.readouterr().err
    assert re.match(r"varify: .*(no variational network|no recording)", told)
    assert told.count("\n") == 1
    assert sorted(plain.iterdir()) == before


def test_what_a_command_is_given_wrongly_is_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    settings = (trained / "settings.toml").read_text()
    (unfinished / "settings.toml").write_text(settings)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "metrics.json").write_bytes((trained / "metrics.json").read_bytes())
    (foreign / "settings.toml").write_text(settings.replace(f"format = {FORMAT}", "format = 1"))
    cases = {
        ("compare", str(unfinished)): f"go on with: varify train --resume {unfinished}",
        ("compare", str(tmp_path)): "is no run folder",
        ("compare", str(foreign)): f"{foreign} was made by varify",
        ("compare",): "the following arguments are required: RUN",
        ("uncertainty", str(trained), "--ood", "leters"): "did you mean 'letters'?",
        ("uncertainty", str(trained), "--ood", str(tmp_path)): "has no images",
        ("uncertainty", str(trained), "--batch", "0"): "batch must be at least 1",
        ("prune", str(trained), "--fractions", "2"): "within [0, 1]",
        ("prune", str(trained), "--where", "conv9*"): "matches no parameter",
        ("plot", str(trained), "--weights", "0"): "weights must be at least 1",
        ("evaluate", str(trained), "--n-samples", "0"): "n-samples must be at least 1",
        ("evaluate", str(trained), "--n-sample", "3"): "did you mean '--n-samples'?",
        ("record", "conv9*"): "matches no variational parameter",
        ("evalute", str(trained)): "invalid choice: 'evalute'",
        (): "the following arguments are required: COMMAND",
    }
    for command, wanted in cases.items():
        assert run([*command]) == 2
        told = capsys.readouterr().err
        assert told.startswith("varify: ")
        assert told.count("\n") == 1
        assert wanted in told


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture) -> None:
    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            run([name, "--help"])
        assert ended.value.code == 0
        told = capsys.readouterr().out
        assert f"varify {name}" in told.split("example")[1]
        _, commands = parsers()
        for action in commands[name]._actions:
            assert action.help, action.dest


def test_every_setting_is_an_option_of_train() -> None:
    _, commands = parsers()
    options = {action.dest for action in commands["train"]._actions}
    assert {f.name for f in fields(Settings)} <= options


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_options_and_values(shell: str, capsys: pytest.CaptureFixture) -> None:
    assert run(["completion", shell]) == 0
    told = capsys.readouterr().out
    for word in ("uncertainty", "--kl-schedule", "3conv3fc", "flipout"):
        assert word in told
