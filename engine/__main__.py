"""``python -m engine`` is the command ``redline``."""

import sys

from engine.cli import main

sys.exit(main())
