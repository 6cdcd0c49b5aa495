"""Align a GPT with DPO, like ``nemo-rao train``: ``python examples/train_gpt_dpo.py key=value ...``."""

import sys

from nemo_rao.cli import main

if __name__ == "__main__":  # ranks and checkpoint writers may import this file again
    sys.exit(main(["train", "--config-name", "gpt_dpo", *sys.argv[1:]]))
