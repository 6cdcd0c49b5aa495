"""A login node's stack: torch built with CUDA, Transformer Engine and apex that can be imported, and no GPU.

Run ``python -m tests.login_node`` with nemo-rao's arguments and a directory of :func:`write_packages` on the path.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
from pathlib import Path
from typing import Any

NO_DRIVER = "Found no NVIDIA driver on your system"
_SUBMODULES = {
    "transformer_engine": ("pytorch", "common", "pytorch.optimizers", "pytorch.float8_tensor", "pytorch.fp8",
                           "pytorch.distributed", "pytorch.tensor", "pytorch.cpp_extensions", "pytorch.attention",
                           "pytorch.module.base", "pytorch.module", "common.recipe", "pytorch.constants",
                           "pytorch.permutation", "pytorch.cross_entropy", "pytorch.router"),
    "transformer_engine_torch": (),
    "apex": ("optimizers", "multi_tensor_apply", "normalization", "normalization.fused_layer_norm", "contrib",
             "contrib.layer_norm", "contrib.layer_norm.layer_norm", "transformer", "transformer.functional"),
    "amp_C": (),
}  # fmt: skip
_MODULE = f"""
__version__, __all__, __path__ = "2.9.0", [], __path__

class _Names(type):
    def __getattr__(cls, name):
        return _kernel(name)

class _Kernel(metaclass=_Names):
    def __init__(self, *args, **kwargs):
        raise RuntimeError({NO_DRIVER!r})

def _kernel(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Names(name, (_Kernel,), {{}})

__getattr__ = _kernel
"""


def write_packages(folder: Path) -> None:
    """Packages from which every name can be imported but not used, like the real ones without a GPU."""
    for package, submodules in _SUBMODULES.items():
        for name in ("", *submodules):
            location = folder.joinpath(package, *filter(None, name.split(".")))
            location.mkdir(parents=True, exist_ok=True)
            (location / "__init__.py").write_text(_MODULE)
        information = folder / f"{package}-2.9.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 2.9.0\n")


def cuda_without_a_driver() -> None:
    """Make a torch built without CUDA behave like a CUDA build that finds no driver."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # as Lightning sets it
    import torch

    def no_driver(*args: Any) -> None:
        raise RuntimeError(NO_DRIVER)

    torch.cuda._is_compiled = lambda: True
    torch.cuda._cudart = torch.cuda._cudart or object()
    torch._C._cuda_init = no_driver
    torch._C._cuda_getDeviceCount = lambda: 0
    torch._C._cuda_getCurrentRawStream = no_driver  # whose presence tells torch.compile that there is a CUDA build


if __name__ == "__main__":
    cuda_without_a_driver()
    for found in _SUBMODULES:
        assert isinstance(importlib.machinery.PathFinder.find_spec(found), importlib.machinery.ModuleSpec)
    from nemo_rao.cli import main

    sys.exit(main(sys.argv[1:]))
