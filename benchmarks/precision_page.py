"""docs/precision.md, from benchmarks/results/precision.json: `make precision-page`.

What stands here in words is what does not change with the figures; every number in a table is one of the file's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.precision import ENDS_IN_BF16, UNCALIBRATED
from benchmarks.results import FOLDER

_Figures = Mapping[str, Any]

BEFORE = """\
# Precision

`precision=NAME` chooses a file of `conf/precision/`; `precision.KEY=VALUE` changes a key. This page is made by
`make precision-page` from the figures in `benchmarks/results/precision.json`.

| file | weights and activations | products of the linear layers | GPUs | for |
|---|---|---|---|---|
| `fp32` | fp32 | fp32 | any | a CPU, and comparing |
| `bf16_mixed` | bf16 | bf16 | Ampere and later | the default choice on GPUs |
| `fp16_mixed` | fp16 | fp16 | any | GPUs without bf16; the loss is scaled |
| `fp8_delayed` | bf16 | e4m3, gradients e5m2; scales of earlier batches | Ada, Hopper and later | the fastest casts |
| `fp8_delayed_e4m3` | bf16 | e4m3; scales of earlier micro-batches | Ada, Hopper and later | comparing |
| `fp8_tensorwise` | bf16 | e4m3, gradients e5m2; a scale for a tensor | Ada, Hopper and later | Hopper |
| `fp8_blockwise` | bf16 | e4m3; a scale for 1 × 128 or 128 × 128 numbers | Hopper and later | Hopper, finer scales |
| `fp8_mxfp8` | bf16 | e4m3; a scale for 32 numbers | Blackwell of data centres | Blackwell |

Master weights and optimizer are in fp32 under all of them. FP8 is for the four linear layers of each transformer layer.
Embedding, norms, attention, output layer, log-probabilities and loss never are in 8 bits. FP8 runs in Transformer
Engine, which is in NVIDIA's containers.

## Keys

| `precision.` | |
|---|---|
| `fp8` | `hybrid`: gradients in e5m2, which has more range and fewer digits; `e4m3`: all in that; `null`: no FP8 |
| `fp8_recipe` | `delayed`, `tensorwise`, `blockwise`, `mxfp8`: what a scale is made of |
| `fp8_amax_history_len`, `fp8_amax_compute_algo` | delayed: the largest value of so many micro-batches, or the last |
| `fp8_margin` | delayed: scales stay so many powers of 2 below what would just fit |
| `fp8_wgrad` | delayed: `false` computes gradients of weights in bf16 |
| `fp8_param_gather` | weights are kept in FP8, without bf16 copies, and gathered so over data-parallel ranks; \
needs the distributed optimizer |
| `first_last_layers_bf16`, `num_layers_at_start_in_bf16`, `num_layers_at_end_in_bf16` | layers left in bf16; not with \
delayed, which Megatron does not let be entered and left within a pass |
| `fp8_simulation` | rounds through 8 bits in PyTorch, without Transformer Engine: to study accuracy, not for speed |
| `fp16_loss_scale`, `fp16_initial_loss_scale`, ... | what fp16's loss is multiplied by; found by trial if `null` |

What cannot be is refused in one line, exit code 2, before anything heavy starts: a recipe that the GPUs of this machine
lack, that those of `nemo-rao plan --gpu` lack, or those that a cluster's file names (`cluster.gpu: h100`) before a job
is submitted; sizes that are no multiples of 16 (32 for MXFP8) on each tensor-parallel rank; FP8 without Transformer
Engine. Sequences are padded to those multiples, on each rank's own part under sequence parallelism.

## What preference training needs

**The reference under the policy's own quantisation.** A reward is β (log π_θ − log π_ref): where the two are computed
under different roundings, their difference is a reward that nobody gave. The reference pass runs in the run's own
format, and its numbers are kept under a key that names it.

