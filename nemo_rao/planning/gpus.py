"""GPUs that a run may be planned for: NVIDIA's data sheets, dense products, without sparsity."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Compute capability; memory in GiB, as the driver reports it; peak TFLOPS in bf16 and in fp32 (not TF32)."""

    name: str
    capability: tuple[int, int]
    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float

    def peak_tflops(self, param_bytes: int) -> float:
        return self.bf16_tflops if param_bytes == 2 else self.fp32_tflops


GPUS = {
    "a100": Gpu("A100 80 GB", (8, 0), 80.0, 312.0, 19.5),
    "h100": Gpu("H100 SXM 80 GB", (9, 0), 79.6, 989.4, 66.9),
    "h200": Gpu("H200 SXM 141 GB", (9, 0), 140.4, 989.4, 66.9),
    "b200": Gpu("B200 180 GB", (10, 0), 179.1, 2250.0, 75.0),
}
