"""`python -m cvt`, and the script `cvt`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C exits with 130 even while it is being imported."""
    try:
        from cvt.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
