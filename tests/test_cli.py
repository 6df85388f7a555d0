"""The command line as its user meets it: whole runs, the same figures again, interruptions, and what goes wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from varify.experiments.cli import run
from varify.experiments.data import DATA, letters
from varify.experiments.models import MODELS
from varify.experiments.runs import Run
from varify.experiments.settings import Settings
from varify.experiments.training import Twins

SHORT = ["--epochs", "2", "--n-samples", "4"]


def figures(text: str) -> list[str]:
    return re.findall(r"^(?:plain|variational) .*$", text, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a"
    assert run(["train", *SHORT, "--prior", "mixtgauss:sigma_1=0.5,pi=0.25", "--out", str(folder)]) == 0
    return folder


def test_a_run_writes_its_folder(finished: Path) -> None:
    assert {p.name for p in finished.iterdir()} == {"settings.json", "checkpoint.pt", "metrics.json", "picture.png"}
    told = json.loads((finished / "metrics.json").read_text())
    assert told["settings"]["prior"] == "mixtgauss:sigma_1=0.5,pi=0.25"
    for network in ("plain", "variational"):
        assert set(told["metrics"][network]) == {"accuracy", "nll", "ece", "letters_auroc"}
    assert (finished / "picture.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_evaluate_prints_the_same_figures_to_the_last_digit(finished: Path, capsys: pytest.CaptureFixture) -> None:
    told = json.loads((finished / "metrics.json").read_text())["metrics"]
    assert run(["evaluate", str(finished)]) == 0
    first = figures(capsys.readouterr().out)
    assert run(["evaluate", str(finished)]) == 0
    assert figures(capsys.readouterr().out) == first
    assert [float(n) for n in first[1].split()[1:]] == pytest.approx(list(told["variational"].values()), abs=1e-6)
    assert run(["evaluate", str(finished), "--seed", "5", "--n-samples", "3"]) == 0
    other = figures(capsys.readouterr().out)
    assert other[0] == first[0]
    assert other[1] != first[1]


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(123)
    assert run(["train", *SHORT, "--out", str(tmp_path / "whole")]) == 0
    original = Twins.train_epoch

    def interrupted(self: Twins, *arguments: object) -> None:
        if self.epoch == 1:
            raise KeyboardInterrupt
        original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Twins, "train_epoch", interrupted)
        assert run(["train", *SHORT, "--out", str(tmp_path / "halves")]) == 130
    assert run(["train", "--resume", str(tmp_path / "halves")]) == 0
    whole, halves = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("whole", "halves"))
    assert whole == halves


def test_ctrl_c_leaves_a_whole_checkpoint_and_says_where(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "varify", "train", "--epochs", "500", "--out", str(folder)]

    def heeds_ctrl_c() -> None:  # also where the tests run in the background of a shell, which ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeds_ctrl_c) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (folder / "checkpoint.pt").exists():
            time.sleep(0.2)
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"{folder}/checkpoint.pt holds epoch" in told
    assert f"varify train --resume {folder}" in told
    assert "Traceback" not in told
    assert {p.name for p in folder.iterdir()} == {"settings.json", "checkpoint.pt"}
    assert run(["evaluate", str(folder), "--n-samples", "1"]) == 0


def one_line(capsys: pytest.CaptureFixture) -> str:
    told = capsys.readouterr().err.strip()
    assert told.startswith("varify: ")
    assert "\n" not in told
    return told


BAD_SETTINGS = [
    (["--model", "vgg"], "model 'vgg' is unknown; there are lenet, mlp, 3conv3fc"),
    (["--data", "cifar"], "data 'cifar' is unknown; there are digits, mnist, fashion-mnist"),
    (["--prior", "nose"], "unknown prior 'nose'"),
    (["--prior", "mixtgauss:pi=2"], "pi must lie within (0, 1), got 2.0"),
    (["--prior", "mixtgauss:pi=x"], "it is written name:key=number"),
    (["--epochs", "0"], "epochs must be greater than 0"),
    (["--beta", "-1"], "beta must be at least 0"),
    (["--device", "gpu"], "device 'gpu' can't be used"),
    (["--data", "mnist", "--data-root", "/dev/null/nowhere"], "mnist"),
]


@pytest.mark.parametrize(("flags", "told"), BAD_SETTINGS, ids=[" ".join(flags) for flags, _ in BAD_SETTINGS])
def test_bad_settings_are_one_line_and_leave_nothing(
    flags: list, told: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(["train", *flags, "--out", str(tmp_path / "run")]) == 1
    assert told.lower() in one_line(capsys).lower()
    assert not (tmp_path / "run").exists()


def test_bad_folders_are_one_line(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cases = {}
    for name in ("no settings", "no checkpoint", "cut", "garbage", "other model", "bad settings"):
        cases[name] = tmp_path / name
        cases[name].mkdir()
        for file in ("settings.json", "checkpoint.pt"):
            (cases[name] / file).write_bytes((finished / file).read_bytes())
    (cases["no settings"] / "settings.json").unlink()
    (cases["no checkpoint"] / "checkpoint.pt").unlink()
    (cases["cut"] / "checkpoint.pt").write_bytes((finished / "checkpoint.pt").read_bytes()[:5000])
    (cases["garbage"] / "checkpoint.pt").write_bytes(b"nothing that torch knows")
    (cases["other model"] / "settings.json").write_text(json.dumps(Settings(model="mlp").as_dict()))
    (cases["bad settings"] / "settings.json").write_text('{"modell": "lenet"}')
    for folder in (*cases.values(), tmp_path / "nowhere"):
        before = sorted(tmp_path.rglob("*"))
        for command in (["evaluate", str(folder)], ["train", "--resume", str(folder)]):
            assert run(command) == 1
            assert str(folder) in one_line(capsys)
        assert sorted(tmp_path.rglob("*")) == before
    assert run(["train", "--out", str(finished)]) == 1
    assert "exists and is not empty" in one_line(capsys)
    assert run(["train", "--resume", str(finished), "--lr", "1"]) == 1
    assert "leave out --lr" in one_line(capsys)


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from varify.__main__ import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY));"  # no file grows beyond this
        f"sys.argv = ['varify', 'train', '--epochs', '1', '--out', {str(tmp_path / 'run')!r}]; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert re.fullmatch(r"varify: .*checkpoint.pt can't be written: .*", done.stderr.strip())
    assert not (tmp_path / "run").exists()


def test_a_failed_write_keeps_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Run.create(tmp_path / "run", Settings())
    folder.write("metrics.json", b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Exception, match=r"metrics.json can't be written: No space left on device"):
        folder.write("metrics.json", b"new")
    assert (tmp_path / "run" / "metrics.json").read_bytes() == b"old"
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"settings.json", "metrics.json"}


@pytest.mark.parametrize("model", MODELS)
def test_every_model_takes_the_images(model: str) -> None:
    assert MODELS[model]()(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


def test_digits_and_letters() -> None:
    images = DATA["digits"](Path())
    assert len(images.train) + len(images.test) == 1797
    assert images.train.mean().abs() < 1e-5
    assert abs(images.train.std() - 1) < 1e-5
    assert letters(28).shape[1:] == (28, 28)
    assert len(letters(28).flatten(1).unique(dim=0)) > 80  # they are not all the same box


def test_the_console_script_and_the_module_are_the_same_program() -> None:
    for command in (["varify", "--version"], [sys.executable, "-m", "varify", "--version"]):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path}, timeout=120)
        assert done.stdout.startswith("varify 0.1")
