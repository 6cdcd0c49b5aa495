"""vLLM in a separate process, for :mod:`nemo_rao.rollout.vllm_sampler`, run by the python of vLLM's environment.

Nothing else of this package is imported here. Each request is a line of JSON on standard input, answered by a line of
JSON on standard output:

    {"do": "start", "model": DIRECTORY, ...}  -> {"vllm": VERSION}
    {"do": "begin"}                           -> {}            new weights follow
    {"do": "weights", "path": SAFETENSORS}    -> {}            a part of them, by Hugging Face's names
    {"do": "end"}                             -> {}            all weights have been sent
    {"do": "sample", "prompts": ..., ...}     -> {"responses": [[TOKENS, LOGPS, IS_CUT], ...]}

or by ``{"error": LINE}``. vLLM's own output goes to standard error. The process ends when its standard input closes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any, TextIO


class Weights:
    """Weight updates in vLLM's workers; a worker extension of vLLM, whose ``self`` is the worker."""

    model_runner: Any
    model_config: Any
    vllm_config: Any

    def begin_weights(self) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)
        self._wanted = {name for name, _ in model.named_parameters()}

    def take_weights(self, path: str) -> None:
        from safetensors import safe_open
        from vllm.config import set_current_vllm_config

        model = self.model_runner.get_model()
        with safe_open(path, "pt") as file, set_current_vllm_config(self.vllm_config):
            names = list(file.keys())  # the file is not a mapping
            taken = model.load_weights((name, file.get_tensor(name)) for name in names)
        self._wanted -= set(taken)

    def end_weights(self) -> list[str]:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(self.model_runner.get_model(), self.model_config)
        return sorted(self._wanted)


class Server:
    """Handles requests, one method each."""

    def __init__(self) -> None:
        self._model: Any = None

    def start(self, model: str, **arguments: Any) -> dict[str, Any]:
        import vllm
        from vllm.platforms import current_platform

        self._model = vllm.LLM(
            model=model,
            load_format="dummy",  # the weights come later
            skip_tokenizer_init=True,
            trust_remote_code=False,
            generation_config="vllm",  # ignore the sampling settings in the directory
            logprobs_mode="raw_logprobs",  # at temperature 1
            enable_prefix_caching=True,  # prefill a prompt once for all its responses
            disable_log_stats=True,
            enforce_eager=current_platform.is_cpu(),  # compiling takes longer than it saves there
            worker_extension_cls=f"{os.path.splitext(os.path.basename(__file__))[0]}.{Weights.__name__}",
            **arguments,
        )
        return {"vllm": vllm.__version__}

    def begin(self) -> dict[str, Any]:
        self._model.collective_rpc("begin_weights")
        return {}

    def weights(self, path: str) -> dict[str, Any]:
        self._model.collective_rpc("take_weights", args=(path,))
        return {}

    def end(self) -> dict[str, Any]:
        missing = [name for of_worker in self._model.collective_rpc("end_weights") for name in of_worker]
        if missing:
            raise ValueError(f"weights are missing, for example {missing[0]}")
        self._model.reset_prefix_cache()  # it was computed with the previous weights
        return {}

    def sample(
        self, prompts: list[list[int]], prompt_indices: list[int], seeds: list[int], settings: dict[str, Any]
    ) -> dict[str, Any]:
        """Sample one response for each entry of ``prompt_indices``, which index ``prompts``."""
        from vllm import SamplingParams

        parameters = [SamplingParams(seed=seed, logprobs=0, detokenize=False, **settings) for seed in seeds]
        outputs = self._model.generate(
            [{"prompt_token_ids": prompts[index]} for index in prompt_indices], parameters, use_tqdm=False
        )
        responses = []
        for output in outputs:
            [one] = output.outputs
            tokens = list(one.token_ids)
            logps = [found[token].logprob for token, found in zip(tokens, one.logprobs, strict=True)]
            responses.append([tokens, logps, one.finish_reason == "length"])
        return {"responses": responses}


def _answer(server: Server, asked: dict[str, Any]) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = getattr(server, asked.pop("do"))(**asked)
        return answer
    except Exception as error:  # whatever vLLM raises
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}


def _own_output() -> TextIO:
    """Reserve standard output for answers and redirect all other output to standard error."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


def main() -> None:
    folder = os.path.dirname(os.path.abspath(__file__))
    # Last on the path, so that other modules of this directory do not shadow those that vLLM imports.
    sys.path[:] = [*(path for path in sys.path if os.path.abspath(path) != folder), folder]
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the rank, even if it is killed
    output, server = _own_output(), Server()
    for line in sys.stdin:
        output.write(json.dumps(_answer(server, json.loads(line))) + "\n")
        output.flush()


if __name__ == "__main__":
    main()
