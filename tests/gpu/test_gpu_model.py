"""One model on a GPU: Transformer Engine's, PyTorch's and transformers' layers agree; packing, log-probs, sampling.

Tolerances are relative errors of whole tensors (norm of the difference over the norm), and those of log-probabilities
in nats. bf16 has 8 bits: the error of a product is 2^-9 = 0.2 %, and a few times that after some layers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ..mcore import tiny
from .on_device import NO_TE, ON_GPU, WITH_TE, enter_megatron, result_of

pytestmark = pytest.mark.gpu

LOGITS = {"fp32": 2e-3, "bf16": 3e-2}  # fp32: Transformer Engine's products are TF32, of 10 bits
GRADIENTS = {"fp32": 1e-2, "bf16": 8e-2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
needs_te = pytest.mark.skipif(not WITH_TE, reason=NO_TE)
SIZES = {"NUM_LAYERS": 2, "HIDDEN": 256, "FFN": 512, "HEADS": 4, "GROUPS": 2, "VOCAB": 250}


def _source() -> Any:
    """A Llama of transformers in sizes that fused kernels take, whose activations do not grow with its width."""
    vars(tiny).update(SIZES)
    model = tiny.llama()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(0.35)
    return model


def _spec(kind: str) -> Any:
    """Of :mod:`nemo_rao.mcore.layer_spec`, or Transformer Engine's, as engines choose it on a GPU."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    from nemo_rao.mcore.layer_spec import layer_spec_without_te

    return (
        layer_spec_without_te
        if kind == "local"
        else lambda config, vp_stage=None: get_gpt_layer_with_transformer_engine_spec()
    )


def _built(source: Any, kind: str, dtype: str, *, fused: bool = False) -> Any:
    original = tiny.config_for

    def config_for(*args: Any, **kwargs: Any) -> Any:
        config = original(*args, **kwargs)
        config.transformer_layer_spec = _spec(kind)
        return config

    tiny.config_for = config_for
    try:
        model = tiny.build(tiny.whole_tensors(source), tiny.Layout(), fused=fused, dtype=DTYPES[dtype])
    finally:
        tiny.config_for = original
    return model.cuda() if ON_GPU else model


def _batch(**layout: bool) -> Any:
    from nemo_rao.mcore.forward import to_device

    samples = tiny.preferences()
    return to_device(tiny.micro_batch(samples, range(len(samples)), **layout))


