"""``python -m docs_pages``."""

import sys

from docs_pages.pages import main

sys.exit(main(sys.argv[1:]))
