"""Patches of Megatron-Bridge for machines without CUDA and Transformer Engine, beyond :mod:`nemo_rao.mcore.cpu`, and
for differences between its releases 0.4, 0.5 and 0.6.

All workarounds for a release of Bridge, or of a package that it imports, are in this module.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# Modules that import Transformer Engine unconditionally, to compare classes with its classes.
_COMPARES_WITH_TE = ("megatron.bridge.peft.lora_layers", "megatron.bridge.peft.lora", "megatron.bridge.peft.utils")
_TE_CLASSES = ("Linear", "LayerNormLinear", "GroupedLinear")


def import_models(*, on_cpu: bool) -> None:
    """Import Bridge's models and their conversion, without its training loop."""
    if on_cpu and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    import megatron.bridge  # noqa: F401

    _mend_release()


def import_bridge(*, on_cpu: bool) -> None:
    """Import Bridge's training loop, and patch what does not work on this machine."""
    import_models(on_cpu=on_cpu)
    from megatron.bridge.training import initialize, setup, train

    # Megatron's data sets are not used, and a wheel has no makefile to compile their helpers.
    initialize.compile_helpers = lambda: None
    train.print_rank_0 = lambda message: None  # start of the loop, step to resume from: the run reports both
    if on_cpu:
        from megatron.bridge.peft import utils as peft_utils

        # Asserts that CUDA is available; its caller has no option to disable this.
        setup.initialize_megatron = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
        # Compiles fused kernels, which are disabled here, with the C++ compiler: half a minute per rank.
        setup.set_jit_fusion_options = lambda *_: None
        # Megatron's placeholders for Transformer Engine's classes would be mistaken for the classes.
        peft_utils.HAVE_TE = False


def dataset_provider() -> type:
    """Return the base class of custom data sets; deprecated since Bridge 0.6, which moved it."""
    try:
        return importlib.import_module("megatron.bridge.data.base").DatasetProvider  # type: ignore[no-any-return]
    except (ModuleNotFoundError, AttributeError):
        return importlib.import_module("megatron.bridge.training.config").DatasetProvider  # type: ignore[no-any-return]


@functools.cache
def _mend_release() -> None:
    """Patch what earlier releases convert incorrectly or not at all."""
    import megatron.bridge
    from packaging.version import Version

    release = Version(megatron.bridge.__version__)
    if release < Version("0.6"):
        _read_gemma3_from_its_config()
        _pad_vocabulary_of_gemma3()
        _read_gates_of_qwen3_moe()
    if release < Version("0.5"):
        _give_gemma3_its_norms()
        _recognize_local_layers()
        _number_local_experts()
        _pad_vocabulary()
        _export_without_tensors()


def _read_gemma3_from_its_config() -> None:
    """Bridge 0.4 and 0.5 read a Gemma 3's precision from a config looked up by name, which a config without weights
    does not have; 0.6 reads it from the config itself."""
    from megatron.bridge.models.gemma import gemma3_bridge
    from megatron.bridge.models.hf_pretrained import causal_lm

    causal_lm._ConfigOnlyPretrainedShim._model_name_or_path = property(lambda self: self.config)
    gemma3_bridge.AutoConfig = types.SimpleNamespace(from_pretrained=lambda config: config)


def _pad_vocabulary_of_gemma3() -> None:
    """Bridge 0.4 and 0.5 pad the vocabulary of a Gemma 3's output layer but not of its embedding; 0.6 pads both."""
    from megatron.bridge.models.gemma.gemma3_provider import Gemma3ModelProvider
    from megatron.bridge.utils.vocab_utils import calculate_padded_vocab_size

    original = Gemma3ModelProvider.provide

    @functools.wraps(original)
    def provide(self: Any, *args: Any, **kwargs: Any) -> Any:
        vocab_size, multiple = self.vocab_size, self.make_vocab_size_divisible_by
        if self.should_pad_vocab:
            self.vocab_size = calculate_padded_vocab_size(vocab_size, multiple, self.tensor_model_parallel_size)
        try:
            return original(self, *args, **kwargs)
        finally:
            self.vocab_size = vocab_size

    Gemma3ModelProvider.provide = provide


def _read_gates_of_qwen3_moe() -> None:
    """Bridge 0.4 and 0.5 assume ``norm_topk_prob`` of a Qwen3-MoE to be true; 0.6 reads it."""
    from megatron.bridge.models.qwen.qwen3_moe_bridge import Qwen3MoEBridge

    def set_order(provider: Any, config: Any) -> None:
        provider.moe_router_pre_softmax = not config.norm_topk_prob

    _complete_provider(Qwen3MoEBridge, set_order)


def _give_gemma3_its_norms() -> None:
    """Bridge 0.4 has a Gemma 3's norms of queries and keys only in its layer spec; 0.5 in the provider's fields."""
    from megatron.bridge.models.gemma.gemma3_bridge import Gemma3ModelBridge

    def set_norms(provider: Any, _: Any) -> None:
        provider.qk_layernorm = True

    _complete_provider(Gemma3ModelBridge, set_norms)


