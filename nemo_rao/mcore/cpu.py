"""Megatron without CUDA: all necessary changes are in this module.

Megatron-core and the engines around it address "the current CUDA device" directly. On a machine without one,
:func:`install_if_needed` makes that device the CPU: it rewrites device arguments, provides the few unconditional calls
of ``torch.cuda``, hides Transformer Engine and apex from Megatron, and disables the fusions that only these provide.
Training then runs megatron-core's model, schedules, DDP, optimizer and checkpoints over gloo.

Engines call :func:`install_if_needed` before they import Megatron, and patch their own code. Nothing is changed if CUDA
is available.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import queue
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nemo_rao.errors import UserError
from nemo_rao.runtime.gpus import has_gpu
from nemo_rao.runtime.malloc import map_large_blocks

_CPU = torch.device("cpu")
_installed = False


def install_if_needed() -> bool:
    """Make Megatron run on the CPU if this machine has no CUDA device. Return whether it does.

    Idempotent. The caller reports it (:data:`nemo_rao.runtime.gpus.CPU_NOTICE`) once all checks have passed.

    Raises:
        UserError: Megatron was imported before, with packages that need a GPU.
    """
    global _installed
    if _installed:
        return True
    if has_gpu():
        return False
    _hide_gpu_packages()
    map_large_blocks()
    _redirect_devices()
    _supply_torch_cuda()
    _patch_megatron()
    _installed = True
    return True


# --------------------------------------------------------------------------------------------- devices


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


# The functions that accept a device without a keyword (in PyTorch, these alone) or return its name.
_OF_DEVICES = {torch.Tensor.cuda, torch.Tensor.pin_memory, torch.Tensor.to, torch.Tensor.type}


class _CudaIsCpu(TorchFunctionMode):
    """Creates tensors for a CUDA device on the CPU, and drops ``pin_memory``."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Every call of PyTorch comes through here, thousands in a step of a small model: most are let through at once.
        if not kwargs and func not in _OF_DEVICES:
            return func(*args)
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron identifies a parameter's precision by names such as "torch.cuda.FloatTensor".
            return func(*args).replace("torch.", "torch.cuda.", 1)
        kwargs.pop("pin_memory", None)
        device = kwargs.get("device")
        if _names_cuda(device) or (isinstance(device, int) and not isinstance(device, bool)):
            kwargs["device"] = _CPU
        if func is torch.Tensor.to and len(args) > 1 and (_names_cuda(args[1]) or type(args[1]) is int):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


def _redirect_devices() -> None:
    # Entered for the life of the process. Forked ranks inherit the mode.
    _CudaIsCpu().__enter__()
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign,assignment]


class _Stream:
    """A stream on which everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or self  # waiting for it returns at once


class _Event:
    """An event that has already happened: computation on a CPU is synchronous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = time.perf_counter()

    def record(self, stream: Any = None) -> None:
        self._seconds = time.perf_counter()

    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: _Event) -> float:
        """Return the milliseconds from this event's record to the other's."""
        return 1000 * (end_event._seconds - self._seconds)


@contextlib.contextmanager
def _stream_context(stream: Any = None) -> Iterator[Any]:
    yield stream


def _supply_torch_cuda() -> None:
    cuda = torch.cuda
    stream = _Stream()
    cuda.Stream = _Stream  # type: ignore[misc,assignment]
    cuda.stream = _stream_context  # type: ignore[assignment]
    cuda.current_stream = cuda.default_stream = lambda device=None: stream  # type: ignore[assignment,return-value]
    cuda.synchronize = lambda device=None: None
    cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    cuda.set_device = lambda device: None
    # Engines seed Megatron's random number tracker only if there is at least one device.
    cuda.device_count = lambda: 1  # type: ignore[assignment]
    # Nothing else may take that device for a real one. In a build with CUDA that finds no driver, is_available()
    # follows device_count() if PYTORCH_NVML_BASED_CUDA_CHECK is set, as by Lightning; others call is_available(), such
    # as is_bf16_supported() and torch.accelerator, or have imported it by name, and then query the device's properties.
    cuda._is_compiled = lambda: False
    cuda.is_available = lambda: False
    cuda.Event = _Event  # type: ignore[misc,assignment]
    # memory_allocated() and others are 0 if CUDA is not initialized; only resetting them would call the driver.
    for name in ("reset_peak_memory_stats", "reset_accumulated_memory_stats"):
        setattr(cuda, name, _do_nothing)
        setattr(cuda.memory, name, _do_nothing)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = cuda.nvtx.mark = _do_nothing  # type: ignore[assignment]
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda new_state, device=None: torch.set_rng_state(new_state)
    cuda.manual_seed = cuda.random.manual_seed = _seed_cpu


