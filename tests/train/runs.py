"""Whole training runs for tests: the real entry point in a process of its own, forked after the one import."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from nemo_rao.objectives.registry import OBJECTIVES

from ..megatron_ranks import import_once

# Objectives that train on data that lies there; the others need samples of their own policy (test_online.py).
OF_DATA = [name for name, each in OBJECTIVES.items() if not each.needs_of(each.config_type()).samples]

# A Llama of two layers, so small that a step takes milliseconds: its vocabulary is padded, its heads are grouped.
TINY = (
    "model.arch.num_layers=2",
    "model.arch.hidden_size=48",
    "model.arch.ffn_hidden_size=96",
    "model.arch.num_attention_heads=4",
    "model.arch.num_query_groups=2",
    "model.seq_length=64",
    "model.optim.lr=1e-3",
    "model.optim.sched.name=constant",
    "trainer.enable_progress_bar=false",
    "exp_manager.draw_curves=false",
)
FOUR_LAYERS = (*TINY, "model.arch.num_layers=4")  # two groups of layers on each of two stages
NO_CHECKPOINTS = (
    "exp_manager.checkpoint_callback_params.save_top_k=0",
    "exp_manager.checkpoint_callback_params.save_last=false",
)


NOT_OF_THE_STEP = (
    *("seconds/update", "tokens_per_second", "data/token_efficiency", "data/tokens_shared"),
    *("perf/mfu", "perf/tflops_per_gpu"),
)


def parallel(tensor: int, pipeline: int, data: int) -> tuple[str, ...]:
    """Overrides for TP x PP x DP ranks."""
    return (
        f"trainer.devices={tensor * pipeline * data}",
        f"model.tensor_model_parallel_size={tensor}",
        f"model.pipeline_model_parallel_size={pipeline}",
    )


def make_data(folder: Path, num_prompts: int = 64) -> tuple[str, ...]:
    """A small preference set, ragged in its number of responses, with its tokenizer; the overrides that name them."""
    from nemo_rao.demo.synthetic import preferences
    from nemo_rao.demo.tokenizer_training import train_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    rows = list(preferences(num_prompts, 4, seed=3))
    for row in rows[::3]:
        del row["responses"][-1]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [row["prompt"] for row in rows] + [answer["content"] for row in rows for answer in row["responses"]]
    train_tokenizer(texts, folder / "tokenizer", 300)
    return (f"data.train_path={folder}/train.jsonl", f"data.tokenizer={folder}/tokenizer")


def run_training(recipe: str, overrides: Sequence[str], **arguments: Any) -> None:
    """What ``nemo-rao train`` does, in a process of its own; further arguments of :func:`_train`."""
    in_fork(functools.partial(_train, **arguments), recipe, tuple(overrides))


def start_checkpoint(folder: Path, overrides: Sequence[str]) -> Path:
    """A run of two fine-tuning steps, whose checkpoint the others start from."""
    run_training(
        "gpt_sft", [*overrides, f"exp_manager.exp_dir={folder}", "exp_manager.name=sft", "trainer.max_steps=2"]
    )
    return folder / "sft"


def _train(recipe: str, overrides: Sequence[str], **arguments: Any) -> None:
    """Checks a run and trains it; ``hooks``: see :func:`nemo_rao.training.train.train`."""
    from nemo_rao.config.compose import compose
    from nemo_rao.training.checks import check_run
    from nemo_rao.training.train import train

    config = compose(recipe, overrides)
    check_run(config)
    train(config, **arguments)


def die_after_step(last: int) -> None:
    """Lets rank 0 of this process's next run be killed in the step after ``last``, before its second micro-batch."""
    from nemo_rao.loop.metrics import Metrics

    counted = Metrics.micro_batch
    seen = []

    def killing(self: Metrics, session: Any, batch: Any, *, embeds_tokens: bool) -> None:
        if session.step == last:
            seen.append(batch)
            if len(seen) == 2 and os.environ["RANK"] == "0":
                os.kill(os.getpid(), signal.SIGKILL)
        counted(self, session, batch, embeds_tokens=embeds_tokens)

    mock.patch.object(Metrics, "micro_batch", killing).start()


def die_in_call(owner: Any, name: str, number: int) -> None:
    """Lets rank 0 of this process's next run be killed as it calls ``owner.name`` for the ``number``-th time."""
    function, calls = getattr(owner, name), []

    def killing(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == number and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)

    mock.patch.object(owner, name, killing).start()


def in_fork(function: Callable[..., Any], *args: Any) -> None:
    """``function(*args)`` in a fork of this process; raises what it raised, with its traceback, or what killed it."""
    process, failure = start_fork(function, *args)
    process.join()
    if process.exitcode < 0:
        raise AssertionError(f"the fork was killed by {signal.Signals(-process.exitcode).name}")
    if process.exitcode > 0:
        raise AssertionError(failure.recv())


def start_fork(function: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """The same, without waiting: the process, and the connection on which a traceback arrives."""
    import_once()
    import torch

    # Once, rather than in each fork.
    import nemo_rao.config.compose
    import nemo_rao.training.checks
    import nemo_rao.training.train  # noqa: F401

    # As the launcher of ranks does: CUDA, once initialized, does not survive a fork.
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(function, args, sender))
    process.start()
    sender.close()
    return process, receiver


def _run(function: Callable[..., Any], args: Sequence[Any], sender: Any) -> None:
    try:
        function(*args)
    except BaseException:
        sender.send(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def steps(run_dir: Path) -> list[dict[str, float]]:
    """The training steps of ``metrics.jsonl``, without what depends on the clock or on the batches' layout."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in record.items() if name not in NOT_OF_THE_STEP}
        for record in records
        if "loss" in record
    ]


def stored(checkpoint: Path, part: str = "weights") -> dict[str, Any]:
    """Every tensor of a checkpoint, or of a critic's, of the model and of its optimizer, by its name there."""
    import torch
    from torch.distributed import checkpoint as torch_checkpoint
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = torch_checkpoint.FileSystemReader(checkpoint / part)
    tensors = {
        name: torch.empty(one.size, dtype=one.properties.dtype)
        for name, one in reader.read_metadata().state_dict_metadata.items()
        if isinstance(one, TensorStorageMetadata)
    }
    torch_checkpoint.load(tensors, storage_reader=reader)
    return tensors


def last_stored(run_dir: Path) -> dict[str, Any]:
    """The same of a run's last checkpoint."""
    from nemo_rao.checkpoint.find import last_checkpoint

    found = last_checkpoint(run_dir)
    assert found is not None
    return stored(found)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())


def score(*arguments: str) -> None:
    """``nemo-rao score`` with these arguments, in a process of its own."""
    in_fork(_score, arguments)


def _score(arguments: Sequence[str]) -> None:
    from nemo_rao.cli import main

    assert main(["score", *arguments]) == 0
