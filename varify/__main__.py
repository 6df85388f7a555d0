"""`python -m varify` and the console script `varify`."""

import sys


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        from varify.experiments.cli import run
    except ModuleNotFoundError as error:
        print(f'varify: {error.name} is missing; pip install "torch-varify[experiments]"', file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # torch takes seconds to import
        return 130
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
