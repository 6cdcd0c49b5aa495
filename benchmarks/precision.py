"""Accuracy of 8-bit training: log-probabilities, log-ratios, RAO's loss and gradient, and short runs.

    python -m benchmarks.precision          simulated on a CPU
    python -m benchmarks.precision --gpu    with Transformer Engine; recipes that the GPU does not support are listed
                                            and skipped

A Llama of 4 layers and 256 channels, wide enough for several blocks of 128, is fine-tuned on the demo's letter puzzles
(W0) and aligned with RAO in fp32 (W1). Then each format starts a run of RAO from W0 through the project's usual entry
point. Before the first step, a probe measures on the same prompts in every format:

    log-probs    of tokens under W0
    log-ratio    log pi_W1 - log pi_W0 of responses, with W0's from the run's own reference pass: rewards are made of it
    loss         of RAO at W1: relative error
    gradient     at W1: relative distance and angle
    rho at start log-ratio of the untrained policy to its reference: with the same rows, and with other rows in its
                 micro-batch

bf16 is compared with fp32, all other formats with bf16. The run then trains on prompts that it sees once, and the final
metrics are compared.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import parser, write_result

SIMULATED = ("precision.fp8_simulation=true",)
EVERY_LAYER = ("precision.first_last_layers_bf16=false",)
LAST = ("precision.fp8_amax_compute_algo=most_recent", "precision.fp8_amax_history_len=1")
UNCALIBRATED = "delayed, not calibrated"
ENDS_IN_BF16 = "tensorwise, ends in bf16"
FORMATS: Mapping[str, Sequence[str]] = {
    "fp32": ("precision=fp32",),
    "bf16": ("precision=bf16_mixed",),
    "fp16": ("precision=fp16_mixed",),
    "delayed": ("precision=fp8_delayed",),
    "delayed, e4m3": ("precision=fp8_delayed_e4m3",),
    "delayed, most_recent of 1": ("precision=fp8_delayed", *LAST),
    UNCALIBRATED: ("precision=fp8_delayed",),
    "tensorwise": ("precision=fp8_tensorwise", *EVERY_LAYER),
    ENDS_IN_BF16: ("precision=fp8_tensorwise",),
    "blockwise": ("precision=fp8_blockwise",),
    "mxfp8": ("precision=fp8_mxfp8",),
}
BASELINE = {"bf16": "fp32"}  # of the others: bf16

MODEL = (
    "model.arch.num_layers=4",
    "model.arch.hidden_size=256",
    "model.arch.ffn_hidden_size=768",
    "model.arch.num_attention_heads=4",
    "model.arch.num_query_groups=2",
    "model.seq_length=64",
)
QUIET = (
    "trainer.max_epochs=null",
    "trainer.enable_progress_bar=false",
    "exp_manager.draw_curves=false",
    "exp_manager.checkpoint_callback_params.save_top_k=0",
)
NOT_KEPT = ("exp_manager.checkpoint_callback_params.save_last=false",)
PROMPTS, HELD_OUT, RESPONSES, VOCAB = 2400, 48, 4, 320
GLOBAL_BATCH, MICRO_BATCH, PROBED = 12, 6, 24  # of RAO, prompts


def main() -> None:
    arguments_of = parser(__doc__, repeats=1)
    arguments_of.add_argument("--gpu", action="store_true", help="use Transformer Engine instead of the simulation")
    arguments_of.add_argument("--sft-steps", type=int, default=150)
    arguments_of.add_argument(
        "--steps", type=int, default=20, help="steps of RAO in each format; no prompt is repeated"
    )
    arguments_of.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    arguments = arguments_of.parse_args()
    import torch

    from nemo_rao.engines.nemo import engine

    torch.set_num_threads(1)  # forking after PyTorch has started threads can hang
    engine.load()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = prepare(folder, arguments)
        found, lacking = {}, {}
        for number, (label, overrides) in enumerate(FORMATS.items()):
            if label not in {*arguments.formats, "fp32", "bf16"}:
                continue
            print(f"{label} ...", flush=True)
            given = [*common, *overrides, f"exp_manager.name=format-{number}", f"trainer.max_steps={arguments.steps}"]
            if "fp8" in overrides[0] and not arguments.gpu:
                given += SIMULATED
            refused = in_child(folder, run_format, given, folder, label)
            if refused is not None:
                lacking[label] = refused
                print(refused, flush=True)
                continue
            found[label] = figures_of(folder, number, label)
    compared = {label: compare(label, found) for label in found}
    shown = {key: value for key, value in vars(arguments).items() if key not in ("output", "formats", "repeats")}
    name = "precision_gpu" if arguments.gpu else "precision"
    write_result(name, arguments, {"formats": compared, "lacking": lacking}, shown=shown)
    print(table_text(compared))


def prepare(folder: Path, arguments: argparse.Namespace) -> list[str]:
    """W0 and W1, and the overrides of a run that starts from W0."""
    from nemo_rao.demo.synthetic import write_preferences
    from nemo_rao.demo.tokenizer_training import texts_of_rows, train_tokenizer
    from nemo_rao.rows.reading import read_rows

    num_prompts = max(PROBED, GLOBAL_BATCH * arguments.steps)
    write_preferences(folder / "train.jsonl", max(PROMPTS, num_prompts), RESPONSES)
    write_preferences(folder / "held_out.jsonl", HELD_OUT, RESPONSES, seed=1, split="held_out")
    train_tokenizer(texts_of_rows(read_rows(str(folder / "train.jsonl"))), folder / "tokenizer", VOCAB)
    device = f"trainer.accelerator={'gpu' if arguments.gpu else 'cpu'}"
    data = (f"data.train_path={folder}/train.jsonl", f"data.tokenizer={folder}/tokenizer")
    common = [*MODEL, *QUIET, *data, device, f"exp_manager.exp_dir={folder}"]
    common.append(f"trainer.threads_per_rank={arguments.threads}")
    sft = [
        *common,
        "exp_manager.name=sft",
        f"trainer.max_steps={arguments.sft_steps}",
        "model.global_batch_size=24",
        "model.micro_batch_size=24",
        "model.optim.lr=2e-3",
        f"model.optim.sched.warmup_steps={min(10, arguments.sft_steps)}",
        "model.sft.prompt_weight=1",
    ]
    rao = [
        *common,
        *NOT_KEPT,
        f"model.restore_from_path={folder}/sft",
        f"data.validation_path={folder}/held_out.jsonl",
        "trainer.val_check_interval=1000000",
        "data.shuffle=false",
        f"model.micro_batch_size={MICRO_BATCH}",
        f"model.global_batch_size={GLOBAL_BATCH}",
        f"data.num_prompts={num_prompts}",
        "model.optim.lr=7e-5",
        f"model.optim.sched.warmup_steps={min(4, arguments.steps)}",
        "model.rao.beta=0.3",
    ]
    print("fine-tuning (W0), then RAO in fp32 (W1) ...", flush=True)
    refused = in_child(folder, run_plain, "gpt_sft", sft)
    assert refused is None, refused
    refused = in_child(folder, run_w1, [*rao, "exp_manager.name=w1", f"trainer.max_steps={arguments.steps}"], folder)
    assert refused is None, refused
    return rao


# ------------------------------------------------------------------------------------------- in a child process


def in_child(folder: Path, function: Callable[..., None], *arguments: Any) -> str | None:
    """Run in a fork of this process, as Megatron's state is global. Return the error line if the run was refused."""
    process = multiprocessing.get_context("fork").Process(target=_child, args=(folder, function, arguments))
    process.start()
    process.join()
    refused = folder / "refused"
    if process.exitcode == 2 and refused.exists():
        line = refused.read_text()
        refused.unlink()
        return line
    if process.exitcode != 0:
        raise SystemExit(process.exitcode or 1)
    return None


