"""``python -m redline`` is the command ``redline``."""

import sys

from redline.cli import main

sys.exit(main())
