"""Set-up of Megatron-Bridge on the single rank that converts a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from nemo_rao.runtime.console import quiet_imports, quiet_third_parties, say


@contextlib.contextmanager
def bridge_of_one_rank() -> Iterator[None]:
    """Import Bridge on the CPU with a progress message, and initialize Megatron's process groups with one rank."""
    say("importing Megatron-Bridge, which takes about 20 seconds")
    with quiet_imports():
        from nemo_rao.mcore import cpu

        cpu.install_if_needed()
        from nemo_rao.engines.bridge.seams import import_models

        import_models(on_cpu=True)
        from nemo_rao.engines.bridge import hugging_face  # noqa: F401
    quiet_third_parties()
    import torch
    import transformers
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    transformers.logging.set_verbosity_error()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
