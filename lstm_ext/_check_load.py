"""Loads the compiled part before all else; where that fails, the doctor says what is wrong."""

try:
    from lstm_ext import _backend as _backend  # reads the environment's switches
    from lstm_ext import _ops as _ops  # finds the compiled module
except ImportError as error:
    # Nothing of this package runs, `python -m lstm_ext doctor` included: it is now or never.
    from lstm_ext.cli import doctor

    doctor.exit_if_asked(error)
    raise
