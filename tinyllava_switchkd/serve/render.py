"""The demo's HTML. All text from users or models is escaped here, and only here."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

from tinyllava_switchkd.serve.engine import Reply
from tinyllava_switchkd.serve.pool import Slot

_WITHOUT_REPLY = {"waiting": "waiting …", "working": "reading …<span class=tl-caret></span>", "done": "no answer"}
_ENDINGS = {"length": "cut at the maximum length", "time": "cut at the time limit", "stopped": "stopped"}


@dataclass
class Cell:
    """One model's answer to one question.

    Attributes:
        index: the model's index in the pool.
        name: the model's display name.
        reply: its answer so far; None while it waits or if it gave none.
        error: the error message if it failed.
        state: "waiting" for the models before it, "working", or "done".
    """

    index: int
    name: str
    reply: Reply | None = None
    error: str | None = None
    state: str = "waiting"


@dataclass
class Exchange:
    """A question, its images, and every model's answer."""

    question: str
    thumbnails: tuple[str, ...] = ()
    cells: list[Cell] = field(default_factory=list)


def escape(text: str) -> str:
    """Escape text for HTML.

    Braces, dollar signs, backticks and backslashes are escaped, too: Gradio fills in templates in HTML values.
    """
    escaped = html.escape(text, quote=True)
    for char in "{}$`\\":
        escaped = escaped.replace(char, f"&#{ord(char)};")
    return escaped


def header(slots: Sequence[Slot]) -> str:
    """The title and the state of each model."""
    return (
        "<div class='tl-header'><h1>TinyLLaVA <span>Switch-KD</span></h1>"
        "<p>Ask a small vision-language model about an image, and see where it looks.</p>"
        f"<div class='tl-models' role='status'>{''.join(map(_model, slots))}</div></div>"
    )


def _model(slot: Slot) -> str:
    if slot.model is not None:
        detail = f"{_count(slot.model.num_parameters)} parameters"
    elif slot.error is not None:
        detail = f"could not be loaded: {slot.error}"
    elif slot.state == "loading":
        detail = f"loading, {slot.seconds:.0f} s"
    else:
        detail = "waiting to be loaded"
    return (
        f"<span class='tl-model tl-{slot.state}'><i></i><b>{escape(slot.name)}</b><span>{escape(detail)}</span></span>"
    )


def transcript(exchanges: Sequence[Exchange]) -> str:
    """The conversation, in a column-reverse box that keeps the newest exchange in view."""
    if not exchanges:
        return (
            "<div class='tl-chat'><div class='tl-empty'><b>Nothing asked yet</b>"
            "<p>Upload or paste an image, or pick an example, then ask a question. "
            "Follow-up questions remember what was said before.</p></div></div>"
        )
    return f"<div class='tl-chat'><div class='tl-turns'>{''.join(map(_exchange, exchanges))}</div></div>"


def _exchange(exchange: Exchange) -> str:
    images = "".join(f"<img src='{source}' alt='image of the question'>" for source in exchange.thumbnails)
    answers = "".join(map(_cell, exchange.cells))
    return (
        f"<section class='tl-turn'><div class='tl-ask'>{images}<p>{escape(exchange.question)}</p></div>"
        f"<div class='tl-answers'>{answers}</div></section>"
    )


def _cell(cell: Cell) -> str:
    if cell.error is not None:
        body = f"<p class='tl-text tl-error'>{escape(cell.error)}</p>"
    elif cell.reply is None:
        body = f"<p class='tl-text tl-muted'>{_WITHOUT_REPLY[cell.state]}</p>"
    else:
        is_growing = cell.reply.finish is None
        text = escape(cell.reply.text) or ("" if is_growing else "<i class='tl-muted'>empty answer</i>")
        body = f"<p class='tl-text'>{text}{'<span class=tl-caret></span>' if is_growing else ''}</p>"
    return (
        f"<article class='tl-answer'><h3>{escape(cell.name)}</h3>{body}"
        f"<footer>{''.join(f'<span>{note}</span>' for note in _notes(cell.reply))}</footer></article>"
    )


def _notes(reply: Reply | None) -> list[str]:
    if reply is None or reply.first_token is None:
        return []
    notes = [f"<b>{_seconds(reply.first_token)}</b> to first token"]
    if reply.rate is not None:
        notes.append(f"<b>{reply.rate:.1f}</b> tokens/s")
    count = len(reply.token_ids)
    notes.append(f"<b>{count}</b> token{'' if count == 1 else 's'}")
    if reply.finish in _ENDINGS:
        notes.append(_ENDINGS[reply.finish])
    return notes


def notice(text: str, kind: str = "info") -> str:
    """A message to the user; `kind` is "info" or "error"."""
    if not text:
        return ""
    role = "alert" if kind == "error" else "status"
    return f"<div class='tl-notice tl-{kind}' role='{role}'>{escape(text)}</div>"


def token_caption(token: int | None, tokens: Sequence[str], share: float) -> str:
    """The caption of the attention map."""
    what = (
        "the whole answer" if token is None else f"token {token + 1} of {len(tokens)}: “{tokens[token].strip() or '␣'}”"
    )
    return (
        f"<div class='tl-caption'>Attention of <b>{escape(what)}</b>. {share:.0%} of it goes to the image; "
        "red is where most of that goes.</div>"
    )


def _count(parameters: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if parameters >= size:
            return f"{parameters / size:.3g} {unit}"
    return str(parameters)


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
