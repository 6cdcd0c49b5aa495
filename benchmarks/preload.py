"""Imported once by the server that training runs are forked from: Megatron and its engine, as a run needs them."""

import importlib

import torch

from nemo_rao.config.engine_choice import installed_engine

torch.set_num_threads(1)  # a fork after torch has started threads can hang
importlib.import_module(f"nemo_rao.engines.{installed_engine()}.engine").load()
