"""Patches of NeMo for machines without CUDA, beyond :mod:`nemo_rao.mcore.cpu`."""

from __future__ import annotations

import types


def patch_nemo() -> None:
    """Import and patch NeMo. Call it after Megatron is on the CPU."""
    from nemo.collections.llm.peft import lora
    from nemo.collections.llm.peft import utils as peft_utils
    from nemo.lightning.io import pl as nemo_io

    # Asserts that CUDA is initialized, then moves tensors between CUDA devices: nothing to do here.
    nemo_io._fix_tensors_device = lambda checkpoint: checkpoint

    # The LoRA transform compares every layer's class with Transformer Engine's, which is not usable here, though
    # parts of NeMo mistake megatron-core's importable placeholders for it.
    lora.te = types.SimpleNamespace(Linear=None)
    peft_utils.HAVE_TE = False
