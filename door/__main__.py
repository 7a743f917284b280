"""The command ``netslim``, as ``python -m netslim``."""

import sys

from netslim.launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
