"""Every Python block of a guide runs, in order and in one namespace, and prints what the page shows beneath it.

A block ```` ```text ```` after a block of code is what that prints.
"""

import re
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [*sorted((DOCS / "guides").glob("*.md")), DOCS / "coming-from.md"]
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*\.?\d*")
RULE = re.compile(r"-{2,}")  # of a table, as long as its figures
# Packages that a page needs beyond those of the tests.
NEEDS = {
    "adapters": ("transformers", "peft", "safetensors"),
    "deployment": ("safetensors",),
    "hugging-face": ("transformers", "accelerate", "safetensors"),
}
# A figure of a page, from a training of seconds, holds to a third or to 0.1: processors and versions of torch differ in
# the last digits, which trainings magnify.
RELATIVE, ABSOLUTE = 1 / 3, 0.1


def same(shown: str, printed: str) -> bool:
    """Whether the words are the same and the numbers about the same."""
    words = [RULE.sub("-", NUMBER.sub("#", text)).split() for text in (shown, printed)]
    if words[0] != words[1]:
        return False
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    numbers = [(float(a.replace(",", "")), float(b.replace(",", ""))) for a, b in pairs]
    return all(abs(a - b) <= max(ABSOLUTE, RELATIVE * abs(a)) for a, b in numbers)


def marked(page: Path) -> object:
    """A page for `parametrize`; other packages warn about their own code, and torch of its quantization's future."""
    quiet = [pytest.mark.filterwarnings("ignore")] if page.stem in NEEDS else []
    return pytest.param(page, marks=quiet, id=page.stem)


@pytest.mark.parametrize("page", [marked(page) for page in PAGES])
def test_a_guides_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS.get(page.stem, ()):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    module = ModuleType("guide")  # what is pickled has a module
    monkeypatch.setitem(sys.modules, "guide", module)
    torch.manual_seed(0)
    printed = None
    blocks = BLOCK.findall(page.read_text())
    assert any(kind == "python" for kind, _ in blocks)
    for kind, block in blocks:
        if kind == "text":
            assert printed is not None, f"nothing printed:\n{block}"
            assert same(block, printed), f"the page shows\n{block}\nand its code prints\n{printed}"
            continue
        out = StringIO()
        with redirect_stdout(out):
            exec(compile(block, str(page), "exec"), module.__dict__)
        printed = out.getvalue()
        print(printed)  # pytest shows it where the test fails


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_guides_links_lead_somewhere(page: Path) -> None:
    words = BLOCK.sub("", page.read_text())  # code has brackets of its own
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", words):
        assert (page.parent / target).exists(), target


def test_what_is_shown_is_compared() -> None:
    assert same("accuracy 0.96, KL 1,200", "accuracy 0.95, KL 1,350")
    assert not same("accuracy 0.96", "accuracy 0.60")
    assert not same("KL 1,200", "KL 2,200")
    assert not same("accuracy 0.96", "accurate 0.96")
