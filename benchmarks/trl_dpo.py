"""TRL's side of a comparison: DPOTrainer, whose steps take turns."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.sessions import Turn


def run_trl(
    turn: Turn, model: Path, pairs: Path, folder: Path, threads: int, batch: int, max_length: int, keys: Mapping
) -> None:
    """Train with TRL's defaults except for ``keys``, each step in its turn.

    To make both sides compute the same, these settings differ from TRL's defaults: rows in the file's order, the
    precision (TRL's is bf16, which is slow on most CPUs), a constant learning rate, no logs to third parties. ``batch``
    is the number of pairs in a step, in one forward pass; TRL's default is 8.
    """
    import datasets
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    turn.begin()
    torch.set_num_threads(threads)
    datasets.disable_progress_bars()
    on_gpu = torch.cuda.is_available()

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **keywords: Any) -> None:
            turn.between_steps()

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(train_dataset or self.train_dataset)

    config = DPOConfig(
        output_dir=str(folder),
        max_steps=1_000_000,
        per_device_train_batch_size=batch,
        max_length=max_length,
        lr_scheduler_type="constant",
        bf16=on_gpu,
        use_cpu=not on_gpu,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **keys,
    )
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = InOrder(
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16 if on_gpu else torch.float32),
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(model),
            callbacks=[TakeTurns()],
        )
        trainer.train()
