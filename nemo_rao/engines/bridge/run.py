"""One rank of a run on Bridge: Bridge's model and training loop, and this project's checkpoints."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.data.utils import get_dataset_provider
from megatron.bridge.training.callbacks import normalize_callbacks
from megatron.bridge.training.config import runtime_config_update
from megatron.bridge.training.initialize import destroy_global_state
from megatron.bridge.training.setup import setup
from megatron.bridge.training.state import GlobalState
from megatron.bridge.training.train import train

from nemo_rao.batch import MicroBatch
from nemo_rao.checkpoint.layout import weights_of
from nemo_rao.config.run_config import RunConfig
from nemo_rao.data.encode import load_tokenizer
from nemo_rao.engines.bridge.build import container, data_set
from nemo_rao.engines.bridge.lora import add_adapters, is_adapter, is_trained, record_base
from nemo_rao.engines.bridge.provider import finish_when_built, padded_vocab_size, provider
from nemo_rao.engines.bridge.session import BridgeSession, CallHooks, ForwardStep
from nemo_rao.loop.data import TrainingData
from nemo_rao.loop.kept_checkpoints import KeepCheckpoints
from nemo_rao.loop.loggers import loggers
from nemo_rao.loop.reference import ReferencePass
from nemo_rao.loop.session import Hook
from nemo_rao.mcore import checkpoint
from nemo_rao.mcore.objective_loss import ObjectiveLoss
from nemo_rao.objectives import registry
from nemo_rao.runtime.console import quiet_third_parties


class Run:
    """A run whose parts are built by Bridge.

    Args:
        objective_config: the objective's keys, with values resolved from the data.
        max_steps: optimizer steps of the whole run.

    Attributes:
        loss: the objective over a micro-batch.
    """

    def __init__(self, config: RunConfig, objective_config: Any, *, max_steps: int) -> None:
        assert config.data.tokenizer is not None
        self._config = config
        self._max_steps = max_steps
        self._tokenizer = load_tokenizer(config.data.tokenizer)
        self._provider = provider(config)
        vocab_size = self._provider.vocab_size or len(self._tokenizer)
        self._padded_vocab_size = padded_vocab_size(self._provider, vocab_size)
        self.loss = ObjectiveLoss(registry.get(config.model.objective), objective_config, vocab_size=vocab_size)
        self._adapters_only = config.model.peft.scheme != "none"
        self._step = 0

    @contextlib.contextmanager
    def built(self, data: TrainingData, *, folder: Path, start_from: Path | None = None) -> Iterator[None]:
        """Build model, optimizer and process groups for the duration of the block.

        Args:
            folder: directory of results.
            start_from: checkpoint of the model's weights; for a run of adapters, of the weights under them.
        """
        self._data, self._folder, self._start_from = data, folder, start_from
        self._provider.vocab_size = self._padded_vocab_size
        finish_when_built(self._provider, self._config, self.loss.needs)
        if start_from is not None:
            self._provider.register_pre_wrap_hook(self._read_start)
        if self._adapters_only:
            self._provider.register_pre_wrap_hook(self._add_adapters)
        state = GlobalState()
        ahead = self._micro_batches()
        state.cfg = container(self._config, self._provider, data_set(ahead), max_steps=self._max_steps)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # Bridge reports every routine step
                runtime_config_update(state.cfg)
                self._parts = setup(state, get_dataset_provider(state.cfg.dataset))
            quiet_third_parties()
            self._provider.vocab_size = self.loss.vocab_size  # the network does not depend on the padding
            yield
            torch.distributed.barrier()
        finally:
            ahead.close()  # ends the prefetching thread
            destroy_global_state()
        torch.distributed.destroy_process_group()

    def session(self, **arguments: Any) -> BridgeSession:
        """Return the current state of the run as a session."""
        return BridgeSession(
            self._parts.state,
            self._parts.model,
            folder=self._folder,
            data=self._data,
            loss=self.loss,
            max_steps=self._max_steps,
            # Adapters initially have no effect: the reference policy is the model without them.
            keep=(lambda name: not is_adapter(name)) if self._adapters_only else None,
            **arguments,
        )

    def train(self, hooks: list[Hook], *, resume_from: Path | None) -> None:
        """Take the remaining steps of the run.

        Args:
            resume_from: this run's last checkpoint.
        """
        parts, state = self._parts, self._parts.state
        rates = self._name_groups()
        self._writer = checkpoint.BackgroundWriter()
        keeping = KeepCheckpoints(
            self._folder / "checkpoints",
            self._config.exp_manager.checkpoint_callback_params,
            self._save,
            self._writer.finish_written,
        )
        self._hooks = hooks
        self._references = [hook for hook in hooks if isinstance(hook, ReferencePass)]
        self._keeping = keeping
        if resume_from is not None:
            self._resume(resume_from)
        session = self.session(loggers=loggers(self._config, self._folder), save_last=keeping.save_last)
        self._session = session
        calls = CallHooks(session, [*hooks, keeping], schedule=self._config.model.optim.sched, rates=rates)
        train(
            ForwardStep(self.loss, calls),
            parts.model,
            parts.optimizer,
            parts.scheduler,
            parts.train_data_iterator,
            None,
            state,
            parts.checkpoint_manager,
            parts.pg_collection,
            callback_manager=normalize_callbacks([calls]),
        )
        calls.close()

    def _micro_batches(self) -> Generator[MicroBatch, None, None]:
        # A generator: the first micro-batch is collated when requested, after the reference log-probs exist.
        with self._data.stream(self._step) as ahead:
            yield from ahead

    def _name_groups(self) -> Sequence[float]:
        """Return the peak learning rate of each parameter group.

        Checkpoints identify a group by its ``max_lr``, among others, but a run may resume with another rate. So the
        groups get the constant index of their kind instead.
        """
        groups, usual = self._parts.optimizer.param_groups, self._config.model.optim.lr
        rates = [float(group["max_lr"]) for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group["max_lr"] = 1.0 if rate == usual else 2.0
        return rates

    # ------------------------------------------------------------------------------------------- checkpoints

    def _read_start(self, chunks: list[Any]) -> list[Any]:
        assert self._start_from is not None
        checkpoint.load_weights(weights_of(self._start_from), chunks)
        return chunks

    def _add_adapters(self, chunks: list[Any]) -> list[Any]:
        add_adapters(chunks, self._config)
        return chunks

    @property
    def _stored(self) -> checkpoint.Filter | None:
        """Return which parts of the model a checkpoint of this run contains."""
        return is_trained if self._adapters_only else None

    def _resume(self, resume_from: Path) -> None:
        stored = checkpoint.load(weights_of(resume_from), self._parts.model, self._parts.optimizer, keep=self._stored)
        self._step = stored["step"]
        train_state = self._parts.state.train_state
        train_state.step = self._step
        train_state.consumed_train_samples = self._step * self._config.model.global_batch_size
        self._keeping.state = stored["kept"]
        for hook in self._references:
            hook.state = stored["reference"]

    def _save(self, folder: Path, finish: Callable[[], None]) -> None:
        content = {
            "step": self._session.step,
            "kept": self._keeping.state,
            "reference": {name: value for hook in self._references for name, value in hook.state.items()},
        }
        request = checkpoint.save(
            folder / "weights",
            self._parts.model,
            self._parts.optimizer,
            content,
            keep=self._stored,
            in_background=self._config.exp_manager.checkpoint_callback_params.async_save,
        )
        for hook in self._hooks:
            hook.save(self._session, folder)
        if self._session.is_first_rank:
            if self._adapters_only:
                assert self._start_from is not None
                record_base(folder, self._start_from)
            self._tokenizer.save_pretrained(folder / "context" / "tokenizer")
        if request is None:
            finish()
        else:
            self._writer.schedule(request, finish)