def _loss(logits: torch.Tensor) -> torch.Tensor:
    """Of logits ``[B, T, V]``: a sum of log-probabilities with weights of either sign, the same for all models."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(*logits.shape[:2], tiny.VOCAB, generator=generator).to(logits.device)
    return (logits[..., : tiny.VOCAB].float().log_softmax(-1) * weights).mean()


def _logits_and_gradients(kind: str, dtype: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    source = _source()
    enter_megatron()
    batch = _batch()
    if kind == "transformers":
        logits = source(batch.tokens.cpu()).logits
        _loss(logits).backward()
        return logits.detach(), tiny.whole_tensors(source, gradients=True)
    model = _built(source, kind, dtype)
    logits = model(batch.tokens, batch.position_ids, None)
    _loss(logits).backward()
    gradients = {name: parameter.grad.float().cpu() for name, parameter in tiny.whole_names(model)}
    return logits.detach().float().cpu(), gradients


def _error(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.fixture(scope="module")
def expected() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    found: tuple[torch.Tensor, dict[str, torch.Tensor]] = result_of(_logits_and_gradients, "transformers", "fp32")
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["local", pytest.param("Transformer Engine", marks=needs_te)])
def test_logits_and_gradients_are_those_of_transformers(kind: str, dtype: str, expected: Any) -> None:
    logits, gradients = result_of(_logits_and_gradients, kind, dtype)
    rows = slice(0, SIZES["VOCAB"])
    errors = {
        name: _error(gradient[: len(expected[1][name])], expected[1][name]) for name, gradient in gradients.items()
    }
    assert _error(logits[..., rows], expected[0][..., rows]) < LOGITS[dtype]
    assert {name: error for name, error in errors.items() if not error < GRADIENTS[dtype]} == {}


def _row_sums(kind: str, dtype: str) -> dict[str, torch.Tensor]:
    """Layout -> ``[R, 2]`` log-probabilities of prompts and responses."""
    from nemo_rao.mcore.forward import forward_step
    from nemo_rao.mcore.loss import sequence_log_probs

    source = _source()
    enter_megatron()
    model = _built(source, kind, dtype, fused=True)
    found = {}
    for layout in ("rows", "packed"):
        batch = _batch(packed=layout == "packed")
        with torch.no_grad():
            sums = sequence_log_probs(forward_step(model, batch), batch, vocab_size=tiny.VOCAB)
        found[layout] = torch.stack(sums, dim=-1).float().cpu()
    with torch.no_grad():
        found["transformers"] = tiny.dense_sums(source, tiny.preferences()).float()
    return found


def test_packed_rows_have_the_log_probabilities_of_rows() -> None:
    """Through Transformer Engine's THD format, in which a GPU's attention takes them."""
    found = result_of(_row_sums, "Transformer Engine" if WITH_TE else "local", "bf16")
    for layout in ("rows", "packed"):
        assert _error(found[layout], found["transformers"]) < 0.02, layout
    assert _error(found["packed"], found["rows"]) < 0.01


def _head_errors() -> dict[str, float]:
    from nemo_rao.ops.linear_log_probs import linear_vocab_parallel_log_probs

    device, generator = torch.device("cuda" if ON_GPU else "cpu"), torch.Generator().manual_seed(0)
    tokens, hidden_size, vocab_size = (2048, 512, 32_003) if ON_GPU else (64, 32, 515)
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(device, torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocab_size + 61, hidden_size, generator=generator) * hidden_size**-0.5).to(
        device, torch.bfloat16
    )
    weight = torch.nn.Parameter(weight)
    weight.main_grad = torch.ones_like(weight, dtype=torch.float32)
    weight.grad_added_to_main_grad = False
    targets = torch.randint(vocab_size, (tokens,), generator=generator).to(device)
    upstream = torch.randn(tokens, generator=generator).to(device)
    for _ in range(2):  # micro-batches add up in main_grad, and autograd's gradient is a placeholder
        logps = linear_vocab_parallel_log_probs(hidden, weight, targets, vocab_size=vocab_size)
        logps.backward(upstream)
        assert weight.grad_added_to_main_grad
        weight.grad = None
    exact = [one.detach().double().requires_grad_() for one in (hidden, weight)]
    exact_logps = (exact[0] @ exact[1][:vocab_size].T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    exact_logps.backward(upstream.double())
    assert exact[0].grad is not None and exact[1].grad is not None and hidden.grad is not None
    return {
        "log-probabilities": float((logps - exact_logps).abs().max()),
        "gradient of hidden states": _error(hidden.grad.double(), 2 * exact[0].grad),
        "gradient of the weight": _error(weight.main_grad.double() - 1, 2 * exact[1].grad),
        "gradient of padding": float((weight.main_grad[vocab_size:] - 1).abs().max()),
    }


def test_fused_log_probabilities_are_those_of_float64_and_add_to_main_grad() -> None:
    errors = result_of(_head_errors)
    assert errors["log-probabilities"] < 1e-4  # nats; inputs are the same bf16 numbers, sums are in fp32
    assert errors["gradient of hidden states"] < 5e-3 and errors["gradient of the weight"] < 5e-3
    assert errors["gradient of padding"] == 0


def _sampled(kind: str, dtype: str) -> list[Any]:
    """(prompt, response, its log-probabilities) of samples of the model."""
    from nemo_rao.rollout.decode import Sampling, sample

    from ..rollout import test_decode

    source = _source()
    enter_megatron()
    model = _built(source, kind, dtype, fused=True).eval()
    requests = test_decode.requests()
    found = sample(
        [model],
        requests,
        max_new_tokens=test_decode.NEW,
        end_tokens=[test_decode.END],
        sampling=Sampling(),
        rows_at_once=7,
        vocab_size=tiny.VOCAB,
    )
    with torch.no_grad():
        return [
            (one.logps.tolist(), _logps_of_row(source, request.prompt.tolist(), one.tokens.tolist()))
            for request, of_prompt in zip(requests, found, strict=True)
            for one in of_prompt
        ]


def _logps_of_row(source: Any, prompt: list[int], response: list[int]) -> list[float]:
    row = torch.tensor([*prompt, *response])
    logps = source(row[None]).logits[0, :-1].log_softmax(-1).gather(-1, row[1:, None])[:, 0]
    of_response: list[float] = logps[len(prompt) - 1 :].tolist()
    return of_response


def test_sampling_with_a_cache_of_keys_and_values_has_the_log_probabilities_of_whole_rows() -> None:
    pairs = result_of(_sampled, "Transformer Engine" if WITH_TE else "local", "bf16")
    differences = torch.tensor([a - b for found, expected in pairs for a, b in zip(found, expected, strict=True)])
    assert len(pairs) == 15 and len(differences) > 30
    assert float(differences.square().mean().sqrt()) < 0.03 and float(differences.abs().max()) < 0.2  # nats a token