def _complete_provider(bridge: Any, complete: Callable[[Any, Any], None]) -> None:
    """Call ``complete`` with each provider that a family's bridge creates, and Hugging Face's config."""
    original = bridge.provider_bridge

    @functools.wraps(original)
    def provider_bridge(self: Any, hf_pretrained: Any) -> Any:
        provider = original(self, hf_pretrained)
        complete(provider, hf_pretrained.config)
        return provider

    bridge.provider_bridge = provider_bridge


def _recognize_local_layers() -> None:
    """Bridge 0.4 recognizes a norm before a column-parallel layer only by TE's name; 0.5 also by ours."""
    from megatron.bridge.models.conversion.param_mapping import AutoMapping

    original = AutoMapping._detect_parallelism_type

    @functools.wraps(original)
    def detect(self: Any, module: Any) -> str:
        if type(module).__name__ != "LayerNormColumnParallelLinear":
            return str(original(self, module))
        is_norm = self.megatron_param.endswith(("layer_norm_weight", "layer_norm_bias"))
        return "replicated" if is_norm else "column"

    AutoMapping._detect_parallelism_type = detect


def _number_local_experts() -> None:
    """Bridge 0.4 numbers experts over ranks only if Transformer Engine groups them; 0.5 also single ones."""
    from megatron.bridge.models.conversion import model_bridge

    original = model_bridge._megatron_local_name_to_global

    @functools.wraps(original)
    def to_global(models: Any, config: Any, param_name: str, vp_stage: int | None = None) -> str:
        name = str(original(models, config, param_name, vp_stage))
        found = re.search(r"\.local_experts\.(\d+)\.", name)
        if found is None or ".adapter." in name or (group := model_bridge._get_ep_group(models)) is None:
            return name
        number = config.num_moe_experts // group.size() * group.rank() + int(found[1])
        return f"{name[: found.start(1)]}{number}{name[found.end(1) :]}"

    model_bridge._megatron_local_name_to_global = to_global


def _pad_vocabulary() -> None:
    """Bridge 0.4 cannot import a vocabulary that is not divisible by the tensor-parallel ranks; 0.5 pads it."""
    import torch
    from megatron.bridge.models.conversion.param_mapping import ColumnParallelMapping
    from megatron.bridge.models.conversion.utils import get_module_and_param_from_name

    original = ColumnParallelMapping.hf_to_megatron

    @functools.wraps(original)
    def hf_to_megatron(self: Any, hf_weights: Any, megatron_module: Any) -> Any:
        of_vocabulary = self.megatron_param in ("embedding.word_embeddings.weight", "output_layer.weight")
        if of_vocabulary and self.tp_size > 1 and hf_weights is not None:
            _, own = get_module_and_param_from_name(megatron_module, self.megatron_param)
            missing = len(own) * self.tp_size - len(hf_weights)
            hf_weights = torch.nn.functional.pad(hf_weights, (0, 0, 0, max(0, missing)))
        return original(self, hf_weights, megatron_module)

    ColumnParallelMapping.hf_to_megatron = hf_to_megatron


class _EveryName:
    """Tensor names of a model without weights: contains every name."""

    source = types.SimpleNamespace(get_all_keys=lambda: _EveryName())

    def __contains__(self, name: object) -> bool:
        return True


def _export_without_tensors() -> None:
    """Bridge 0.4 exports only tensors of an existing Hugging Face model, and fails with only a config; 0.5 does not."""
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge

    original = MegatronModelBridge.build_conversion_tasks

    @functools.wraps(original)
    def build_conversion_tasks(self: Any, hf_pretrained: Any, megatron_model: Any) -> Any:
        if hasattr(hf_pretrained, "state"):
            return original(self, hf_pretrained, megatron_model)
        hf_pretrained.state = _EveryName()
        try:
            return original(self, hf_pretrained, megatron_model)
        finally:
            del hf_pretrained.state

    MegatronModelBridge.build_conversion_tasks = build_conversion_tasks


@contextlib.contextmanager
def _modules(made: Mapping[str, types.ModuleType]) -> Iterator[None]:
    """Make imports of these names find these modules, within the block."""
    before = {name: sys.modules[name] for name in made if name in sys.modules}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]
        sys.modules.update(before)


def _transformer_engine_named() -> contextlib.AbstractContextManager[None]:
    """Make ``import transformer_engine.pytorch`` find classes without instances, within the block."""
    # These check whether it is installed, and must not find it.
    import megatron.core.extensions.transformer_engine
    import megatron.core.models.gpt.gpt_model
    import megatron.core.transformer.moe.moe_utils  # noqa: F401

    package, pytorch = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    vars(pytorch).update({name: type(name, (), {}) for name in _TE_CLASSES})
    vars(pytorch)["ops"] = types.SimpleNamespace(Sequential=object)
    vars(package)["pytorch"] = pytorch
    return _modules({"transformer_engine": package, "transformer_engine.pytorch": pytorch})


class _Finder(importlib.abc.MetaPathFinder):
    """Finds :data:`_COMPARES_WITH_TE`, and executes them while Transformer Engine is importable."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if fullname not in _COMPARES_WITH_TE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None and spec.loader is not None
        spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def create_module(self, spec: Any) -> Any:
        return self._inner.create_module(spec)

    def exec_module(self, module: Any) -> None:
        with _transformer_engine_named():
            self._inner.exec_module(module)
