"""vLLM in a process of its own, for :mod:`nemo_rao.rollout.vllm_sampler`: run by the python of vLLM's environment.

Nothing of this package is imported here. A line of JSON on standard input asks for something, and one on standard
output answers it:

    {"do": "start", "model": FOLDER, ...}     -> {"vllm": VERSION}
    {"do": "begin"}                           -> {}            weights are about to come
    {"do": "weights", "path": SAFETENSORS}    -> {}            some of them, by Hugging Face's names
    {"do": "end"}                             -> {}            they are all there
    {"do": "sample", "prompts": ..., ...}     -> {"responses": [[TOKENS, LOGPS, IS_CUT], ...]}

or with ``{"error": LINE}``. What vLLM itself prints goes to standard error. The process ends with its standard input.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any, TextIO


class Weights:
    """What vLLM's workers do with new weights; a worker extension of vLLM, whose ``self`` is the worker."""

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
            names = list(file.keys())  # it is no mapping
            taken = model.load_weights((name, file.get_tensor(name)) for name in names)
        self._wanted -= set(taken)

    def end_weights(self) -> list[str]:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(self.model_runner.get_model(), self.model_config)
        return sorted(self._wanted)


class Server:
    """Does what is asked."""

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
            generation_config="vllm",  # not the sampling settings that a folder brings along
            logprobs_mode="raw_logprobs",  # of the model, whatever the temperature
            enable_prefix_caching=True,  # a prompt is read once for its responses
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
            raise ValueError(f"weights are missing, of {missing[0]} for one")
        self._model.reset_prefix_cache()  # keys and values of the weights before
        return {}

    def sample(
        self, prompts: list[list[int]], places: list[int], seeds: list[int], settings: dict[str, Any]
    ) -> dict[str, Any]:
        """One response for each place: the number of its prompt."""
        from vllm import SamplingParams

        parameters = [SamplingParams(seed=seed, logprobs=0, detokenize=False, **settings) for seed in seeds]
        outputs = self._model.generate(
            [{"prompt_token_ids": prompts[place]} for place in places], parameters, use_tqdm=False
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
    """Standard output, for answers alone: what anything else prints there goes to standard error."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


def main() -> None:
    folder = os.path.dirname(os.path.abspath(__file__))
    # Behind all else: the folder's other modules must not stand in the way of those that vLLM imports.
    sys.path[:] = [*(path for path in sys.path if os.path.abspath(path) != folder), folder]
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a rank that is killed takes it along
    output, server = _own_output(), Server()
    for line in sys.stdin:
        output.write(json.dumps(_answer(server, json.loads(line))) + "\n")
        output.flush()


if __name__ == "__main__":
    main()
