"""The web demo's page: layout, event handlers, and server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import gradio as gr
from gradio.blocks import Block
from gradio.routes import App
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from tinyllava_switchkd.serve import render
from tinyllava_switchkd.serve.conversation import Sampling
from tinyllava_switchkd.serve.demo import USER_ERRORS, Demo, Session
from tinyllava_switchkd.serve.examples import EXAMPLES, FOLDER
from tinyllava_switchkd.serve.limits import Gate, Hosts, Room
from tinyllava_switchkd.serve.upload import REFUSED, GuardedBlocks, UploadedImage

Updates = dict[Block, object]
"""Component -> its new value, or a `gr.update`."""

_FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]  # the browser's own fonts: nothing is fetched from elsewhere
_STYLE = Path(__file__).with_name("page.css")
_SESSIONS = 64
_FILE_SECONDS = 2 * 3600
_MODELS = "models"  # all events that run a model share one place in the queue
_PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}
_ASK_ONCE = "() => { if (window.tlAsking) throw new Error('asked already'); window.tlAsking = true; }"
_ASKED = "() => { window.tlAsking = false; }"


class Page:
    """The demo as a Gradio page.

    Args:
        demo: answers the requests.
        sampling: initial values of the settings.
    """

    def __init__(self, demo: Demo, sampling: Sampling | None = None) -> None:
        self.demo = demo
        sampling = sampling or Sampling()
        with GuardedBlocks(
            title="TinyLLaVA Switch-KD",
            analytics_enabled=False,
            fill_width=True,
            delete_cache=(_FILE_SECONDS // 4, _FILE_SECONDS),
        ) as self.blocks:
            self.session = gr.State(None, time_to_live=_FILE_SECONDS)
            self.timer = gr.Timer(1.0, active=not demo.pool.is_settled)
            self.header = _html(render.header(demo.pool.slots), elem_id="tl-top")
            with gr.Row(elem_id="tl-main"):
                with gr.Column(scale=2, min_width=300, elem_id="tl-left"):
                    self._build_image()
                    self._build_settings(sampling)
                with gr.Column(scale=5, min_width=320, elem_id="tl-right"):
                    self._build_conversation()
                    self._build_attention()
            self._connect()
        self.room = Room(
            Path(get_upload_folder()), lambda: set().union(*self.blocks.temp_file_sets), demo.limits.upload_bytes
        )

    def _build_image(self) -> None:
        self.image = UploadedImage(
            type="filepath",
            image_mode=None,
            sources=["upload", "clipboard"],
            label="Image",
            placeholder="Drop an image here, paste one,\nor click to upload",
            height=300,
            buttons=[],
            elem_id="tl-image",
        )
        _html(
            "<div class='tl-label'>Examples <span>(the quickstart's models know digits)</span></div>",
            elem_id="tl-examples-label",
        )
        self.examples = gr.Gallery(
            [str(FOLDER / name) for name, _ in EXAMPLES],
            label="Examples",
            show_label=False,
            columns=3,
            height="auto",
            object_fit="cover",
            allow_preview=False,
            interactive=False,
            buttons=[],
            elem_id="tl-examples",
        )

    def _build_settings(self, default: Sampling) -> None:
        longest = self.demo.limits.max_new_tokens
        with gr.Accordion("Settings", open=False, elem_id="tl-settings"):
            warmest, most = max(2, default.temperature), max(200, default.top_k)
            self.temperature = gr.Slider(
                0,
                warmest,
                default.temperature,
                step=0.05,
                label="Temperature",
                info="0 always takes the likeliest token.",
            )
            self.top_p = gr.Slider(0.01, 1, default.top_p, step=0.01, label="Top-p")
            self.top_k = gr.Slider(0, most, default.top_k, step=1, label="Top-k", info="0 for no limit.")
            harshest = max(2, default.repetition_penalty)
            self.penalty = gr.Slider(
                0.5, harshest, default.repetition_penalty, step=0.05, label="Repetition penalty", info="1 for none."
            )
            self.length = gr.Slider(
                1, longest, min(default.max_new_tokens, longest), step=1, label="Longest answer, in tokens"
            )

    def _build_conversation(self) -> None:
        self.chat = _html(render.transcript(()), elem_id="tl-chat")
        self.notice = _html("", elem_id="tl-notice")
        with gr.Row(elem_id="tl-bar"):
            self.question = gr.Textbox(
                show_label=False,
                label="Question",
                placeholder="Ask about the image …",
                lines=1,
                max_lines=6,
                max_length=self.demo.limits.question_chars,
                scale=6,
                min_width=200,
                container=False,
                autofocus=False,
                elem_id="tl-question",
            )
            self.send = gr.Button(
                "Send",
                variant="primary",
                scale=1,
                min_width=84,
                interactive=bool(self.demo.pool.ready),
                elem_id="tl-send",
            )
            self.stop = gr.Button("Stop", variant="stop", scale=1, min_width=84, interactive=False, elem_id="tl-stop")
            self.clear = gr.Button("New chat", scale=1, min_width=100, elem_id="tl-clear")

    def _build_attention(self) -> None:
        names = [(slot.name, index) for index, slot in enumerate(self.demo.pool.slots)]
        with gr.Column(elem_id="tl-attention"):
            _html(
                "<div class='tl-section'><h2>Where did it look?</h2><p>Attention of each token of the last answer to "
                "the image.</p></div>"
            )
            with gr.Row(elem_id="tl-attention-bar"):
                self.which = gr.Radio(
                    names,
                    value=0,
                    show_label=False,
                    label="Model",
                    container=False,
                    visible=len(names) > 1,
                    scale=4,
                    elem_id="tl-which",
                )
                self.attend = gr.Button("Show attention", scale=1, min_width=150, elem_id="tl-attend")
            self.attention_notice = _html("", elem_id="tl-attention-notice")
            with gr.Column(visible=False, elem_id="tl-map") as self.map:
                _html(
                    "<div class='tl-hint'>Click a token. The redder it is, the more of its attention goes to the "
                    "image.</div>"
                )
                self.tokens = gr.HighlightedText(
                    [],
                    label="Tokens of the answer",
                    show_label=False,
                    show_legend=False,
                    show_whitespaces=True,
                    buttons=[],
                    elem_id="tl-tokens",
                )
                self.position = gr.Slider(
                    0, 1, 0, step=1, label="Token (0 is the whole answer)", buttons=[], elem_id="tl-position"
                )
                self.picture = gr.Image(
                    interactive=False, show_label=False, format="webp", buttons=["fullscreen"], elem_id="tl-picture"
                )
                self.caption = _html("", elem_id="tl-caption")

    def _connect(self) -> None:
        self.blocks.load(self.refresh, None, [self.header, self.send, self.timer], queue=False, **_PRIVATE)
        self.timer.tick(self.refresh, None, [self.header, self.send, self.timer], queue=False, **_PRIVATE)
        arrival = [self.image, self.question, self.notice]
        self.image.upload(self.check_image, [self.session, self.image], arrival, concurrency_limit=2, **_PRIVATE)
        self.examples.select(self.pick, self.session, arrival, queue=False, **_PRIVATE)
        settings = [self.temperature, self.top_p, self.top_k, self.penalty, self.length]
        buttons = [self.notice, self.send, self.stop, self.clear]
        # Gradio's own guard against a second click works only after the server's first reply.
        once = gr.on([self.send.click, self.question.submit], None, js=_ASK_ONCE, **_PRIVATE)
        begun = once.success(self.begin, self.session, [self.session, *buttons], queue=False, **_PRIVATE)
        asked = begun.success(
            self.ask,
            [self.session, self.image, self.question, *settings],
            [self.session, self.chat, *buttons, self.question, self.map, self.attention_notice],
            concurrency_id=_MODELS,
            concurrency_limit=1,
            **_PRIVATE,
        )
        asked.success(None, js=_ASKED, **_PRIVATE)
        for step in (begun, asked):
            step.failure(None, js=_ASKED, **_PRIVATE)
            step.failure(self.turn_away, None, buttons, queue=False, **_PRIVATE)
        self.stop.click(self.halt, self.session, self.stop, queue=False, **_PRIVATE)
        self.clear.click(
            self.restart,
            self.session,
            [self.session, self.chat, self.notice, self.map, self.attention_notice],
            queue=False,
            **_PRIVATE,
        )
        panel = [self.map, self.tokens, self.position, self.picture, self.caption, self.attention_notice]
        gr.on(
            [self.attend.click, self.which.input],
            self.show_attention,
            [self.session, self.which],
            panel,
            concurrency_id=_MODELS,
            concurrency_limit=1,
            api_visibility="private",
            show_progress="minimal",
            show_progress_on=self.attend,
        )
        self.tokens.select(self.choose_token, None, self.position, queue=False, **_PRIVATE)
        self.position.change(
            self.show_token,
            [self.session, self.which, self.position],
            [self.picture, self.caption],
            trigger_mode="always_last",
            concurrency_limit=4,
            **_PRIVATE,
        )

    # Event handlers

    def refresh(self) -> Updates:
        """Show the progress of loading."""
        pool = self.demo.pool
        return {
            self.header: render.header(pool.slots),
            self.send: gr.update(interactive=bool(pool.ready)),
            self.timer: gr.update(active=not pool.is_settled),
        }

    def check_image(self, session: Session | None, path: str | None) -> Updates:
        """Refuse a bad upload at once, not only when a question is sent with it."""
        try:
            file = self._own(path)
            if file is not None:
                self.demo.read_upload(file)
        except USER_ERRORS as error:
            return {self.image: None, self.notice: render.notice(str(error), "error")}
        return {self.notice: _about_second_image(session)}

    def pick(self, session: Session | None, event: gr.SelectData) -> Updates:
        """Select an example."""
        index = int(event.index) % len(EXAMPLES)
        _, question = EXAMPLES[index]
        return {
            self.image: list(self.blocks.examples)[index],
            self.question: question,
            self.notice: _about_second_image(session),
        }

    def begin(self, session: Session | None) -> Updates:
        """Update the page at once, even while others are being answered."""
        session = session or self.demo.new_session()
        session.stop.clear()
        waits = render.notice("Others are being answered first; please wait.") if self.demo.is_busy else ""
        return {self.session: session, self.notice: waits, **self._buttons(busy=True)}

    def turn_away(self) -> Updates:
        """Report a question that reached no model: the queue is full, or its image was refused or no longer exists."""
        message = (
            "The question was not accepted: too many people are asking, or the image is no longer on the server. "
            "Please try again, and upload the image again if necessary."
        )
        return {self.notice: render.notice(message, "error"), **self._buttons(busy=False)}

    def _own(self, path: str | None) -> str | None:
        """The file of the image on the page.

        Raises:
            gr.Error: it is neither an upload of this server nor an example.
        """
        if path is None:
            return None
        file = self.blocks.own_file(path)
        if file is None:
            raise gr.Error(REFUSED, print_exception=False)
        return file

    def _buttons(self, busy: bool) -> Updates:
        """The buttons while a question is being answered (`busy`) or not."""
        return {
            self.send: gr.update(interactive=not busy),
            self.stop: gr.update(interactive=busy),
            self.clear: gr.update(interactive=not busy),
        }

    def ask(
        self,
        session: Session | None,
        image: str | None,
        question: str,
        temperature: float,
        top_p: float,
        top_k: float,
        penalty: float,
        length: float,
    ) -> Iterator[Updates]:
        """Stream the answers onto the page."""
        session = session or self.demo.new_session()
        busy = {
            self.session: session,
            self.notice: "",
            self.question: "",
            **self._buttons(busy=True),
            self.map: gr.update(visible=False),
            self.attention_notice: "",
        }
        try:
            sampling = Sampling(temperature, top_p, int(top_k), penalty, int(length))
            for _ in self.demo.ask(session, self._own(image), question, sampling):
                yield {self.chat: render.transcript(session.exchanges), **busy}
                busy = {}
            message = {}  # keeps a notice about an image uploaded in the meantime
        except USER_ERRORS as error:
            message = {self.notice: render.notice(str(error), "error")}
        yield {
            self.session: session,
            self.chat: render.transcript(session.exchanges),
            **message,
            **self._buttons(busy=False),
        }

    def halt(self, session: Session | None) -> dict[str, object]:
        """Stop this session's answer."""
        if session is not None:
            session.stop.set()
        return gr.update(interactive=False)

    def restart(self, session: Session | None) -> Updates:
        """Start a new conversation."""
        if session is not None:
            session.stop.set()
        return {
            self.session: None,
            self.chat: render.transcript(()),
            self.notice: "",
            self.map: gr.update(visible=False),
            self.attention_notice: "",
        }

    def show_attention(self, session: Session | None, which: int) -> Updates:
        """Show the attention map of a model's last answer."""
        try:
            attention = self.demo.attend(session or self.demo.new_session(), which)
        except USER_ERRORS as error:
            return {self.map: gr.update(visible=False), self.attention_notice: render.notice(str(error), "error")}
        share = attention.share
        strength = share / max(share.max(), 1e-9)
        return {
            self.map: gr.update(visible=True),
            self.tokens: [(text, float(value)) for text, value in zip(attention.tokens, strength, strict=True)],
            self.position: gr.update(value=0, maximum=len(attention.tokens)),
            self.attention_notice: "",
            **self.show_token(session, which, 0),
        }

    def choose_token(self, event: gr.SelectData) -> int:
        """The slider position of a clicked token."""
        return int(event.index) + 1

    def show_token(self, session: Session | None, which: int, position: float) -> Updates:
        """Draw the map of the token at `position`, counted from 1; 0 is the whole answer."""
        if session is None or which not in session.maps:
            return {}
        attention = session.maps[which]
        token = min(int(position), len(attention.tokens)) - 1
        chosen = None if token < 0 else token
        share = float(attention.share.mean() if chosen is None else attention.share[chosen])
        return {
            self.picture: self.demo.picture(session, which, chosen),
            self.caption: render.token_caption(chosen, attention.tokens, share),
        }


