"""The policy as vLLM needs to know it, and the Python that runs vLLM. Imports nothing heavy."""

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
    """What vLLM needs to know of the policy, and where it runs.

    Attributes:
        python: of an environment with vLLM; see :func:`check_python`.
        config_json: the policy's, of Hugging Face.
        dtype: of its weights, torch's name.
        to_hugging_face: Megatron's names and whole tensors -> Hugging Face's.
        seq_length: tokens of a prompt and its response together, at most.
        gpus: those that vLLM has, by number; none: the first rank's.
        memory: share of each that it takes.
    """

    python: str
    config_json: str
    dtype: str
    to_hugging_face: Callable[[Tensors], Iterator[tuple[str, Tensor]]]
    seq_length: int
    gpus: Sequence[int]
    memory: float


def check_python(python: str) -> str:
    """An interpreter's absolute path.

    Raises:
        UserError: it is none, or has no vLLM.
    """
    found = shutil.which(python)
    if found is None:
        raise UserError(
            f"{_KEY}={python}: no such program; name the python of an environment with vLLM, such as "
            ".venv-vllm/bin/python (make install-vllm)"
        )
    try:
        looked = subprocess.run(
            [found, "-I", "-c", _LOOKS], stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"{_KEY}={python}: does not run ({' '.join(str(error).split())[:200]}); name a python"
        ) from None
    if looked.returncode != 0:
        raise UserError(
            f"{_KEY}={python}: has no vLLM; install it there (make install-vllm makes an environment with it), or set "
            "online.sampler=megatron"
        )
    return found
