"""The objectives' formulas in plain Python, each with its gradient derived by hand; no code of the package is used.

``FORMULAS[name](answers, **keys)`` is one prompt's ``(loss, {column: d loss / d logp(y)})``, ``(None, {})`` if the
prompt does not count. A formula's keyword-only parameters are the objective's keys with their defaults.

w and l (in code, z): the better and the worse response of a pair; D = rho_w - rho_l; s = logistic, ls = log s,
s' = s(1 - s). Since rho = logp - a constant, d/drho = d/dlogp.
"""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nemo_rao.batch import ObjectiveBatch

from .batches import Entry, prompts_of

Gradient = dict[int, float]
Result = tuple[float | None, Gradient]
NO_LOSS: Result = (None, {})


@dataclass(frozen=True, kw_only=True)
class Answer(Entry):
    """A response with everything that a formula may ask of it; a prompt's own numbers stand in each of its responses.

    ``reward`` may be NaN. ``ensemble``: the response's rewards by M models, () if there is one only. ``mismatched`` is
    the mean log-ratio of mismatched pairs of the batch.
    """

    reference_logp: float
    ranked: bool
    ensemble: tuple[float, ...]
    reference_rewards: tuple[float, ...]
    value: float
    mismatched: float


def answers_of(batch: ObjectiveBatch) -> list[list[Answer]]:
    """The valid responses of each prompt of a batch."""

    def cell(tensor: Tensor | None, *index: int, absent: Any) -> Any:
        return absent if tensor is None else tensor[index].tolist()

    return [
        [
            Answer(
                **vars(entry)
                | {
                    "reference_logp": entry.logp - entry.rho,
                    "ranked": bool(batch.ranked[entry.row]),
                    "ensemble": tuple(cell(batch.reward_ensemble, entry.row, entry.column, absent=())),
                    "reference_rewards": tuple(
                        reward
                        for reward in cell(batch.reference_rewards, entry.row, absent=())
                        if not math.isnan(reward)
                    ),
                    "value": cell(batch.values, entry.row, entry.column, absent=math.nan),
                    "mismatched": cell(batch.kl_estimate, absent=math.nan),
                }
            )
            for entry in entries
        ]
        for entries in prompts_of(batch)
    ]


def logsigmoid(x: float) -> float:
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return math.exp(logsigmoid(x))


def log1mexp(x: float) -> float:
    """log(1 - e^x) for x < 0."""
    return math.log(-math.expm1(x)) if x > -math.log(2) else math.log1p(-math.exp(x))


def log_softmax(values: list[float]) -> list[float]:
    top = max(values)
    log_sum = top + math.log(sum(math.exp(value - top) for value in values))
    return [value - log_sum for value in values]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def rewards_known(answers: list[Answer]) -> bool:
    return not any(math.isnan(answer.reward) for answer in answers)


def pairs_of(answers: list[Answer]) -> list[tuple[Answer, Answer]]:
    """All ordered pairs (better, worse)."""
    if answers and answers[0].ranked:
        return [(w, z) for i, w in enumerate(answers) for z in answers[i + 1 :]]
    if not rewards_known(answers):
        return []
    return [(w, z) for w in answers for z in answers if w.reward > z.reward]


def best_of(answers: list[Answer]) -> Answer | None:
    """Ranked: the first; else the first of the highest reward; nothing if neither is known."""
    if answers[0].ranked:
        return answers[0]
    return max(answers, key=lambda answer: answer.reward) if rewards_known(answers) else None


FORMULAS: dict[str, Callable[..., Result]] = {}
PAIRS: set[str] = set()


def formula(function: Callable[..., Result]) -> Callable[..., Result]:
    FORMULAS[function.__name__] = function
    return function


def pair_formula(function: Callable[..., tuple[float, float, float]]) -> Callable[..., Result]:
    """From ``(loss, d/dlogp_w, d/dlogp_l)`` of one pair to the mean over pairs, -sft_weight/|w| added to the second."""

    @functools.wraps(function)
    def over_pairs(answers: list[Answer], *, sft_weight: float = 0.0, **keys) -> Result:  # type: ignore[no-untyped-def]
        pairs = pairs_of(answers)
        if not pairs:
            return NO_LOSS
        loss, gradient = 0.0, {answer.column: 0.0 for answer in answers}
        for w, z in pairs:
            of_pair, by_w, by_z = function(w, z, **keys)
            loss += (of_pair - sft_weight * w.logp / w.length) / len(pairs)
            gradient[w.column] += (by_w - sft_weight / w.length) / len(pairs)
            gradient[z.column] += by_z / len(pairs)
        return loss, gradient

    PAIRS.add(function.__name__)
    return formula(over_pairs)


