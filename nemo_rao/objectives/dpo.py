"""DPO, Direct Preference Optimization (Rafailov et al. 2023, Eq. 7), and two variants for noisy labels.

    Delta   = rho(w) - rho(l),    rho(y) = logp(y) - logp_ref(y)
    dpo     = -ls(beta Delta),                                               dL/dDelta = -beta s(-beta Delta)
    cDPO    = -(1 - eps) ls(beta Delta) - eps ls(-beta Delta)                (Mitchell 2023, conservative DPO)
    robust  = [-(1 - eps) ls(beta Delta) + eps ls(-beta Delta)] / (1 - 2 eps)    (Chowdhury et al. 2024)

s = logistic, ls = log s, w and l the chosen and rejected response, eps = ``label_smoothing``, the probability that a
label is flipped. eps > 0 gives cDPO; ``robust: true`` gives the third loss, an unbiased estimate of the loss on clean
labels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from nemo_rao.errors import UserError
from nemo_rao.keys import key
from nemo_rao.objectives.base import Objective
from nemo_rao.objectives.pair_loss import WITH_REFERENCE, PairConfig, Terms, beta_rho, loss_of_pairs


@dataclass(frozen=True)
class DPOConfig(PairConfig):
    block = "dpo"

    beta: float = key(0.1, "reward per nat of log-ratio to the reference", low=0, exclusive=True)
    label_smoothing: float = key(0.0, "probability that a pair's label is flipped, below 0.5", low=0, high=0.5)
    robust: bool = key(False, "with label_smoothing: the robust loss instead of cDPO")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing == 0.5:
            raise UserError("model.dpo.label_smoothing=0.5: must be < 0.5, since random labels carry no preference")


def dpo_loss(chosen: Terms, rejected: Terms, config: DPOConfig) -> Tensor:
    """Loss of each pair."""
    logits = config.beta * (chosen.rho - rejected.rho)
    right, wrong, epsilon = -logsigmoid(logits), -logsigmoid(-logits), config.label_smoothing
    if config.robust:
        return ((1 - epsilon) * right - epsilon * wrong) / (1 - 2 * epsilon)
    return (1 - epsilon) * right + epsilon * wrong


DPO = Objective(
    name="dpo",
    config_type=DPOConfig,
    loss=loss_of_pairs(dpo_loss, beta_rho),
    needs=WITH_REFERENCE,
    formula="−(1−ε)·lσ(βΔ) − ε·lσ(−βΔ); `robust`: [−(1−ε)·lσ(βΔ) + ε·lσ(−βΔ)]/(1−2ε)",
    source="Rafailov et al. 2023, Eq. 7; Mitchell 2023 (cDPO); Chowdhury et al. 2024 (robust)",
    checked="TRL `sigmoid`, `aot` of single pairs (cDPO) and `robust`; formula, gradient by hand, finite differences",
)
