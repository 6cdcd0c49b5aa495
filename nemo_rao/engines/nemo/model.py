"""The aligned Megatron GPT: NeMo's ``GPTModel`` with an objective instead of next-token cross-entropy."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from megatron.core.transformer.module import Float16Module
from nemo.collections.llm.gpt.model.base import GPTConfig, GPTModel
from nemo.lightning.megatron_parallel import MegatronLossReduction
from nemo.lightning.pytorch.optim import OptimizerModule
from torch import Tensor, nn

from nemo_rao.batch import MicroBatch, ModelOutput
from nemo_rao.mcore.finish import finish_chunk, finish_config
from nemo_rao.mcore.forward import forward_step, to_device
from nemo_rao.mcore.loss import LOSS
from nemo_rao.mcore.objective_loss import ObjectiveLoss
from nemo_rao.objectives import registry

# Before megatron-core 0.15 the wrapper that casts inputs to 16 bits always makes an fp32 copy of the logits.
_TAKES_FP32_OUTPUT = "fp32_output" in inspect.signature(Float16Module.forward).parameters


class MegatronGPTAlignmentModel(GPTModel):
    """Any NeMo GPT, trained with an objective of :mod:`nemo_rao.objectives`.

    The last pipeline stage computes log-probabilities per sequence from vocab-parallel logits and passes them to the
    objective. Gradients are those of the mean over the global batch's prompts, however it is split.

    Args:
        config: a NeMo GPT config (Llama, Qwen2, Mistral, ...). Its loss scaling is set; without Transformer Engine its
            layer spec is replaced by one with the same parameter names.
        objective: a name of :mod:`nemo_rao.objectives.registry`.
        objective_config: the objective's ``config_type``, or its keys, all optional. ``log_z0: auto`` must be resolved
            already.
        optim: NeMo optimizer module.
        tokenizer: NeMo tokenizer; its ``vocab_size`` is used if ``config.vocab_size`` is ``None``.
        model_transform: such as ``nemo.collections.llm.peft.LoRA``.
        fused_log_probs: never hold the logits, see :mod:`nemo_rao.mcore.output_layer`.
        head_seed: seed of a new score head. An argument, because NeMo creates the further chunks of an interleaved
            pipeline from the first one's arguments.
        fp8_simulation: fields of :class:`nemo_rao.mcore.fp8_simulation.Fp8Simulation`; ``None``: no simulation.
        shared_prompts, packed: the layout of micro-batches, see :func:`nemo_rao.data.collate.collate`.

    Attributes:
        loss: the objective over a micro-batch.

    Raises:
        UserError: the objective is unknown, or has no such key or value.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        objective: str = "rao",
        objective_config: Any = None,
        optim: OptimizerModule | None = None,
        tokenizer: Any = None,
        model_transform: Callable[[nn.Module], nn.Module] | None = None,
        fused_log_probs: bool = True,
        head_seed: int = 0,
        fp8_simulation: Mapping[str, Any] | None = None,
        shared_prompts: bool = False,
        packed: bool = False,
    ) -> None:
        finish_config(config, fp8_simulation=fp8_simulation, shared_prompts=shared_prompts, packed=packed)
        super().__init__(config, optim=optim, tokenizer=tokenizer, model_transform=model_transform)
        described = registry.get(objective)
        if not isinstance(objective_config, described.config_type):
            objective_config = described.make_config(objective_config or {})
        self.loss = ObjectiveLoss(described, objective_config, vocab_size=self.vocab_size)
        self._fused_log_probs = fused_log_probs
        self._head_seed = head_seed
        self._fp8_is_simulated = fp8_simulation is not None

    def io_transform_args(self, init_fn: Callable[..., None], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments that NeMo stores, for further chunks of an interleaved pipeline and for checkpoints.

        The objective's keys are stored as plain values, so that a checkpoint has no pickles of this package's classes.
        """
        keys = kwargs.get("objective_config")
        if dataclasses.is_dataclass(keys) and not isinstance(keys, type):
            kwargs["objective_config"] = dataclasses.asdict(keys)
        return super().io_transform_args(init_fn, *args, **kwargs)

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Build this rank's part of the model, with its head on the last pipeline stage."""
        built_before = hasattr(self, "module")
        super().configure_model(vp_stage=vp_stage) if vp_stage is not None else super().configure_model()
        if built_before:
            return
        finish_chunk(
            self.module,
            self.loss.needs,
            fused_log_probs=self._fused_log_probs,
            head_seed=self._head_seed,
            fp8_is_simulated=self._fp8_is_simulated,
        )

    @property
    def vocab_size(self) -> int:
        """V without padding: the number of logit columns that are tokens."""
        return self.config.vocab_size or self.tokenizer.vocab_size

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Like ``GPTModel.forward``, but keep bf16 logits in bf16: their log-probabilities accumulate in fp32.

        Before adapters are added, as in their reference pass, NeMo has not wrapped the model in the casting module.
        """
        if _TAKES_FP32_OUTPUT and isinstance(self.module, Float16Module):
            return self.module(*args, **kwargs, fp32_output=False)
        return super().forward(*args, **kwargs)

    def data_step(self, dataloader_iter: Iterator) -> MicroBatch:
        """Return the next micro-batch, on this rank's device."""
        batch, *_ = next(dataloader_iter)
        return to_device(batch)

    def forward_step(self, batch: MicroBatch) -> Tensor | ModelOutput:
        """Return the model's output on the last pipeline stage, hidden states on earlier ones."""
        return forward_step(self, batch)

    @property
    def training_loss_reduction(self) -> AlignmentLossReduction:
        return AlignmentLossReduction(self)

    @property
    def validation_loss_reduction(self) -> AlignmentLossReduction:
        return AlignmentLossReduction(self)


class AlignmentLossReduction(MegatronLossReduction):
    """Called by NeMo with the last pipeline stage's output of a micro-batch."""

    def __init__(self, model: MegatronGPTAlignmentModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch, forward_out: ModelOutput) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return self.model.loss(forward_out, batch)

    def reduce(self, losses_reduced_per_micro_batch: list[dict[str, Tensor]]) -> Tensor:
        """Return this data-parallel rank's mean loss. The metrics hook reduces and logs the global statistics."""
        pairs = torch.stack([statistics[LOSS] for statistics in losses_reduced_per_micro_batch]).sum(0)
        return pairs[0] / pairs[1].clamp(min=1)
