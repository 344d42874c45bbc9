"""The command line, ``python -m lstm_ext``, and what it shows: demo, benchmark, lecture's model."""

from lstm_ext.cli.main import main as main