**Scales before the first number.** Delayed scaling begins with scale 1 and takes each next one from what it has seen.
Under scale 1 a weight of 0.02 is among the smallest numbers of e4m3 and loses digits. Pre-training forgets its first
micro-batches; a reference computed so would stay to the end. So the first step's micro-batches are run forward before
the reference pass, until their numbers stop changing, and the scales are kept for the first step: there log π_θ − log
π_ref is exactly 0, with `max` over a history longer than a few steps' micro-batches. `most_recent` changes scales
within the step. Scales of gradients are not set before: the first micro-batch's smallest gradients round to 0, as in
pre-training.

**The first step checks the reference.** Before a weight has changed, policy and reference are the same model, so every
log-ratio is rounding. A run compares them in its first step, prompts and responses, in nats per square root of a token,
reports the result in one line, and stops with exit code 2 above these limits:

| number format | root mean square over rows | largest row |
|---|---:|---:|
| fp32 | 1e-4 | 1e-3 |
| fp16, bf16; fp32 with Transformer Engine, which multiplies in TF32 | 0.1 | 1 |
| FP8 | 0.3 | 3 |

A mixture of experts has the limits of the next row: a token whose experts are nearly tied may take another one. Under
dropout nothing is checked. The limits are some ten times a token's error below: networks are deeper than this one, and
a reference may have been computed under another parallelism. A reference of other rows or of another network is off by
whole nats.

**Looking changes nothing.** The reference pass, validation and scoring leave every module's amax history as it was, bit
for bit, though casts note what they see; so a run does not depend on how often it is validated. Checkpoints carry
scales and histories (`_extra_state`), and a resumed run goes on bit for bit. LoRA's checkpoints hold adapters alone:
with `delayed` it is refused.

**The rows beside a row.** Under `tensorwise` a row is rounded with the largest value of its micro-batch, so that its
log-probability depends a little on the other rows (*beside* below); under the other recipes, and in bf16, only as far
as sums are taken in another order, which small differences 8 bits can turn into larger ones.

**fp16.** A step whose gradients overflow is left out, and the scale halved: begin with a scale that fits
(`fp16_initial_loss_scale`), as a preference run has few steps. NeMo itself lets Megatron divide gradients by the scale
without multiplying the loss by it; here it is multiplied.

"""

NOT_SHOWN = """\
## On GPUs

