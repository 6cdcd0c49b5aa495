"""Check in the first step that reference and policy give the same log-probabilities."""

from __future__ import annotations

from pathlib import Path

from megatron.core.utils import get_model_config

from nemo_rao.config.run_config import PrecisionConfig
from nemo_rao.errors import UserError
from nemo_rao.loop.session import Hook, Session
from nemo_rao.mcore.first_step import LogRatios
from nemo_rao.runtime.console import say
from nemo_rao.runtime.gpus import transformer_engine_is_used

# Nats per square root of a token: root mean square over the first step's rows, and the largest of them. The measured
# error of a token is in docs/precision; these limits allow for networks ten times as deep, and for a reference that was
# computed under another parallelism.
_LIMITS = {"fp32": (1e-4, 1e-3), "16 bits": (0.1, 1.0), "8 bits": (0.3, 3.0)}


def limits(precision: PrecisionConfig, *, experts: bool, tf32: bool) -> tuple[float, float]:
    """Return the largest deviation that rounding can explain: (rms, largest), nats per square root of a token.

    Args:
        experts: the network is a mixture of experts: a token whose experts are nearly tied may choose another one, so
            the limits are those of the next coarser format.
        tf32: fp32 products have the precision of fp16, as with Transformer Engine.
    """
    coarseness = list(_LIMITS)
    at = 2 if precision.fp8 is not None else 1 if precision.params != "fp32" or tf32 else 0
    return _LIMITS[coarseness[min(at + experts, 2)]]


class CheckFirstStep(Hook):
    """Stops a run in its first step if policy and reference are not the same model, before anything is saved.

    Compares prompts and responses of that step, and mismatched rows if the objective has them. Must come before
    :class:`nemo_rao.loop.hooks.MismatchedPass`, which computes those.

    Args:
        precision: number formats.
        cache_dir: cache directory of the reference, for the message.
    """

    def __init__(self, precision: PrecisionConfig, cache_dir: Path) -> None:
        self._precision = precision
        self._cache_dir = cache_dir

    def before_step(self, session: Session) -> None:
        if session.step > 0:
            return
        config = get_model_config(session.chunks[0])
        if config.hidden_dropout > 0 or config.attention_dropout > 0:
            say("first step   log-ratios to the reference are not checked: they are not 0 with dropout")
            return
        session.loss.log_ratios = LogRatios(session.loss.needs)

    def after_step(self, session: Session) -> None:
        if session.loss.log_ratios is None:
            return
        found, session.loss.log_ratios = session.loss.log_ratios.deviation(), None
        assert found.rows > 0, "the first step's rows must have been compared"
        experts = get_model_config(session.chunks[0]).num_moe_experts is not None
        rms, largest = limits(self._precision, experts=experts, tf32=transformer_engine_is_used())
        figures = f"rms {found.rms:.2g}, largest {found.largest:.2g} nats per square root of a token"
        if not (found.rms <= rms and found.largest <= largest):  # also fails for NaN
            raise UserError(
                f"{self._cache_dir}: the reference log-probabilities do not match the starting policy: log-ratios at "
                f"the first step must be 0, but are {figures}, over {found.rows} prompts and responses (rounding "
                f"explains {rms:g} and {largest:g}). Delete the directory to recompute them."
            )
        say(f"first step   log-ratios to the reference are 0 up to rounding: {figures}, {found.rows} rows")
