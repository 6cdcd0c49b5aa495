"""Rows of a file as the model of a trained run reads them: with its template, tokenizer and length limit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_rao.batch import Row, Sample
from nemo_rao.config.precision_checks import sequence_multiple
from nemo_rao.config.run_config import RunConfig
from nemo_rao.data.encode import BoundaryError, Encoder, load_tokenizer, pad_token_id
from nemo_rao.engines.engine import engine_of
from nemo_rao.errors import UserError
from nemo_rao.scoring.run import OPTIONS
from nemo_rao.scoring.scorer import NoScore

if TYPE_CHECKING:
    from nemo_rao.data.store import PreferenceData


# Remarks about rows; each is printed after a number of rows.
AS_TRAINED = "have responses marked as truncated, which are scored without an end token, as in the model's training"
NOT_AS_TRAINED = (
    "have responses marked as truncated, which are scored without an end token; the model was trained without such "
    "responses (data.truncated=drop)"
)


@dataclass(frozen=True)
class Limit:
    """Maximum length of prompt and response, ``tokens``, and the setting that it comes from, for messages."""

    tokens: int
    set_by: str

    def lacks(self, num_tokens: int) -> NoScore:
        return NoScore(f"longer than {self.set_by}", f"{num_tokens} tokens")


@dataclass
class Tokenized:
    """Rows in tokens, and the responses that the model cannot read.

    Attributes:
        data: prompts with the responses that can be read.
        pad_token_id: padding token of the tokenizer.
        numbers: for each response in ``data``, in order, its (row, response) indices.
        lacks: (row, response) -> why the response is not in ``data``.
        remarks: row -> remarks to be counted.
        notes: remarks about the tokenizer and its chat template.
    """

    data: PreferenceData
    pad_token_id: int
    numbers: list[tuple[int, int]] = field(default_factory=list)
    lacks: dict[tuple[int, int], NoScore] = field(default_factory=dict)
    remarks: dict[int, Sequence[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def length_limit(config: RunConfig, run: str, max_length: int | None) -> Limit:
    """Return the limit of ``--max-length``, or else the length that the run was trained with.

    Nothing is checked if the model's context is unknown; positions can be computed for any length.

    Raises:
        UserError: ``--max-length`` is beyond the model's context.
    """
    trained = config.model.seq_length
    if max_length is None:
        return Limit(trained, f"model.seq_length={trained}, with which {run} was trained (--max-length raises it)")
    longest = context_length(config) if max_length > trained else None
    if longest is not None and max_length > longest:
        raise UserError(f"--max-length {max_length}: the context of {run}'s model is {longest} tokens. Lower it.")
    return Limit(max_length, f"--max-length {max_length}")


def context_length(config: RunConfig) -> int | None:
    """Return the number of tokens that the network's positions are made for: at least its training length.

    A checkpoint does not state it. Learned positions end at the training length. Otherwise it comes from the
    config.json beside an imported model's tokenizer, or from the defaults of the class ``model.config_class``. The
    defaults of a family's base class describe no particular model: ``None``.
    """
    engine, trained = engine_of(config), config.model.seq_length
    engine.load()
    made = engine.model_config(config)
    if made.position_embedding_type == "learned_absolute":
        return trained
    with_tokenizer = Path(config.data.tokenizer or "").expanduser() / "config.json"
    found = json.loads(with_tokenizer.read_text()) if with_tokenizer.is_file() else {}
    if found.get("hidden_size") == made.hidden_size and "max_position_embeddings" in found:
        return max(trained, int(found["max_position_embeddings"]))
    if config.model.config_class is None:
        return None
    of_class = next(one.default for one in dataclasses.fields(type(made)) if one.name == "seq_length")
    assert isinstance(of_class, int)
    return max(trained, of_class)


def with_length(config: RunConfig, num_tokens: int) -> RunConfig:
    """Return the recipe for sequences of ``num_tokens``, rounded up to what its parallelism needs."""
    multiple = sequence_multiple(config)
    model = replace(config.model, seq_length=-(-num_tokens // multiple) * multiple)
    return replace(config, model=model)


def tokenize(rows: Sequence[Row], config: RunConfig, limit: Limit) -> Tokenized:
    """Render the responses as in the run's training, and keep those within the limit."""
    from nemo_rao.data.dataset import ROWS_AT_ONCE
    from nemo_rao.data.store import PreferenceData

    keys = config.data
    encoder = Encoder(
        load_tokenizer(keys.tokenizer or ""),
        chat_template=keys.chat_template,  # type: ignore[arg-type]
        template_arguments=keys.template_arguments,
        answers=keys.answers,  # type: ignore[arg-type]
    )
    made = Tokenized(PreferenceData(iter(())), pad_token_id(encoder.tokenizer))

    def samples() -> Iterator[Sample]:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            batch = rows[start : start + ROWS_AT_ONCE]
            for at, encoded in enumerate(_encode(encoder, batch), start):
                kept: list[_Encoded] = []
                remarks: list[str] = []
                for number, one in enumerate(encoded):
                    if isinstance(one, _Encoded) and one.num_tokens > limit.tokens:
                        one = limit.lacks(one.num_tokens)
                    if isinstance(one, NoScore):
                        made.lacks[at, number] = one
                    else:
                        made.numbers.append((at, number))
                        kept.append(one)
                        remarks += one.sample.remarks
                        if rows[at].responses[number].truncated:
                            remarks.append(AS_TRAINED if keys.truncated == "without_end" else NOT_AS_TRAINED)
                if kept:
                    made.remarks[at] = list(dict.fromkeys(remarks))
                    yield _unrewarded(kept)

    made.data = PreferenceData(samples())
    made.notes = list(dict.fromkeys(encoder.notes))
    return made