None of this has run on a GPU with Transformer Engine yet: none could be had. What a GPU does beyond the simulation:
products of some recipes sum in less than fp32 (Hopper's fast accumulation in the forward pass under `tensorwise`),
weights are cast once a step, blocks along tokens are cut before a split sequence is gathered. One command runs the same
probe, and 20 RAO steps, in bf16 and in each recipe that the GPU has, and names those that it lacks:

```
python -m benchmarks.precision --gpu
```

Time and memory are not planned: `nemo-rao plan` counts FP8 as bf16 and says so.
"""


def page() -> str:
    report = json.loads((FOLDER / "precision.json").read_text())
    parts = [BEFORE, _measured(report), _meaning(report), _runs(report), NOT_SHOWN]
    return "\n".join(part.strip() + "\n" for part in parts)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return "0" if value == 0 else f"{value:.1e}" if value < 1e-3 else f"{value:.4f}"


def _measured(report: _Figures) -> str:
    given = report["arguments"]
    names = (
        ("tokens, rms", "token_rms"),
        ("tokens, max", "token_max"),
        ("responses, rms", "response_rms"),
        ("log-ratio, rms", "log_ratio_error_rms"),
        ("log-ratio, max", "log_ratio_error_max"),
        ("loss", "loss_error"),
        ("gradient", "gradient_error"),
    )
    rows = [
        [label, *(_number(figures.get(name)) for _, name in names), f"{figures['gradient_cosine']:.5f}"]
        for label, figures in report["formats"].items()
        if "gradient_cosine" in figures
    ]
    start = [
        [label, _number(figures["start_rms"]), _number(figures["beside_rms"]), _number(figures["log_ratio_rms"])]
        for label, figures in report["formats"].items()
    ]
    return "\n".join(
        [
            "## Measured in simulation\n",
            "`python -m benchmarks.precision`, regenerated by `make precision`: a Llama of 4 layers and 256 channels, "
            f"fine-tuned for {given['sft_steps']} steps on the demonstration's letter puzzles (W0) and aligned with "
            f"RAO for {given['steps']} in fp32 (W1); the same weights and prompts in every format, one rank, "
            f"{report['device']}, {report['date']}, commit {report['commit']}. bf16 against fp32, the others against "
            "bf16. Log-probabilities of tokens and responses at W0, in nats; log-ratios log π_W1 − log π_W0, W0's from "
            "the run's own reference pass, in nats; RAO's loss at W1, relative; its gradient at W1, relative distance "
            "and cosine. *ends in bf16*: the first and last layer.\n",
            _table(["format", *(title for title, _ in names), "cosine"], rows),
            "",
            "What a policy that has learned nothing differs from its reference by, in nats, rms over responses. "
            "*As it is*: with the scales that it has once it has seen the first two steps' batches. *Beside*: with "
            "other rows in its micro-batch. To compare with: the log-ratio that RAO has made of it at W1.\n",
            _table(["format", "as it is", "beside", "log-ratio at W1"], start),
        ]
    )


def _meaning(report: _Figures) -> str:
    """What follows for a point-wise loss; the numbers in it are the file's."""
    formats = report["formats"]
    eight = [name for name in formats if name not in ("fp32", "bf16", "fp16")]
    errors = [formats[name]["log_ratio_error_rms"] for name in eight]
    ended = {name: figures["run"]["val_loss"] for name, figures in formats.items()}
    whole = [name for name in eight if name not in (ENDS_IN_BF16, UNCALIBRATED)]
    of_loss, of_gradient = (
        min(whole, key=lambda name: formats[name][figure]) for figure in ("loss_error", "gradient_error")
    )
    ends, all_layers = (formats[name]["log_ratio_error_rms"] for name in (ENDS_IN_BF16, "tensorwise"))
    return (
        f"**Does a point-wise loss survive?** FP8 moves a response's log-ratio by {min(errors):.2f} to "
        f"{max(errors):.2f} nats, where RAO has made it {formats['fp32']['log_ratio_rms']:.2f} nats (rms) and bf16 "
        f"moves it by {formats['bf16']['log_ratio_error_rms']:.2f}. Unlike a difference within a pair, a point-wise "
        "loss sees all of it, times β. That is noise that training bears where rewards differ by more; it does not "
        f"where they differ by less. With every layer in 8 bits, the loss is nearest to bf16's under {of_loss}, the "
        f"gradient under {of_gradient}. The first and the last layer in bf16, half of this model's, bring the "
        f"log-ratio's error under tensorwise scales from {all_layers:.2f} to {ends:.2f} nats. Delayed ones also drift, "
        f"by {formats['delayed']['start_rms']:.2f} nats within the first steps, with nothing learned, and by "
        f"{formats[UNCALIBRATED]['start_rms']:.2f} without calibration. Runs end at held-out losses from "
        f"{min(ended.values()):.3f} to {max(ended.values()):.3f} (below), fp32's at {ended['fp32']:.3f} and bf16's at "
        f"{ended['bf16']:.3f}: so few steps of one seed put the formats in no order. Choose `fp8_mxfp8` on Blackwell, "
        "`fp8_blockwise` or `fp8_tensorwise` on Hopper, and bf16 where rewards are close. fp16's row is its distance "
        "from bf16, which is bf16's own error. One seed and a small model: differences between recipes of a tenth mean "
        "nothing, and a response of n tokens has about √n times a token's error.\n"
    )


def _runs(report: _Figures) -> str:
    rows = [
        [
            label,
            f"{figures['run']['val_loss']:.4f}",
            f"{figures['run']['val_target_error']:.4f}",
            f"{figures['run']['val_margins']:.4f}",
            str(figures["run"]["steps_left_out"]),
        ]
        for label, figures in report["formats"].items()
    ]
    return (
        f"**{report['arguments']['steps']} steps of RAO in each format**, from W0, on the same batches, no prompt "
        "twice: held-out prompts at the end.\n\n"
        + _table(["format", "loss", "target error", "margin", "steps left out"], rows)
    )


if __name__ == "__main__":
    print(page(), end="")