def _child(folder: Path, function: Callable[..., None], arguments: Sequence[Any]) -> None:
    from nemo_rao.errors import UserError

    try:
        function(*arguments)
    except UserError as error:
        (folder / "refused").write_text(str(error))
        raise SystemExit(2) from None


def run_plain(recipe: str, overrides: Sequence[str], hooks: Any = None) -> None:
    from nemo_rao.config.compose import compose
    from nemo_rao.training.checks import check_run
    from nemo_rao.training.train import as_they_are, train

    config = compose(recipe, list(overrides))
    check_run(config)
    train(config, hooks=hooks or as_they_are)


def run_w1(overrides: Sequence[str], folder: Path) -> None:
    """Train RAO in fp32 and keep its final weights: name -> tensor."""
    import torch

    from nemo_rao.loop.session import Hook

    class Keep(Hook):
        def end(self, session: Any) -> None:
            torch.save({name: value.detach().float().cpu() for name, value in weights(session)}, folder / "w1.pt")

    run_plain("gpt_rao", overrides, lambda hooks: [*hooks, Keep()])


def weights(session: Any) -> Iterator[tuple[str, Any]]:
    from nemo_rao.mcore.forward import unwrapped

    [chunk] = session.chunks
    yield from unwrapped(chunk).named_parameters()


