"""All objectives by name. A new one is a new line here."""

from __future__ import annotations

from collections.abc import Mapping

from nemo_rao.errors import UserError, did_you_mean
from nemo_rao.objectives.base import Objective
from nemo_rao.objectives.dpo import DPO
from nemo_rao.objectives.groupwise import AGRO, KIMI, NCA, QRPO, RPO_PARTITION
from nemo_rao.objectives.grpo import GRPO
from nemo_rao.objectives.pairwise import CAL_DPO, DPO_SHIFT, DPOP, HINGE, IPO, R_DPO, SPPO
from nemo_rao.objectives.pointwise import DRO, KTO
from nemo_rao.objectives.ppo import PPO
from nemo_rao.objectives.rao import RAO
from nemo_rao.objectives.reference_free import ALPHAPO, ORPO, SIMPO, SLIC
from nemo_rao.objectives.reward_model import RM, RM_REGRESSION
from nemo_rao.objectives.rloo import RLOO
from nemo_rao.objectives.robust_po import ROBUST_PO
from nemo_rao.objectives.rpo import RPO
from nemo_rao.objectives.sft import SFT
from nemo_rao.other_names import objective_hint


def table(*objectives: Objective) -> Mapping[str, Objective]:
    """Name -> objective; two of one name are a mistake of ours."""
    named = {objective.name: objective for objective in objectives}
    assert len(named) == len(objectives), f"duplicate among {[objective.name for objective in objectives]}"
    return named


OBJECTIVES = table(
    RAO,
    DPO,
    IPO,
    CAL_DPO,
    SLIC,
    HINGE,
    SIMPO,
    ALPHAPO,
    ORPO,
    DPOP,
    DPO_SHIFT,
    R_DPO,
    SPPO,
    ROBUST_PO,
    RPO,
    DRO,
    KTO,
    RPO_PARTITION,
    KIMI,
    AGRO,
    QRPO,
    NCA,
    SFT,
    RM,
    RM_REGRESSION,
    RLOO,
    GRPO,
    PPO,
)


def get(name: str) -> Objective:
    """The objective of this name.

    Raises:
        UserError: there is none; with the nearest name that exists.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if (hint := objective_hint(name)) is not None:
        raise UserError(f"model.objective={name}: no such objective; {hint}")
    near = did_you_mean(name, OBJECTIVES, otherwise=".", cutoff=0.4)  # names are short
    raise UserError(f"model.objective={name}: no such objective{near} The objectives are {', '.join(OBJECTIVES)}.")
