"""``nemo-rao objectives``: the reference page of all objectives, written from the table in the code.

docs/objectives.md is this text; a test compares the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from nemo_rao.config.recipe_text import limits, shown
from nemo_rao.objectives.base import Needs, Objective
from nemo_rao.objectives.registry import OBJECTIVES

_BEFORE = """\
# Objectives

`nemo-rao train --config-name gpt_<name>`, or `model.objective=<name>` over any other recipe. Its keys are
`model.<name>.<key>`. This page is what `nemo-rao objectives` prints.

**Notation.** x: the prompt; y: a response with its end token, |y| tokens; w, l: the chosen and the rejected response of
a pair. logπ(y): log-probability of y given x, summed over tokens, natural logarithm. ρ(y) = logπ_θ(y) − logπ_ref(y),
Δ = ρ(w) − ρ(l); ρ_x: the same as ρ of the prompt without its first token. r: explicit reward. σ: logistic function,
lσ = log σ; sg: stop gradient. π_ref is the policy at the start of the run.

**Normalisation.** The loss of a global batch is the mean over its prompts of the mean over a prompt's responses (or
pairs), however the batch is split over micro-batches and ranks. ppo's is the mean over all its response tokens.

**Pairs.** Of two responses, the better one is the chosen one of labelled data (`chosen`, `rejected`), or else the one
with the higher reward. With `data.pairs_by=reward`, rewards decide even against labels; `data.pairs_by=label` refuses
data without labels. Of K > 2 responses, pairwise objectives use the best and the worst; with
`data.responses=best_random`, the best and a worse one drawn once; with `data.responses=all`, every pair. The order of
rows with `"ranked": true` is a preference, best first. Ties: responses with equal rewards are not a pair; pairwise
objectives drop and count a prompt without any pair. Labelled responses with equal rewards are a pair, unless their
tokens are equal.

**Data without pairs.** `prompt`, `completion` and `label` (true, false) or `reward`, one row per response. kto uses
labels, or rewards with `model.kto.threshold`; rao, dro, rpo_partition and qrpo accept single responses with rewards.
qrpo uses the quantile of a reward among the row's `reference_rewards`, a list, or among the prompt's own responses if
there is none. `data.reward_field=[a,b]` is an ensemble of reward models: robust_po uses the nearest for each pair, all
others the mean.

**Level of rewards.** rao, dro and sppo with `win_probability=rewards` fit log-ratios to absolute rewards: a constant
added to all rewards shifts their targets. `model.rao.log_z0=auto`, the default, removes it and prints the value; the
RAO paper's own runs (`gpt_rao_llama3_8b` and similar recipes) set 50, which fits the paper's reward model. dro's V(x)
has to learn it, as have ppo's values, though its advantages are whitened. If the mean target is more than 5 nats per
response from 0, a run warns before its first step and names the key that centres it. kto compares rewards with
`model.kto.threshold`. All other objectives depend only on differences or ranks.

**Needs.** *reference*: the reference policy's log-probabilities, computed once before the first step and cached on
disk; objectives without it run no such pass. *rewards*: of every response. *preference*: labels or rewards. *K ≥ 2*:
two responses to every prompt. *t0*: all prompts begin with the same token. *value head*: a linear head on the last
pipeline stage, with its own learning rate, saved with the model. *score head*: a reward model's head, in place of the
output layer. If the model that a run starts from has a head of the same size, it is kept; otherwise a value head starts
at 0 and a score head at random values drawn from trainer.seed. The run reports which. *mismatched*: a forward pass
before each step over the batch's prompts with responses to other prompts.

"""


def page() -> str:
    """Markdown: what applies to all objectives, then a row for each."""
    header = "| name | loss of a prompt's pair or response | needs | keys: default, range | source | checked against |"
    rows = [_row(objective) for objective in OBJECTIVES.values()]
    return _BEFORE + "\n".join([header, "|---|---|---|---|---|---|", *rows]) + "\n"


def _row(objective: Objective) -> str:
    cells = (
        f"`{objective.name}`",
        objective.formula,
        _needs(objective.needs_of(objective.config_type())),
        "<br>".join(_keys(objective)),
        objective.source,
        objective.checked,
    )
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _needs(needs: Needs) -> str:
    """The objective's needs with its default keys."""
    named = (
        ("reference", needs.reference),
        ("rewards", needs.rewards),
        ("preference", needs.preference and not needs.rewards),
        (f"K ≥ {needs.min_responses}", needs.min_responses > 1),
        ("t0", needs.shared_first_token),
        ("rewards, some may be null", needs.attributes),
        ("value head", needs.values is not None),
        ("score head", needs.scores > 0),
        ("mismatched", needs.kl_estimate),
        ("its own samples", needs.samples),
    )
    return ", ".join(name for name, needed in named if needed) or "–"


def _keys(objective: Objective) -> Iterator[str]:
    for field in dataclasses.fields(objective.config_type):
        spec = field.metadata["key"]
        yield f"`{field.name}` {shown(field.default)}{limits(spec)}: {spec.comment}"