def run_format(overrides: Sequence[str], folder: Path, label: str) -> None:
    from nemo_rao.loop.hooks import CalibrateScales
    from nemo_rao.loop.session import Hook

    class Probe(Hook):
        def start(self, session: Any) -> None:
            if session.is_first_rank:
                probe(session, folder)

    def changed(hooks: list[Any]) -> list[Any]:
        kept = [one for one in hooks if label != UNCALIBRATED or not isinstance(one, CalibrateScales)]
        return [*kept, Probe()]

    run_plain("gpt_rao", overrides, changed)


def probe(session: Any, folder: Path) -> None:
    """Measure a format and write the numbers to ``probe.pt``; weights and scales are left unchanged."""
    import torch

    from nemo_rao.mcore.calibration import calibrate
    from nemo_rao.mcore.quantization import quantization_kept

    data, chunks, loss_of = session.data.train, session.chunks, session.loss
    batches = [list(range(start, start + MICRO_BATCH)) for start in range(0, PROBED, MICRO_BATCH)]
    apart = [list(range(start, PROBED, len(batches))) for start in range(len(batches))]
    at_w0 = log_probs(chunks, loss_of, data, batches)
    reference = torch.from_numpy(data.reference[: len(at_w0["responses"])].copy())
    own = {name: value.detach().clone() for name, value in weights(session)}
    w1 = torch.load(folder / "w1.pt")
    with quantization_kept(chunks):
        # The policy's scales after the first step's micro-batches; no weight has changed.
        calibrate(chunks, batches, make_micro_batch=data.micro_batch)
        soon = log_probs(chunks, loss_of, data, batches)
        beside = log_probs(chunks, loss_of, data, apart)
        for name, value in weights(session):
            value.data.copy_(w1[name])
        calibrate(chunks, batches, make_micro_batch=data.micro_batch)
        at_w1 = log_probs(chunks, loss_of, data, batches)
        for _ in range(3):  # scales of gradients depend on the preceding passes
            loss, gradient = loss_and_gradient(chunks, loss_of, data, batches)
        for name, value in weights(session):
            value.data.copy_(own[name])
    found = {
        "tokens": at_w0["tokens"],
        "responses": at_w0["responses"],
        "log_ratio": at_w1["responses"] - reference[:, 1],
        "loss": loss,
        "gradient": gradient,
        "start": soon["responses"] - reference[:, 1],
        "beside": beside["responses"] - soon["responses"],
    }
    torch.save(found, folder / "probe.pt")


