"""Token ids as pieces of text, so that every boundary between tokens can be shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

Decode = Callable[[Sequence[int]], str]

_UNFINISHED = "\ufffd"  # decoders return it for bytes of an incomplete character
_LONGEST_CHARACTER = 8  # tokens; longer incomplete characters are shown as they are
_BEGINNING = 100  # characters used to find a message of which only the beginning is shown
_KEPT_INVISIBLE = {"\n", "\t", " ", "\u200c", "\u200d"}  # joiners are parts of emoji and of several scripts


class Kind(Enum):
    """Role of a token in training."""

    PROMPT = "prompt"  # content of a prompt message
    TEMPLATE = "template"  # chat template around messages, or a later turn that is not the assistant's
    RESPONSE = "response"  # its log-probability is trained
    END = "end"  # the token that ends the response, also trained


@dataclass(frozen=True)
class Piece:
    """One token, or several that only together form complete characters."""

    text: str
    ids: tuple[int, ...]
    kind: Kind


def pieces_of(ids: Sequence[int], kinds: Sequence[Kind], decode: Decode) -> list[Piece]:
    """Split tokens into pieces of text, in order; joined, they give the whole text.

    Tokens are decoded together with the previous piece, since SentencePiece decoders drop the space before the first
    token. A piece never contains tokens of different kinds.

    Args:
        ids: token ids.
        kinds: kind of each token.
        decode: ids -> text, including special tokens.
    """
    assert len(ids) == len(kinds)
    pieces: list[Piece] = []
    start = 0
    for end in range(1, len(ids) + 1):
        is_last = end == len(ids) or kinds[end] is not kinds[start]
        before = pieces[-1].ids if pieces else ()
        known = decode(before) if before else ""
        text = decode((*before, *ids[start:end]))[len(known) :]
        if text.endswith(_UNFINISHED) and not is_last and end - start < _LONGEST_CHARACTER:
            continue
        pieces.append(Piece(text, tuple(int(one) for one in ids[start:end]), kinds[start]))
        start = end
    return pieces


def further_tokens(pieces: Sequence[Piece], num_tokens: int | None) -> int:
    """Number of tokens of a prompt or response that follow the pieces to show; 0 if there are no pieces.

    Args:
        num_tokens: tokens of the whole prompt or response.
    """
    return num_tokens - sum(len(piece.ids) for piece in pieces) if pieces and num_tokens is not None else 0


def runs(pieces: Sequence[Piece]) -> Iterator[tuple[Kind, str]]:
    """Merge neighbouring pieces of the same kind into one text."""
    kind: Kind | None = None
    text: list[str] = []
    for piece in pieces:
        if piece.kind is not kind:
            if kind is not None:
                yield kind, "".join(text)
            kind, text = piece.kind, []
        text.append(piece.text)
    if kind is not None:
        yield kind, "".join(text)


def kinds_of_prompt(pieces: Sequence[Piece], contents: Sequence[str], *, cut: bool = False) -> list[Piece]:
    """Mark the pieces of a prompt that are outside the messages' contents as template.

    Args:
        contents: contents of the messages, in order; those not found are skipped.
        cut: whether the pieces end before the prompt does.
    """
    text = "".join(piece.text for piece in pieces)
    spans, at = [], 0
    for content in contents:
        wanted = content.strip()
        found = text.find(wanted, at)
        if found < 0 and cut:
            found = text.find(wanted[:_BEGINNING], at)
        if wanted and found >= 0:
            at = found + len(wanted)
            spans.append((found, at))
    if not spans:
        return list(pieces)
    marked, start = [], 0
    for piece in pieces:
        end = start + len(piece.text)
        inside = any(start < last and end > first for first, last in spans)
        marked.append(Piece(piece.text, piece.ids, Kind.PROMPT if inside else Kind.TEMPLATE))
        start = end
    return marked


def visible(text: str) -> str:
    """Escape characters that a terminal or page would interpret instead of showing, as in Python (``\\x1b``): control
    characters, marks that change the writing direction, halves of surrogate pairs."""
    return "".join(
        one if one.isprintable() or one in _KEPT_INVISIBLE else one.encode("unicode_escape").decode() for one in text
    )