def _about_second_image(session: Session | None) -> str:
    if session is None or not session.exchanges:
        return ""
    return render.notice("This image is added to the conversation. To ask about it alone, press New chat first.")


def _html(value: str, elem_id: str | None = None) -> gr.HTML:
    """HTML styled only by page.css."""
    return gr.HTML(value, elem_id=elem_id, apply_default_css=False)


def _theme() -> gr.themes.Base:
    return gr.themes.Soft(
        primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=_FONTS, font_mono=["monospace"]
    ).set(
        body_text_color_subdued="*neutral_500",
        block_border_width="1px",
        block_radius="16px",
        block_shadow="none",
        block_label_background_fill="*block_background_fill",
        block_label_background_fill_dark="*block_background_fill",
        block_label_text_color="*body_text_color_subdued",
        block_label_text_color_dark="*body_text_color_subdued",
        block_title_background_fill="none",
        block_title_text_color="*body_text_color",
        block_title_padding="0",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_600",
        # white text on these colours has a contrast of at least 4.5 to 1
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
        button_secondary_background_fill_hover_dark="*neutral_500",
        button_cancel_background_fill_hover_dark="*neutral_500",
        checkbox_border_color="*neutral_300",
        checkbox_label_background_fill_selected="*primary_700",
        checkbox_label_background_fill_selected_dark="*primary_700",
        slider_color="*primary_600",
        input_border_color_focus="*primary_500",
        input_border_color_focus_dark="*primary_500",
    )


