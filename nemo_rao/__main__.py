"""``python -m nemo_rao``: the same as the command ``nemo-rao``."""

import sys

from nemo_rao.cli import main

if __name__ == "__main__":
    sys.exit(main())