@dataclass(frozen=True)
class _Encoded:
    """A response in tokens: a sample and the response's index in it."""

    sample: Sample
    number: int

    @property
    def num_tokens(self) -> int:
        """Number of tokens of prompt and response."""
        return len(self.sample.prompt) + len(self.sample.responses[self.number])


def _encode(encoder: Encoder, rows: Sequence[Row]) -> list[list[_Encoded | NoScore]]:
    """Encode each row's responses, or return why they cannot be read."""
    wanted = [replace(row, responses=tuple(replace(one, weight=1.0) for one in row.responses)) for row in rows]
    return [_of_responses(encoder, *pair) for pair in zip(wanted, encoder.encode_many(wanted), strict=True)]


def _of_responses(encoder: Encoder, row: Row, encoded: Sample | UserError) -> list[_Encoded | NoScore]:
    if isinstance(encoded, Sample):
        return [_Encoded(encoded, number) for number in range(len(row.responses))]
    if len(row.responses) > 1:  # perhaps only one of them cannot be read
        single = [replace(row, responses=(response,)) for response in row.responses]
        return [one for responses in _encode(encoder, single) for one in responses]
    reason = encoded.reason if isinstance(encoded, BoundaryError) else "cannot be rendered as in the run's training"
    detail = OPTIONS(str(encoded).removeprefix(f"{row.location}: "))
    return [NoScore(reason, detail.replace("response 1", "the response"))]  # the caller adds its number


def _unrewarded(kept: Sequence[_Encoded]) -> Sample:
    """A sample with some of a prompt's responses, without the fields that the file has for them."""
    import numpy as np

    answers = [one.sample.answers[one.number] for one in kept if one.sample.answers is not None]
    return Sample(
        prompt=kept[0].sample.prompt,
        responses=tuple(one.sample.responses[one.number] for one in kept),
        rewards=np.full(len(kept), np.nan),
        ranked=False,
        location=kept[0].sample.location,
        ensemble=np.zeros((len(kept), 0)),
        reference_rewards=np.zeros(0),
        answers=tuple(answers) or None,
    )
