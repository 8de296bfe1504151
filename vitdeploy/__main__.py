"""``python -m vitdeploy`` is the command line."""

import sys

from vitdeploy.cli import main

if __name__ == "__main__":
    sys.exit(main())
