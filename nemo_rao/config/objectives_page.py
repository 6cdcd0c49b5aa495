"""A page on all objectives, generated from the registry: what applies to all of them, then a section for each.

``nemo-rao objectives`` prints it. docs/reference/objectives.md is the same page, with typeset formulas and advice
(``docs_pages/objectives.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nemo_rao.config.recipe_text import limits, shown
from nemo_rao.objectives.base import Needs, Objective
from nemo_rao.objectives.registry import OBJECTIVES

_BEFORE = """\
# Objectives

Each objective is a recipe, `nemo-rao train --config-name gpt_NAME`, or `model.objective=NAME` over any other recipe.
Its keys are `model.NAME.KEY`.

## Notation

| symbol | meaning |
|---|---|
| x, y | a prompt, and a response with its end token, \\|y\\| tokens |
| w, l | the chosen and the rejected response of a pair |
| log π(y) | log-probability of y given x: a sum over tokens, natural logarithm |
| ρ(y) | log π_θ(y) − log π_ref(y), the log-ratio; ρ_x is that of the prompt without its first token |
| Δ | ρ(w) − ρ(l) |
| r | explicit reward |
| σ, sg | logistic function; stop gradient |
| π_ref | the reference: the policy at the start of the run |

## What applies to all

**Normalization.** The loss of a global batch is the mean over its prompts of the mean over a prompt's responses (or
pairs), however the batch is split over micro-batches and ranks. The loss of `ppo` is the mean over all its response
tokens; `grpo` has a key for it.

**Pairs.** Of two responses, the better one is the chosen one of labeled data (`chosen`, `rejected`), or else the one
with the higher reward. With `data.pairs_by=reward`, rewards decide even against labels; `data.pairs_by=label` refuses
data without labels. Of K > 2 responses, pairwise objectives use the best and the worst; with
`data.responses=best_random`, the best and a worse one drawn once; with `data.responses=all`, every pair. The order of
rows with `"ranked": true` is a preference, best first. Responses with equal rewards are not a pair; pairwise objectives
drop and count a prompt without any pair. Labeled responses with equal rewards are a pair, unless their tokens are
equal.

**Data without pairs.** `prompt`, `completion` and `label` (true, false) or `reward`, one row per response. `kto` uses
labels, or rewards with `model.kto.threshold`; `rao`, `dro`, `rpo_partition` and `qrpo` accept single responses with
rewards. `qrpo` uses the quantile of a reward among the row's `reference_rewards`, a list, or among the prompt's own
responses if there is none. `data.reward_field=[a,b]` is an ensemble of reward models: `robust_po` uses the nearest for
each pair, all others the mean.

**Level of rewards.** `rao`, `dro`, and `sppo` with `win_probability=rewards`, fit log-ratios to absolute rewards: a
constant added to all rewards shifts their targets. `model.rao.log_z0=auto`, the default, removes it and prints the
value; the RAO paper's own runs (`gpt_rao_llama3_8b` and similar recipes) set 50, which fits the paper's reward model.
The V(x) of `dro` has to learn it, as have the values of `ppo`, whose advantages are whitened. If the mean target is
more than 5 nats per response from 0, a run warns before its first step and names the key that centers it. `kto`
compares rewards with `model.kto.threshold`. All other objectives depend only on differences or ranks.

**Needs.** The row *needs* of each objective lists:

| need | meaning |
|---|---|
| reference | the reference policy's log-probabilities, computed once before the first step and cached on disk |
| rewards | a reward of every response |
| preference | labels or rewards |
| K ≥ 2 | two responses to every prompt |
| t0 | all prompts begin with the same token |
| value head | a linear head on the last pipeline stage, with its own learning rate, saved with the model |
| score head | a reward model's head, in place of the output layer |
| KL estimate | a forward pass before each step over the batch's prompts with responses to other prompts |
| its own samples | an [online run](../guides/online.md) |

If the model that a run starts from has a head of the same size, it is kept; otherwise a value head starts at 0 and a
score head at random values drawn from `trainer.seed`. The run reports which.
"""


@dataclass(frozen=True)
class Note:
    """What the page in docs/ adds for an objective.

    Attributes:
        tex: formulas in display mathematics, separated by empty lines.
        when: advice on when to use it.
    """

    tex: str
    when: str


def page(notes: Mapping[str, Note] | None = None) -> str:
    """The page as Markdown.

    Args:
        notes: by name of the objective; without a note, the formula is shown as text.
    """
    notes = notes or {}
    sections = ("\n".join(_section(objective, notes.get(name))) for name, objective in OBJECTIVES.items())
    return "\n".join([_BEFORE, *sections])


def _section(objective: Objective, note: Note | None) -> Iterator[str]:
    yield f"## {objective.name}\n"
    if note:
        yield from (f"$$\n{tex.strip()}\n$$\n" for tex in note.tex.split("\n\n"))
        yield f"{note.when}\n"
    else:
        yield f"    {objective.formula}\n"
    yield f"- **Needs**: {_needs(objective.needs_of(objective.config_type()))}"
    yield f"- **Source**: {objective.source}"
    yield f"- **Checked against**: {objective.checked}\n"
    yield "| key | default | allowed | meaning |\n|---|---|---|---|"
    for field in dataclasses.fields(objective.config_type):
        spec = field.metadata["key"]
        cells = (f"`{field.name}`", f"`{shown(field.default)}`", limits(spec).strip(" []"), spec.comment)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def _needs(needs: Needs) -> str:
    """The objective's needs with default keys."""
    named = (
        ("reference", needs.reference),
        ("rewards", needs.rewards),
        ("preference", needs.preference and not needs.rewards),
        (f"K ≥ {needs.min_responses}", needs.min_responses > 1),
        ("t0", needs.shared_first_token),
        ("rewards, some may be null", needs.attributes),
        ("value head", needs.values is not None),
        ("score head", needs.scores > 0),
        ("KL estimate", needs.kl_estimate),
        ("its own samples", needs.samples),
    )
    return ", ".join(name for name, needed in named if needed) or "nothing but responses"
