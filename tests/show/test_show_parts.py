"""Pieces of tokens join to the text; histograms count every number."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rao.data.tokenizer import load_tokenizer
from nemo_rao.show.histogram import histogram, number, ticks
from nemo_rao.show.pieces import Kind, pieces_of, visible
from nemo_rao.show.terminal import axis, bars


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), st.integers(0, 60))
def test_pieces_join_to_the_text_of_all_tokens(tokenizer: str, text: str, split: int) -> None:
    made = load(tokenizer)
    ids = made(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
    kinds = [Kind.PROMPT if at < split else Kind.RESPONSE for at in range(len(ids))]
    pieces = pieces_of(ids, kinds, made.decode)
    assert [one for piece in pieces for one in piece.ids] == ids
    assert [piece.kind for piece in pieces for _ in piece.ids] == kinds
    if split >= len(ids):  # a change of kind may cut a character
        assert "".join(piece.text for piece in pieces) == text + "<|im_end|>"


_LOADED: dict[str, object] = {}


def load(folder: str):  # type: ignore[no-untyped-def]
    if folder not in _LOADED:
        _LOADED[folder] = load_tokenizer(folder)
    return _LOADED[folder]


def test_a_character_of_several_tokens_is_one_piece(tokenizer: str) -> None:
    made = load(tokenizer)
    ids = made("👧", add_special_tokens=False)["input_ids"]
    assert len(ids) == 4
    (piece,) = pieces_of(ids, [Kind.PROMPT] * 4, made.decode)
    assert piece.text == "👧" and list(piece.ids) == ids


def test_what_would_act_is_made_visible() -> None:
    assert (
        visible("a\x1b[31m\u202e\x00\ud800\r\n\t日本 👩\u200d👧")
        == "a\\x1b[31m\\u202e\\x00\\ud800\\r\n\t日本 👩\u200d👧"
    )


@given(
    st.lists(st.floats(-1e300, 1e300, allow_nan=False) | st.just(np.nan) | st.integers(-3, 9).map(float), max_size=50),
    st.lists(st.floats(-10, 10), max_size=20),
)
def test_every_known_number_is_in_one_bin(a: list[float], b: list[float]) -> None:
    made = histogram({"a": np.array(a), "b": np.array(b)})
    known = int(np.isfinite(a).sum()) if a else 0
    if made is None:
        assert not known and not b
        return
    assert made.counts["a"].sum() == known and made.counts["b"].sum() == len(b)
    assert np.all(np.diff(made.edges) > 0) and len(made.edges) < 120
    lines = [*bars(made.totals, 2), *axis(made, 2)]
    assert len(lines) == 5 and sum(character != " " for character in lines[2][::2]) == int((made.totals > 0).sum())
    assert all(made.label(bin) for bin in range(len(made.totals))) and len(ticks(made)) < 20


def test_grades_have_a_bar_each_and_lengths_reach_the_limit_they_come_near() -> None:
    grades = histogram({"a": np.array([1.0, 2, 2, 5])})
    assert grades is not None and grades.levels
    assert [(grades.label(bin), int(count)) for bin, count in enumerate(grades.totals)] == [
        *(("1", 1), ("2", 2), ("3", 0), ("4", 0), ("5", 1))
    ]
    near = histogram({"a": np.arange(0.0, 700.0)}, mark=1024, from_zero=True)
    far = histogram({"a": np.arange(0.0, 100.0)}, mark=1024, from_zero=True)
    beyond = histogram({"a": np.arange(0.0, 9000.0)}, mark=1024, from_zero=True)
    assert near is not None and near.edges[-1] >= 1024 and far is not None and far.edges[-1] <= 110
    assert beyond is not None and beyond.edges[-1] <= 2200 and beyond.is_cut == (False, True)
    assert beyond.totals.sum() == 9000 and beyond.label(len(beyond.totals) - 1).startswith("above ")


@pytest.mark.parametrize(("value", "text"), [(1234.0, "1,234"), (0.25, "0.25"), (-3.14159e-5, "-3.142e-05"), (0, "0")])
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text
