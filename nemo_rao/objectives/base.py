"""What an objective is: a name, its keys, a pure loss function, and what it needs of data and model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from nemo_rao.batch import LossOutput, ObjectiveBatch, RewardSummary
from nemo_rao.keys import check, make

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# Heads besides the output layer (:mod:`nemo_rao.mcore.heads`): their names in models and in checkpoints.
VALUE_HEAD, SCORE_HEAD = "value_head", "score_head"


@dataclass(frozen=True)
class ObjectiveConfig:
    """Base of all objectives' keys: frozen, and refusing wrong values when it is made.

    Attributes:
        block: the name of its group of keys, ``model.<block>``: that of its objective.
    """

    block: ClassVar[str]

    def __post_init__(self) -> None:
        check(self, f"model.{self.block}")


@dataclass(frozen=True)
class Needs:
    """What an objective, under given keys, asks for. What it does not ask for may be missing from the batch.

    Attributes:
        reference: the reference policy's log-probabilities.
        rewards: of every response, an explicit reward.
        preference: that a prompt's responses can be compared, or labeled good and bad: all have rewards, or their order
            is a preference.
        pairs: it compares two responses at a time; more than two are reduced to the best and the worst when data is
            loaded, unless the data's keys ask otherwise.
        min_responses: of every prompt.
        shared_first_token: all prompts begin with the same token t0, since the loss compares prompts'
            log-probabilities, which are known but for that of t0.
        attributes: of every response, several rewards, of which some may be missing (null, NaN).
        values: of a value head: V(x) of each prompt, or V(x, y_<t) of each token of a response; with ``tokens``.
        value_gradient: the gradient of values reaches the model; where not, the head alone.
        scores: numbers of each response from the score head of a reward model; 0: it is not a reward model.
        kl_estimate: the mean log-ratio of mismatched prompts and responses, over the global batch.
        prompt_logps: log-probabilities of prompts; 0 for an objective that does not declare it.
        prompt_gradient: they carry a gradient.
        tokens: the log-probability of every token of a response.
        samples: samples of the policy itself, drawn while it trains; the objective cannot be used with stored data.
        critic: of every token, the value by a critic: a separate model, which :attr:`Objective.critic` trains.
        values_alone: this is the objective of a critic, whose value head replaces the output layer.
    """

    reference: bool = False
    rewards: bool = False
    preference: bool = False
    pairs: bool = False
    min_responses: int = 1
    shared_first_token: bool = False
    attributes: bool = False
    values: Literal["prompt", "tokens"] | None = None
    value_gradient: bool = False
    scores: int = 0
    kl_estimate: bool = False
    prompt_logps: bool = False
    prompt_gradient: bool = False
    tokens: bool = False
    samples: bool = False
    critic: bool = False
    values_alone: bool = False


def keep(config: Any, rewards: RewardSummary) -> Any:
    """The ``resolve`` of objectives whose keys do not depend on the data."""
    return config


@dataclass(frozen=True)
class MeanTarget:
    """The log-ratio at which the loss asks the policy to be, on average over the training data.

    Attributes:
        nats: mean over prompts of the mean over responses of the rho(y) of zero loss, at the start of the run. Far from
            0, the loss makes all responses more probable, or all less, whatever their differences are.
        remedy: what moves the mean to 0, such as ``model.rao.log_z0=6.1``.
    """

    nats: float
    remedy: str


def no_mean_target(config: Any, rewards: RewardSummary) -> MeanTarget | None:
    """The ``mean_target`` of objectives whose loss does not change when all rewards of a prompt are shifted alike."""
    return None


@dataclass(frozen=True)
class SampledTokens:
    """A whole rollout of N responses, before the first step on it. Arrays over tokens are concatenated by response.

    Attributes:
        lengths: ``[N]`` int64 tokens, each at least 1.
        rewards: ``[N]`` float64, NaN if missing.
        old: float32, nats, log-probability of each token under the policy that sampled.
        reference: the same under the reference policy; ``None`` unless the objective declares it.
        values: float32, V(x, y_<t) of the value head or the critic.
    """

    lengths: np.ndarray
    rewards: np.ndarray
    old: np.ndarray
    reference: np.ndarray | None
    values: np.ndarray


@dataclass(frozen=True)
class Advantages:
    """What an objective computes from a rollout, once for all steps on it.

    Attributes:
        advantages, returns: float32, of each token; 0 for responses without a reward.
        metrics: of the rollout.
    """

    advantages: np.ndarray
    returns: np.ndarray
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Objective:
    """One entry of :mod:`nemo_rao.objectives.registry`.

    Attributes:
        name: in the registry, and of the keys: ``model.<name>.<key>``.
        config_type: the keys.
        loss: ``(batch, config) -> LossOutput``. Pure. Its metrics have the same names for every batch. What it does
            not need may be missing from the batch: ``None``, rewards NaN.
        needs: ``config -> Needs``, or what it needs whatever its keys.
        formula: of one prompt's loss, for the reference page.
        source: the paper, with equation where there is one.
        checked: what value and gradient are held against in the tests.
        resolve: ``(config, rewards of the training data) -> config`` with every key fixed that the data decides; called
            once before training, and once with the validation data's, whose outcome is not used. Raises
            :class:`UserError` where keys and rewards do not go together.
        mean_target: ``(resolved config, rewards of the training data) -> MeanTarget``, for objectives whose loss
            compares log-ratios with rewards as such, rather than with differences or ranks of them; ``None`` where
            there is nothing to compare.
        advantages: ``(rollout, config) -> Advantages``, for objectives whose token advantages depend on the whole
            rollout; ``None`` for others. Pure, and independent of how batches are split.
        response_advantages: ``(batch, config) -> [P, K]``, each response's advantage, for display; ``None`` for
            objectives without one. The batch has no log-probabilities of prompts.
        critic: the objective that trains the critic, with the same keys, for objectives that may have one
            (``Needs.critic``).
    """

    name: str
    config_type: type[ObjectiveConfig]
    loss: Callable[[ObjectiveBatch, Any], LossOutput]
    needs: Needs | Callable[[Any], Needs]
    formula: str
    source: str
    checked: str
    resolve: Callable[[Any, RewardSummary], Any] = keep
    mean_target: Callable[[Any, RewardSummary], MeanTarget | None] = no_mean_target
    advantages: Callable[[SampledTokens, Any], Advantages] | None = None
    response_advantages: Callable[[ObjectiveBatch, Any], Tensor] | None = None
    critic: Objective | None = None

    def needs_of(self, config: Any) -> Needs:
        """What it needs under these keys."""
        return self.needs if isinstance(self.needs, Needs) else self.needs(config)

    def make_config(self, keys: Mapping[str, Any]) -> Any:
        """A config with some keys set.

        Raises:
            UserError: a key that does not exist, a value that is not allowed.
        """
        return make(self.config_type, keys, f"model.{self.name}")
