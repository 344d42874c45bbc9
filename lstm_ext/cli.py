"""The command line: ``python -m lstm_ext {info, demo}``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line, by default the process's.

    Returns:
        The exit status: 0, or 1 when the demo finds numbers that differ or a package missing.
    """
    parser = argparse.ArgumentParser("lstm_ext", description="A fused LSTM cell for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what was built, and what of it is in use")
    demo = commands.add_parser("demo", help="train the lecture's model, check numbers, show speed")
    demo.add_argument("--epochs", type=_positive, default=150, help="passes over the text")
    demo.add_argument("--picture", type=Path, default=Path("demo.png"), help="where to save it")
    options = parser.parse_args(arguments)
    return _info() if options.command == "info" else _demo(options.epochs, options.picture)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _info() -> int:
    from lstm_ext import build_info

    for name, value in build_info().items():
        print(f"{name:22} {value}")
    return 0


def _demo(epochs: int, picture: Path) -> int:
    if not picture.resolve().parent.is_dir():
        print(f"lstm_ext demo: no such folder: {picture.resolve().parent}")
        return 1
    try:
        import matplotlib as _matplotlib  # noqa: F401
        import tqdm as _tqdm  # noqa: F401
    except ImportError as error:
        print(f"lstm_ext demo: {error}; it needs: pip install tqdm matplotlib")
        return 1
    from lstm_ext import demo

    return 0 if demo.run(epochs, picture) else 1
