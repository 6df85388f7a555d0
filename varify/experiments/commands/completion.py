"""`varify completion`: what makes a shell complete the commands and their options."""

import argparse

from varify.experiments.errors import INSTALL, SettingsError
from varify.experiments.options import Parser

HELP = "print a script that makes a shell complete varify's commands and options"
EXAMPLES = """examples:
  varify completion bash > ~/.local/share/bash-completion/completions/varify
  varify completion zsh > ~/.zfunc/_varify
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="bash, zsh or tcsh")


def do(options: argparse.Namespace, parser: Parser) -> int:
    """Print it. The script knows all words itself, so that a tab need not wait for torch."""
    try:
        import shtab
    except ImportError as error:
        raise SettingsError(f"completion needs shtab: {INSTALL.format('completion')}") from error
    print(shtab.complete(parser.for_completion(), options.shell))
    return 0
