"""The keys of ``online``: what a run samples from the policy in training, and how the samples are rewarded."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_rao.keys import key


@dataclass
class OnlineConfig:
    num_generations: int | None = key(
        None,
        "K: responses to train on, sampled for each prompt from the policy in training; null: train on the responses "
        "in the data",
        low=1,
    )
    max_new_tokens: int = key(256, "tokens of a sampled response, its end token included", low=1)
    temperature: float = key(1.0, "logits are divided by it; 0: the most probable token", low=0)
    top_k: int = key(0, "sample from this many of the most probable tokens; 0: all", low=0)
    top_p: float = key(
        1.0, "sample from the fewest most probable tokens with at least this total probability", low=0, high=1
    )
    seed: int = key(1234, "seed of the samples", low=0)
    sampler: str = key(
        "megatron",
        "megatron: the training model samples, in place; vllm: vLLM samples, in a separate process that gets the "
        "weights before each rollout",
        choices=("megatron", "vllm"),
    )
    vllm_python: str | None = key(
        None, "with sampler=vllm: Python interpreter of an environment with vLLM (make install-vllm creates one)"
    )
    vllm_gpus: list[int] = key(
        [], "GPUs of the first rank's machine, by number, over which vLLM splits the model; []: the first rank's", low=0
    )
    vllm_memory: float = key(
        0.3, "fraction of each of these GPUs' memory that vLLM uses, weights included", low=0, high=1, exclusive=True
    )
    vllm_importance_cap: float | None = key(
        None,
        "with sampler=vllm, ppo and grpo weight each token by π/μ, at most this (2 is usual): probability under the "
        "training model over that under vLLM; null: no weights",
        low=0,
        exclusive=True,
    )
    reward: list[str] = key(
        [],
        "scorer of the samples or a list of scorers, as in nemo-rao score: [NAME=]KIND:ARGUMENT, such as "
        "rule:module:function, judge:judge.yaml or model:RUN_FOLDER of a reward model; with several, the reward is "
        "the weighted sum",
    )
    reward_weights: dict[str, float] = key({}, "weights of scorers by name; others have 1")
    cut_responses: str = key(
        "score",
        "samples truncated at max_new_tokens; score: scored like others; penalty: their reward is cut_reward; drop: "
        "they have no reward and are left out of the loss",
        choices=("score", "penalty", "drop"),
    )
    cut_reward: float = key(0.0, "reward of a truncated sample, with cut_responses=penalty")
    mini_batches: int = key(1, "global batches that one rollout fills: optimizer steps in each pass over it", low=1)
    epochs: int = key(1, "passes over each rollout; each but the first shuffles its prompts", low=1)
    rows_at_once: int = key(
        64, "responses that a rank decodes together, rounded to whole prompts; with sampler=vllm, over all ranks", low=1
    )
    scoring_attempts: int = key(3, "attempts to call a scorer before the run stops", low=1)
    validation_generations: int = key(1, "responses sampled for each prompt of data.validation_path", low=1)
    log_samples_every: int = key(10, "steps between entries of samples.jsonl, each from its step's rollout", low=1)
    log_samples: int = key(4, "prompts per entry of samples.jsonl", low=0)
