"""Metrics of a rollout.

rollout/reward, _std, _p10, _p50, _p90    mean, deviation and quantiles of the rewards of samples that have one
rollout/scores/<name>                     mean of one scorer's scores, unweighted, if there are several scorers
rollout/unscored                          share of samples without a reward
rollout/kl                                log pi(y) - log pi_ref(y), nats per response, with a reference
rollout/entropy                           -log pi(y_t), nats per token: the policy's entropy as its samples show it
rollout/length                            tokens per response
rollout/cut                               share of responses that ended at their limit
rollout/sampler_logps_mean_diff, _max_    |log mu(y_t) - log pi(y_t)|, nats: mu by the sampler, pi by a pass of the
                                          training model over whole rows, if there was one
rollout/importance, rollout/importance_capped    mean importance weight of tokens; share of tokens at the cap
"""

from __future__ import annotations

import numpy as np

from nemo_rao.rollout.samples import Rollout


def importance(rollout: Rollout, cap: float) -> np.ndarray:
    """Compute truncated importance weights min(pi(y_t) / mu(y_t), cap), float32, of each token: mu is the sampler's
    distribution, pi that of the training model with the same weights (Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training")."""
    assert rollout.old_logps is not None, "with vLLM, the training model's log-probabilities are always computed"
    ratio = np.exp(rollout.old_logps.astype(np.float64) - rollout.logps)
    return np.minimum(ratio, cap).astype(np.float32)


def metrics(rollout: Rollout, importance_cap: float | None = None) -> dict[str, float]:
    """Compute all metrics of a scored rollout; those of rewards are missing if no sample has a reward.

    Args:
        importance_cap: upper bound of the importance weights; ``None``: tokens are not weighted.
    """
    assert rollout.rewards is not None, "the rollout has not been scored"
    logps = rollout.response_logps()
    known = rollout.rewards[~np.isnan(rollout.rewards)]
    found = {
        "rollout/unscored": 1 - known.size / rollout.rewards.size,
        "rollout/entropy": float(-logps.sum() / rollout.lengths.sum()),
        "rollout/length": float(rollout.lengths.mean()),
        "rollout/cut": float(rollout.is_cut.mean()),
    }
    if known.size:
        low, middle, high = np.quantile(known, [0.1, 0.5, 0.9]).tolist()
        found |= {
            "rollout/reward": float(known.mean()),
            "rollout/reward_std": float(known.std()),
            "rollout/reward_p10": low,
            "rollout/reward_p50": middle,
            "rollout/reward_p90": high,
        }
    if rollout.old_logps is not None:
        differences = np.abs(rollout.logps.astype(np.float64) - rollout.old_logps)
        found["rollout/sampler_logps_mean_diff"] = float(differences.mean())
        found["rollout/sampler_logps_max_diff"] = float(differences.max())
    if len(rollout.scores) > 1:
        for name, scores in rollout.scores.items():
            if not np.isnan(scores).all():
                found[f"rollout/scores/{name}"] = float(np.nanmean(scores))
    if importance_cap is not None:
        weights = importance(rollout, importance_cap)
        found["rollout/importance"] = float(weights.mean())
        found["rollout/importance_capped"] = float((weights >= np.float32(importance_cap)).mean())
    if rollout.reference is not None:
        found["rollout/kl"] = float((logps - rollout.reference[:, 1].reshape(logps.shape)).mean())
    return found
