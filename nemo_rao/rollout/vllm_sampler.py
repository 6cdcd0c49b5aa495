"""Sampling by vLLM, in a separate process and environment, with the weights of the training model.

Before each rollout, rank 0 gathers the weights one tensor at a time and passes them on in parts, each an in-memory
file. Prompts and responses are exchanged as token ids, without text, pickles or ports. Each response has its own seed,
but vLLM's rounding depends on the composition of batches, so a second run may sample different tokens.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_rao.errors import RankFailure
from nemo_rao.mcore.whole_tensors import whole_tensors
from nemo_rao.rollout import vllm_process
from nemo_rao.rollout.decode import Sampled, Sampling
from nemo_rao.rollout.sampler import Wanted
from nemo_rao.rollout.vllm_model import Tensors, VllmModel

_KEY = "online.sampler=vllm"
_PART_BYTES = 10**9  # maximum size of a part; a larger tensor is a part by itself
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Variables set by launchers for ranks, and by this environment for its Python: vLLM must not see them.
_OF_RANK = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OF_PYTHON = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


class VllmProcess:
    """vLLM's process; see :mod:`nemo_rao.rollout.vllm_process`.

    Args:
        python: interpreter of its environment.
        folder: directory for its log.
        environ: environment variables of the process.
    """

    def __init__(self, python: str, folder: Path, environ: Mapping[str, str]) -> None:
        self._log = folder / "vllm.log"
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                [python, vllm_process.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=dict(environ),
                text=True,
                encoding="utf-8",
            )

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and return the answer.

        Raises:
            RankFailure: the request failed, or the process has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            raise RankFailure(f"{_KEY}: the vLLM process {how}{self._last_line()}. See its log, {self._log}.")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self.close()
            raise RankFailure(f"{_KEY}: {answer['error']}. See the log of vLLM, {self._log}.")
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f" ({last[:300]})" if last else ""


class VllmSampler:
    """See :class:`nemo_rao.rollout.sampler.Sampler`.

    Args:
        model: the policy.
        folder: the run's directory.
        max_new_tokens: tokens of a response, including its end token.
        end_tokens: tokens that end a response.
        rows_at_once: maximum number of responses decoded together.
        seed: sampling seed.
    """

    def __init__(
        self,
        model: VllmModel,
        folder: Path,
        *,
        max_new_tokens: int,
        end_tokens: Sequence[int],
        sampling: Sampling,
        rows_at_once: int,
        seed: int,
    ) -> None:
        self._model = model
        self._folder = folder / "vllm"
        self._rows_at_once = rows_at_once
        self._seed = seed
        self._settings = {
            "max_tokens": max_new_tokens,
            "stop_token_ids": list(end_tokens),
            "ignore_eos": True,  # end tokens are the run's, not the model's
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or -1,
            "top_p": sampling.top_p,
        }
        self._process: VllmProcess | None = None

    def sample(self, chunks: Sequence[Any], wanted: Sequence[Wanted]) -> list[list[Sampled]]:
        self._hand_over(chunks)
        rank = torch.distributed.get_rank()
        is_of_model = parallel_state.get_model_parallel_group().rank() == 0
        of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
        # Ranks of one model-parallel group have the same requests.
        torch.distributed.all_gather_object(of_ranks, list(wanted) if is_of_model else [])
        found: list[Any] = [None]
        if rank == 0:
            found = [self._sampled([one for of_rank in of_ranks for one in of_rank])]
        torch.distributed.broadcast_object_list(found, src=0)
        return [found[0][one.rollout, one.slot] for one in wanted]

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None

    def _hand_over(self, chunks: Sequence[Any]) -> None:
        """Send the model's weights to vLLM. A collective over all ranks."""
        tensors = whole_tensors(chunks)
        if torch.distributed.get_rank() > 0:
            for _ in tensors:
                raise AssertionError("tensors are whole on rank 0 alone")
            return
        process = self._process = self._process or self._started()
        process.ask("begin")
        for part in _parts(self._model.to_hugging_face(tensors)):
            with _in_memory(part) as path:
                process.ask("weights", path=path)
        process.ask("end")

    def _started(self) -> VllmProcess:
        self._folder.mkdir(exist_ok=True)
        (self._folder / "config.json").write_text(self._model.config_json)
        process = VllmProcess(self._model.python, self._folder, self._environ())
        process.ask(
            "start",
            model=str(self._folder),
            dtype=self._model.dtype,
            max_model_len=self._model.seq_length,
            max_num_seqs=self._rows_at_once,
            tensor_parallel_size=max(1, len(self._model.gpus)),
            gpu_memory_utilization=self._model.memory,
            seed=0,  # each response has its own
        )
        return process

    def _environ(self) -> dict[str, str]:
        usual = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HOST_IP": "127.0.0.1",  # rendezvous of its workers
            "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB, without a GPU
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the ranks compute here too
        }
        kept = {name: value for name, value in os.environ.items() if name not in (*_OF_RANK, *_OF_PYTHON)}
        found = {**usual, **kept, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        gpus = self._model.gpus
        if not gpus and torch.cuda.is_available():
            given, own = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.current_device()
            found["CUDA_VISIBLE_DEVICES"] = given.split(",")[own] if given else str(own)
        elif gpus:
            found["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        return found

    def _sampled(self, wanted: Sequence[Wanted]) -> dict[tuple[int, int], list[Sampled]]:
        prompt_indices = [index for index, one in enumerate(wanted) for _ in range(one.num_responses)]
        seeds = [self._seed_of(one, k) for one in wanted for k in range(one.num_responses)]
        assert self._process is not None
        answer = self._process.ask(
            "sample",
            prompts=[one.prompt.tolist() for one in wanted],
            prompt_indices=prompt_indices,
            seeds=seeds,
            settings=self._settings,
        )
        found: dict[tuple[int, int], list[Sampled]] = {(one.rollout, one.slot): [] for one in wanted}
        for index, (tokens, logps, is_cut) in zip(prompt_indices, answer["responses"], strict=True):
            one = wanted[index]
            response = Sampled(np.array(tokens, dtype=np.int32), np.array(logps, dtype=np.float32), is_cut)
            found[one.rollout, one.slot].append(response)
        return found

    def _seed_of(self, one: Wanted, number: int) -> int:
        state = np.random.SeedSequence([self._seed, one.rollout, one.slot, number]).generate_state(1, np.uint64)
        return int(state[0] >> np.uint64(1))


def _parts(tensors: Tensors) -> Iterator[dict[str, Tensor]]:
    """Group tensors into parts of at most ``_PART_BYTES``."""
    part: dict[str, Tensor] = {}
    num_bytes = 0
    for name, tensor in tensors:
        if part and num_bytes + tensor.nbytes > _PART_BYTES:
            yield part
            part, num_bytes = {}, 0
        part[name] = tensor.contiguous()
        num_bytes += tensor.nbytes
    if part:
        yield part


@contextlib.contextmanager
def _in_memory(part: Mapping[str, Tensor]) -> Iterator[str]:
    """Path of an in-memory safetensors file, readable by other processes of this user. It has no name on disk, so
    nothing can be left behind. `safetensors` cannot write it, since it creates a temporary file next to the path."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in part.items():
        start, end = end, end + tensor.nbytes
        described = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = described
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with os.fdopen(os.memfd_create("weights"), "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in part.values():
            file.write(tensor.flatten().view(torch.uint8).cpu().numpy().data)
        file.flush()
        yield f"/proc/{os.getpid()}/fd/{file.fileno()}"