def defaults(name: str) -> dict[str, object]:
    """The keys of an objective and their defaults."""
    parameters = inspect.signature(FORMULAS[name]).parameters.values()
    keys = {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    return keys | ({"sft_weight": 0.0} if name in PAIRS else {})


@pair_formula
def ipo(w: Answer, z: Answer, *, beta: float = 0.1, length_normalized: bool = False) -> tuple[float, float, float]:
    """(h - 1/(2 beta))^2 with h = D, or rho_w/|w| - rho_l/|l|; dL/dh = 2 (h - 1/(2 beta))."""
    of_w, of_z = (1 / w.length, 1 / z.length) if length_normalized else (1.0, 1.0)
    error = w.rho * of_w - z.rho * of_z - 1 / (2 * beta)
    return error**2, 2 * error * of_w, -2 * error * of_z


@pair_formula
def cal_dpo(
    w: Answer, z: Answer, *, beta: float = 0.001, calibration_weight: float = 1.0
) -> tuple[float, float, float]:
    """-ls(D) + c[(rho_w - t)^2 + (rho_l + t)^2], t = 1/(2 beta); d/dw = -s(-D) + 2c(rho_w - t), d/dl likewise."""
    delta, target = w.rho - z.rho, 1 / (2 * beta)
    loss = -logsigmoid(delta) + calibration_weight * ((w.rho - target) ** 2 + (z.rho + target) ** 2)
    by_w = -sigmoid(-delta) + 2 * calibration_weight * (w.rho - target)
    by_z = sigmoid(-delta) + 2 * calibration_weight * (z.rho + target)
    return loss, by_w, by_z


@pair_formula
def slic(w: Answer, z: Answer, *, delta: float = 1.0, lam: float = 0.1) -> tuple[float, float, float]:
    """max(0, delta - logp_w + logp_l) - lam logp_w; slopes -1 and 1 inside the margin, 0 beyond, and -lam for w."""
    slack = delta - w.logp + z.logp
    inside = 1.0 if slack > 0 else 0.0
    return max(0.0, slack) - lam * w.logp, -inside - lam, inside


@pair_formula
def hinge(w: Answer, z: Answer, *, beta: float = 0.1) -> tuple[float, float, float]:
    """max(0, 1 - beta D); dL/dD = -beta inside the margin, 0 beyond."""
    slack = 1 - beta * (w.rho - z.rho)
    slope = beta if slack > 0 else 0.0
    return max(0.0, slack), -slope, slope


@pair_formula
def simpo(w: Answer, z: Answer, *, beta: float = 2.0, gamma: float = 1.0) -> tuple[float, float, float]:
    """-ls(m), m = beta (logp_w/|w| - logp_l/|l|) - gamma; dL/dm = -s(-m), dm/dlogp_w = beta/|w|."""
    margin = beta * (w.logp / w.length - z.logp / z.length) - gamma
    slope = beta * sigmoid(-margin)
    return -logsigmoid(margin), -slope / w.length, slope / z.length


@pair_formula
def alphapo(
    w: Answer, z: Answer, *, alpha: float = 0.25, beta: float = 2.5, gamma: float = 0.1
) -> tuple[float, float, float]:
    """-ls(beta (R_w - R_l) - gamma), R = (1 - e^(-alpha p))/alpha, p = logp/|y|; dR/dp = e^(-alpha p)."""

    def reward(p: float) -> float:
        return p if alpha == 0 else -math.expm1(-alpha * p) / alpha

    p_w, p_z = w.logp / w.length, z.logp / z.length
    margin = beta * (reward(p_w) - reward(p_z)) - gamma
    slope = beta * sigmoid(-margin)
    return -logsigmoid(margin), -slope * math.exp(-alpha * p_w) / w.length, slope * math.exp(-alpha * p_z) / z.length


@pair_formula
def orpo(w: Answer, z: Answer, *, lam: float = 0.1) -> tuple[float, float, float]:
    """-p_w - lam ls(o_w - o_l), o = p - log(1 - e^p), p = logp/|y|; do/dp = 1/(1 - e^p) = -1/expm1(p)."""
    p_w, p_z = w.logp / w.length, z.logp / z.length
    log_odds_ratio = (p_w - log1mexp(p_w)) - (p_z - log1mexp(p_z))
    slope = lam * sigmoid(-log_odds_ratio)
    by_w = (-1 + slope / math.expm1(p_w)) / w.length
    return -p_w - lam * logsigmoid(log_odds_ratio), by_w, -slope / math.expm1(p_z) / z.length


@pair_formula
def dpop(w: Answer, z: Answer, *, beta: float = 0.3, lam: float = 50.0) -> tuple[float, float, float]:
    """-ls(m), m = beta (D - lam max(0, -rho_w)); dm/dw = beta (1 + lam [rho_w < 0]), dm/dl = -beta."""
    margin = beta * (w.rho - z.rho - lam * max(0.0, -w.rho))
    slope = beta * sigmoid(-margin)
    return -logsigmoid(margin), -slope * (1 + lam if w.rho < 0 else 1), slope


@pair_formula
def dpo_shift(w: Answer, z: Answer, *, beta: float = 0.01, f: float = 0.95) -> tuple[float, float, float]:
    """-ls(m), m = beta (rho_w - f rho_l); dm/dw = beta, dm/dl = -f beta."""
    margin = beta * (w.rho - f * z.rho)
    slope = beta * sigmoid(-margin)
    return -logsigmoid(margin), -slope, f * slope


@pair_formula
def r_dpo(w: Answer, z: Answer, *, beta: float = 0.1, alpha: float = 0.05) -> tuple[float, float, float]:
    """-ls(m), m = beta D + alpha (|w| - |l|); dm/dD = beta."""
    margin = beta * (w.rho - z.rho) + alpha * (w.length - z.length)
    slope = beta * sigmoid(-margin)
    return -logsigmoid(margin), -slope, slope


@pair_formula
def sppo(w: Answer, z: Answer, *, eta: float = 1000.0, win_probability: str = "labels") -> tuple[float, float, float]:
    """(rho_w - eta (P_w - 1/2))^2 + (rho_l - eta (P_l - 1/2))^2; d/drho = 2 (rho - eta (P - 1/2))."""
    if win_probability == "labels":
        p_w, p_z = 1.0, 0.0
    elif win_probability == "rewards":
        p_w, p_z = w.reward, z.reward
    else:
        p_w = sigmoid(w.reward - z.reward)
        p_z = 1 - p_w
    error_w, error_z = w.rho - eta * (p_w - 0.5), z.rho - eta * (p_z - 0.5)
    return error_w**2 + error_z**2, 2 * error_w, 2 * error_z


@pair_formula
def robust_po(w: Answer, z: Answer, *, beta: float = 0.1, gamma: float = 0.0) -> tuple[float, float, float]:
    """min_m (r_w - r_l - beta D)^2 - gamma logp_w/|w|; d/dD = -2 beta e of the model m whose error e is smallest."""
    models = list(zip(w.ensemble, z.ensemble, strict=True)) or [(w.reward, z.reward)]
    error = min((of_w - of_z - beta * (w.rho - z.rho) for of_w, of_z in models), key=abs)
    return error**2 - gamma * w.logp / w.length, -2 * beta * error - gamma / w.length, 2 * beta * error


@formula
def rpo(
    answers: list[Answer],
    *,
    distance: str = "bwd",
    beta: float = 0.1,
    eta: float = 1.0,
    explicit: str = "rewards",
    gap: float = 1.0,
    use_reference: bool = True,
    length_normalized: bool = False,
    margin: float = 0.0,
    sft_weight: float = 0.0,
) -> Result:
    """D[a || b], a_k = beta rho_k - margin [k is best], b_k = eta r_k or gap [k is best]; q = softmax(b), p of a.

    bwd    sum q (log q - log p):                           d/da_k = p_k - q_k
    fwd    sum p (log p - log q):                           d/da_k = p_k ((log p_k - log q_k) - fwd)
    sq     mean over i < j of (d_i - d_j)^2, d = a - b:     d/da_k = 2 / (K (K - 1) / 2) sum_j (d_k - d_j)
    sqloo  1/2 sum (d_k - mean of the others)^2
           = 1/2 (K/(K - 1))^2 sum (d_k - mean d)^2:        d/da_k = (K/(K - 1))^2 (d_k - mean d)
    """
    num = len(answers)
    if num < 2 or (explicit == "rewards" and not rewards_known(answers)):
        return NO_LOSS
    best = best_of(answers)
    if best is None:
        return NO_LOSS
    slopes = [beta / answer.length if length_normalized else beta for answer in answers]
    a = [
        slope * (answer.rho if use_reference else answer.logp) - (margin if answer is best else 0.0)
        for slope, answer in zip(slopes, answers, strict=True)
    ]
    b = [eta * y.reward if explicit == "rewards" else (gap if y is best else 0.0) for y in answers]
    log_p, log_q = log_softmax(a), log_softmax(b)
    d = [of_a - of_b for of_a, of_b in zip(a, b, strict=True)]
    both = list(zip(log_p, log_q, strict=True))
    if distance == "bwd":
        loss = sum(math.exp(of_q) * (of_q - of_p) for of_p, of_q in both)
        by_a = [math.exp(of_p) - math.exp(of_q) for of_p, of_q in both]
    elif distance == "fwd":
        loss = sum(math.exp(of_p) * (of_p - of_q) for of_p, of_q in both)
        by_a = [math.exp(of_p) * (of_p - of_q - loss) for of_p, of_q in both]
    elif distance == "sq":
        num_pairs = num * (num - 1) / 2
        loss = sum((d[i] - d[j]) ** 2 for i in range(num) for j in range(i)) / num_pairs
        by_a = [2 / num_pairs * sum(of_k - of_j for of_j in d) for of_k in d]
    else:
        others = [(sum(d) - of_k) / (num - 1) for of_k in d]
        loss = sum((of_k - of_others) ** 2 for of_k, of_others in zip(d, others, strict=True)) / 2
        by_a = [(num / (num - 1)) ** 2 * (of_k - mean(d)) for of_k in d]
    gradient = {y.column: by * slope for y, by, slope in zip(answers, by_a, slopes, strict=True)}
    gradient[best.column] -= sft_weight / best.length
    return loss - sft_weight * best.logp / best.length, gradient


def mean_over(answers: list[Answer], of_each: Callable[[Answer], tuple[float, float]]) -> Result:
    """From ``(loss, d/dlogp)`` of each response to their mean."""
    if not answers:
        return NO_LOSS
    results = [of_each(answer) for answer in answers]
    gradient = {answer.column: by / len(answers) for answer, (_, by) in zip(answers, results, strict=True)}
    return mean([loss for loss, _ in results]), gradient


@formula
def dro(answers: list[Answer], *, tau: float = 1.0, value_lr: float | None = None) -> Result:
    """(1/tau) 1/2 e^2 with e = r - V - tau rho: d/drho = -e. The value's 1/2 e^2 does not reach rho; d/dV = -e."""

    def of_each(answer: Answer) -> tuple[float, float]:
        error = answer.reward - answer.value - tau * answer.rho
        return (1 / tau + 1) * error**2 / 2, -error

    return mean_over(answers, of_each)


def dro_by_value(answers: list[Answer], tau: float) -> Gradient:
    """d loss / d V(x) in each response's place: (V - r + tau rho) / K."""
    return {y.column: (y.value - y.reward + tau * y.rho) / len(answers) for y in answers}


@formula
def kto(
    answers: list[Answer],
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    threshold: float | None = None,
) -> Result:
    """weight (1 - s(u)), u = +-beta (rho - z0): d/drho = -+ weight beta s'(u); z0 = max(0, mismatched) is constant."""

    def desirable(answer: Answer) -> bool:
        if threshold is None and answer.ranked:
            return answer is answers[0]
        return answer.reward > (0.5 if threshold is None else threshold)

    def of_each(answer: Answer) -> tuple[float, float]:
        good = desirable(answer)
        weight, sign = (desirable_weight, 1) if good else (undesirable_weight, -1)
        u = sign * beta * (answer.rho - max(0.0, answer.mismatched))
        return weight * sigmoid(-u), -weight * sign * beta * sigmoid(u) * sigmoid(-u)

    return mean_over(answers, of_each)


def partition_value(answers: list[Answer], tau: float) -> float:
    """V = tau log sum_k exp(logp_ref,k/|y_k| + r_k/tau)."""
    terms = [y.reference_logp / y.length + y.reward / tau for y in answers]
    return tau * (max(terms) - log_softmax(terms)[terms.index(max(terms))])


@formula
def rpo_partition(answers: list[Answer], *, tau: float = 5.0) -> Result:
    """1/2 e^2, e = rho/|y| - (r - V)/tau; d/drho = e/|y|. V does not depend on the policy."""

    def of_each(answer: Answer) -> tuple[float, float]:
        error = answer.rho / answer.length - (answer.reward - partition_value(answers, tau)) / tau
        return error**2 / 2, error / answer.length

    return mean_over(answers, of_each)


@formula
def kimi(answers: list[Answer], *, tau: float = 0.1) -> Result:
    """e^2, e = r - mean r - tau rho; d/drho = -2 tau e. Two responses at least."""
    if len(answers) < 2:
        return NO_LOSS
    mean_reward = mean([answer.reward for answer in answers])

    def of_each(answer: Answer) -> tuple[float, float]:
        error = answer.reward - mean_reward - tau * answer.rho
        return error**2, -2 * tau * error

    return mean_over(answers, of_each)


@formula
def agro(answers: list[Answer], *, beta: float = 0.1) -> Result:
    """1/(2 (K - 1)) sum (c - mean c)^2, c = r - beta rho; d/drho_k = -beta (c_k - mean c)/(K - 1)."""
    if len(answers) < 2:
        return NO_LOSS
    c = [answer.reward - beta * answer.rho for answer in answers]
    centered = [of_k - mean(c) for of_k in c]
    loss = sum(of_k**2 for of_k in centered) / (2 * (len(c) - 1))
    return loss, {y.column: -beta * of_k / (len(c) - 1) for y, of_k in zip(answers, centered, strict=True)}


def qrpo_target(answer: Answer, answers: list[Answer], beta: float, exact_log_z: bool) -> float:
    """r~ - beta log Z: what beta rho is to become."""
    scale = answer.reference_rewards or tuple(other.reward for other in answers)
    quantile = sum(reward <= answer.reward for reward in scale) / len(scale)
    log_z = math.log(beta * (math.exp(1 / beta) - 1)) if exact_log_z else math.log(beta) + 1 / beta
    return quantile - beta * log_z


@formula
def qrpo(answers: list[Answer], *, beta: float = 0.1, exact_log_z: bool = False) -> Result:
    """e^2, e = r~ - beta log Z - beta rho; d/drho = -2 beta e."""

    def of_each(answer: Answer) -> tuple[float, float]:
        error = qrpo_target(answer, answers, beta, exact_log_z) - beta * answer.rho
        return error**2, -2 * beta * error

    return mean_over(answers, of_each)


def nca_weights(answers: list[Answer], alpha: float) -> list[float] | None:
    """softmax(r/alpha); all on the first where there is an order only; nothing where there is neither."""
    if rewards_known(answers):
        return [math.exp(log_p) for log_p in log_softmax([answer.reward / alpha for answer in answers])]
    return [1.0] + [0.0] * (len(answers) - 1) if answers[0].ranked else None


@formula
def nca(answers: list[Answer], *, beta: float = 0.01, alpha: float = 0.01) -> Result:
    """-sum_k q_k ls(u_k) - (1/K) sum_k ls(-u_k), u = beta rho; d/drho_k = beta (-q_k s(-u_k) + s(u_k)/K)."""
    weights = nca_weights(answers, alpha) if answers else None
    if weights is None:
        return NO_LOSS
    loss, gradient = 0.0, {}
    for answer, weight in zip(answers, weights, strict=True):
        u = beta * answer.rho
        loss -= weight * logsigmoid(u) + logsigmoid(-u) / len(answers)
        gradient[answer.column] = beta * (sigmoid(u) / len(answers) - weight * sigmoid(-u))
    return loss, gradient


@formula
def rloo(answers: list[Answer], *, beta: float = 0.03) -> Result:
    """-A rho, A = R - mean of the others' R, R = r - beta rho; d/dlogp = -A / K. A prompt with one has no part."""
    if len(answers) < 2:
        return NO_LOSS
    shaped = [answer.reward - beta * answer.rho for answer in answers]
    loss, gradient = 0.0, {}
    for k, answer in enumerate(answers):
        advantage = shaped[k] - mean(shaped[:k] + shaped[k + 1 :])
        loss -= advantage * answer.rho / len(answers)
        gradient[answer.column] = -advantage / len(answers)
    return loss, gradient
