"""Talk to a checkpoint in the terminal.

    python -m tinyllava_switchkd.serve.chat --model_path MODEL --image PHOTO.jpg
    python -m tinyllava_switchkd.serve.chat --model_path MODEL --image PHOTO.jpg --question "What is this?"

With ``--question`` the answer, and nothing else, goes to the standard output.
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

if TYPE_CHECKING:  # what needs torch waits until the command line has been read
    from tinyllava_switchkd.serve.engine import ChatModel, Reply

HELP = """\
/image PATH ...   show one or more images with the next question
/clear            forget the conversation and its images
/stats            print time to first token and tokens a second after every answer, or stop doing so
/help             print this
/quit             leave (so does Ctrl-D); Ctrl-C stops an answer"""

_ENDINGS = {"length": "cut at --max_new_tokens", "time": "cut at --time_limit", "stopped": "stopped"}


class Chat:
    """A conversation with one model in a terminal.

    Args:
        model: whom to talk to.
        sampling: how it answers.
        time_limit: seconds for an answer, None for no limit.
        stats: whether to print figures after every answer.
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
        """Ask, and print the answer as it comes."""
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
        """Show images with the next question; all or, if one cannot be read, none."""
        for image in [read_image(Path(path).expanduser()) for path in paths]:
            self.conversation.attach(image)

    def command(self, line: str) -> bool:
        """Carry out a ``/command``.

        Returns:
            False if it was to leave.

        Raises:
            ValueError: there is no such command, or it lacks its argument.
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
            print(f"Figures are {'on' if self.stats else 'off'}.")
        elif name == "/image":
            try:
                paths = shlex.split(rest)
            except ValueError:
                raise ValueError(f"A quotation mark in {rest!r} has no partner.") from None
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
    """Ctrl-C sets `stop`; a second one, while the model still works, interrupts as usual."""

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
    """What bad input and unfit machines raise; anything else is a bug and keeps its traceback."""
    import torch

    return ValueError, OSError, ImportError, torch.OutOfMemoryError


def printable(text: str) -> str:
    """Text without control characters, which a terminal would obey."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(description="Talk to a TinyLLaVA checkpoint in the terminal.")
    parser.add_argument("--model_path", required=True, help="checkpoint: a folder or a hub name")
    parser.add_argument("--image", "--image_file", nargs="+", default=[], metavar="FILE", help="images to begin with")
    parser.add_argument(
        "--question", action="append", help="ask this and leave; given several times, one is asked after the other"
    )
    parser.add_argument("--stats", action="store_true", help="print time to first token and tokens a second")
    parser.add_argument(
        "--time_limit", type=number(0.01, 1e6), help="seconds after which an answer is stopped; default: none"
    )
    add_sampling_options(parser)
    add_loading_options(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Load the model and talk."""
    from transformers.utils import logging as transformers_logging

    from tinyllava_switchkd.serve.engine import ChatModel

    sampling = sampling_of(args)
    for path in args.image:
        read_image(path)  # a bad path should not wait for the model
    transformers_logging.disable_progress_bar()
    started = time.perf_counter()
    print(f"Loading {args.model_path} ...", file=sys.stderr)
    model = ChatModel.load(args.model_path, template=args.template, **loading_kwargs(args))
    print(
        f"{model.name}: {model.num_parameters / 1e6:,.1f} million parameters on {model.model.device}, template "
        f"{model.template}, {model.model.num_image_tokens} tokens an image; loaded in "
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

        print("Ask away; /help lists the commands.")
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
