"""Bridge's run as a :class:`~nemo_rao.loop.session.Session`, the callback that calls hooks, and the forward step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.training.callbacks import Callback
from torch import Tensor

from nemo_rao.batch import MicroBatch, ModelOutput
from nemo_rao.config.model_config import ScheduleConfig
from nemo_rao.loop.data import TrainingData
from nemo_rao.loop.loggers import Logger
from nemo_rao.loop.schedule import learning_rate
from nemo_rao.loop.session import Hook, Session
from nemo_rao.mcore.checkpoint import PREFIX, Filter, sharded_model
from nemo_rao.mcore.forward import forward_step, to_device, unwrapped
from nemo_rao.mcore.objective_loss import ObjectiveLoss


class BridgeSession:
    """See :class:`nemo_rao.loop.session.Session`.

    Args:
        state: Bridge's global state.
        chunks: this rank's model chunks.
        keep: selects the reference policy's weights, which exclude adapters.
        save_last: for a run that trains, see :meth:`nemo_rao.loop.session.Session.save`.
    """

    def __init__(
        self,
        state: Any,
        chunks: Sequence[Any],
        *,
        folder: Path,
        data: TrainingData,
        loss: ObjectiveLoss,
        max_steps: int,
        loggers: Sequence[Logger] = (),
        keep: Filter | None = None,
        save_last: Callable[[Session], None] | None = None,
    ) -> None:
        self._state = state
        self.chunks = chunks
        self.folder = folder
        self.data = data
        self.loss = loss
        self.max_steps = max_steps
        self.step = int(state.train_state.step)
        self.is_stopping = False
        self.loggers = loggers
        self._keep = keep
        self._save_last = save_last
        self._reported: dict[str, float] = {}

    @property
    def is_first_rank(self) -> bool:
        return torch.distributed.get_rank() == 0

    def reported(self) -> Mapping[str, float]:
        return self._reported

    def done(self, step: int, numbers: Mapping[str, float]) -> None:
        """Set the number of optimizer steps done; the last one's metrics replace those of the previous step."""
        self.step, self._reported = step, dict(numbers)

    def report(self, values: Mapping[str, float]) -> None:
        self._reported |= values

    def stop(self) -> None:
        self.is_stopping = True
        self._state.cfg.train.train_iters = self.step

    def save(self) -> None:
        assert self._save_last is not None, "the run trains"
        self._save_last(self)

    def sharded_weights(self) -> Mapping[str, Any]:
        # With NeMo's prefix: the same weights have the same fingerprint on either engine.
        return sharded_model(self.chunks, prefix=PREFIX, keep=self._keep)


class CallHooks(Callback):
    """Calls a run's hooks, in order, and sets each step's learning rate.

    Args:
        rates: the peak learning rate of each parameter group.
    """

    def __init__(
        self, session: BridgeSession, hooks: Sequence[Hook], *, schedule: ScheduleConfig, rates: Sequence[float]
    ) -> None:
        self._session = session
        self._hooks = hooks
        self._schedule = schedule
        self._rates = rates

    def on_train_start(self, context: Any) -> None:
        for hook in self._hooks:
            hook.start(self._session)

    def on_train_step_start(self, context: Any) -> None:
        self._set_rates(context, self._session.step)
        for hook in self._hooks:
            hook.before_step(self._session)

    def micro_batch(self, batch: MicroBatch, *, embeds_tokens: bool) -> None:
        for hook in self._hooks:
            hook.micro_batch(self._session, batch, embeds_tokens=embeds_tokens)

    def on_train_step_end(self, context: Any) -> None:
        step = int(context.state.train_state.step) + 1  # Bridge increments it later
        numbers = {} if context.grad_norm is None else {"grad_norm": float(context.grad_norm)}
        self._session.done(step, {**numbers, "lr": self._lr})
        for hook in self._hooks:
            hook.after_step(self._session)

    def on_train_end(self, context: Any) -> None:
        for hook in self._hooks:
            hook.end(self._session)

    def close(self) -> None:
        for hook in self._hooks:
            hook.close()
        for logger in self._session.loggers:
            logger.close()

    def _set_rates(self, context: Any, step: int) -> None:
        self._lr = learning_rate(self._schedule, step, highest=self._rates[0], max_steps=self._session.max_steps)
        for group, highest in zip(context.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = learning_rate(self._schedule, step, highest=highest, max_steps=self._session.max_steps)


class ForwardStep:
    """Runs a chunk on a micro-batch for Bridge: returns (its output, the loss function of the last stage's output)."""

    def __init__(self, loss: ObjectiveLoss, callback: CallHooks) -> None:
        self._loss = loss
        self._callback = callback

    def __call__(self, data_iterator: Iterator[MicroBatch], model: Any) -> tuple[Any, Callable]:
        batch = to_device(next(data_iterator))
        self._callback.micro_batch(batch, embeds_tokens=unwrapped(model).pre_process)

        def loss(output: ModelOutput) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            loss_sum, num_prompts, _ = self._loss(output, batch)
            return loss_sum, num_prompts, {}  # the metrics hook reduces them, together

        return forward_step(model, batch), loss
