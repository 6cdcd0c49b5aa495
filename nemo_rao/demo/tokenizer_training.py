"""Training of a small byte-level tokenizer, for runs that start without a model.

It can encode any text without an unknown token. Its chat template puts a special token before and after every message,
so that no merge crosses a boundary:

    <|begin|><|user|>Sort: b a<|end|><|assistant|>a b<|end|>
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from nemo_rao.batch import Row
from nemo_rao.errors import UserError

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = (PAD, BEGIN, END, *(f"<|{role}|>" for role in ROLES))  # numbered from 0
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], folder: str | os.PathLike[str], vocab_size: int = 512) -> None:
    """Train a byte-level BPE and save it for ``AutoTokenizer.from_pretrained(folder)``.

    Args:
        texts: training texts. The same texts give the same tokenizer.
        folder: output directory, created if missing.
        vocab_size: number of tokens, including special ones; small corpora may give fewer. At least 262.

    Raises:
        UserError: ``vocab_size`` is too small for the bytes and the special tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"vocab_size is {vocab_size}, but a byte-level tokenizer needs at least {SMALLEST_VOCABULARY} "
            f"(256 bytes and {len(SPECIAL_TOKENS)} special tokens)"
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Plain text also begins with t0, so that RAO can use data without a chat template.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, SPECIAL_TOKENS.index(BEGIN))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1 << 20,
    ).save_pretrained(os.fspath(folder))


def texts_of_rows(rows: Iterable[Row]) -> Iterator[str]:
    """All texts of the rows, prompts and responses."""
    for row in rows:
        if isinstance(row.prompt, str):
            yield row.prompt
        else:
            yield from (message["content"] for message in row.prompt if message["content"])
        yield from (response.content for response in row.responses)
