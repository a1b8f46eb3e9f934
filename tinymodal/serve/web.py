"""The web chat: pictures, microphone or file, streamed words, spoken answers, and why it said so.

``tinymodal serve MODEL --web`` mounts it beside the API; what is asked here goes through the same scheduler
and under the same limits. The page fetches nothing from elsewhere and tells nobody that it is used, so it
works offline. Where the server has a key, the page asks for it first.
"""

from __future__ import annotations

import asyncio
import functools
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymodal.core.errors import RecipeError
from tinymodal.serve.web_examples import Example, examples_of
from tinymodal.serve.web_explain import explained
from tinymodal.serve.web_look import CSS, theme
from tinymodal.serve.web_turns import Settings, answer, contents

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from tinymodal.serve.app import Served
    from tinymodal.serve.gate import Doors

SWEEP_S = (3600, 24 * 3600)
"""Every so many seconds files that were uploaded so many seconds ago are deleted."""
AT_ONCE = 8
"""Chats that are answered at once; others wait for their turn in the page's own queue."""
LOOK_S = 0.5
"""How often an open page looks whether the server is asked to end."""
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-src 'self'; frame-ancestors 'self'; object-src 'none'; "
    "base-uri 'self'; form-action 'self'"
)
KINDS = ("image", "audio")


def mount(app: FastAPI, served: Served, path: str = "/") -> FastAPI:
    """Put the web chat into an application, behind all routes that it has.

    Args:
        app: of :func:`tinymodal.serve.app.create_app`.
        served: the model and everything that its routes share.
        path: where the page is.

    Raises:
        RecipeError: gradio is not installed.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise RecipeError(
            f"--web needs {error.name}, which is not installed; pip install 'tinymodal[serve]'"
        ) from error
    app.add_middleware(AtHome, doors=served.doors)
    return gr.mount_gradio_app(
        app,
        chat_page(served),
        path,
        footer_links=[],
        run_history=False,
        auth=None if served.key is None else functools.partial(_opens, served.key),
        auth_message="The key of this server is the password; any name will do.",
        show_error=False,
        max_file_size=served.limits.body_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        theme=theme(gr),
        css=CSS,
    )


class AtHome:
    """Has the browser refuse whatever would leave this server, and any other site that would frame the page.

    Gradio's page knows buttons that send a picture elsewhere; with this none can. It also lets go of pages
    that are only open when the server is asked to end: their beating hearts would hold it for half a minute.

    Args:
        app: what is behind it.
        doors: of the server.
    """

    def __init__(self, app: ASGIApp, doors: Doors) -> None:
        self.app, self.doors = app, doors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"content-security-policy", POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        if scope["type"] != "http" or "/heartbeat/" not in scope["path"]:
            await self.app(scope, receive, sent)
            return
        beating = asyncio.ensure_future(self.app(scope, receive, sent))
        while not (beating.done() or self.doors.closing):
            await asyncio.wait((beating,), timeout=LOOK_S)
        beating.cancel()
        with suppress(asyncio.CancelledError):
            await beating


def _uploads() -> Path:
    """Where gradio keeps what was uploaded."""
    from gradio.utils import get_upload_folder

    return Path(get_upload_folder()).resolve()


def _opens(key: Any, name: str, password: str) -> bool:
    return bool(key.opens(b"Bearer " + password.encode()))


def chat_page(served: Served) -> Any:
    """The page, as gradio's ``Blocks``."""
    import gradio as gr

    sees, hears = ("image" in served.engine.places, "audio" in served.engine.places)
    kinds = [kind for kind in KINDS if kind in served.engine.places]
    # Gradio copies them into its own cache when the page is made.
    with tempfile.TemporaryDirectory(prefix="tinymodal-examples-") as folder:
        examples = examples_of(Path(folder), sees=sees, hears=hears)
        with gr.Blocks(
            title=f"{served.name} · TinyModal",
            analytics_enabled=False,
            delete_cache=SWEEP_S,
            fill_height=True,
        ) as page:
            gr.Markdown(f"# {_plain(served.name)}", elem_id="head")
            with gr.Tab("Chat", elem_id="chat-tab"):
                _chat_tab(gr, served, kinds, examples)
            if sees or hears:
                with gr.Tab("Explain", elem_id="explain-tab"):
                    _explain_tab(gr, served, sees, hears, examples)
    page.queue(default_concurrency_limit=AT_ONCE, max_size=served.limits.waiting, api_open=False)
    return page


