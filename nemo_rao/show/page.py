"""An inspection as one HTML file: no script, nothing loaded from elsewhere, every text from the data escaped."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from nemo_rao.show.charts import share, svg
from nemo_rao.show.inspection import Inspection, Setting
from nemo_rao.show.pieces import Kind, Piece, further_tokens, visible
from nemo_rao.show.report import DROPPED, IN_BETWEEN, KEPT, NOT_DRAWN, Chart, charts, reasons, remarks
from nemo_rao.show.rows import ShownResponse, ShownRow, left_out_text, reward_parts
from nemo_rao.show.style import STYLE

MARK = '<meta name="generator" content="nemo-rao show">'  # identifies pages that may be overwritten

_KINDS = {Kind.PROMPT: "p", Kind.TEMPLATE: "t", Kind.RESPONSE: "r", Kind.END: "e"}
_SERIES = {
    KEPT: "s-kept",
    DROPPED: "s-dropped",
    "chosen": "s-chosen",
    "rejected": "s-rejected",
    IN_BETWEEN: "s-between",
}


def page(seen: Inspection) -> Iterator[str]:
    """Generate the file's text, part by part."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    name = os.path.basename(seen.source.rstrip("/")) or seen.source
    yield (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{MARK}'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(name)} · nemo-rao show</title><style>{STYLE}</style></head><body><main>\n"
    )
    yield f'<p class="over">nemo-rao show · {_text(seen.recipe)}</p><h1>{_text(name)}</h1>'
    if name != seen.source:
        yield f'<p class="soft small mono">{_text(seen.source)}</p>'
    yield from _tiles(seen)
    yield from _counts(seen)
    for title, group in charts(seen):
        yield f"<h2>{_text(title)}</h2>"
        yield from _charts(group)
    yield "<h2>Rows as trained on</h2>"
    yield from _tools(seen)
    for row in seen.rows:
        yield from _row(row, seen)
    asked = {row.location for row in seen.rows}
    if others := [row for row in seen.dropped if row.location not in asked]:
        yield "<h2>First row dropped for each reason</h2>"
        for row in others:
            yield from _row(row, seen)
    yield "<h2>Settings</h2>"
    yield from _settings(seen.settings)
    yield "</main></body></html>\n"


def _text(text: str) -> str:
    return escape(visible(text), quote=True)


def _tiles(seen: Inspection) -> Iterator[str]:
    numbers, report = seen.numbers, seen.report
    steps, _, of_what = seen.steps.partition(" ") if seen.steps[0].isdigit() else ("", "", "")
    tiles = [
        (f"{seen.num_trained:,}", "prompts to train on"),
        (f"{report.rows_read - report.rows_kept:,}", f"of {report.rows_read:,} rows dropped"),
        (f"{len(numbers.responses):,}", "responses"),
        (f"{numbers.num_tokens:,}", "tokens of prompts with responses"),
    ]
    if of_what:
        tiles.append((steps, of_what))
    yield '<div class="tiles">'
    for value, label in tiles:
        yield f'<div class="card"><b>{_text(value)}</b><span class="soft small">{_text(label)}</span></div>'
    yield "</div>"
    if not of_what:
        yield f'<p class="notice">{_text(seen.steps)}</p>'


def _counts(seen: Inspection) -> Iterator[str]:
    report = seen.report
    kept = f"{report.rows_kept:,} of {report.rows_read:,} rows kept"
    if seen.num_trained != report.rows_kept:
        kept += f", and {seen.num_trained:,} of them drawn (data.num_prompts)"
    yield f'<h2>Kept and dropped rows</h2><div class="card"><p>{_text(kept)}</p>'
    yield share(report.rows_kept, report.rows_read)
    yield '<div class="reasons">'
    for reason, rows, example in reasons(report):
        yield f'<div class="reason"><b>{rows:,} dropped</b><div>{_text(reason)}'
        yield f'<div class="soft small">first: {_text(seen.short(example))}</div></div></div>'
    yield "</div>"
    if found := remarks(seen):
        yield '<ul class="remarks">' + "".join(f"<li>{_text(seen.short(remark))}</li>" for remark in found) + "</ul>"
    yield "</div>"


def _charts(group: Iterable[Chart]) -> Iterator[str]:
    group = list(group)
    several = [chart.histogram.counts for chart in group if len(chart.histogram.counts) > 1]
    if series := list(dict.fromkeys(name for counts in several for name in counts)):
        yield '<p class="keys small">'
        for name in series:
            yield f'<span><span class="k {_SERIES[name]}"></span>{_text(name)}</span>'
        yield "</p>"
    yield '<div class="charts">'
    for chart in group:
        drawing = svg(
            chart.histogram,
            classes=_SERIES,
            stacked=chart.is_stacked,
            mark_name="seq_length",
            label=f"{chart.title}: {chart.summary}",
        )
        yield f'<figure class="card"><h3>{_text(chart.title)}</h3>'
        yield f'<p class="soft small">{_text(chart.summary)}</p>{drawing}</figure>'
    yield "</div>"


