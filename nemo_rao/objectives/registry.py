"""All objectives by name. A new one is a new line here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from nemo_rao.errors import UserError
from nemo_rao.objectives.base import Objective
from nemo_rao.objectives.dpo import DPO
from nemo_rao.objectives.rao import RAO
from nemo_rao.objectives.sft import SFT


def table(*objectives: Objective) -> Mapping[str, Objective]:
    """Name -> objective; two of one name are a mistake of ours."""
    named = {objective.name: objective for objective in objectives}
    assert len(named) == len(objectives), f"duplicate among {[objective.name for objective in objectives]}"
    return named


OBJECTIVES = table(
    RAO,
    DPO,
    SFT,
)


def get(name: str) -> Objective:
    """The objective of this name.

    Raises:
        UserError: there is none; with the nearest name that exists.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    nearest = difflib.get_close_matches(name, OBJECTIVES, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    raise UserError(f"model.objective={name}: no such objective; {hint}there are {', '.join(OBJECTIVES)}")
