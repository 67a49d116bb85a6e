"""``python -m sparklab``: the command line."""

import sys

from sparklab.cli import main

if __name__ == "__main__":
    sys.exit(main())