def _tools(seen: Inspection) -> Iterator[str]:
    also = " (its log-probability is trained as well)" if seen.prompt_is_learned else ""
    template = "template and other turns" if seen.prompt_is_learned else "not learned: template, other turns"
    yield '<div class="keys tools">'
    for kind, name in (("p", f"prompt{also}"), ("t", template), ("r", "response"), ("e", "end token")):
        yield f'<span class="sample {kind}">{name}</span>'
    yield '<label class="small"><input type="checkbox" id="borders"> token boundaries</label>'
    yield '<label class="small"><input type="checkbox" id="whole"> full texts</label></div>'
    yield '<p class="soft small">Hover over a token to see its id.</p>'


def _row(row: ShownRow, seen: Inspection) -> Iterator[str]:
    yield f'<article class="card row"><header><h3>{_text(seen.short(row.location))}</h3>'
    if row.unused:
        yield f'<span class="soft small">unused fields: {_text(", ".join(row.unused))}</span>'
    yield "</header>"
    if row.problem is not None:
        yield f'<p class="notice"><b>dropped: {_text(row.problem[0])}.</b> {_text(seen.short(row.problem[1]))}</p>'
    if not row.is_drawn:
        yield f'<p class="notice">{NOT_DRAWN}</p>'
    if not row.responses:  # its record cannot be read
        yield "</article>\n"
        return
    size = "" if row.num_prompt_tokens is None else f'<span class="soft">{row.num_prompt_tokens:,} tokens</span>'
    yield f'<section class="part"><p class="head"><b>prompt</b>{size}</p>'
    yield _tokens(row.prompt, row.prompt_text, row.num_prompt_tokens, left_out=False)
    yield '</section><div class="answers">'
    for response in row.responses:
        yield f'<section class="part">{_head(response, row)}'
        left_out = response.left_out is not None
        yield _tokens(response.pieces, response.text, response.num_tokens, left_out=left_out) + "</section>"
    yield "</div></article>\n"


def _head(response: ShownResponse, row: ShownRow) -> str:
    parts = [f"<b>response {response.number}</b>"]
    if response.role:
        parts.append(f'<span class="badge {response.role}">{response.role} by {row.compared_by}</span>')
    if response.left_out is not None:
        parts.append(f'<span class="badge left">{_text(left_out_text(response))}</span>')
    if response.truncated:
        parts.append('<span class="badge cut">truncated</span>')
    parts += [f"<span>{_text(part)}</span>" for part in reward_parts(response, row)]
    if response.num_tokens is not None:
        parts.append(f'<span class="soft">{response.num_tokens:,} tokens</span>')
    if response.ended and response.pieces[-1].kind is Kind.END:
        parts.append(f'<span class="sample e">ends with {_text(response.pieces[-1].text)}</span>')
    if response.pieces and not response.ended:
        parts.append('<span class="soft">no end token</span>')
    return f'<p class="head">{"".join(parts)}</p>'


def _tokens(pieces: Sequence[Piece], text: str, num_tokens: int | None, *, left_out: bool) -> str:
    """A prompt's or response's tokens, or its text if the tokens are unknown."""
    if not pieces:
        return f'<div class="text{" out" if left_out else ""}">{_lines(text)}</div>'
    spans = [
        f'<span class="{_KINDS[piece.kind]}" data-t="{_text(_hint(piece))}">{_lines(piece.text)}</span>'
        for piece in pieces
    ]
    if further := further_tokens(pieces, num_tokens):
        spans.append(f" [… {further:,} more tokens; --full shows all …]")
    return f'<div class="text">{"".join(spans)}</div>'


def _hint(piece: Piece) -> str:
    """Tooltip of a token: "id 1234 · ' the'"."""
    ids = " + ".join(map(str, piece.ids))
    return f"{'id' if len(piece.ids) == 1 else 'ids'} {ids} · {piece.text!r}"


def _lines(text: str) -> str:
    """The text with its line breaks visible."""
    return _text(text).replace("\n", "<i></i>\n")


def _settings(settings: Sequence[Setting]) -> Iterator[str]:
    def table(shown: Iterable[Setting]) -> str:
        rows = (f'<tr><td>{_text(one.name)}</td><td class="mono small">{_text(one.value)}</td></tr>' for one in shown)
        return f"<table>{''.join(rows)}</table>"

    yield f'<div class="card">{table(one for one in settings if not one.is_default)}'
    if defaults := [one for one in settings if one.is_default]:
        yield f"<details><summary>{len(defaults)} keys with their defaults</summary>{table(defaults)}</details>"
    yield "</div>"
