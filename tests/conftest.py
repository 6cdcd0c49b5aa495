"""Set before anything is imported: tests fork ranks, and neither of these thread pools survives a fork."""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
