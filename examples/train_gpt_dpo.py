"""Align a GPT with DPO: ``python examples/train_gpt_dpo.py key=value ...``, as ``nemo-rao train`` does."""

import sys

from nemo_rao.cli import main

if __name__ == "__main__":  # ranks and checkpoint writers may import this file anew
    sys.exit(main(["train", "--config-name", "gpt_dpo", *sys.argv[1:]]))
