"""What Megatron-Bridge needs on a machine without CUDA and Transformer Engine, beyond :mod:`nemo_rao.mcore.cpu`.

Everything here works around a release of Bridge, or of a package that it imports; nothing else in the package does.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Modules that import Transformer Engine unconditionally, to compare classes with its own.
_COMPARES_WITH_TE = ("megatron.bridge.peft.lora_layers", "megatron.bridge.peft.lora", "megatron.bridge.peft.utils")
_TE_CLASSES = ("Linear", "LayerNormLinear", "GroupedLinear")


def import_models(*, on_cpu: bool) -> None:
    """Import Bridge's models and their conversion, without its training loop."""
    if on_cpu and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    import megatron.bridge  # noqa: F401


def import_bridge(*, on_cpu: bool) -> None:
    """Import Bridge's training loop, and change what it cannot do on this machine."""
    import_models(on_cpu=on_cpu)
    from megatron.bridge.training import initialize, setup, train

    # Megatron's own data sets are not used, and a wheel has no makefile to compile their helpers with.
    initialize.compile_helpers = lambda: None
    train.print_rank_0 = lambda message: None  # a loop that begins, a step that it goes on from: the run says both
    if on_cpu:
        from megatron.bridge.peft import utils as peft_utils

        # Asserts that there is CUDA; its caller has no way to say otherwise.
        setup.initialize_megatron = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
        # Compiles fused kernels, which are off here, with the machine's C++ compiler: half a minute for each rank.
        setup.set_jit_fusion_options = lambda *_: None
        # Megatron's stand-ins for Transformer Engine's classes are taken for the classes.
        peft_utils.HAVE_TE = False


def dataset_provider() -> type:
    """The base class of data sets of one's own; deprecated since Bridge 0.6, which moved it."""
    try:
        return importlib.import_module("megatron.bridge.data.base").DatasetProvider  # type: ignore[no-any-return]
    except (ModuleNotFoundError, AttributeError):
        return importlib.import_module("megatron.bridge.training.config").DatasetProvider  # type: ignore[no-any-return]


@contextlib.contextmanager
def _modules(made: Mapping[str, types.ModuleType]) -> Iterator[None]:
    """While it lasts, imports of these names find these modules."""
    before = {name: sys.modules[name] for name in made if name in sys.modules}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]
        sys.modules.update(before)


def _transformer_engine_named() -> contextlib.AbstractContextManager[None]:
    """While it lasts, ``import transformer_engine.pytorch`` finds classes of which nothing is an instance."""
    # These ask whether it is there, and are not to find it.
    import megatron.core.extensions.transformer_engine
    import megatron.core.models.gpt.gpt_model
    import megatron.core.transformer.moe.moe_utils  # noqa: F401

    package, pytorch = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    vars(pytorch).update({name: type(name, (), {}) for name in _TE_CLASSES})
    vars(pytorch)["ops"] = types.SimpleNamespace(Sequential=object)
    vars(package)["pytorch"] = pytorch
    return _modules({"transformer_engine": package, "transformer_engine.pytorch": pytorch})


class _Finder(importlib.abc.MetaPathFinder):
    """Finds :data:`_COMPARES_WITH_TE`, and has them run while Transformer Engine is named."""

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
