"""Compare policy and reference before the first optimizer step, when they are the same model.

Log-ratios then consist of rounding errors only. Those of a response of n tokens are about sqrt(n) times those of a
token, so each row's log-ratio is compared in nats per square root of a token, for any length. A reference with other
weights, another network or other rows differs by whole nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_rao.batch import ObjectiveBatch
from nemo_rao.objectives.base import Needs


@dataclass(frozen=True)
class Deviation:
    """Deviation between policy and reference, in nats per square root of a token.

    Attributes:
        rows: number of compared prompts and responses.
        rms: root mean square over rows.
        largest: largest absolute value.
    """

    rows: int
    rms: float
    largest: float


class LogRatios:
    """Collects the log-ratios of a global batch, micro-batch by micro-batch.

    Args:
        needs: needs of the objective; prompts are compared if it needs their log-probabilities.
    """

    def __init__(self, needs: Needs) -> None:
        self._prompts = needs.prompt_logps
        self._rows: list[Tensor] = []

    def add(self, batch: ObjectiveBatch) -> None:
        """Add prompts and responses of one micro-batch; called on the last pipeline stage."""
        assert batch.reference_response_logps is not None and batch.reference_prompt_logps is not None
        self.add_rows((batch.response_logps - batch.reference_response_logps)[batch.valid], batch.lengths[batch.valid])
        if self._prompts:
            log_ratio, tokens = batch.prompt_logps - batch.reference_prompt_logps, batch.prompt_lengths
            self.add_rows(log_ratio[batch.valid], tokens[batch.valid])

    def add_rows(self, log_ratio: Tensor, tokens: Tensor) -> None:
        """Add log-ratios ``[N]``, in nats, with their numbers of tokens ``[N]``; rows without tokens are ignored."""
        self._rows.append((log_ratio.detach()[tokens > 0] / tokens[tokens > 0].sqrt()).abs())

    def deviation(self) -> Deviation:
        """Compute the deviation over all ranks. A collective.

        Tensor- and context-parallel ranks hold the same rows, which changes neither the mean nor the maximum; the count
        is divided by the number of copies.
        """
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        rows = torch.cat([torch.zeros(0, device=device), *self._rows]).double()
        copies = (
            parallel_state.get_tensor_model_parallel_world_size() * parallel_state.get_context_parallel_world_size()
        )
        sums = torch.stack([rows.square().sum(), rows.new_tensor(len(rows))]) / copies
        largest = torch.cat([rows, rows.new_zeros(1)]).max()  # NaN stays NaN
        torch.distributed.all_reduce(sums)
        every = [torch.zeros_like(largest) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(every, largest)  # a reduction by MAX may drop NaN
        squares, count = sums.tolist()
        return Deviation(round(count), (squares / max(count, 1)) ** 0.5, torch.stack(every).max().item())
