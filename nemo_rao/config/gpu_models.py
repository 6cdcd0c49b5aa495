"""GPUs that a run can be planned for, and the FP8 recipes that they support.

Figures are from NVIDIA's data sheets, for dense matrix products without sparsity. Links are those of its DGX and HGX
systems with 8 GPUs: NVLink, for which data sheets give both directions together, and one InfiniBand card per GPU, HDR
(200 Gb/s) for A100, NDR (400 Gb/s) for the others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30


Capability = tuple[int, int]
NO_END: Capability = (1000, 0)


@dataclass(frozen=True)
class Gpu:
    """A GPU model.

    Attributes:
        name: the name to print.
        capability: compute capability.
        memory_gib: as the driver reports it.
        bf16_tflops, fp32_tflops: peak, in bf16 and in fp32 (not TF32).
        intra_node_gbs, inter_node_gbs: bandwidth of NVLink and of InfiniBand in one direction, GB/s.
        memory_gbs: memory bandwidth, GB/s.
        device_names: regular expression for the driver's name of it. Other GPUs of its generation, such as PCIe cards,
            have other peaks.
    """

    name: str
    capability: Capability
    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float
    intra_node_gbs: float
    inter_node_gbs: float
    memory_gbs: float
    device_names: str

    def peak_tflops(self, param_bytes: int) -> float:
        return self.bf16_tflops if param_bytes == 2 else self.fp32_tflops


GPUS = {
    "a100": Gpu("A100 80 GB", (8, 0), 80.0, 312.0, 19.5, 300.0, 25.0, 2039.0, r"NVIDIA A100[- ].*GB( PCIe)?"),
    "h100": Gpu("H100 SXM 80 GB", (9, 0), 79.6, 989.4, 66.9, 450.0, 50.0, 3350.0, "NVIDIA H100 80GB HBM3"),
    "h200": Gpu("H200 SXM 141 GB", (9, 0), 140.4, 989.4, 66.9, 450.0, 50.0, 4800.0, "NVIDIA H200"),
    "b200": Gpu("B200 180 GB", (10, 0), 179.1, 2250.0, 75.0, 900.0, 50.0, 8000.0, "NVIDIA B200"),
}


def gpu_of_device(name: str) -> Gpu | None:
    """The GPU with this name in the driver (``torch.cuda.get_device_name``); ``None`` if it is not in the table."""
    return next((gpu for gpu in GPUS.values() if re.fullmatch(gpu.device_names, name)), None)


@dataclass(frozen=True)
class Fp8Recipe:
    """What an FP8 recipe needs.

    Attributes:
        scales: what has a scale, and from what it is computed.
        lowest, below: compute capabilities that support it: ``lowest`` inclusive, ``below`` exclusive.
        architectures: the same in words.
        multiple: a sequence's tokens and a layer's channels on each rank must be a multiple of it.
    """

    scales: str
    lowest: Capability
    architectures: str
    multiple: int
    below: Capability = NO_END

    def runs_on(self, capability: Capability) -> bool:
        return self.lowest <= capability < self.below


# By Megatron's names. Supported GPUs are those of Transformer Engine's ``check_recipe_support``; multiples are those of
# Megatron's ``get_fp8_align_size``.
FP8_RECIPES = {
    "delayed": Fp8Recipe("a scale per tensor, from previous steps", (8, 9), "Ada, Hopper and later", 16),
    "tensorwise": Fp8Recipe("a scale per tensor, from the tensor itself", (8, 9), "Ada, Hopper and later", 16),
    "blockwise": Fp8Recipe("a scale per block of 128 values", (9, 0), "Hopper and later", 16),
    # Compute capability 12, workstation Blackwell, lacks some of the matrix layouts.
    "mxfp8": Fp8Recipe("a scale per 32 values", (10, 0), "data-center Blackwell", 32, below=(12, 0)),
}
