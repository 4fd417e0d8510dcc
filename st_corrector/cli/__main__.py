"""``python -m st_corrector.cli``."""

import sys

from . import main

sys.exit(main())
