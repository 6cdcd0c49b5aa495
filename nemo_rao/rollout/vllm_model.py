"""Description of the policy for vLLM, and the Python interpreter that runs vLLM. Imports nothing heavy."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_rao.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_KEY = "online.vllm_python"
_LOOKS = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
_SECONDS = 60

Tensors = Iterable[tuple[str, "Tensor"]]


@dataclass(frozen=True)
class VllmModel:
    """Description of the policy for vLLM, and the resources for running it.

    Attributes:
        python: interpreter of an environment with vLLM; see :func:`check_python`.
        config_json: the policy's Hugging Face config.json.
        dtype: torch name of the dtype of its weights.
        to_hugging_face: converts Megatron's names and full tensors to Hugging Face's.
        seq_length: maximum number of tokens of a prompt and its response together.
        gpus: indices of vLLM's GPUs; empty: the first rank's GPU.
        memory: fraction of each GPU's memory for vLLM.
    """

    python: str
    config_json: str
    dtype: str
    to_hugging_face: Callable[[Tensors], Iterator[tuple[str, Tensor]]]
    seq_length: int
    gpus: Sequence[int]
    memory: float


def check_python(python: str) -> str:
    """Check that an interpreter has vLLM, and return its absolute path.

    Raises:
        UserError: it is not an interpreter, or has no vLLM.
    """
    found = shutil.which(python)
    if found is None:
        raise UserError(
            f"{_KEY}={python}: no such program. Set it to the python of an environment with vLLM, such as "
            ".venv-vllm/bin/python (make install-vllm)."
        )
    try:
        looked = subprocess.run(
            [found, "-I", "-c", _LOOKS], stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"{_KEY}={python}: does not run ({' '.join(str(error).split())[:200]}). Set it to a Python interpreter."
        ) from None
    if looked.returncode != 0:
        raise UserError(
            f"{_KEY}={python}: has no vLLM. Install it there (make install-vllm creates an environment with it), or "
            "set online.sampler=megatron."
        )
    return found
