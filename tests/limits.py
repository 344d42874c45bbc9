"""How long tests take: which cases are slow, and from when on one counts as hung."""

import pytest

# Seconds until another process counts as hung: so far beyond what any takes that no test fails
# because the machine is busy.
HUNG = 1800

# Of each test that was collected, before any is left out: its name, and whether it is slow.
COLLECTED = pytest.StashKey[list[tuple[str, bool]]]()


def slow(*values):
    """Return values of a parameter (one each, or a tuple of several) as slow cases."""
    return [
        pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow) for v in values
    ]


def slow_where(is_slow, cases):
    """Return cases (tuples of values), those that ``is_slow(*values)`` tells as slow ones."""
    return [slow(case)[0] if is_slow(*case) else case for case in cases]


def slow_but(kept, names):
    """Return names of cases, as slow ones but for those that `make test` keeps."""
    return [name if name in kept else pytest.param(name, marks=pytest.mark.slow) for name in names]
