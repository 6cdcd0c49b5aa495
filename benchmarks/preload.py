"""Imported once by the server that training runs are forked from: Megatron and NeMo, as a run needs them."""

import torch

from nemo_rao.engines.nemo import engine

torch.set_num_threads(1)  # a fork after torch has started threads can hang
engine.load()
