"""``python -m lstm_ext``."""

import sys

from lstm_ext.cli import main

sys.exit(main())