def log_probs(chunks: Sequence[Any], loss_of: Any, data: Any, batches: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Log-probabilities in nats: of the tokens of all responses, concatenated, and of each response."""
    import torch

    from nemo_rao.mcore.forward import evaluation_mode, forward_only
    from nemo_rao.mcore.loss import _token_log_probs, sequence_log_probs

    def report(output: Any, batch: Any) -> dict[str, Any]:
        positions, length = batch.all_response_positions, batch.tokens.shape[1]
        logps = _token_log_probs(output, batch, positions, 0, loss_of.vocab_size)
        tokens = logps[positions // length, positions % length]
        sums = sequence_log_probs(output, batch, vocab_size=loss_of.vocab_size, prompts=False)[1]
        return {"tokens": tokens, "sums": sums, "ids": batch.response_ids}

    with evaluation_mode(chunks):
        outputs = forward_only(chunks, batches, make_micro_batch=data.micro_batch, report=report)
    ids = torch.cat([output["ids"] for output in outputs]).cpu()
    sums = torch.cat([output["sums"] for output in outputs]).float().cpu()
    return {
        "tokens": torch.cat([output["tokens"] for output in outputs]).float().cpu(),
        "responses": sums[ids.argsort()],
    }


def loss_and_gradient(
    chunks: Sequence[Any], loss_of: Any, data: Any, batches: Sequence[Sequence[int]]
) -> tuple[float, Any]:
    """RAO's mean loss over the prompts and its gradient ``[weights]`` in fp32, with Megatron's own schedule."""
    import torch
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from nemo_rao.mcore.forward import forward_step, to_device
    from nemo_rao.mcore.loss import LOSS

    [chunk] = chunks

    def step(iterator: Iterator[Any], model: Any) -> Any:
        batch = to_device(next(iterator))
        return forward_step(model, batch), lambda output: loss_of(output, batch)

    chunk.zero_grad_buffer()
    reported = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([data.micro_batch(prompts) for prompts in batches]),
        model=[chunk],
        num_microbatches=len(batches),
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    parts = [parameter.main_grad.flatten().float().cpu() for parameter in chunk.parameters()]
    gradient = torch.cat(parts)
    chunk.zero_grad_buffer()
    scale = chunk.config.grad_scale_func
    if scale is not None:
        gradient = gradient / float(scale(torch.ones(())))
    loss_of.take_statistics()
    total, count = torch.stack([one[LOSS] for one in reported]).sum(0).tolist()
    return total / count, gradient


# --------------------------------------------------------------------------------------------------- figures


def figures_of(folder: Path, number: int, label: str) -> dict[str, Any]:
    """Results of a format's probe and run: tensors, and the run's metrics."""
    import torch

    records = [json.loads(line) for line in (folder / f"format-{number}" / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if "val/loss" in record][-1]
    losses = [record["loss"] for record in records if "loss" in record]
    run = {
        "val_loss": last["val/loss"],
        "val_target_error": last["val/rao/target_error"],
        "val_margins": last["val/rewards/margins"],
        "steps_left_out": sum("loss" in record and "grad_norm" not in record for record in records),
        "losses": losses,
    }
    return {**torch.load(folder / "probe.pt"), "run": run}


def compare(label: str, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A format's errors relative to its baseline; none for fp32."""
    own = found[label]
    result: dict[str, Any] = {
        "run": own["run"],
        "loss": own["loss"],
        "log_ratio_rms": rms(own["log_ratio"]),
        "start_rms": rms(own["start"]),
        "beside_rms": rms(own["beside"]),
    }
    if label == "fp32":
        return result
    base = found[BASELINE.get(label, "bf16")]
    difference = own["gradient"].double() - base["gradient"].double()
    norm = base["gradient"].double().norm()
    result |= {
        "token_rms": rms(own["tokens"] - base["tokens"]),
        "token_max": float((own["tokens"] - base["tokens"]).abs().max()),
        "response_rms": rms(own["responses"] - base["responses"]),
        "log_ratio_error_rms": rms(own["log_ratio"] - base["log_ratio"]),
        "log_ratio_error_max": float((own["log_ratio"] - base["log_ratio"]).abs().max()),
        "loss_error": abs(own["loss"] / base["loss"] - 1),
        "gradient_error": float(difference.norm() / norm),
        "gradient_cosine": float(
            own["gradient"].double() @ base["gradient"].double() / norm / own["gradient"].double().norm()
        ),
    }
    return result


def rms(values: Any) -> float:
    return math.sqrt(float(values.double().square().mean()))


def table_text(compared: Mapping[str, Mapping[str, Any]]) -> str:
    names = ("token_rms", "log_ratio_error_rms", "loss_error", "gradient_error", "gradient_cosine", "start_rms")
    lines = [f"{'':28}" + "".join(f"{name:>21}" for name in names)]
    for label, figures in compared.items():
        lines.append(f"{label:28}" + "".join(f"{figures.get(name, math.nan):>21.6f}" for name in names))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
