"""What import from and export to Hugging Face have in common: how NeMo's connectors are used.

    config.json      --import-->  family and arch, keys of a recipe; context/model.yaml --export-->  config.json
    *.safetensors                 weights/, Megatron's torch_dist, for any parallelism                     *.safetensors
    tokenizer files               tokenizer/, and from there into every checkpoint's context/              the same

Weights are converted by NeMo's own connectors (``HFLlamaImporter``, ``HFLlamaExporter``). NeMo has such a pair for each
family, but they map the same names, except for Qwen2's biases and Qwen3's norms of queries and keys, and Llama's alone
knows tied embeddings: so Llama's serves all families, and NeMo's transforms of the others are added. NeMo's translation
of configs is not used: it unties Qwen2, takes Mistral's attention window for its length, drops factors of Llama 3.1's
rotary scaling, exports the length that was trained on for the longest possible one, and to export it unpickles a
checkpoint's context.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from nemo_rao.config.engine_choice import installed_engine
from nemo_rao.errors import UserError
from nemo_rao.runtime.console import quiet_imports, quiet_third_parties, say


class Weights:
    """Tensors by name, in the form in which NeMo's connectors take a model that is none.

    ``config`` has what splits fused queries, keys and values: ``num_attention_heads``, ``num_query_groups``,
    ``kv_channels``.
    """

    def __init__(self, tensors: Mapping[str, Any], config: SimpleNamespace) -> None:
        self._tensors = dict(tensors)
        self.config = config

    def state_dict(self) -> dict[str, Any]:
        return dict(self._tensors)


def on_cpu_alone() -> None:
    """Conversion is the CPU's, also where there are GPUs: it moves bytes. To be called before torch is imported."""
    from nemo_rao.runtime.launch import started_externally

    if (launcher := started_externally()) is not None:
        raise UserError(f"{launcher} started several ranks, but one process converts a model; run it without")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # transformers offers to load both; neither takes part, and tensorflow alone takes seconds to import.
    os.environ.setdefault("USE_TF", "0")
    os.environ.setdefault("USE_FLAX", "0")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def engine_here() -> str:
    """The engine by which this environment converts.

    Raises:
        UserError: there is none.
    """
    if (found := installed_engine()) is None:
        raise UserError(
            "neither NeMo's LLM collection (nemo_toolkit 2.x) nor Megatron-Bridge is installed, by which models are "
            "converted; run make install, or use NVIDIA's container"
        )
    return found


@contextlib.contextmanager
def bridge_of_one_rank() -> Iterator[None]:
    """Import Bridge on the CPU, saying so, and have Megatron's process groups of one rank."""
    say("importing Megatron-Bridge, which takes about 20 seconds")
    with quiet_imports():
        from nemo_rao.mcore import cpu

        cpu.install_if_needed()
        from nemo_rao.engines.bridge.seams import import_models

        import_models(on_cpu=True)
        from nemo_rao.engines.bridge import hugging_face  # noqa: F401
    quiet_third_parties()
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def import_nemo_aloud() -> None:
    """Imports NeMo, telling why nothing seems to happen, and keeps it from telling what it does."""
    from nemo_rao.engines.nemo import engine

    if "nemo.collections.llm" not in sys.modules:
        say("importing NeMo, which takes about 20 seconds")
    engine.load()
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(nemo_logging.ERROR)
    quiet_third_parties()
