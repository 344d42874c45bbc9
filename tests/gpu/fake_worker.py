"""In place of path_worker.py, on no device: paths that hang, crash or are wrong, by their names."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def main() -> int:
    """Go through the cases; what each does is its ``way``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", type=Path, required=True)
    options = parser.parse_args()
    cases = json.loads(options.cases.read_text())
    with options.out.open("a", buffering=1) as stream:

        def say(event: str, **line: Any) -> None:
            stream.write(json.dumps({"event": event, **line}) + "\n")

        say("started")
        if cases[0]["way"] == "no start":
            raise ImportError("libsomething.so: cannot open shared object file")
        say("ready")
        for case in cases:
            name, way = case["name"], case["way"]
            say("begin", path=name)
            print(name, flush=True)
            if way == "hangs":
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_IGN)
                time.sleep(600)
            if way == "crashes":
                os.abort()
            if way == "CUDA error":
                say("result", path=name, status="error", worst="CUDA error: unspecified")
                return 3
            good = way != "is wrong"
            say("result", path=name, status="ok" if good else "wrong", worst="grad w_hh",
                error=1e-7 if good else 0.5, torch=1e-7, allowed=3e-7)  # fmt: skip
            if way == "hangs in the profiler":
                time.sleep(600)
            say("end", path=name, seconds=0.1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
