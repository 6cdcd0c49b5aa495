"""Generation with vLLM, which batches by itself and samples each response with a separate seed.

The rounding of its kernels depends on the composition of batches, so responses may differ slightly between runs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from nemo_rao.errors import UserError
from nemo_rao.generation.engine import Continuation, Request, first_stop
from nemo_rao.generation.model_folder import moved_settings
from nemo_rao.generation.settings import PolicySettings


class VllmEngine:
    """See :class:`nemo_rao.generation.engine.Engine`."""

    name = "vllm"

    def __init__(self, folder: Path, settings: PolicySettings, stop: Collection[int]) -> None:
        from vllm import LLM

        self._settings, self._stop = settings, frozenset(stop)
        moved = moved_settings(folder)
        try:
            # "vllm": ignore the sampling settings in the model's directory.
            self._model = LLM(
                model=str(folder),
                load_format="safetensors",
                trust_remote_code=False,
                generation_config="vllm",
                hf_overrides=moved,
            )
        except Exception as error:  # many kinds: an unknown model, memory, drivers
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"model {folder}: vLLM cannot load it ({type(error).__name__}: {reason}). Use --engine transformers."
            ) from None

    def generate(self, requests: Sequence[Request]) -> list[Continuation]:
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                temperature=request.temperature,
                top_p=self._settings.top_p,
                top_k=self._settings.top_k or -1,
                max_tokens=request.max_new_tokens,
                seed=int(np.random.SeedSequence([self._settings.seed, *request.stream]).generate_state(1)[0]),
                stop_token_ids=sorted(self._stop),
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request.tokens.tolist()} for request in requests]
        outputs = self._model.generate(prompts, parameters, use_tqdm=False)
        return [first_stop(list(output.outputs[0].token_ids), self._stop) for output in outputs]
