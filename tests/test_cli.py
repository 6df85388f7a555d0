"""The command line as its user meets it: whole runs, the same figures again, interruptions, and what goes wrong."""

import io
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
from varify.experiments.errors import RunError
from varify.experiments.progress import Progress, shown
from varify.experiments.runs import FORMAT, Run
from varify.experiments.settings import Settings
from varify.experiments.training import Training

SHORT = ["--epochs", "2", "--n-samples", "4", "--quiet"]
FILES = {"settings.toml", "checkpoint.pt", "metrics.json", "picture.png"}


def figures(text: str) -> list[str]:
    return re.findall(r"^(?:plain|variational) .*$", text, flags=re.MULTILINE)


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())["metrics"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a"
    assert run(["train", *SHORT, "--prior", "mixtgauss:sigma_1=0.5,pi=0.25", "--out", str(folder)]) == 0
    return folder


def test_a_run_writes_its_folder(finished: Path) -> None:
    assert {p.name for p in finished.iterdir()} == FILES
    told = json.loads((finished / "metrics.json").read_text())
    assert told["settings"]["prior"] == "mixtgauss:sigma_1=0.5,pi=0.25"
    for network in ("plain", "variational"):
        assert set(told["metrics"][network]) == {"accuracy", "nll", "ece", "brier", "ood_auroc"}
        assert told["seconds"][network] > 0
    assert (finished / "picture.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_evaluate_prints_the_same_figures_to_the_last_digit(finished: Path, capsys: pytest.CaptureFixture) -> None:
    told = metrics(finished)
    assert run(["evaluate", str(finished)]) == 0
    first = figures(capsys.readouterr().out)
    assert run(["evaluate", str(finished)]) == 0
    assert figures(capsys.readouterr().out) == first
    assert [float(n) for n in first[1].split()[1:]] == pytest.approx(list(told["variational"].values()), abs=1e-6)
    assert run(["evaluate", str(finished), "--seed", "5", "--n-samples", "3"]) == 0
    other = figures(capsys.readouterr().out)
    assert other[0] == first[0]
    assert other[1] != first[1]


def test_a_run_follows_the_librarys_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the settings leave open is not given to the library, whose defaults then hold."""
    import varify

    given: dict = {}
    convert, groups = varify.variationalize, varify.parameter_groups
    monkeypatch.setattr(varify, "variationalize", lambda net, **options: given.update(options) or convert(net))
    monkeypatch.setattr(varify, "parameter_groups", lambda *a: given.update(rates=a[1:]) or groups(*a))
    assert run(["train", *SHORT, "--epochs", "1", "--networks", "variational", "--out", str(tmp_path / "run")]) == 0
    assert given == {"rates": (Settings().lr, None)}
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    rates = [group["initial_lr"] for group in state["learners"]["variational"]["optimizer"]["param_groups"]]
    assert rates == [Settings().lr, 5 * Settings().lr]
    assert set(metrics(tmp_path / "run")) == {"variational"}


VARIANTS = {
    "the defaults": [],
    "estimator, schedule, validation, augmentation": [
        *("--estimator", "auto", "--kl-schedule", "warm-up", "--validation", "0.2"),
        *("--augment", "flip,rotate,shift", "--lr-plan", "plateau", "--record", "fc3.*"),
    ],
    "ivon": ["--optimizer", "ivon", "--prior", "gaussian", "--train-samples", "2", "--lr-plan", "constant"],
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(123)
    options = [*SHORT, "--batch-size", "300", *options]
    assert run(["train", *options, "--out", str(tmp_path / "whole")]) == 0
    original = Training.train_epoch

    def interrupted(self: Training, report: object) -> object:
        if self.epoch == 1:
            raise KeyboardInterrupt
        return original(self, report)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "train_epoch", interrupted)
        assert run(["train", *options, "--out", str(tmp_path / "halves")]) == 130
    assert run(["train", "--resume", str(tmp_path / "halves"), "--quiet"]) == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "halves")
    for name in ("whole", "halves"):
        assert {p.name for p in (tmp_path / name).iterdir()} == FILES | (
            {"record.npz"} if "--record" in options else set()
        )


def test_a_resumed_run_may_be_longer(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "run"
    assert run(["train", *SHORT, "--epochs", "1", "--model", "mlp", "--size", "8", "--out", str(folder)]) == 0
    assert run(["train", "--resume", str(folder), "--epochs", "2", "--quiet"]) == 0
    assert Run(folder).settings().epochs == 2
    assert json.loads((folder / "metrics.json").read_text())["epoch"] == 2
    capsys.readouterr()
    assert run(["train", "--resume", str(folder), "--epochs", "1"]) == 2
    assert "epochs 1: the run has done 2 already" in one_line(capsys)


def test_settings_from_a_file_are_those_of_the_options(tmp_path: Path) -> None:
    options = ["--model", "mlp", "--size", "8", "--lr", "1e-3", "--estimator", "flipout", "--batch-size", "400", *SHORT]
    assert run(["train", *options, "--out", str(tmp_path / "a")]) == 0
    config = tmp_path / "config.toml"
    config.write_text(
        'model = "mlp"\nsize = 8\nlr = 0.001\nestimator = "flipout"\nbatch-size = 400\nepochs = 9\nn_samples = 4\n'
    )
    assert run(["train", "--config", str(config), "--epochs", "2", "--quiet", "--out", str(tmp_path / "b")]) == 0
    again = ["train", "--config", str(tmp_path / "a" / "settings.toml"), "--quiet", "--out", str(tmp_path / "c")]
    assert run(again) == 0
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") == metrics(tmp_path / "c")


def test_the_best_epoch_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that gets worse from its second epoch on ends with the state of the first."""
    original = Training.train_epoch

    def ruined(self: Training, report: object) -> object:
        if self.epoch:
            for learner in self.learners.values():
                with torch.no_grad():
                    for p in learner.network.parameters():
                        p.mul_(0)
        return original(self, report)

    options = [*SHORT, "--model", "mlp", "--size", "8", "--batch-size", "300", "--validation", "0.3"]
    assert run(["train", *options, "--epochs", "1", "--lr-plan", "constant", "--out", str(tmp_path / "one")]) == 0
    monkeypatch.setattr(Training, "train_epoch", ruined)
    assert run(["train", *options, "--lr-plan", "constant", "--out", str(tmp_path / "two")]) == 0
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["best_epoch"] == {"plain": 1, "variational": 1}
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")
    assert run(["evaluate", str(tmp_path / "two")]) == 0


def test_a_pipe_gets_a_few_lines_and_quiet_none(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = [
        "--epochs",
        "45",
        "--n-samples",
        "1",
        "--networks",
        "plain",
        "--model",
        "mlp",
        "--size",
        "8",
        "--batch-size",
        "2000",
    ]
    assert run(["train", *options, "--out", str(tmp_path / "a")]) == 0
    told = capsys.readouterr().err.splitlines()
    assert 10 <= len(told) <= 22
    assert re.fullmatch(r"epoch 45 of 45: plain \S+  left 0:00", told[-1])
    assert not any("\r" in line for line in told)
    assert run(["train", *options, "--quiet", "--out", str(tmp_path / "b")]) == 0
    assert capsys.readouterr().err == ""


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
    assert {p.name for p in folder.iterdir()} == {"settings.toml", "checkpoint.pt"}
    assert run(["evaluate", str(folder), "--n-samples", "1"]) == 0


def one_line(capsys: pytest.CaptureFixture) -> str:
    told = capsys.readouterr().err.strip()
    assert told.startswith("varify: ")
    assert "\n" not in told
    return told


BAD_SETTINGS = [
    (["--model", "lenett"], "model 'lenett' is unknown; there are lenet, alexnet, 3conv3fc, mlp"),
    (["--model", "lenett"], "did you mean 'lenet'?"),
    (["--model", "no.such:thing"], "there is no module 'no' here or installed"),
    (["--model", "torch.nn:Linnear"], "torch.nn has no function 'Linnear'; did you mean 'Linear'?"),
    (["--model", "tests.factories:seven"], "gives (2, 7) for two images, and the data have 10 classes"),
    (["--model", "tests.factories:nothing"], "must give a torch.nn.Module, got a NoneType"),
    (["--model", "tests.factories:fits", "--activation", "relu"], "takes no activation"),
    (["--size", "28"], "lenet takes images of 32 pixels a side, not 28"),
    (["--data", "cifar"], "did you mean 'cifar10'?"),
    (["--ood", "leters"], "did you mean 'letters'?"),
    (["--data", "mnist", "--data-root", "/dev/null/nowhere"], "mnist is not in /dev/null/nowhere: add --download"),
    (["--prior", "nose"], "varify: unknown prior 'nose'; there are"),
    (["--prior", "mixtgaus"], "did you mean 'mixtgauss'?"),
    (["--prior", "mixtgauss:pi=2"], "pi must lie within (0, 1), got 2.0"),
    (["--prior", "mixtgauss:pi=x"], "'pi=x' must be key=number, as in mixtgauss:pi=0.5"),
    (["--init", "mopde"], "init must be"),
    (["--where", "conv9*"], "matches no parameter"),
    (["--record", "conv9*"], "record 'conv9*' matches no variational parameter; there are conv1.weight"),
    (["--networks", "plain", "--record", "*"], "record is of a variational network"),
    (["--estimator", "locale"], "estimator must be one of 'auto', 'flipout', 'local', 'weights'"),
    (["--optimizer", "ivno"], "did you mean 'ivon'?"),
    (["--kl-schedule", "warmup"], "did you mean 'warm-up'?"),
    (["--kl-schedule", "warm-up:2"], "takes a share within (0, 1]"),
    (["--kl-schedule", "blundell", "--optimizer", "ivon"], "ivon has the KL in its step"),
    (["--optimizer", "ivon", "--prior", "mixtgauss"], "Gaussian"),
    (["--epochs", "0"], "epochs must be at least 1"),
    (["--epochs", "many"], "invalid int value: 'many'"),
    (["--lr", "-1"], "lr must be greater than 0"),
    (["--validation", "1"], "within [0, 1)"),
    (["--validation", "1e-9"], "leaves 1348 images to train on and 0 to validate"),
    (["--beta", "-1"], "beta must be auto or a number of at least 0"),
    (["--augment", "flip,turn"], "augment 'turn' is unknown"),
    (["--device", "gpu"], "device 'gpu' can't be used"),
    (["--epoch", "3"], "varify train has no option --epoch; did you mean '--epochs'?"),
    (["digits"], "varify train doesn't take 'digits'"),
    (["--config", "/nowhere.toml"], "/nowhere.toml can't be read: No such file"),
]


@pytest.mark.parametrize(("flags", "told"), BAD_SETTINGS, ids=[" ".join(flags) for flags, _ in BAD_SETTINGS])
def test_bad_settings_are_one_line_and_leave_nothing(
    flags: list, told: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(["train", *flags, "--out", str(tmp_path / "run")]) == 2
    assert told.lower() in one_line(capsys).lower()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_one(capsys: pytest.CaptureFixture) -> None:
    assert run(["train", "--device", "cuda"]) == 2
    told = one_line(capsys)
    assert "device 'cuda' can't be used" in told
    assert "--device cpu" in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("epoch = 3", "there is no setting 'epoch'; did you mean 'epochs'?"),
        ('epochs = "3"', "epochs must be an integer, not '3'"),
        ("epochs = true", "epochs must be an integer, not True"),
        ("epochs = ", "is no TOML"),
        ('model = "vgg"', "model 'vgg' is unknown"),
        ("[train]\nepochs = 3", "there is no setting 'train'"),
    ],
)
def test_a_bad_file_is_one_line(text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = tmp_path / "c.toml"
    config.write_text(text)
    assert run(["train", "--config", str(config), "--out", str(tmp_path / "run")]) == 2
    line = one_line(capsys)
    assert str(config) in line
    assert told in line


@pytest.mark.parametrize("factory", ["raises", "fails_later"])
def test_a_factory_that_raises_shows_the_users_own_lines(
    factory: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(["train", "--model", f"tests.factories:{factory}", "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "Traceback (most recent call last):"
    assert "factories.py" in told[1] or "torch" in told[1]
    assert "varify/experiments" not in "\n".join(told)
    assert told[-2].startswith("ZeroDivisionError")
    assert told[-1].startswith(f"varify: model 'tests.factories:{factory}' raised")
    assert not list(tmp_path.iterdir())


def test_a_factory_of_ones_own_in_the_working_directory_with_a_prior_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text((Path(__file__).parent / "factories.py").read_text())
    train = ["train", "--epochs", "1", "--quiet", "--model", "mine:fits", "--out", "run", "--batch-size", "500"]
    for command in ([*train, "--prior", "laplace-of-the-factories:scale=0.1"], ["evaluate", "run"]):
        # as the console script, which has no working directory on its path
        script = f"import sys; sys.path.remove(''); from varify.experiments.cli import run; sys.exit(run({command}))"
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


def test_bad_folders_are_one_line(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cases = {}
    names = ("no settings", "no checkpoint", "cut", "garbage", "other model", "bad settings", "other format", "first")
    for name in names:
        cases[name] = tmp_path / name
        cases[name].mkdir()
        for file in ("settings.toml", "checkpoint.pt"):
            (cases[name] / file).write_bytes((finished / file).read_bytes())
    settings = (finished / "settings.toml").read_text()
    (cases["no settings"] / "settings.toml").unlink()
    (cases["no checkpoint"] / "checkpoint.pt").unlink()
    (cases["cut"] / "checkpoint.pt").write_bytes((finished / "checkpoint.pt").read_bytes()[:5000])
    (cases["garbage"] / "checkpoint.pt").write_bytes(b"nothing that torch knows")
    (cases["other model"] / "settings.toml").write_text(settings.replace('"lenet"', '"mlp"'))
    (cases["bad settings"] / "settings.toml").write_text(settings.replace("model =", "modell ="))
    other = settings.replace(f"format = {FORMAT}", "format = 99").replace('varify = "', 'varify = "9')
    (cases["other format"] / "settings.toml").write_text(other)
    (cases["first"] / "settings.toml").rename(cases["first"] / "settings.json")
    told = {}
    for name, folder in {**cases, "nowhere": tmp_path / "nowhere"}.items():
        before = sorted(tmp_path.rglob("*"))
        for command in (["evaluate", str(folder)], ["train", "--resume", str(folder)]):
            assert run(command) == 2
            told[name] = one_line(capsys)
            assert str(folder) in told[name]
        assert sorted(tmp_path.rglob("*")) == before
    assert re.search(r"checkpoint.pt is no whole checkpoint \(\w+Error\); train it again$", told["cut"])
    assert "was made by varify 9" in told["other format"]
    assert "train it again" in told["other format"]
    assert "varify 0.1.0" in told["first"]
    assert run(["train", "--out", str(finished)]) == 2
    assert "exists and is not empty" in one_line(capsys)
    assert run(["train", "--resume", str(finished), "--lr", "1"]) == 2
    assert "leave out --lr" in one_line(capsys)


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from varify.__main__ import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY));"  # no file grows beyond this
        f"sys.argv = ['varify', 'train', '--epochs', '1', '--out', {str(tmp_path / 'run')!r}]; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert re.fullmatch(r"varify: .*checkpoint.pt can't be written: .*", done.stderr.strip())
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Run.create(tmp_path / "run", Settings(), {})
    folder.write("metrics.json", b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"metrics.json can't be written: No space left on device"):
        folder.write("metrics.json", b"new")
    assert (tmp_path / "run" / "metrics.json").read_bytes() == b"old"
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"settings.toml", "checkpoint.pt", "metrics.json"}


def test_a_loss_that_is_no_number_ends_the_run_with_the_epoch_before(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    assert run(["train", *SHORT, "--networks", "plain", "--lr", "1e20", "--out", str(folder)]) == 2
    assert re.match(r"varify: plain is (nan|inf) in epoch 1: a lower --lr may help", one_line(capsys))
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["epoch"] == 0


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ["--networks", "plain", "--model", "mlp", "--size", "8", "--batch-size", "500", "--validation", "0.5"]
    assert run(["train", *SHORT, *options, "--tensorboard", "--out", str(tmp_path / "run")]) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"plain", "plain_validation"}
    told = [(e.step, e.value) for e in events.Scalars("plain_validation")]
    best = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["best"]["plain"]
    assert [step for step, _ in told] == [1, 2]
    assert min(value for _, value in told) == pytest.approx(best[1])


@pytest.mark.parametrize("extra", ["tensorboard", "shtab"])
def test_what_an_option_needs_is_named(
    extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, extra, None)
    command = {
        "tensorboard": ["train", "--tensorboard", "--out", str(tmp_path / "run")],
        "shtab": ["completion", "zsh"],
    }
    assert run(command[extra]) == 2
    assert "pip install" in one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_the_console_script_and_the_module_are_the_same_program() -> None:
    for command in (["varify", "--version"], [sys.executable, "-m", "varify", "--version"]):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path}, timeout=120)
        assert done.stdout.startswith("varify 0.1")


def test_a_terminal_gets_a_bar_with_the_time_left_and_the_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress("lenet on digits", epochs=2, steps=3, done=1)
    for i in range(3):
        time.sleep(0.11)  # longer than tqdm takes between two pictures
        progress.step({"loss": 0.5, "nll": 0.25, "kl": 12345.0 + i})
    progress.close()
    told = sys.stderr.getvalue()
    assert re.search(r"lenet on digits: +83%.* 5/6 \[00:00<00:00, .*loss=0.500, nll=0.250, kl=12,346\]", told)
    assert list(shown(range(3), "predictions")) == [0, 1, 2]
    assert "predictions" in sys.stderr.getvalue()
