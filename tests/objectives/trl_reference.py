"""TRL's own losses, called with given log-probabilities: the reference for tests of objectives.

TRL computes a loss in a trainer's method that also runs the model. Here a trainer is created without its constructor,
with the settings that the method reads and a fake model that returns the log-probabilities of the test. Everything else
is TRL's code. The trainers of TRL 1.14 read logits, those of 1.16 log-probabilities; the fake model provides both.

Each function returns a ``Loss``: ``(batch, logps [P, 2]) -> []``, the mean over P pairs, with gradient to ``logps``;
column 0 is the chosen response, 1 the rejected one. Reference log-probabilities and lengths are the batch's.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from nemo_rao.batch import ObjectiveBatch

from .batches import select

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # at import, trl.experimental says that it is
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

Loss = Callable[[ObjectiveBatch, Tensor], Tensor]


def dpo(loss_type: str, *, beta: float, label_smoothing: float = 0.0, sft_weight: float = 0.0) -> Loss:
    """One of the loss types of ``DPOTrainer``; with ``sft_weight``, its type ``sft`` is added."""

    def loss(batch: ObjectiveBatch, logps: Tensor) -> Tensor:
        trainer = make_trainer(
            DPOTrainer,
            loss_types=[loss_type, "sft"] if sft_weight else [loss_type],
            loss_weights=[1.0, sft_weight] if sft_weight else [1.0],
            beta=beta,
            label_smoothing=label_smoothing,
            f_divergence_type="reverse_kl",
            ld_alpha=None,
            use_weighting=False,
        )
        tokens, mask = tokens_of(batch)
        inputs = {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "completion_mask": mask.long(),
            "ref_chosen_logps": batch.reference_response_logps[:, 0],
            "ref_rejected_logps": batch.reference_response_logps[:, 1],
        }
        with in_float64():
            return trainer.compute_loss(model_of(batch, logps), inputs)

    return loss


def kto(*, beta: float, z0: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Loss:
    """``KTOTrainer``'s loss; ``z0`` is the mean log-ratio of mismatched pairs. Column 0 is desirable, 1 is not."""

    def loss(batch: ObjectiveBatch, logps: Tensor) -> Tensor:
        tokens, mask = tokens_of(batch)
        mismatched = torch.linspace(-3, 3, len(tokens), dtype=torch.float64)  # its mean is 0
        trainer = make_trainer(
            KTOTrainer,
            loss_type="kto",
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            calculate_KL=True,
            _compute_kl_logps=lambda model, inputs: mismatched + z0,
        )
        inputs = {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "completion_mask": mask.long(),
            "label": torch.arange(len(tokens)) < len(batch.valid),
            "ref_logps": stacked(batch.reference_response_logps),
            "ref_KL_logps": torch.zeros_like(mismatched),
        }
        with in_float64():
            return trainer.compute_loss(model_of(batch, logps), inputs)

    return loss


def cpo(
    loss_type: str,
    *,
    beta: float,
    gamma: float = 0.0,
    alpha: float = 0.0,
    nll_weight: float = 0.0,
    label_smoothing: float = 0.0,
) -> Loss:
    """One of the loss types of ``CPOTrainer``, which has no reference. ``alpha`` is AlphaPO's."""
    keys = {"simpo_gamma": gamma, "alpha": alpha, "cpo_alpha": nll_weight, "label_smoothing": label_smoothing}
    return without_reference(CPOTrainer, loss_type=loss_type, beta=beta, pad_token_id=0, **keys)


def orpo(*, beta: float) -> Loss:
    """``ORPOTrainer``'s loss, negative log-likelihood included. Its prompts are one token long: see ``tokens_of``."""
    return without_reference(ORPOTrainer, beta=beta, padding_value=0)


def without_reference(trainer_type: type, **settings: Any) -> Loss:
    """The loss of a trainer that takes chosen and rejected sequences apart."""

    def loss(batch: ObjectiveBatch, logps: Tensor) -> Tensor:
        trainer = make_trainer(trainer_type, is_encoder_decoder=False, **settings)
        tokens, mask = tokens_of(batch)
        attended = mask.clone()
        attended[:, 0] = True
        inputs = {}
        for name, rows in (("chosen", slice(None, len(tokens) // 2)), ("rejected", slice(len(tokens) // 2, None))):
            inputs[f"{name}_input_ids"] = tokens[rows]
            inputs[f"{name}_attention_mask"] = attended[rows].long()
            inputs[f"{name}_labels"] = tokens[rows].masked_fill(~mask[rows], -100)
        with in_float64():
            return trainer.get_batch_loss_metrics(model_of(batch, logps), inputs, "eval")[0]

    return loss


def one_pair_at_a_time(loss: Loss) -> Loss:
    """The mean of the losses of batches of one pair, for losses that mix pairs: they sort, or pool tokens."""

    def mean(batch: ObjectiveBatch, logps: Tensor) -> Tensor:
        prompts = torch.arange(len(logps)).split(1)
        return torch.stack([loss(select(batch, prompt), logps[prompt]) for prompt in prompts]).mean()

    return mean


def make_trainer(trainer_type: type, **settings: Any) -> Any:
    """A trainer that evaluates on one CPU process, with the reference's log-probabilities in its batches."""
    trainer = trainer_type.__new__(trainer_type)
    shared = {
        "accelerator": SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        "model": SimpleNamespace(training=False),
        "precompute_ref_logps": True,
        "aux_loss_enabled": False,
        "use_liger_kernel": False,
        "_metrics": {"eval": defaultdict(list)},
        "_total_train_tokens": 0,
    }
    vars(trainer).update(shared | settings)
    return trainer


def tokens_of(batch: ObjectiveBatch) -> tuple[Tensor, Tensor]:
    """Token ids ``[2P, T]``, the chosen responses before the rejected ones, and which of them are a response's.

    Every token is 1. A row is a prompt of one token, then the response, then padding. One token, since ORPO's negative
    log-likelihood is that of all tokens but a row's first, the prompt's among them.
    """
    lengths = stacked(batch.lengths)[:, None]
    positions = torch.arange(int(lengths.max()) + 1).expand(len(lengths), -1)
    return torch.ones_like(positions), (positions > 0) & (positions <= lengths)


def model_of(batch: ObjectiveBatch, logps: Tensor) -> Callable[..., SimpleNamespace]:
    """A model of two tokens that gives each token of a response the log-probability logp / |y|."""
    _, mask = tokens_of(batch)
    per_token = (stacked(logps) / stacked(batch.lengths))[:, None]

    def model(*args: Any, **kwargs: Any) -> SimpleNamespace:
        right = torch.where(mask[:, 1:], per_token, math.log(0.5))
        logits = torch.stack([torch.log1p(-right.exp()), right], dim=-1)
        unread = torch.zeros_like(right)
        return SimpleNamespace(
            logits=torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1),
            log_probs=torch.where(mask[:, 1:], per_token, 0.0),
            entropy=unread,
            mean_logits=unread,
            is_top1=unread.bool(),
        )

    return model


def stacked(values: Tensor) -> Tensor:
    """``[P, 2] -> [2P]``, the first column before the second."""
    return values.T.flatten()


@contextmanager
def in_float64() -> Iterator[None]:
    """Where TRL asks for float32, and where it makes tensors of numbers, float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            yield
    finally:
        torch.set_default_dtype(default)
