"""Align a GPT with RAO: ``python examples/train_gpt_rao.py key=value ...``, as ``nemo-rao train`` does."""

import sys

from nemo_rao.cli import main

if __name__ == "__main__":  # ranks and checkpoint writers may import this file anew
    sys.exit(main(["train", "--config-name", "gpt_rao", *sys.argv[1:]]))
