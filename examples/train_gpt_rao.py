"""Align a GPT with RAO, like ``nemo-rao train``: ``python examples/train_gpt_rao.py key=value ...``."""

import sys

from nemo_rao.cli import main

if __name__ == "__main__":  # ranks and checkpoint writers may import this file again
    sys.exit(main(["train", "--config-name", "gpt_rao", *sys.argv[1:]]))
