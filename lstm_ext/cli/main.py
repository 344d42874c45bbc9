"""The command line: ``python -m lstm_ext {info, doctor, demo, gates, bench, convert}``."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DESCRIPTION = """\
A fused LSTM for PyTorch: look at the build, at its numbers, at its gates and at its speed.
Every command has a --help of its own; with --json, what it finds is printed for machines.
"""
DOCTOR = """\
Checks the installation: versions, instruction sets, threads, OpenMP, switches and GPU; computes a
cell and a layer beside torch.nn's in float64; times both. Says what is wrong and what to do.
Exit status 0 if nothing is wrong, else 1.
"""
GATES = """\
Draws the gates of an LSTM that reads a text, character by character, and counts how open they were.

  python -m lstm_ext gates
      trains the lecture's small model first, and traces it on the lecture's own text
  python -m lstm_ext demo --save model.pt
  python -m lstm_ext gates --checkpoint model.pt --text abaBabaB
      the same in two steps
  python -m lstm_ext gates --checkpoint yours.pt --vocabulary "abc ..." --text "a text"
      any state dict with an LSTM in it, of torch.nn or lstm_ext, that reads characters one-hot or
      through an embedding; a linear layer behind it gives the predictions

Pictures: gates (two heat maps, a row a step), histogram, saturation, half_life. trace.npz has the
numbers (lstm_ext.GateTrace.load, or numpy.load).
"""
BENCH = """\
Times our modules and torch's own in turn, on random numbers, and prints medians in microseconds.

  python -m lstm_ext bench                            a few sizes of cell and layer
  python -m lstm_ext bench 64x512x512                 a cell: batch x input x hidden
  python -m lstm_ext bench 50x64x512x512 --threads 1  a layer: time x batch x input x hidden
"""
CONVERT = """\
Says which LSTMs a file that torch.save wrote holds, and what lstm_ext.convert makes of them.

  python -m lstm_ext convert model.pt
      of a state dict: by the names and sizes of its weights; nothing in the file is run
  python -m lstm_ext convert model.pt --trust --out converted.pt
      of a whole model, whose pickle can run any code: converts it, says what was left and why,
      and writes it
"""


class CommandError(Exception):
    """What a command reports in one line, exit status 1."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line, by default the process's.

    Returns:
        The exit status: 0; 1 for what went wrong, in one line on stderr, and when the demo finds
        numbers that differ, or the doctor that something is wrong; 2, by way of SystemExit, for
        arguments that make no sense.
    """
    options = _parser().parse_args(arguments)
    commands = {
        "info": _info, "doctor": _doctor, "demo": _demo, "gates": _gates, "bench": _bench,
        "convert": _convert,
    }  # fmt: skip
    command = commands[options.command]
    try:
        # With --json, stdout is for the JSON alone.
        with contextlib.redirect_stdout(sys.stderr if options.json else sys.stdout):
            found, status = command(options)
    except CommandError as error:
        print(f"lstm_ext {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nlstm_ext {options.command}: interrupted", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(found, indent=1))
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lstm_ext", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, what: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=what, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("--json", action="store_true", help="print what is found as JSON")
        return command

    what = "what was built, and what of it is in use"
    add("info", what, what.capitalize() + ".")
    add("doctor", "check the installation, say what is wrong and what to do", DOCTOR)
    what = "train the lecture's model, check numbers, show speed"
    demo = add("demo", what, what.capitalize() + ".")
    demo.add_argument("--epochs", type=_positive, default=150, help="passes over the text")
    demo.add_argument("--picture", type=Path, default=Path("demo.png"), help="where to save it")
    demo.add_argument("--save", type=Path, help="write the trained model here, for gates")
    gates = add("gates", "draw the gates of an LSTM that reads a text", GATES)
    gates.add_argument("--checkpoint", type=Path, help="weights, as torch.save wrote them")
    gates.add_argument("--text", help="what to read; the lecture's own by default")
    gates.add_argument("--vocabulary", help="the model's characters in the order of their numbers")
    gates.add_argument("--module", help="the LSTM's name in the model, if there are several")
    gates.add_argument("--layer", type=int, default=-1, help="0 the first, -1 the last")
    gates.add_argument("--direction", type=int, default=0, choices=[0, 1], help="1 is backward")
    gates.add_argument("--last", type=_positive, help="draw so many steps from the end")
    gates.add_argument("--epochs", type=_positive, default=1000, help="to train the small model")
    gates.add_argument("--out", type=Path, default=Path("gates"), help="folder of the pictures")
    gates.add_argument("--format", choices=["png", "svg"], default="png")
    bench = add("bench", "time our modules and torch's own", BENCH)
    bench.add_argument("shapes", nargs="*", type=_shape, metavar="SIZES")
    bench.add_argument("--threads", type=_positive, help="torch's own number by default")
    bench.add_argument("--device", default="cpu")
    bench.add_argument(
        "--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"]
    )
    convert = add("convert", "say what convert makes of a checkpoint", CONVERT)
    convert.add_argument("checkpoint", type=Path, help="a file that torch.save wrote")
    convert.add_argument("--trust", action="store_true", help="unpickle a whole model")
    convert.add_argument("--out", type=Path, help="write the converted model here")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _shape(text: str) -> tuple[int, ...]:
    from lstm_ext.cli.bench import parse_shape

    return parse_shape(text)


def _need(*packages: str) -> None:
    for package in packages:
        try:
            __import__(package)
        except ImportError as error:
            raise CommandError(f"{error}; it needs: pip install {' '.join(packages)}") from None


def _need_folder(file: Path) -> None:
    folder = file.resolve().parent
    if not folder.is_dir():
        raise CommandError(f"no such folder: {folder}")


def _progress(what: str) -> Any:
    """Return what wraps a list in a progress bar, or leaves it alone where there is no tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        return iter

    return lambda items: tqdm(items, desc=what)


