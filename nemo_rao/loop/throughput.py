"""Model FLOPs of a step and the share of the GPUs' peak that they are: the planner's formula, the step's own tokens."""

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
    """Turns what a step computed and its seconds into metrics.

    Attributes:
        setting: the run as the planner sees it.
        peak_tflops: of one GPU in the format of the weights, so that FP8 is measured by bf16's peak; ``None``: not
            known.
    """

    setting: Setting
    peak_tflops: float | None

    def metrics(self, work: Work, seconds: float) -> dict[str, float]:
        """``perf/tflops_per_gpu`` and, where the peak is known, ``perf/mfu`` (from 0 to 1).

        Counted are model FLOPs (:mod:`nemo_rao.planning.compute`) of the tokens that were computed: neither padding nor
        a shared prompt's repetitions, nor what recomputation adds.
        """
        tflops = flops(self.setting, work).model / (seconds * self.setting.ranks * 1e12)
        of_peak = {} if self.peak_tflops is None else {"perf/mfu": tflops / self.peak_tflops}
        return {"perf/tflops_per_gpu": tflops, **of_peak}


def throughput_of(config: RunConfig, *, responses: int) -> Throughput | None:
    """For a run on GPUs; ``None`` on a CPU, and where the planner does not know the network.

    Args:
        responses: of each prompt of the training data, on average.
    """
    if not torch.cuda.is_available():
        return None
    try:
        setting = setting_of(config, responses=responses)
    except UserError:  # what a plan would refuse, such as families whose layers are not planned
        return None
    gpu = gpu_of_device(torch.cuda.get_device_name())
    return Throughput(setting, None if gpu is None else gpu.peak_tflops(setting.param_bytes))
