"""Common parts of import from and export to Hugging Face.

    config.json      --import-->  family and arch, keys of a recipe      --export-->  config.json
    *.safetensors                 weights/, Megatron's torch_dist, for any parallelism  *.safetensors
    tokenizer files               tokenizer/, and from there into every checkpoint      the same

Weights are converted by the engine's own code: NeMo's connectors (:mod:`nemo_rao.engines.nemo.hugging_face`), or
Megatron-Bridge's ``AutoBridge`` (:mod:`nemo_rao.engines.bridge.hugging_face`). Everything else is the same for both.
"""

from __future__ import annotations

import os
import sys

from nemo_rao.config.engine_choice import installed_engine
from nemo_rao.errors import UserError


def on_cpu_alone() -> None:
    """Hide GPUs from this process: a conversion only moves bytes. Must be called before torch is imported.

    Raises:
        UserError: a launcher started several ranks.
    """
    from nemo_rao.runtime.launch import started_externally

    if (launcher := started_externally()) is not None:
        raise UserError(f"{launcher} started several ranks, but a single process converts a model. Run without it.")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # transformers would import both if installed; tensorflow alone takes seconds.
    os.environ.setdefault("USE_TF", "0")
    os.environ.setdefault("USE_FLAX", "0")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def engine_here() -> str:
    """Name of the engine that converts models in this environment.

    Raises:
        UserError: none is installed.
    """
    if (found := installed_engine()) is None:
        raise UserError(
            "converting a model needs NeMo's LLM collection (nemo_toolkit 2.x) or Megatron-Bridge, and neither is "
            "installed. Run make install, or use NVIDIA's container."
        )
    return found
