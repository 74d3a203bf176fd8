"""Entry point of `prismaquant-ray` and of `python -m jobs`: first the signals, then the imports."""

from __future__ import annotations

from jobs.stopping import SIGNALS


def main() -> None:
    """Own the process's signals, then run the command line."""
    SIGNALS.begin()
    from jobs.command_line import cli

    cli(prog_name="prismaquant-ray")


if __name__ == "__main__":
    main()
