"""What the build has left in this checkout: the object files of the package itself."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def objects(pattern):
    """Object files that match, of the module in use; the test is skipped where there are none."""
    folders = sorted(ROOT.glob(f"build/cp3{sys.version_info.minor}-torch{torch.__version__}-*"))
    found = sorted(folders[0].glob(pattern)) if folders else []
    if not found:
        pytest.skip("the package was not built in this checkout")
    return found


def operators():
    """Those of all operators but the CPU's kernels, and without what needs Python."""
    return [o for o in objects("csrc/joined/*.o") if o.stem in ("differentiation", "operators")]
