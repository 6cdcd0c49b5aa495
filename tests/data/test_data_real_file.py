"""Real answers and a judge's scores, in UltraFeedback's shape. Skipped where the file is not at hand."""

from pathlib import Path

import numpy as np
import pytest

from nemo_rao.data.collate import collate
from nemo_rao.data.dataset import load_preferences
from nemo_rao.data.encode import Encoder
from nemo_rao.rows.reading import read_rows

FILE = Path(__file__).parents[3] / "shared" / "data" / "alpacaeval_k4_shared.jsonl.gz"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"{FILE.name} is not here")


@pytest.fixture(scope="module")
def rows():
    return list(read_rows(FILE))


def test_every_row_has_four_scored_answers(rows):
    assert len(rows) == 403
    assert {len(row.responses) for row in rows} == {4}
    rewards = np.array([[response.reward for response in row.responses] for row in rows], dtype=np.float64)
    assert rewards.min() >= 0 and rewards.max() <= 1
    assert not any(row.ranked for row in rows)


def test_every_kept_answer_is_found_again_in_its_tokens(rows, tokenizers):
    data = load_preferences(
        FILE,
        tokenizers["own"],
        seq_length=2048,
        num_responses=2,
        min_responses=2,
        needs_rewards=True,
        needs_shared_first_token=True,
        needed_by="objective rao",
    )
    assert data.report.rows_read == 403
    assert data.report.rows_kept == len(data) == 403 - sum(data.report.dropped.values()) > 200
    assert data.max_length <= 2048 and data.num_responses == 2 * len(data)
    by_place = {row.location: row for row in rows}
    for sample in data:
        row = by_place[sample.location]
        assert tokenizers["own"].decode(sample.prompt) == f"<|begin|><|user|>{row.prompt}<|end|><|assistant|>"
        for response, tokens in zip(row.responses, sample.responses, strict=False):
            assert tokenizers["own"].decode(tokens) == f"{response.content}<|end|>"
    kept = [by_place[sample.location] for sample in data]
    expected = np.mean([np.mean([response.reward for response in row.responses[:2]]) for row in kept])
    assert data.reward_summary().mean == pytest.approx(expected)


@pytest.mark.parametrize("name", ["chatml", "llama_3"])
def test_boundaries_equal_those_of_apply_chat_template(name, rows, tokenizers):
    tokenizer = tokenizers[name]
    encoder = Encoder(tokenizer)
    for row, sample in zip(rows[:20], encoder.encode_many(rows[:20]), strict=True):
        messages = [{"role": "user", "content": row.prompt}]
        assert sample.prompt.tolist() == tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        for response, tokens in zip(row.responses, sample.responses, strict=True):
            whole = tokenizer.apply_chat_template(
                [*messages, {"role": "assistant", "content": response.content}], return_dict=False
            )
            end = len(whole) - whole[::-1].index(encoder.end_token_id)
            assert whole[:end] == [*sample.prompt, *tokens]


def test_packed_batches_hardly_compute_padding_and_shared_prompts_save_what_they_are(tokenizers):
    data = load_preferences(FILE, tokenizers["own"], seq_length=2048)

    def tokens(**layout: bool) -> tuple[int, int, int]:
        """Of the rows, computed, and computed with padding, over a pass in micro-batches of two prompts."""
        batches = [
            collate([data[i], data[i + 1]], [data.response_offset(i), 0], pad_token_id=0, pad_multiple=16, **layout)
            for i in range(0, len(data) - 1, 2)
        ]
        return (
            sum(batch.num_row_tokens for batch in batches),
            sum(batch.num_tokens for batch in batches),
            sum(batch.tokens.numel() for batch in batches),
        )

    of_rows, computed, with_padding = tokens()
    assert of_rows == computed and computed / with_padding < 0.8
    for shared in (False, True):
        same_rows, computed, with_padding = tokens(packed=True, shared_prompts=shared)
        assert same_rows == of_rows and computed / with_padding >= 0.95
        prompts = sum((len(s.prompt) - 1) * (len(s.responses) - 1) for s in list(data)[: len(data) // 2 * 2])
        assert of_rows - computed == prompts * shared
