"""docs/precision.md, from benchmarks/results/precision.json: `make precision-page`.

The text here does not depend on the figures; every number in a table is read from the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from benchmarks.markdown import markdown_table
from benchmarks.precision import ENDS_IN_BF16, UNCALIBRATED
from benchmarks.results import FOLDER

_Figures = Mapping[str, Any]

BEFORE = """\
# Precision

`precision=NAME` selects a file of `conf/precision/`; `precision.KEY=VALUE` changes a key. `make precision-page`
generates this page from the figures in `benchmarks/results/precision.json`.

| file | weights and activations | products of the linear layers | GPUs | for |
|---|---|---|---|---|
| `fp32` | fp32 | fp32 | any | CPUs and comparisons |
| `bf16_mixed` | bf16 | bf16 | Ampere and later | the default choice on GPUs |
| `fp16_mixed` | fp16 | fp16 | any | GPUs without bf16; the loss is scaled |
| `fp8_delayed` | bf16 | e4m3, gradients e5m2; scales of earlier batches | Ada, Hopper and later | the fastest casts |
| `fp8_delayed_e4m3` | bf16 | e4m3; scales of earlier micro-batches | Ada, Hopper and later | comparisons |
| `fp8_tensorwise` | bf16 | e4m3, gradients e5m2; one scale per tensor | Ada, Hopper and later | Hopper |
| `fp8_blockwise` | bf16 | e4m3; one scale per 1 × 128 or 128 × 128 values | Hopper and later | Hopper, finer scales |
| `fp8_mxfp8` | bf16 | e4m3; one scale per 32 values | data-center Blackwell | Blackwell |

With all of them, master weights and optimizer are in fp32. FP8 applies to the four linear layers of each transformer
layer; embedding, norms, attention, output layer, log-probabilities and loss are never in 8 bits. FP8 needs Transformer
Engine, which NVIDIA's [containers](guides/containers.md) include.

## Keys

| `precision.` | meaning |
|---|---|
| `fp8` | `hybrid`: gradients in e5m2, which has more range and fewer digits; `e4m3`: everything in e4m3; \
`null`: no FP8 |
| `fp8_recipe` | `delayed`, `tensorwise`, `blockwise`, `mxfp8`: how scales are computed |
| `fp8_amax_history_len`, `fp8_amax_compute_algo` | delayed: number of micro-batches in the amax history, \
and whether its largest or its last value is used |
| `fp8_margin` | delayed: powers of 2 by which scales stay below the largest possible one |
| `fp8_wgrad` | delayed: `false` computes gradients of weights in bf16 |
| `fp8_param_gather` | weights are kept in FP8, without bf16 copies, and gathered in FP8 over data-parallel ranks; \
needs the distributed optimizer |
| `first_last_layers_bf16`, `num_layers_at_start_in_bf16`, `num_layers_at_end_in_bf16` | layers kept in bf16; not with \
delayed, which Megatron cannot switch on and off within a pass |
| `fp8_simulation` | rounds to 8 bits in PyTorch, without Transformer Engine: to study accuracy, not for speed |
| `fp16_loss_scale`, `fp16_initial_loss_scale`, ... | loss scale of fp16; dynamic if `null` |

Unsupported settings are refused in one line, with exit code 2, before anything heavy starts: a recipe that the GPUs of
this machine, of `nemo-rao plan --gpu`, or of a cluster file (`cluster.gpu: h100`, before a job is submitted) do not
support; sizes that are not multiples of 16 (32 for MXFP8) on each tensor-parallel rank; FP8 without Transformer Engine.
Sequences are padded to these multiples, with sequence parallelism on each rank's part.

## What preference training needs

**The reference uses the policy's quantization.** An implicit reward is β (log π_θ − log π_ref). If the two are rounded
differently, the difference adds a spurious reward. The reference pass therefore runs in the number format of the run,
which is part of its cache key.

**Scales are calibrated before the reference pass.** Delayed scaling starts with scale 1 and derives each next scale
from the values it has seen. With scale 1, a weight of 0.02 is among the smallest numbers of e4m3 and loses digits.
Pre-training recovers from its first micro-batches, but a reference computed with such scales would remain in the loss.
Before the reference pass, forward passes over the first step's micro-batches are therefore repeated until their results
stop changing, and the scales are kept for the first step. In that step, log π_θ − log π_ref is exactly 0 with `max`
over a history longer than a few steps' micro-batches; `most_recent` changes scales within the step. Scales of gradients
are not calibrated: the smallest gradients of the first micro-batch round to 0, as in pre-training.

**The first step checks the reference.** Before a weight has changed, policy and reference are the same model, so
log-ratios consist only of rounding errors. In its first step, a run compares prompts and responses, in nats per square
root of a token, reports the result in one line, and stops with exit code 2 above these limits:

| number format | root mean square over rows | largest row |
|---|---:|---:|
| fp32 | 1e-4 | 1e-3 |
| fp16, bf16; fp32 with Transformer Engine, which multiplies in TF32 | 0.1 | 1 |
| FP8 | 0.3 | 3 |

Mixtures of experts use the limits of the next row, as a token whose experts are nearly tied may be routed differently.
With dropout, nothing is checked. The limits are about ten times the error of a token in the tables below, because real
networks are deeper than the measured one and a reference may have been computed under another parallelism. The
reference of other rows or of another network is off by whole nats.

