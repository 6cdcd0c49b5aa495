"""Reference log-probabilities, computed before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core.utils import get_model_config

from nemo_rao.errors import UserError
from nemo_rao.loop.data import AlignmentData
from nemo_rao.loop.session import Hook, Session
from nemo_rao.mcore.fingerprint import weights_fingerprint
from nemo_rao.mcore.network import network_fingerprint
from nemo_rao.mcore.quantization import quantization_fingerprint
from nemo_rao.mcore.reference import compute_reference, earlier_reference_key, load_reference, reference_key
from nemo_rao.rollout.samples import RolloutData
from nemo_rao.runtime.progress import Progress


class ReferencePass(Hook):
    """Computes the reference policy's log-probs before the first step; a resumed run reads them from the cache.

    A checkpoint includes the parts of the cache keys that depend on the start (:attr:`state`), since the weights, and
    the scales of delayed scaling, that the sums were computed with no longer exist then. The engine stores the state
    and restores it before the run resumes.

    Args:
        data_sets: name -> data whose ``reference`` is set.
        cache_dir: a directory shared by all ranks.
        precision: part of the key, because results depend on it.
        micro_batch_size: number of prompts.
        micro_batches_per_part: micro-batches between writes; at most these are lost if the pass is interrupted.
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
        show_progress: bool = True,
    ) -> None:
        self._data_sets = data_sets
        self._cache_dir = cache_dir
        self._precision = precision
        self._micro_batch_size = micro_batch_size
        self._micro_batches_per_part = micro_batches_per_part
        self._show_progress = show_progress
        self._start: dict[str, str] | None = None  # parts of the keys that depend on the start

    @property
    def state(self) -> dict[str, str]:
        """State to include in checkpoints."""
        return dict(self._start or {})

    @state.setter
    def state(self, stored: Mapping[str, str]) -> None:
        # Checkpoints of earlier versions lack the network, and the first ones the scales.
        self._start = {"weights": "", "network": "", "scales": "", **stored}

    def start(self, session: Session) -> None:
        resumed = self._start is not None
        if self._start is None:
            chunks = session.chunks
            self._start = {
                "weights": weights_fingerprint(session.sharded_weights(), vocab_size=session.loss.vocab_size),
                "network": network_fingerprint(get_model_config(chunks[0])),
                "scales": quantization_fingerprint(chunks),
            }
        for name, data_set in self._data_sets.items():
            data = data_set.data
            assert not isinstance(data, RolloutData), "samples have no reference log-probs before they are drawn"
            key = self._key(data.fingerprint())
            if resumed:
                data_set.reference = load_reference(self._cache_dir, key, data.num_responses)
            else:
                data_set.reference = self._compute(session, data_set, key, name)
            if data_set.reference is None:
                raise UserError(
                    f"{self._cache_dir / key}: is missing, and has the reference log-probabilities of the {name} data "
                    "that this run started with (or the data has changed). Restore the directory and the data, or "
                    "start a new run under another exp_manager.name."
                )

    def _key(self, data: str) -> str:
        assert self._start is not None
        parts = {"weights": self._start["weights"], "data": data, "precision": self._precision + self._start["scales"]}
        if not self._start["network"]:
            return earlier_reference_key(**parts)
        return reference_key(network=self._start["network"], **parts)

    def _compute(self, session: Session, data_set: AlignmentData, key: str, name: str) -> Any:
        shown = self._show_progress and session.is_first_rank
        with Progress(f"reference log-probs ({name})", unit="prompt", shown=shown) as progress:
            return compute_reference(
                session.chunks,
                prompts=data_set.responses_of_prompts(),
                make_micro_batch=data_set.micro_batch,
                micro_batch_size=self._micro_batch_size,
                micro_batches_per_part=self._micro_batches_per_part,
                vocab_size=session.loss.vocab_size,
                cache_dir=self._cache_dir,
                key=key,
                progress=progress.update,
            )