def _info(_: argparse.Namespace) -> tuple[dict[str, Any], int]:
    from lstm_ext import build_info

    info = build_info()
    for name, value in info.items():
        print(f"{name:22} {value}")
    return info, 0


def _doctor(_: argparse.Namespace) -> tuple[dict[str, Any], int]:
    from lstm_ext.cli import doctor

    found = doctor.report(*doctor.run())
    doctor.show(found)
    return found, 0 if found["fine"] else 1


def _demo(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    for file in (options.picture, options.save):
        if file is not None:
            _need_folder(file)
    _need("tqdm", "matplotlib")
    from lstm_ext.cli import demo

    found = demo.run(options.epochs, options.picture, options.save)
    return found, 0 if found["agreed"] else 1


def _gates(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    _need("matplotlib", "numpy")
    _need_folder(options.out)
    from lstm_ext.cli import checkpoint, lecture
    from lstm_ext.inspect import plot
    from lstm_ext.layer import LSTM

    if options.checkpoint is None:
        trained = lecture.seeded_layer_model(LSTM)
        lecture.train(trained, _progress("training the lecture's model")(range(options.epochs)))
        model = checkpoint.lecture_model(trained)
        text = lecture.TEXT[:-1] if options.text is None else options.text
        last = options.last or 8  # as the lecture draws them
    else:
        if options.text is None:
            raise CommandError("--checkpoint needs a --text to read")
        text, last = options.text, options.last
    try:
        if options.checkpoint is not None:
            model = checkpoint.load(options.checkpoint, options.vocabulary, options.module)
        trace, yhat = model.trace(text)
        part = trace.select(options.layer, options.direction)
    except (ValueError, IndexError, OSError) as error:
        raise CommandError(str(error)) from None

    where = {"layer": options.layer, "direction": options.direction}
    pictures = {
        "gates": plot.gates(
            trace,
            **where,
            last=last,
            tokens=text,
            yhat=yhat,
            # Spaces and the like would not be seen.
            classes=[c if c.isprintable() and c != " " else repr(c) for c in model.vocabulary],
        ),
        "histogram": plot.histogram(trace, **where),
        "saturation": plot.saturation(trace),
        "half_life": plot.half_life(trace),
    }
    options.out.mkdir(exist_ok=True)
    files = []
    for name, figure in pictures.items():
        files.append(str(options.out / f"{name}.{options.format}"))
        figure.savefig(files[-1], dpi=110)
    files.append(str(options.out / "trace.npz"))
    trace.save(files[-1])
    shares, half_life = part.saturation(), part.half_life()[0]
    print(f"\n{trace}, {len(text)} characters")
    for name, share in shares.items():
        print(f"  {name:10} {share:6.1%} of steps and units")
    print(
        f"  half of c is forgotten after {half_life.median():.3g} steps in the middle unit, "
        f"{half_life.max():.3g} in the one that remembers longest"
    )
    found: dict[str, Any] = {
        "files": files,
        "saturation": shares,
        # JSON knows no infinity.
        "half_life": [x if x != float("inf") else None for x in half_life.tolist()],
    }
    if yhat is not None:
        found["next"] = "".join(model.vocabulary[k] for k in yhat.argmax(-1).tolist())
        print(f"  after {text[-20:]!r} it expects {found['next'][-1]!r}")
    print("written: " + ", ".join(files))
    return found, 0


def _bench(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    import torch

    from lstm_ext.cli import bench

    before = torch.get_num_threads()
    try:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        threads = torch.get_num_threads()
        shapes = options.shapes or [*bench.CELLS, *bench.LAYERS]
        dtype = getattr(torch, options.dtype)
        try:
            rows = bench.measure(shapes, dtype, options.device, _progress("timing"))
        except RuntimeError as error:
            raise CommandError(str(error).splitlines()[0]) from None
    finally:
        torch.set_num_threads(before)
    print(f"\nmicroseconds a call, {options.dtype}, {threads} thread(s): lstm_ext, torch.nn")
    for row in rows:
        print(bench.line(row))
    where = {"threads": threads, "dtype": options.dtype, "device": options.device}
    return {**where, "rows": rows}, 0


def _convert(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    import warnings

    import torch
    from torch import nn

    from lstm_ext.cli import checkpoint
    from lstm_ext.convert import _convert_and_tell

    if options.out is not None:
        _need_folder(options.out)
    try:
        if options.trust:
            content = torch.load(options.checkpoint, map_location="cpu", weights_only=False)
        else:
            content = checkpoint.read(options.checkpoint)
    except (ValueError, OSError) as error:
        raise CommandError(f"{error} (of a whole model: --trust)") from None
    if isinstance(content, nn.Module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the lines say it
            lines = [line._asdict() for line in _convert_and_tell(content)]
        if options.out is not None:
            torch.save(content, options.out)
    elif options.out is not None:
        raise CommandError("--out is for a whole model; a state dict loads into ours as it is")
    else:
        lines = [
            {"name": name, "kind": kind, "result": "can be converted"}
            for name, kind in checkpoint.lstms(content)
        ]
    for line in lines:
        print(f"{line['name'] or '(the model itself)'}: {line['kind']}: {line['result']}")
    if not lines:
        print("no LSTM")
    return {"modules": lines}, 0
