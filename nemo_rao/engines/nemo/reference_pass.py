"""Before the first step, the reference policy's numbers; in the first step, whether they are the policy's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from megatron.core.utils import get_model_config

from nemo_rao.config.run_config import PrecisionConfig
from nemo_rao.engines.nemo.callbacks import model_chunks
from nemo_rao.engines.nemo.data_module import AlignmentData
from nemo_rao.errors import UserError
from nemo_rao.mcore.fingerprint import weights_fingerprint
from nemo_rao.mcore.first_step import LogRatios
from nemo_rao.mcore.network import network_fingerprint
from nemo_rao.mcore.quantisation import quantisation_fingerprint
from nemo_rao.mcore.reference import compute_reference, earlier_reference_key, load_reference, reference_key
from nemo_rao.runtime.console import say
from nemo_rao.runtime.gpus import transformer_engine_is_used
from nemo_rao.runtime.progress import Progress


class ReferencePass(pl.Callback):
    """Before the first step, the reference policy's sums; on resume, the same sums from the cache.

    A checkpoint carries what the cache keys are made of, since the weights, and the scales of delayed scaling, that
    they were computed with are gone by then.

    Args:
        data_sets: name -> data whose ``reference`` is to be set.
        cache_dir: a folder that all ranks share.
        precision: part of the key: numbers computed in another precision are other numbers.
        micro_batch_size: prompts.
        micro_batches_per_part: how much is lost at most when the pass is interrupted.
        vocab_size: V without padding.
        show_progress: on the first rank.
    """

    def __init__(
        self,
        data_sets: Mapping[str, AlignmentData],
        *,
        cache_dir: Path,
        precision: str,
        micro_batch_size: int,
        micro_batches_per_part: int,
        vocab_size: int,
        show_progress: bool = True,
    ) -> None:
        self._data_sets = data_sets
        self._cache_dir = cache_dir
        self._precision = precision
        self._micro_batch_size = micro_batch_size
        self._micro_batches_per_part = micro_batches_per_part
        self._vocab_size = vocab_size
        self._show_progress = show_progress
        self._start: dict[str, str] | None = None  # parts of the keys that are the start's

    def state_dict(self) -> dict[str, Any]:
        return dict(self._start or {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Checkpoints of earlier versions have no network, and the first ones no scales.
        self._start = {"weights": "", "network": "", "scales": "", **state_dict}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        resumed = self._start is not None
        if self._start is None:
            chunks = model_chunks(trainer)
            sharded = trainer.strategy.megatron_parallel.sharded_state_dict()
            self._start = {
                "weights": weights_fingerprint(sharded, vocab_size=self._vocab_size),
                "network": network_fingerprint(get_model_config(chunks[0])),
                "scales": quantisation_fingerprint(chunks),
            }
        for name, data_set in self._data_sets.items():
            data = data_set.data
            key = self._key(data.fingerprint())
            if resumed:
                data_set.reference = load_reference(self._cache_dir, key, data.num_responses)
            else:
                data_set.reference = self._compute(trainer, data_set, key, name)
            if data_set.reference is None:
                raise UserError(
                    f"{self._cache_dir / key} is missing: the reference log-probabilities of the {name} data that this "
                    "run started with (or the data has changed since); restore the folder and the data, or start a "
                    "new run under another exp_manager.name"
                )

    def _key(self, data: str) -> str:
        assert self._start is not None
        parts = {"weights": self._start["weights"], "data": data, "precision": self._precision + self._start["scales"]}
        if not self._start["network"]:
            return earlier_reference_key(**parts)
        return reference_key(network=self._start["network"], **parts)

    def _compute(self, trainer: pl.Trainer, data_set: AlignmentData, key: str, name: str) -> Any:
        shown = self._show_progress and trainer.is_global_zero
        with Progress(f"reference log-probs ({name})", unit="prompt", shown=shown) as progress:
            return compute_reference(
                model_chunks(trainer),
                prompts=data_set.responses_of_prompts(),
                make_micro_batch=data_set.micro_batch,
                micro_batch_size=self._micro_batch_size,
                micro_batches_per_part=self._micro_batches_per_part,
                vocab_size=self._vocab_size,
                cache_dir=self._cache_dir,
                key=key,
                progress=progress.update,
            )


# Nats per square root of a token: root mean square over the first step's rows, and the largest of them. docs/precision
# has what was measured of a token's error; these leave room for networks ten times as deep, and for a reference that
# was computed under another parallelism.
_LIMITS = {"fp32": (1e-4, 1e-3), "16 bits": (0.1, 1.0), "8 bits": (0.3, 3.0)}


def limits(precision: PrecisionConfig, *, experts: bool, tf32: bool) -> tuple[float, float]:
    """The largest deviation that rounding can explain: (rms, largest), nats per square root of a token.

    Args:
        experts: the network is a mixture: a token whose experts are nearly tied may take another one, so the limits
            are those of the next coarser format.
        tf32: products of fp32 numbers keep as many digits as fp16 has, as Transformer Engine's do.
    """
    coarseness = list(_LIMITS)
    at = 2 if precision.fp8 is not None else 1 if precision.params != "fp32" or tf32 else 0
    return _LIMITS[coarseness[min(at + experts, 2)]]


class CheckFirstStep(pl.Callback):
    """Stops a run whose policy and reference are not the same model in its first step, before a weight has changed.

    Of that step, prompts and responses are compared, and the mismatched rows where the objective has some. It stands
    before :class:`nemo_rao.engines.nemo.callbacks.MismatchedPass`, which runs those.

    Args:
        precision: number formats.
        cache_dir: of the reference, for the message.
    """

    def __init__(self, precision: PrecisionConfig, cache_dir: Path) -> None:
        self._precision = precision
        self._cache_dir = cache_dir
        self._log_ratios: LogRatios | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step > 0:
            return
        config = get_model_config(model_chunks(trainer)[0])
        if config.hidden_dropout > 0 or config.attention_dropout > 0:
            say("first step   log-ratios to the reference are not checked: they are not 0 under dropout")
            return
        self._log_ratios = LogRatios(pl_module.needs)
        for chunk in model_chunks(trainer):
            chunk.log_ratios = self._log_ratios

    def on_megatron_step_end(self, step: Any, microbatch_outputs: list, reduced: Any) -> None:
        if self._log_ratios is None:
            return
        found, self._log_ratios = self._log_ratios.deviation(), None
        assert found.rows > 0, "nobody has looked at the first step's rows"
        chunks = model_chunks(step.trainer)
        for chunk in chunks:
            chunk.log_ratios = None
        experts = get_model_config(chunks[0]).num_moe_experts is not None
        rms, largest = limits(self._precision, experts=experts, tf32=transformer_engine_is_used())
        figures = f"rms {found.rms:.2g}, largest {found.largest:.2g} nats per square root of a token"
        if not (found.rms <= rms and found.largest <= largest):  # NaN is refused, too
            raise UserError(
                f"{self._cache_dir}: the reference log-probabilities are not those of the starting policy: log-ratios "
                f"at the first step, which must be 0, are {figures}, over {found.rows} prompts and responses; rounding "
                f"explains {rms:g} and {largest:g}. Delete the folder to have them computed again"
            )
        say(f"first step   log-ratios to the reference are 0 but for rounding: {figures}, {found.rows} rows")
