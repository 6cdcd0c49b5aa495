"""What a rollout shows of the policy that sampled it.

rollout/reward, _std, _p10, _p50, _p90    mean, deviation and quantiles of the rewards of samples that have one
rollout/unscored                          share of samples without a reward
rollout/kl                                log pi(y) - log pi_ref(y), nats per response, with a reference
rollout/entropy                           -log pi(y_t), nats per token: the policy's entropy as its samples show it
rollout/length                            tokens per response
rollout/cut                               share of responses that ended at their limit
rollout/sampler_logps_mean_diff, _max_    |log mu(y_t) - log pi(y_t)|, nats: mu by the sampler, pi by a pass of the
                                          training model over whole rows, where there was such a pass
"""

from __future__ import annotations

import numpy as np

from nemo_rao.rollout.samples import Rollout


def metrics(rollout: Rollout) -> dict[str, float]:
    """All of them, of a rollout that is scored."""
    assert rollout.rewards is not None, "scored"
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
    if rollout.reference is not None:
        found["rollout/kl"] = float((logps - rollout.reference[:, 1].reshape(logps.shape)).mean())
    return found
