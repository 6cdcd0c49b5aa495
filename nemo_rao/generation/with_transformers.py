"""Generation with Hugging Face's ``generate`` in left-padded batches, with our own sampling.

Each response has its own sequence of uniform numbers u_t, made from the seed and the response's stream. Token t is the
inverse of the cumulative distribution at u_t: the first token v, in vocabulary order, with P(token <= v) > u_t. The
rest of the batch affects it only through rounding of logits: hardly ever in fp32; in bf16 a different batch size makes
most responses diverge within a few dozen tokens. ``do_sample`` with a seed was considered, but it draws for the batch
as a whole.

Shapes: R requests of a batch, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_rao.errors import UserError
from nemo_rao.generation.engine import Continuation, Request, first_stop
from nemo_rao.generation.model_folder import read_configuration, tensors_for_transformers
from nemo_rao.generation.settings import PolicySettings
from nemo_rao.ops.sampling import draw, uniforms


def load_model(folder: Path) -> Any:
    """Load a causal language model in the precision of its weights, on the GPU if there is one.

    Raises:
        UserError: `transformers` cannot load it.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading, which would run into our messages
    configuration, tensors = read_configuration(folder), tensors_for_transformers(folder)
    try:
        model, loading = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(configuration)].from_pretrained(
            str(folder) if tensors is None else None,
            config=configuration,
            state_dict=tensors,
            torch_dtype="auto",
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        if missing := sorted(loading["missing_keys"]):  # transformers would initialize them randomly
            raise UserError(f"it has no tensor {missing[0]}")
        if left_over := sorted(loading["unexpected_keys"]):
            named = f"{len(left_over)} tensors, such as {left_over[0]}"
            print(f"model {folder}: ignored, as {configuration.model_type} has no such tensors: {named}", flush=True)
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    except torch.OutOfMemoryError:
        raise UserError(f"model {folder}: does not fit into GPU memory. Use a larger GPU.") from None
    except Exception as error:  # many kinds: an unknown class, different shapes, remote code
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model {folder}: `transformers` cannot load it ({type(error).__name__}: {reason}). Pass a directory with "
            "a causal language model."
        ) from None


class TransformersEngine:
    """See :class:`nemo_rao.generation.engine.Engine`."""

    name = "transformers"

    def __init__(
        self, folder: Path, settings: PolicySettings, stop: Collection[int], num_tokens: int, padding: int
    ) -> None:
        import transformers

        self.model = load_model(folder)
        # Ignore the temperature, penalties etc. of the model's generation_config.json: none was requested.
        self.model.generation_config = transformers.GenerationConfig(
            eos_token_id=sorted(stop), pad_token_id=padding, do_sample=False
        )
        self._settings, self._stop, self._num_tokens, self._padding = settings, frozenset(stop), num_tokens, padding

    def generate(self, requests: Sequence[Request]) -> list[Continuation]:
        found: dict[int, Continuation] = {}
        # Requests near the end of the model's context have less room and form separate batches.
        for limit in sorted({request.max_new_tokens for request in requests}):
            numbers = [at for at, request in enumerate(requests) if request.max_new_tokens == limit]
            for start in range(0, len(numbers), self._settings.batch_size):
                batch = numbers[start : start + self._settings.batch_size]
                try:
                    found.update(zip(batch, self._batch([requests[at] for at in batch], limit), strict=True))
                except torch.OutOfMemoryError:
                    raise UserError(
                        f"batch_size={self._settings.batch_size}: {len(batch)} sequences do not fit into GPU memory. "
                        "Lower it; the same command resumes from the finished work."
                    ) from None
        return [found[at] for at in range(len(requests))]

    @torch.inference_mode()
    def _batch(self, requests: Sequence[Request], limit: int) -> list[Continuation]:
        """Call the model's ``generate`` once for R requests."""
        width = max(len(request.tokens) for request in requests)
        tokens = np.full((len(requests), width), self._padding, dtype=np.int64)
        mask = np.zeros((len(requests), width), dtype=np.int64)
        for row, request in enumerate(requests):
            tokens[row, width - len(request.tokens) :] = request.tokens
            mask[row, width - len(request.tokens) :] = 1
        draws = np.stack([uniforms(self._settings.seed, request.stream, limit) for request in requests])
        device = self.model.device
        temperature = torch.tensor([[request.temperature] for request in requests], device=device)
        uniforms_RT = torch.from_numpy(draws).to(device)

        def choose(input_ids: Tensor, scores: Tensor) -> Tensor:
            """Mask all but the sampled token of each row, so that argmax selects it. ``[R, V]`` -> ``[R, V]``."""
            logits = scores.clone()
            logits[:, self._num_tokens :] = -torch.inf
            settings = self._settings
            chosen = draw(
                logits, uniforms_RT[:, input_ids.shape[1] - width], temperature, settings.top_k, settings.top_p
            )
            return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)

        output = self.model.generate(
            input_ids=torch.from_numpy(tokens).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            max_new_tokens=limit,
            logits_processor=[choose],
        )
        return [first_stop(row, self._stop) for row in output[:, width:].tolist()]