def launch(
    page: Page,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    queue_size: int = 16,
    allow_hosts: Sequence[str] = (),
    **kwargs: object,
) -> tuple[App, str, str]:
    """Serve a page.

    Args:
        page: what to serve.
        host: address to listen on.
        port: None for the first free port from 7860 on.
        share: make a public link through Gradio's servers.
        queue_size: requests that may wait; any more are rejected.
        allow_hosts: other host names of the demo, such as a reverse proxy's.
        kwargs: for `gr.Blocks.launch`.
    """
    file_bytes = page.demo.limits.image.max_bytes
    hosts = Hosts(host, allow_hosts)
    gate = Middleware(Gate, max_bytes=file_bytes + 2**20, hosts=hosts, room=page.room)
    page.blocks.queue(max_size=queue_size, default_concurrency_limit=4, api_open=False)
    started = page.blocks.launch(
        server_name=host,
        server_port=port,
        share=share,
        theme=_theme(),
        head=f"<style>{_STYLE.read_text(encoding='utf-8')}</style>",  # `css=` loses rules for phones and dark mode
        allowed_paths=[str(FOLDER / name) for name, _ in EXAMPLES],
        max_file_size=file_bytes,
        app_kwargs={"middleware": [gate]},
        state_session_capacity=_SESSIONS,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        **kwargs,
    )
    if page.blocks.share_url:
        hosts.names.add(urlsplit(page.blocks.share_url).hostname)
    return started
