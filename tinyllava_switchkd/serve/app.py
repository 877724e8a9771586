"""Web demo: one or more checkpoints answer questions about an image, side by side.

    python -m tinyllava_switchkd.serve.app --model_path STUDENT --compare TEACHER SFT_STUDENT

It listens on the loopback interface only, unless ``--host`` is given, and makes a public link only with ``--share``.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_switchkd.cli import CommandParser
from tinyllava_switchkd.registry import display_names
from tinyllava_switchkd.serve.images import ImageLimits
from tinyllava_switchkd.serve.limits import DemoLimits
from tinyllava_switchkd.serve.options import (
    add_loading_options,
    add_sampling_options,
    loading_kwargs,
    number,
    sampling_of,
)

if TYPE_CHECKING:  # torch and gradio are imported only after the command line has been parsed
    from tinyllava_switchkd.serve.page import Page


def build_parser() -> argparse.ArgumentParser:
    defaults, image = DemoLimits(), DemoLimits().image
    parser = CommandParser(description="Web demo of one or more TinyLLaVA checkpoints.")
    parser.add_argument("--model_path", required=True, help="checkpoint: a folder or a hub name")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="MODEL", help="more checkpoints, which answer the same questions"
    )
    parser.add_argument("--names", nargs="+", help="display names of the models; default: their folder names")
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine only")
    group.add_argument("--port", type=number(1, 65535, int), help="default: the first free port from 7860 on")
    group.add_argument("--share", action="store_true", help="make a public link through Gradio's servers")
    group.add_argument(
        "--allow_host", nargs="+", default=[], metavar="NAME", help="other host names, such as a reverse proxy's"
    )
    group.add_argument(
        "--queue_size", type=number(1, 10_000, int), default=16, help="requests that may wait; any more are rejected"
    )
    group.add_argument(
        "--time_limit", type=number(1, 86_400), default=defaults.seconds, help="seconds per answer of a model"
    )
    group.add_argument(
        "--max_upload_mb", type=number(0.01, 1000), default=image.max_bytes / 2**20, help="largest upload, in MB"
    )
    group.add_argument(
        "--max_megapixels",
        type=number(0.01, 100),
        default=image.max_pixels / 1e6,
        help="largest upload, in millions of pixels",
    )
    group.add_argument(
        "--all_uploads_mb",
        type=number(1, 1_000_000),
        default=defaults.upload_bytes / 2**20,
        help="disk space for all visitors' uploads together, in MB",
    )
    add_sampling_options(parser)
    add_loading_options(parser)
    return parser


def build_page(args: argparse.Namespace) -> Page:
    """Build the page from the options, without loading the models.

    Raises:
        ValueError, FileNotFoundError: an option is invalid.
    """
    from tinyllava_switchkd.serve.demo import Demo
    from tinyllava_switchkd.serve.engine import ChatModel
    from tinyllava_switchkd.serve.page import Page
    from tinyllava_switchkd.serve.pool import ModelPool, Slot

    paths = [args.model_path, *args.compare]
    for path in paths:
        is_hub_name = path.count("/") == 1 and not path.startswith((".", "/", "~"))
        if not Path(path).exists() and not is_hub_name:
            raise FileNotFoundError(f"There is no checkpoint {path!r}.")
    _check_host(args.host)
    names = args.names or display_names(paths)
    if len(set(names)) != len(paths):
        raise ValueError(f"--names takes one distinct name for each of the {len(paths)} models, not {names}.")
    sampling = sampling_of(args)
    image = ImageLimits(int(args.max_upload_mb * 2**20), int(args.max_megapixels * 1e6), DemoLimits().image.max_side)
    if args.all_uploads_mb < args.max_upload_mb:
        raise ValueError(
            f"--all_uploads_mb {args.all_uploads_mb:g} leaves no room for one upload of --max_upload_mb "
            f"{args.max_upload_mb:g}."
        )
    limits = DemoLimits(
        image=image,
        max_new_tokens=max(sampling.max_new_tokens, DemoLimits.max_new_tokens),
        seconds=args.time_limit,
        upload_bytes=int(args.all_uploads_mb * 2**20),
    )
    load = partial(ChatModel.load, template=args.template, **loading_kwargs(args))
    slots = [Slot(name, partial(load, path, name)) for path, name in zip(paths, names, strict=True)]
    return Page(Demo(ModelPool(slots), limits), sampling)


def _check_host(host: str) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.bind(address)
    except (OSError, UnicodeError):
        raise ValueError(f"--host {host} is not an address of this machine; use 127.0.0.1, for example.") from None


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "httpx2"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # By default all Gradio servers share one upload folder, and each empties it when it ends. This server gets a folder
    # of its own, inside $GRADIO_TEMP_DIR if that is set.
    above = os.environ.get("GRADIO_TEMP_DIR")
    if above:
        Path(above).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tinyllava-demo-", dir=above) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            return _serve(args)
        finally:
            os.environ.pop("GRADIO_TEMP_DIR")
            os.environ.update({"GRADIO_TEMP_DIR": above} if above else {})


def _serve(args: argparse.Namespace) -> int:
    from transformers.utils import logging as transformers_logging

    from tinyllava_switchkd.serve.demo import USER_ERRORS
    from tinyllava_switchkd.serve.page import launch

    transformers_logging.disable_progress_bar()
    try:
        page = build_page(args)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that uploads are deleted
        page.demo.pool.start()
        _, local, shared = launch(
            page,
            args.host,
            args.port,
            args.share,
            args.queue_size,
            args.allow_host,
            quiet=True,
            prevent_thread_lock=True,
        )
        print(f"The demo is at {' and '.join(filter(None, (local, shared)))} (Ctrl-C ends it).", flush=True)
        page.blocks.block_thread()
    except (*USER_ERRORS, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
