"""The tab that explains: the same page as ``tinymodal explain`` writes, in a frame of its own."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from tinymodal.core.errors import TinyModalError
from tinymodal.core.page import told
from tinymodal.core.threads import on_one_core
from tinymodal.serve.errors import ApiError, of_user
from tinymodal.serve.web_turns import NAME, conversation

if TYPE_CHECKING:
    from tinymodal.serve.app import Served

MAX_NEW_TOKENS = 48
"""Words beyond are not explained here; ``tinymodal explain`` has no such limit."""
SQUARES = 6


def explained(
    served: Served,
    picture: str | None,
    sound: str | None,
    question: str | None,
    hide: bool,
    root: Path | None = None,
) -> str:
    """An explanation as HTML: a frame that runs no script and reaches nothing outside.

    Args:
        served: the model.
        picture: an uploaded file.
        sound: likewise.
        question: its words; empty where the sound is the question.
        hide: whether pieces are hidden as a check.
        root: the folder that files must lie in; None: any.
    """
    from tinymodal.infer.explain import explain
    from tinymodal.infer.explain_page import page

    on_one_core()  # Gradio's threads stay, and answers are decoded meanwhile
    message = {"text": question or "", "files": [file for file in (picture, sound) if file]}
    try:
        sample = conversation(served, message, (), root)
        found = explain(served.engine, sample, max_new_tokens=MAX_NEW_TOKENS, squares=SQUARES if hide else 0)
    except ApiError as error:
        return _told(error.message)
    except TinyModalError as error:
        return _told(of_user(error, NAME).message)
    whole = page(found, question or "the sound", served.name)
    return f'<iframe class="explained" title="Why these words" sandbox="" srcdoc="{escape(whole)}"></iframe>'


def _told(message: str) -> str:
    return f'<p class="refused" role="alert">{told(message)}</p>'
