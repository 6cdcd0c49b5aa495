"""Model FLOP/s and MFU of a training step: the planner's formula applied to the tokens that the step computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemo_rao.config.gpu_models import gpu_of_device
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError
from nemo_rao.planning.compute import Work, flops
from nemo_rao.planning.plan import setting_of
from nemo_rao.planning.setting import Setting


@dataclass(frozen=True)
class Throughput:
    """Computes throughput metrics from a step's work and seconds.

    Attributes:
        setting: the planner's description of the run.
        peak_tflops: dense peak of one GPU in the weights' format (for FP8 that of bf16); ``None`` if not known.
    """

    setting: Setting
    peak_tflops: float | None

    def metrics(self, work: Work, seconds: float) -> dict[str, float]:
        """Compute ``perf/tflops_per_gpu`` and, if the peak is known, ``perf/mfu`` (from 0 to 1).

        Both count model FLOPs (:mod:`nemo_rao.planning.compute`) of the computed tokens, without padding,
        repetitions of a shared prompt and recomputation.

        Args:
            work: work of the step, over all ranks.
            seconds: duration of the step.
        """
        tflops = flops(self.setting, work).model / (seconds * self.setting.ranks * 1e12)
        of_peak = {} if self.peak_tflops is None else {"perf/mfu": tflops / self.peak_tflops}
        return {"perf/tflops_per_gpu": tflops, **of_peak}


def throughput_of(config: RunConfig, *, responses: int) -> Throughput | None:
    """Return the throughput metrics of a run on GPUs; ``None`` on a CPU, and for networks unknown to the planner.

    Args:
        responses: average number of responses per prompt in the training data.
    """
    if not torch.cuda.is_available():
        return None
    try:
        setting = setting_of(config, responses=responses)
    except UserError:  # as nemo-rao plan reports it, such as for families of models that it does not support
        return None
    gpu = gpu_of_device(torch.cuda.get_device_name())
    return Throughput(setting, None if gpu is None else gpu.peak_tflops(setting.param_bytes))
