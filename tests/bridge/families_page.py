"""docs/families.md, generated from the models that the tests convert and compare:

python -m tests.bridge.families_page > docs/families.md
"""

from __future__ import annotations

from nemo_rao.config.families import family_of_model_type
from nemo_rao.hugging_face.families import FAMILIES

from .layouts import LAYOUTS, VARIANTS
from .models import MODELS

_BEFORE = """\
# Families of models

This page lists the models that [`nemo-rao import-hf` and `export-hf`](guides/hugging_face.md) convert with
Megatron-Bridge, without Transformer Engine. It is generated from the tests
(`python -m tests.bridge.families_page > docs/families.md`). For each row, a test creates a model with random weights in
transformers. At {layouts}, its log-probabilities in Megatron equal those of transformers to
1e-4, and import followed by export returns its weights bit for bit.
Batch layouts: {variants}.

| model | architecture | `model.family` | NeMo's engine converts it |
|---|---|---|---|
"""
_AFTER = """
For mixtures of experts, the second layout also uses expert parallelism over 2 ranks. gpt-oss requires
`model.expert_tensor_parallel_size=1`, because its experts have biases.

The following are refused by name, in one line:

- other architectures, and unknown keys of config.json or values that the networks above do not support
- soft-capped logits (Gemma 2), quantized weights (published gpt-oss: use a bf16 copy), rotary scaling of Gemma 3
- Llama 3's rotary scaling with values other than `low_freq_factor` 1, `high_freq_factor` 4 and 8192 tokens, which are
  fixed in Megatron-Bridge
- without Transformer Engine: multi-latent or linear attention, shared experts, experts in some layers only, multi-token
  prediction
"""


def page() -> str:
    """The whole page."""
    rows = []
    for name, given in MODELS.items():
        family = next(family for family in FAMILIES if family.model_type == given["model_type"])
        known = family_of_model_type(family.model_type)
        assert known is not None
        nemo = "yes" if family.nemo_model is not None else "no"
        rows.append(f"| {name} | {family.architecture} | `{known.name}` | {nemo} |\n")
    before = _BEFORE.format(variants=", ".join(VARIANTS), layouts=" and ".join(LAYOUTS))
    return before + "".join(rows) + _AFTER


if __name__ == "__main__":
    print(page(), end="")
