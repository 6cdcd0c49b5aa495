"""What NeMo needs on a machine without CUDA, beyond :mod:`nemo_rao.mcore.cpu`."""

from __future__ import annotations

import types


def patch_nemo() -> None:
    """Import of NeMo what it has to change. After Megatron is on the CPU."""
    from nemo.collections.llm.peft import lora
    from nemo.collections.llm.peft import utils as peft_utils
    from nemo.lightning.io import pl as nemo_io

    # Asserts that CUDA is initialised, then moves stray tensors between CUDA devices: nothing to move here.
    nemo_io._fix_tensors_device = lambda checkpoint: checkpoint

    # The LoRA transform compares every layer's class with Transformer Engine's. That is not usable here, though parts
    # of NeMo take megatron-core's importable stand-ins for it.
    lora.te = types.SimpleNamespace(Linear=None)
    peft_utils.HAVE_TE = False