**Evaluation leaves quantizer state unchanged.** Casts record the values they see. The reference pass, validation and
scoring restore every module's amax history bit for bit, so a run does not depend on how often it is validated.
Checkpoints contain scales and histories (`_extra_state`), and a resumed run continues bit for bit. LoRA checkpoints
contain only adapters, so LoRA with `delayed` is refused.

**Effect of other rows.** With `tensorwise`, a row is rounded with the largest value of its micro-batch, so its
log-probability depends slightly on the other rows (*other rows* below). With the other recipes and in bf16, it depends
on them only through the order of summation, whose small differences 8-bit rounding can amplify.

**fp16.** A step whose gradients overflow is skipped and halves the loss scale. As preference runs have few steps,
choose an initial scale that does not overflow (`fp16_initial_loss_scale`). NeMo lets Megatron divide gradients by the
scale without multiplying the loss by it; nemo_rao multiplies the loss.

"""

NOT_SHOWN = """\
## On GPUs

None of this has been run on a GPU with Transformer Engine yet, as none has been available. A GPU differs from the
simulation: with some recipes, products accumulate in lower precision than fp32 (Hopper's fast accumulation in the
forward pass with `tensorwise`), weights are cast once per step, and blocks along tokens are formed before a split
sequence is gathered. This command runs the same probe and 20 RAO steps in bf16 and in each recipe that the GPU
supports, and lists the unsupported ones:

```
python -m benchmarks.precision --gpu
```

`nemo-rao plan` does not model the time and memory of FP8: it plans for bf16 and reports this.
"""


def page() -> str:
    report = json.loads((FOLDER / "precision.json").read_text())
    parts = [BEFORE, _measured(report), _meaning(report), _runs(report), NOT_SHOWN]
    return "\n".join(part.strip() + "\n" for part in parts)


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
            "`python -m benchmarks.precision` measures how far each format is from a finer one: bf16 from fp32, and "
            "all others from bf16. `make precision` repeats it. The model is a Llama of 4 layers and 256 channels on "
            f"one rank, fine-tuned for {given['sft_steps']} steps on the demo's letter puzzles (weights W0) "
            f"and aligned with RAO for {given['steps']} steps in fp32 (weights W1). Weights and prompts are the same "
            f"in every format. {report['device']}, {report['date']}, commit {report['commit']}.\n",
            "| column | error of |\n|---|---|\n"
            "| tokens, responses | log-probabilities at W0, in nats |\n"
            "| log-ratio | log π_W1 − log π_W0, in nats, with W0's from the run's own reference pass |\n"
            "| loss | RAO's loss at W1, relative |\n"
            "| gradient, cosine | RAO's gradient at W1: relative distance, and cosine of the angle |\n",
            "*Ends in bf16* keeps the first and the last layer in bf16.\n",
            markdown_table(["format", *(title for title, _ in names), "cosine"], rows),
            "",
            "The second table lists log-ratios that should be 0, those of an untrained policy, in nats, rms over "
            "responses. *Drift*: after its scales have seen the batches of the first two steps. *Other rows*: with "
            "other rows in its micro-batch. The last column is the log-ratio after RAO, for comparison.\n",
            markdown_table(["format", "drift", "other rows", "log-ratio at W1"], start),
        ]
    )


def _meaning(report: _Figures) -> str:
    """The consequences for a pointwise loss, with the file's numbers."""
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
        "**Is FP8 precise enough for a pointwise loss?** FP8 changes a response's log-ratio by "
        f"{min(errors):.2f} to {max(errors):.2f} nats (rms), bf16 by {formats['bf16']['log_ratio_error_rms']:.2f}. "
        f"After RAO it is {formats['fp32']['log_ratio_rms']:.2f} nats. A pairwise loss sees only differences within a "
        "pair; a pointwise loss sees the whole error, times β. Training tolerates the error only if rewards differ by "
        "more than that.\n\n"
        f"With all layers in 8 bits, the loss is closest to bf16's with {of_loss}, the gradient with {of_gradient}. "
        "Keeping the first and the last layer, half of this model's layers, in bf16 reduces the log-ratio's error with "
        f"tensorwise scales from {all_layers:.2f} to {ends:.2f} nats. Delayed scales also drift, by "
        f"{formats['delayed']['start_rms']:.2f} nats within the first steps without any training, and by "
        f"{formats[UNCALIBRATED]['start_rms']:.2f} without calibration. Runs end at held-out losses between "
        f"{min(ended.values()):.3f} and {max(ended.values()):.3f} (below), fp32 at {ended['fp32']:.3f} and bf16 at "
        f"{ended['bf16']:.3f}; so few steps with one seed do not rank the formats.\n\n"
        "**Choose** `fp8_mxfp8` on Blackwell, `fp8_blockwise` or `fp8_tensorwise` on Hopper, and bf16 where rewards "
        "are close. The error of fp16 is measured relative to bf16 and is mostly that of bf16. With one seed and a "
        "small model, differences of a tenth between formats are not significant. A response of n tokens has about √n "
        "times the error of a token.\n"
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
        f"**{report['arguments']['steps']} steps of RAO in each format**, from W0 and on the same batches, each prompt "
        "once. Figures are for held-out prompts after the last step.\n\n"
        + markdown_table(["format", "loss", "target error", "margin", "skipped steps"], rows)
    )


if __name__ == "__main__":
    print(page(), end="")
