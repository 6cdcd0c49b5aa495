"""Imported once by the server from which training runs are forked: Megatron and the engine that a run needs."""

import importlib

import torch

from nemo_rao.config.engine_choice import installed_engine

torch.set_num_threads(1)  # a fork after torch has started threads can hang
importlib.import_module(f"nemo_rao.engines.{installed_engine()}.engine").load()