def _seed_cpu(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _do_nothing(*args: Any, **kwargs: Any) -> None: ...


# Megatron and its engines use the kernels of these if they can be imported, even without a GPU.
_GPU_PACKAGES = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C")


def _hide_gpu_packages() -> None:
    """Make imports of the packages fail, and searches for them find nothing, from now on."""
    loaded = [name for name, module in sys.modules.items() if name.split(".")[0] in _GPU_PACKAGES and module]
    if loaded and "megatron.core" in sys.modules:
        raise UserError(
            f"Megatron was imported with {loaded[0].split('.')[0]}, which needs a GPU, but there is none. Start with "
            "`nemo-rao train`, or call nemo_rao.mcore.cpu.install_if_needed() before anything imports Megatron."
        )
    for name in loaded:
        del sys.modules[name]
    sys.modules.update(dict.fromkeys(_GPU_PACKAGES))  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------- Megatron

# Features of Transformer Engine, apex or CUDA kernels: field -> value without them.
_WITHOUT_FUSIONS = {
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "memory_efficient_layer_norm": False,
    "gradient_accumulation_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "bias_dropout_add_fusion": False,
    "masked_softmax_fusion": False,
    "cross_entropy_loss_fusion": False,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
    "tp_comm_overlap": False,
    "enable_cuda_graph": False,
    "batch_p2p_sync": False,
    "use_transformer_engine_full_layer_spec": False,
    "use_cpu_initialization": True,
    # A stage's output is freed once it is being sent to the next; gloo reads it later, on a separate thread.
    "deallocate_pipeline_outputs": False,
}


class _WrittenPart:
    """The report on a rank's part of a checkpoint, by the rank or by its forked background writer."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (open in both, until both are gone)

    def put(self, written: Any) -> None:
        pickle.dump(written, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """Return the reported value.

        Raises:
            queue.Empty: nothing was reported.
        """
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except EOFError:
            raise queue.Empty from None


def _patch_megatron() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.moe import moe_utils, token_dispatcher
    from megatron.core.transformer.transformer_config import TransformerConfig

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state

    # The default, a queue served by a process that is spawned for each rank, imports the entry point again, which takes
    # seconds, and outlives a killed rank.
    name = "get_write_results_queue"  # before megatron-core 0.19 with an underscore
    setattr(filesystem_async, name if hasattr(filesystem_async, name) else f"_{name}", lambda *_: _WrittenPart())

    # A router tests this name, which Megatron sets to None only if an import fails, and here it does not fail.
    vars(moe_utils).setdefault("te_general_gemm", None)

    # The sizes by which tokens are exchanged; those already on the CPU would remain a tensor, which collectives do not
    # accept as a list of sizes.
    def moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = moved
    _exchange_unequal_parts()
    _forget_all_groups()

    # As in megatron-core since 0.15; before, a forked process writes, which the queue does not reach.
    def save(strategy: Any, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        strategy.async_save(sharded_state_dict, checkpoint_dir).execute_sync()

    with contextlib.suppress(ImportError):  # not since 0.19
        from megatron.core.dist_checkpointing.strategies import base

        base.AsyncSaveShardedStrategy.save = save

    # All configs, including those of an engine's importers, pass through __post_init__.
    original = TransformerConfig.__post_init__

    @functools.wraps(original)
    def without_fusions(config: Any) -> None:
        for name, value in _WITHOUT_FUSIONS.items():
            if name in config.__dataclass_fields__:
                setattr(config, name, value)
        if isinstance(config.window_size, list):  # from YAML or JSON; masks are cached by it, so it must be hashable
            config.window_size = tuple(config.window_size)
        config.attention_backend = AttnBackend.auto  # the others select Transformer Engine's
        original(config)

    TransformerConfig.__post_init__ = without_fusions


def _exchange_unequal_parts() -> None:
    """Gather and scatter parts of different lengths, for ranks that split an expert: gloo supports only equal ones."""
    from megatron.core.tensor_parallel import mappings

    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gathered(own: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> torch.Tensor:
        if sizes is None:
            return gather(own, group, None, use_global_buffer)
        padded = own.new_zeros(max(1, *sizes), *own.shape[1:])
        padded[: len(own)] = own
        parts = gather(padded, group).chunk(len(sizes))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def scattered(whole: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> torch.Tensor:
        if sizes is None:
            return scatter(whole, group, None, use_global_buffer)
        total = whole.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split(list(sizes))[group.rank()].clone()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gathered, scattered


def _forget_all_groups() -> None:
    """Delete two groups that megatron-core (0.14 to 0.19) keeps when its groups are destroyed.

    A later forked process hangs when it replaces them: gloo's destructor waits for threads, which a fork lacks.
    """
    from megatron.core import parallel_state

    original = parallel_state.destroy_model_parallel

    @functools.wraps(original)
    def destroy_model_parallel() -> None:
        original()
        for name in ("_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP", "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP_GLOO"):
            vars(parallel_state)[name] = None

    parallel_state.destroy_model_parallel = destroy_model_parallel
