"""The command line: the parser, and what an error looks like."""

import argparse
import sys
from collections.abc import Sequence

from varify import VarifyError, __version__
from varify.experiments.commands import COMMANDS
from varify.experiments.errors import ExperimentError, UsersError
from varify.experiments.options import Parser

DESCRIPTION = "Train networks and their variational twins, and look at what these know."


def run(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code. What goes wrong is one line on standard error, and code 2."""
    parser, commands = parsers()
    try:
        options = parser.parse(arguments, commands)
        if options.command == "completion":
            return int(options.do(options, parser))
        return int(options.do(options))
    except UsersError as error:
        print(f"{error.traceback}varify: {error}", file=sys.stderr)
        return 2
    except (ExperimentError, VarifyError) as error:
        print(f"varify: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nvarify: interrupted", file=sys.stderr)
        return 130


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """The whole parser, and that of each command."""
    parser = Parser(prog="varify", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"varify {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command", title="commands")
    found = {}
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=f"{module.HELP[0].upper()}{module.HELP[1:]}.",
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add(command)
        command.set_defaults(do=module.do)
        found[name] = command
    return parser, found
