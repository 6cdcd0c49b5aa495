"""docs/reference/objectives.md: the objectives' page with typeset formulas, and advice on when to use each.

An objective without an entry here is shown with the formula of its table, ``nemo_rao.objectives.registry``.
"""

from __future__ import annotations

from nemo_rao.config import objectives_page
from nemo_rao.config.objectives_page import Note

NOTES: dict[str, Note] = {
    "rao": Note(
        r"""\Bigl(r - \beta\bigl[\rho(y) + \log Z(x)\bigr]\Bigr)^2,\qquad
\log Z(x) = \log Z_0 + \operatorname{sg}(\rho_x)""",
        "Use it if every response has a score. It uses the size of each score, not just the order, and fits each "
        "response's probability separately. Set `log_z0` to about mean reward / `beta`, which `auto` does. See "
        "[The three numbers of a run](../concepts/three_numbers.md).",
    ),
    "dpo": Note(
        r"""-(1-\varepsilon)\log\sigma(\beta\Delta) - \varepsilon\log\sigma(-\beta\Delta)

\mathrm{robust}:\ \frac{-(1-\varepsilon)\log\sigma(\beta\Delta) +
\varepsilon\log\sigma(-\beta\Delta)}{1-2\varepsilon}""",
        "The standard for chosen and rejected responses without scores. With `label_smoothing` it is cDPO; `robust` "
        "corrects the bias that wrong labels cause.",
    ),
    "ipo": Note(
        r"""\Bigl(\Delta - \frac{1}{2\beta}\Bigr)^2

\mathrm{length\_normalized}:\ \Delta = \frac{\rho(w)}{|w|} - \frac{\rho(l)}{|l|}""",
        "Use it if pairs are nearly certain and DPO overfits them: the margin has a finite target. To compare with TRL "
        "or published results, set `length_normalized=true`.",
    ),
    "cal_dpo": Note(
        r"""-\log\sigma(\Delta) + w\Bigl[\Bigl(\rho(w) - \frac{1}{2\beta}\Bigr)^2 +
\Bigl(\rho(l) + \frac{1}{2\beta}\Bigr)^2\Bigr]""",
        "Use it if DPO lowers the probability of chosen responses: each log-ratio has its own target.",
    ),
    "slic": Note(
        r"""\max\bigl(0,\ \delta - \log\pi(w) + \log\pi(l)\bigr) - \lambda\log\pi(w)""",
        "A hinge loss on log-probabilities, without a reference. `lam` weights the likelihood of the chosen response.",
    ),
    "hinge": Note(
        r"""\max(0,\ 1 - \beta\Delta)""",
        "Stops separating a pair once its margin is 1. Use it to compare with RSO.",
    ),
    "simpo": Note(
        r"""-\log\sigma\Bigl(\beta\Bigl[\frac{\log\pi(w)}{|w|} - \frac{\log\pi(l)}{|l|}\Bigr] - \gamma\Bigr)""",
        "Use it against responses that grow longer, or to save the reference pass. `beta` is larger than in "
        "DPO, 2 to 2.5, as it multiplies means over tokens.",
    ),
    "alphapo": Note(
        r"""-\log\sigma\bigl(\beta(R_w - R_l) - \gamma\bigr),\qquad R = \frac{1 - p^{-\alpha}}{\alpha},\quad
p = \exp\frac{\log\pi(y)}{|y|}""",
        "SimPO with a different reward shape; `alpha=0` is SimPO.",
    ),
    "orpo": Note(
        r"""-\frac{\log\pi(w)}{|w|} - \lambda\log\sigma\Bigl(\log\frac{p_w}{1-p_w} - \log\frac{p_l}{1-p_l}\Bigr),\qquad
p = \exp\frac{\log\pi(y)}{|y|}""",
        "Combines fine-tuning and preference training in one run from a base model, without a reference. `lam` is "
        "TRL's `beta`.",
    ),
    "dpop": Note(
        r"""-\log\sigma\bigl(\beta\bigl[\Delta - \lambda\max(0, -\rho(w))\bigr]\bigr)""",
        "Use it if DPO lowers the probability of chosen responses, especially for pairs that differ in few tokens.",
    ),
    "dpo_shift": Note(
        r"""-\log\sigma\bigl(\beta\bigl[\rho(w) - f\rho(l)\bigr]\bigr)""",
        "Trades margin for the probability of chosen responses: a lower `f` keeps the probability higher.",
    ),
    "r_dpo": Note(
        r"""-\log\sigma\bigl(\beta\Delta + \alpha(|w| - |l|)\bigr)""",
        "DPO with a length penalty: use it if responses grow longer than those of the reference.",
    ),
    "sppo": Note(
        r"""\bigl(\rho(w) - \eta(P_w - \tfrac12)\bigr)^2 + \bigl(\rho(l) - \eta(P_l - \tfrac12)\bigr)^2""",
        "Fits each log-ratio to a win probability. It is designed for repeated rounds of sampling and scoring.",
    ),
    "robust_po": Note(
        r"""\min_m\bigl(r_m(w) - r_m(l) - \beta\Delta\bigr)^2 - \gamma\frac{\log\pi(w)}{|w|}""",
        "Distills reward models into the policy and accounts for disagreement in an ensemble of them. The RAO paper "
        "calls it RPO.",
    ),
    "rpo": Note(
        r"""a_k = \beta\rho(y_k),\quad b_k = \eta r_k

\mathrm{bwd}:\ \operatorname{KL}\bigl(\operatorname{softmax}(b)\,\|\,\operatorname{softmax}(a)\bigr)

\mathrm{sqloo}:\ \tfrac12\sum_k\Bigl(d_k - \frac{1}{K-1}\sum_{j\ne k} d_j\Bigr)^2,\ d = a - b""",
        "Use it if only score differences within a prompt are meaningful. It is a family of losses: `fwd` swaps the "
        "arguments of `bwd`, and `sq` is `sqloo` for two responses. DPO, IPO and SimPO are special configurations.",
    ),
    "dro": Note(
        r"""\frac{1}{2\tau}\bigl(r - \operatorname{sg}V(x) - \tau\rho(y)\bigr)^2 +
\tfrac12\bigl(V(x) - r + \tau\operatorname{sg}\rho(y)\bigr)^2""",
        "For single responses with scores whose level differs between prompts: a value head learns the level.",
    ),
    "kto": Note(
        r"""\lambda_D\bigl(1 - \sigma(\beta(\rho(y) - z_0))\bigr)\ \mathrm{or}\
\lambda_U\bigl(1 - \sigma(\beta(z_0 - \rho(y)))\bigr),\qquad
z_0 = \max\bigl(0, \operatorname{mean}\rho(y'\mid x)\bigr)""",
        "For single responses that are good (first term) or bad (second), without pairs. $z_0$ is estimated from "
        "responses to other prompts, over all ranks.",
    ),
    "rpo_partition": Note(
        r"""\tfrac12\Bigl(\bar\rho(y) - \frac{r - \hat V}{\tau}\Bigr)^2,\quad \bar\rho = \frac{\rho(y)}{|y|},\quad
\hat V = \tau\log\sum_k\exp\Bigl(\frac{\log\pi_{\mathrm{ref}}(y_k)}{|y_k|} + \frac{r_k}{\tau}\Bigr)""",
        "Like RAO, but with the level of rewards estimated from the prompt's own responses, and averaged over tokens.",
    ),
    "kimi": Note(
        r"""\bigl(r - \bar r - \tau\rho(y)\bigr)^2,\qquad \bar r = \frac1K\sum_k r_k""",
        "Like RAO, but with the mean reward of the prompt's responses as the level.",
    ),
    "agro": Note(
        r"""\tfrac12\operatorname{Var}_k\bigl(r_k - \beta\rho(y_k)\bigr)""",
        "Needs no level of rewards: only the unbiased variance of the errors within a prompt counts.",
    ),
    "qrpo": Note(
        r"""\bigl(\tilde r - \beta\log Z - \beta\rho(y)\bigr)^2,\qquad \log Z = \log\beta + \frac1\beta""",
        "Use it if the scale of scores is arbitrary: $\\tilde r$ is the quantile of the reward among the rewards of "
        "the reference policy, for which log Z is known.",
    ),
    "nca": Note(
        r"""-\sum_k\operatorname{softmax}(r/\alpha)_k\log\sigma(\beta\rho(y_k)) -
\frac1K\sum_k\log\sigma(-\beta\rho(y_k))""",
        "A contrastive loss over all K responses that also keeps absolute probabilities from falling.",
    ),
    "sft": Note(
        r"""-\frac{\log\pi(y)}{|y|}""",
        "Fine-tuning on the best or only response to each prompt; the usual start for all other objectives.",
    ),
    "rm": Note(
        r"""-\log\sigma\bigl(s_w - s_l - m(r_w - r_l)\bigr) + c(s_w + s_l)^2""",
        "A Bradley-Terry reward model; $s$ is the score. See [Reward models](../guides/reward_models.md).",
    ),
    "rm_regression": Note(
        r"""\operatorname{mean}_a(s_a - r_a)^2""",
        "A reward model that predicts one or several attributes; missing ones are left out.",
    ),
    "rloo": Note(
        r"""-\operatorname{sg}(A)\,\rho(y),\qquad A_k = R_k - \frac{1}{K-1}\sum_{j\ne k}R_j,\quad
R = r - \beta\rho(y)""",
        "The simplest online objective: REINFORCE with the prompt's other samples as the baseline. See "
        "[Online training](../guides/online.md).",
    ),
    "grpo": Note(
        r"""-\min\bigl(wA,\ \operatorname{clip}(w, 1-\varepsilon_{\mathrm{low}}, 1+\varepsilon_{\mathrm{high}})A\bigr) +
\beta\operatorname{KL},\qquad A = \frac{r - \bar r}{s}""",
        "Online, per token; $w$ is the token's ratio to the policy that sampled. DAPO: `normalize=token "
        "clip_high=0.28`. Dr. GRPO: `normalize=constant scale=none`.",
    ),
    "ppo": Note(
        r"""-\min\bigl(wA,\ \operatorname{clip}(w, 1-\varepsilon, 1+\varepsilon)A\bigr) +
\frac{c}{2}\max\bigl((V-R)^2,\ (\operatorname{clip}(V, V_{\mathrm{old}}\pm\varepsilon_v) - R)^2\bigr)""",
        "Online, per token, with a [critic](../guides/online.md#ppos-critic). $A$ is computed by GAE and whitened over "
        "the rollout. One sample per prompt is enough.",
    ),
}


def page() -> str:
    return objectives_page.page(NOTES).replace(
        "## Notation",
        "[Which objective?](../start/which_objective.md) helps you choose. This page is generated from the code by\n"
        "`python -m docs_pages`; `nemo-rao objectives` prints it.\n\n## Notation",
        1,
    )
