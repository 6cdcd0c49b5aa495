"""Loading of prompts, as samples without responses, for runs that sample their own responses.

Prompts that leave no room for a response are dropped and counted, never truncated. Unused fields are counted as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemo_rao.batch import Row, Sample
from nemo_rao.data.dataset import ROWS_AT_ONCE, different_first_tokens
from nemo_rao.data.dropped import BoundaryError
from nemo_rao.data.encode import Encoder
from nemo_rao.data.rendering_record import ChatTemplate
from nemo_rao.data.report import LoadReport, Outcome
from nemo_rao.data.store import PreferenceData
from nemo_rao.errors import UserError
from nemo_rao.rows.prompts import read_prompts
from nemo_rao.rows.reading import Paths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RESPONSES = "responses in the file are not used, as the run samples its own"


def load_prompts(
    paths: Paths,
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int,
    set_by: str,
    strict: bool = False,
    needs_shared_first_token: bool = False,
    needed_by: str = "the objective",
    chat_template: ChatTemplate = "auto",
    template_arguments: Mapping[str, Any] | None = None,
    columns: Mapping[str, str] | None = None,
    ignore_fields: Sequence[str] = (),
    is_read: Callable[[str], bool] = lambda name: False,
) -> tuple[PreferenceData, list[Row]]:
    """Read, render and tokenize prompts.

    Args:
        paths: see :func:`nemo_rao.rows.reading.read_rows`; rows may also be prompts without responses.
        longest: tokens; a longer prompt is dropped and counted.
        set_by: where ``longest`` comes from, for messages.
        strict: stop at the first prompt that would be dropped.
        needs_shared_first_token, needed_by: see :func:`nemo_rao.data.dataset.load_preferences`.
        chat_template, template_arguments: see :class:`nemo_rao.data.encode.Encoder`.
        columns, ignore_fields: see :func:`nemo_rao.rows.reading.read_rows`.
        is_read: whether a field outside the prompt is read elsewhere, and therefore not counted as unused.

    Returns:
        the prompts as samples without responses, with their report; and as rows without responses, in the same order.

    Raises:
        UserError: a file cannot be read, a row has no prompt, the chat template rejects one, or no prompt is left.
    """
    encoder = Encoder(tokenizer, chat_template=chat_template, template_arguments=template_arguments)
    prompts = read_prompts(paths, columns=columns, ignore_fields=ignore_fields)
    report = LoadReport(notes=list(dict.fromkeys(encoder.notes)))
    rows: list[Row] = []
    samples: list[Sample] = []
    for start in range(0, len(prompts), ROWS_AT_ONCE):
        batch = prompts[start : start + ROWS_AT_ONCE]
        asked = [prompt.as_row() for prompt in batch]
        for prompt, row, sample in zip(batch, asked, encoder.encode_many(asked), strict=True):
            report.rows_read += 1
            report.not_used(name for name in (*prompt.unused, *prompt.carried) if not is_read(name))
            dropped = _why_dropped(row, sample, longest, set_by)
            if dropped is not None:
                if strict:
                    raise UserError(f"{dropped[1]} (strict: no row may be dropped)")
                report.drop(*dropped)
                continue
            assert isinstance(sample, Sample)
            if needs_shared_first_token and samples and sample.prompt[0] != samples[0].prompt[0]:
                raise different_first_tokens(samples[0], sample, tokenizer, needed_by)
            remarks = (*sample.remarks, *([_RESPONSES] if prompt.has_responses else []))
            report.keep(Outcome(row, row, sample, None, remarks=remarks), None)
            rows.append(row)
            samples.append(sample)
    if not samples:
        sources = ", ".join(map(str, [paths] if isinstance(paths, (str, os.PathLike)) else paths))
        raise UserError(f"{sources}: no prompt is left to sample from: {report}")
    return PreferenceData(samples, report), rows


def _why_dropped(row: Row, sample: Sample | UserError, longest: int, set_by: str) -> tuple[str, str] | None:
    """(reason, line with the location), or ``None`` to keep the prompt. Raises if the prompt is invalid."""
    if isinstance(sample, BoundaryError):
        return sample.reason, str(sample)
    if isinstance(sample, UserError):
        raise sample
    if len(sample.prompt) > longest:
        return (
            f"longer than {longest} tokens: {set_by}",
            f"{row.location}: the prompt has {len(sample.prompt)} tokens, more than {longest}: {set_by}",
        )
    return None
