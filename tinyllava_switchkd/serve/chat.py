"""Talk to a checkpoint in the terminal.

    python -m tinyllava_switchkd.serve.chat --model_path MODEL --image PHOTO.jpg
    python -m tinyllava_switchkd.serve.chat --model_path MODEL --image PHOTO.jpg --question "What is this?"

With ``--question``, only the answer is written to standard output.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_switchkd.cli import CommandParser
from tinyllava_switchkd.serve.conversation import Conversation, Sampling
from tinyllava_switchkd.serve.images import read_image
from tinyllava_switchkd.serve.options import (
    add_loading_options,
    add_sampling_options,
    loading_kwargs,
    number,
    sampling_of,
)

if TYPE_CHECKING:  # torch is imported only after the command line has been parsed
    from tinyllava_switchkd.serve.engine import ChatModel, Reply

HELP = """\
/image PATH ...   attach one or more images to the next question
/clear            start a new conversation without images
/stats            turn on or off: time to first token and tokens per second after every answer
/help             print this help
/quit             quit (also Ctrl-D); Ctrl-C stops an answer"""

_ENDINGS = {"length": "cut at --max_new_tokens", "time": "cut at --time_limit", "stopped": "stopped"}


class Chat:
    """A conversation with one model in a terminal.

    Args:
        model: the model.
        sampling: decoding settings.
        time_limit: seconds per answer, None for no limit.
        stats: whether to print timings after every answer.
    """

    def __init__(
        self, model: ChatModel, sampling: Sampling, time_limit: float | None = None, stats: bool = False
    ) -> None:
        self.model = model
        self.sampling = sampling
        self.time_limit = time_limit
        self.stats = stats
        self.conversation = Conversation()

    def ask(self, question: str) -> None:
        """Ask a question and print the answer as it is generated."""
        stop, written, reply = threading.Event(), 0, None
        with _interrupt_sets(stop):
            for reply in self.model.stream(self.conversation, question, self.sampling, stop, self.time_limit):
                print(printable(reply.text[written:]), end="", flush=True)
                written = len(reply.text)
        print()
        if reply is not None:
            self._report(reply)

    def _report(self, reply: Reply) -> None:
        notes = [_ENDINGS[reply.finish]] if reply.finish in _ENDINGS else []
        if self.stats and reply.first_token is not None:
            notes.append(f"first token after {reply.first_token:.2f} s")
            notes.append(f"{len(reply.token_ids)} tokens")
            notes += [f"{reply.rate:.1f} tokens/s"] if reply.rate is not None else []
        if notes:
            print(f"[{', '.join(notes)}]", file=sys.stderr)

    def attach(self, paths: Sequence[str]) -> None:
        """Attach images to the next question: all of them, or none if one cannot be read."""
        for image in [read_image(Path(path).expanduser()) for path in paths]:
            self.conversation.attach(image)

    def command(self, line: str) -> bool:
        """Run a ``/command``.

        Returns:
            False if the command was to quit.

        Raises:
            ValueError: the command is unknown, or its argument is missing.
        """
        name, _, rest = line.partition(" ")
        if name in ("/quit", "/exit"):
            return False
        if name == "/help":
            print(HELP)
        elif name == "/clear":
            self.conversation.clear()
            print("A new conversation.")
        elif name == "/stats":
            self.stats = not self.stats
            print(f"Timings are {'on' if self.stats else 'off'}.")
        elif name == "/image":
            try:
                paths = shlex.split(rest)
            except ValueError:
                raise ValueError(f"A quotation mark in {rest!r} is not closed.") from None
            if not paths:
                raise ValueError("/image needs the path of an image.")
            self.attach(paths)
            print(f"{len(self.conversation.pending)} image(s) go with the next question.")
        else:
            raise ValueError(f"There is no command {name}; /help lists them.")
        return True

    def loop(self) -> None:
        """Read questions and commands until the input ends."""
        prompt = "\nYou: " if sys.stdin.isatty() else ""
        while True:
            try:
                line = input(prompt).strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            try:
                if line.startswith("/"):
                    if not self.command(line):
                        return
                elif line:
                    if prompt:
                        print(f"{self.model.name}: ", end="", flush=True)
                    self.ask(line)
            except user_errors() as error:
                print(f"error: {error}", file=sys.stderr)


@contextmanager
def _interrupt_sets(stop: threading.Event) -> Iterator[None]:
    """Make Ctrl-C set `stop`; a second Ctrl-C while the model is still running interrupts as usual."""

    def on_interrupt(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def user_errors() -> tuple[type[Exception], ...]:
    """Errors due to bad input or an unsuitable machine. Any other error is a bug and keeps its traceback."""
    import torch

    return ValueError, OSError, ImportError, torch.OutOfMemoryError


def printable(text: str) -> str:
    """Remove control characters, which a terminal would execute."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(description="Talk to a TinyLLaVA checkpoint in the terminal.")
    parser.add_argument("--model_path", required=True, help="checkpoint: a folder or a hub name")
    parser.add_argument(
        "--image", "--image_file", nargs="+", default=[], metavar="FILE", help="images for the first question"
    )
    parser.add_argument(
        "--question", action="append", help="ask this and quit; may be repeated, the questions are asked in order"
    )
    parser.add_argument("--stats", action="store_true", help="print time to first token and tokens per second")
    parser.add_argument(
        "--time_limit", type=number(0.01, 1e6), help="seconds after which an answer is stopped; default: none"
    )
    add_sampling_options(parser)
    add_loading_options(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Load the model and start the chat."""
    from transformers.utils import logging as transformers_logging

    from tinyllava_switchkd.serve.engine import ChatModel

    sampling = sampling_of(args)
    for path in args.image:
        read_image(path)  # reports a bad path before the model is loaded
    transformers_logging.disable_progress_bar()
    started = time.perf_counter()
    print(f"Loading {args.model_path} ...", file=sys.stderr)
    model = ChatModel.load(args.model_path, template=args.template, **loading_kwargs(args))
    print(
        f"{model.name}: {model.num_parameters / 1e6:,.1f} million parameters on {model.model.device}, template "
        f"{model.template}, {model.model.num_image_tokens} tokens per image; loaded in "
        f"{time.perf_counter() - started:.1f} s.",
        file=sys.stderr,
    )
    chat = Chat(model, sampling, args.time_limit, args.stats)
    chat.attach(args.image)
    if args.question:
        for question in args.question:
            chat.ask(question)
        return
    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history for input())

        print("Ask a question; /help lists the commands.")
    chat.loop()


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        run(args)
    except user_errors() as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