def _chat_tab(gr: Any, served: Served, kinds: list[str], examples: list[Example]) -> None:
    limits = served.limits
    words = {"image": "a picture", "audio": "a sound"}
    beside = " or ".join(words[kind] for kind in kinds)
    box = _local(
        gr.MultimodalTextbox(
            sources=[*(["upload"] if kinds else []), *(["microphone"] if "audio" in kinds else [])],
            file_types=kinds or None,
            file_count="multiple",
            placeholder=f"Ask something{f', with {beside}' if kinds else ''}",
            show_label=False,
            max_plain_text_length=limits.characters,
            elem_id="question",
            stop_btn=True,
        )
    )
    bot = _local(
        gr.Chatbot(
            show_label=False,
            height="62vh",
            buttons=["copy"],
            # In one bubble with a picture words cannot be changed: gradio 6.31 fails to hand that over.
            group_consecutive_messages=False,
            editable="user",
            sanitize_html=True,
            render_markdown=False,
            placeholder=f"{_plain(served.name)} answers here.",
            elem_id="talk",
        )
    )
    # Not where they are made, but where the chat puts them: below it, folded.
    later = {"render": False}
    inputs = [
        gr.Checkbox(False, label="Say the answer aloud", visible=served.speaks, elem_id="aloud", **later),
        gr.Dropdown(served.voices, value=None, label="Voice", visible=len(served.voices) > 1, **later),
        gr.Slider(
            1,
            limits.new_tokens,
            min(256, limits.new_tokens),
            step=1,
            label="Longest answer (tokens)",
            **later,
        ),
        gr.Slider(0, 2, 0, step=0.05, label="Temperature (0 takes the likeliest word)", **later),
        gr.Slider(0.05, 1, 1, step=0.05, label="Top p", **later),
        gr.Slider(0, 200, 0, step=1, label="Top k (0: all)", **later),
        gr.Slider(0, 1, 0, step=0.01, label="Min p", **later),
        gr.Slider(1, 2, 1, step=0.05, label="Repetition penalty", **later),
        gr.Number(0, precision=0, minimum=0, label="Seed", **later),
    ]

    async def reply(message: dict[str, Any], history: list[dict[str, Any]], *chosen: Any) -> Any:
        async for shown in answer(served, message, history, Settings.of(chosen), _uploads()):
            yield [gr.Audio(part, autoplay=True) if isinstance(part, tuple) else part for part in shown]

    _chat_class(gr)(
        reply,
        multimodal=True,
        chatbot=bot,
        textbox=box,
        additional_inputs=inputs,
        additional_inputs_accordion=gr.Accordion("How it answers", open=False, **later),
        examples=[[{"text": each.question, "files": each.files}] for each in examples] or None,
        examples_label="Try one",
        run_examples_on_click=False,
        cache_examples=False,
        flagging_mode="never",
        analytics_enabled=False,
        concurrency_limit=AT_ONCE,
        api_visibility="private",
        fill_height=True,
    )


def _chat_class(gr: Any) -> Any:
    """Gradio's chat, in which a changed question keeps its files, and the answer to it can be stopped."""

    class Chat(gr.ChatInterface):
        def _setup_events(self):  # type: ignore[no-untyped-def]
            super()._setup_events()
            unlisted: dict[str, Any] = {"api_visibility": "private"}

            # From the state and not from the page, which has forgotten the files of what it changes.
            def change(history, edit_data):  # type: ignore[no-untyped-def]
                place = edit_data.index
                place = place[0] if isinstance(place, list | tuple) else place
                files = [file for said in history[place : place + 1] for file in contents(said)[1]]
                return history[:place], history[:place], {"text": edit_data.value, "files": files}

            # By this gradio knows what to hand over.
            change.__annotations__["edit_data"] = gr.EditData
            again = self._api_wrapper(self.fn, self._stream_fn)
            changed = self.chatbot.edit(
                change, [self.chatbot_state], [self.chatbot, self.chatbot_state, self.saved_input], **unlisted
            )
            answered = changed.then(
                self._append_message_to_history, [self.saved_input, self.chatbot_state], [self.chatbot],
                queue=False, **unlisted,
            ).then(
                again, [self.saved_input, self.chatbot_state, *self.additional_inputs],
                [self.null_component, self.chatbot], concurrency_limit=AT_ONCE, **unlisted,
            )  # fmt: skip
            answered.then(
                lambda shown: (shown, shown), [self.chatbot], [self.chatbot_state, self.chatbot_value],
                queue=False, **unlisted,
            )  # fmt: skip
            # The button that stops it, which gradio has for questions that are new or asked again.
            self._setup_stop_events([], [answered], changed)

    return Chat


def _explain_tab(gr: Any, served: Served, sees: bool, hears: bool, examples: list[Example]) -> None:
    gr.Markdown(
        "For each word of the answer: what else could have come, where the model looked, and which part of "
        "the picture or the sound it needs."
    )
    with gr.Row():
        picture = _local(
            gr.Image(
                type="filepath",
                sources=["upload", "clipboard"],
                label="Picture",
                visible=sees,
                height=260,
                elem_id="why-picture",
            )
        )
        sound = _local(
            gr.Audio(type="filepath", sources=["upload", "microphone"], label="Sound", visible=hears)
        )
    question = gr.Textbox(label="Question", lines=1, elem_id="why-question")
    hide = gr.Checkbox(True, label="Hide pieces one after the other as a check (takes longer)")
    button = gr.Button("Explain", variant="primary", elem_id="why")
    shown = gr.HTML(elem_id="explained")
    given = [picture, sound, question, hide]

    def run(seen: str | None, heard: str | None, asked: str, check: bool) -> str:
        return explained(served, seen, heard, asked, check, root=_uploads())

    for start in (button.click, question.submit):
        # One at a time: each is as much work as many answers.
        start(run, given, shown, concurrency_limit=1, concurrency_id="explain", api_visibility="private")
    rows = [[each.picture, each.sound, each.question] for each in examples if each.picture or each.sound]
    if rows:
        gr.Examples(rows, given[:3], label="Try one", cache_examples=False, run_on_click=False)


def _local(component: Any) -> Any:
    """The component, which takes files and no addresses: gradio would have the server fetch them."""
    import gradio as gr
    from gradio_client.utils import is_http_url_like

    keep = component.async_move_resource_to_block_cache

    async def keep_file(place: Any) -> Any:
        if place is not None and is_http_url_like(str(place)):
            raise gr.Error("Addresses are not fetched; upload the file.", print_exception=False)
        return await keep(place)

    component.async_move_resource_to_block_cache = keep_file
    return component


def _plain(text: str) -> str:
    """A name inside markdown."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]()#+-!<>|" else c for c in text)
