"""Does llama.cpp give the student's answers? check_gguf.py EXPORT FOLDER, where FOLDER was written by ask.py."""

from __future__ import annotations

import argparse
import base64
import ctypes
import json
from pathlib import Path
from typing import Any

MAX_NEW_TOKENS = 32


def compare(args: argparse.Namespace) -> None:
    """Answer the questions in llama.cpp and print how many answers are equal."""
    import llama_cpp
    import numpy as np
    from llama_cpp.llama_chat_format import MTMDChatHandler

    rows = json.loads((args.folder / "expected.json").read_text(encoding="utf-8"))
    handler = MTMDChatHandler(str(args.export / "mmproj.gguf"), verbose=False)
    llama = llama_cpp.Llama(
        str(args.export / "model.gguf"), chat_handler=handler, n_ctx=args.context, n_threads=1, verbose=False
    )
    handler._init_mtmd_context(llama)
    vocabulary = len(rows[0]["logits"])

    def last_logits() -> Any:
        pointer = llama_cpp.llama_get_logits_ith(llama._ctx.ctx, -1)
        return np.array(np.ctypeslib.as_array(pointer, shape=(vocabulary,)))

    def greedy(row: dict, image: Path) -> tuple[list[int], Any]:
        llama.reset()
        llama._ctx.kv_cache_clear()
        if row["before"]:
            llama.eval(row["before"])
        _eval_image(llama, handler, image)
        llama.eval(row["after"])
        first = logits = last_logits()
        answer: list[int] = []
        while len(answer) < MAX_NEW_TOKENS and (token := int(logits.argmax())) not in row["stops"]:
            answer.append(token)
            llama.eval([token])
            logits = last_logits()
        return answer, first

    # The handler returns text without invalid UTF-8. A random student's answers contain much of it, so the tokens are
    # recorded and compared instead.
    sampled: list[int] = []
    sample = llama.sample

    def recorded(*args: Any, **kwargs: Any) -> int:
        sampled.append(sample(*args, **kwargs))
        return sampled[-1]

    llama.sample = recorded
    found = {"questions": len(rows), "equal": 0, "logits": 0.0, "equal_unresized": 0, "not_square": 0}
    found |= {"prompts": 0, "handler": 0}
    for index, row in enumerate(rows):
        square, image = args.folder / f"{index}_square.png", args.folder / f"{index}.png"
        answer, logits = greedy(row, square)
        found["equal"] += answer == row["answer"]
        found["logits"] = max(found["logits"], float(np.abs(logits - np.array(row["logits"])).max()))
        found["not_square"] += row["size"][0] != row["size"][1]
        found["equal_unresized"] += greedy(row, image)[0] == row["answer"]

        url = "data:image/png;base64," + base64.b64encode(square.read_bytes()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": row["question"]}]
        messages = [{"role": "user", "content": content}]
        sampled.clear()
        llama.create_chat_completion(messages, temperature=0.0, repeat_penalty=1.0, max_tokens=MAX_NEW_TOKENS)
        found["prompts"] += _prompt_pieces(llama, handler, content) == [row["before"], row["after"]]
        # The handler continues while the last bytes are an incomplete character.
        found["handler"] += [token for token in sampled if token not in row["stops"]][:MAX_NEW_TOKENS] == row["answer"]
    print(json.dumps(found))
    print(
        f"{found['equal']} of {len(rows)} answers equal on images resized beforehand (logits within "
        f"{found['logits']:.2g}), {found['equal_unresized']} on original images ({found['not_square']} not square); "
        f"{found['prompts']} prompts have the same tokens, {found['handler']} answers of the chat handler are equal."
    )
    if not args.report and found["equal"] < len(rows):
        raise SystemExit(1)


def _eval_image(llama: Any, handler: Any, image: Path) -> None:
    """Append an image's tokens to the context."""
    import llama_cpp

    mtmd = handler._mtmd_cpp
    chunks = _chunks(handler, mtmd.mtmd_default_marker(), image)
    for index in range(mtmd.mtmd_input_chunks_size(chunks)):
        chunk = mtmd.mtmd_input_chunks_get(chunks, index)
        if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
            past = llama_cpp.llama_pos(0)
            arguments = (handler.mtmd_ctx, llama._ctx.ctx, chunk, llama.n_tokens, 0, llama.n_batch, False)
            if mtmd.mtmd_helper_eval_chunk_single(*arguments, ctypes.byref(past)) != 0:
                raise ValueError(f"llama.cpp could not read {image}.")
            llama.n_tokens = past.value
    mtmd.mtmd_input_chunks_free(chunks)


def _chunks(handler: Any, text: bytes, image: Path) -> Any:
    mtmd = handler._mtmd_cpp
    bitmap = handler._create_bitmap_from_bytes(image.read_bytes())
    given = mtmd.mtmd_input_text()
    given.text, given.text_len, given.add_special, given.parse_special = text, len(text), True, True
    chunks = mtmd.mtmd_input_chunks_init()
    bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
    if mtmd.mtmd_tokenize(handler.mtmd_ctx, chunks, ctypes.byref(given), bitmaps, 1) != 0:
        raise ValueError(f"llama.cpp could not read the prompt {text!r}.")
    mtmd.mtmd_bitmap_free(bitmap)
    return chunks


def _prompt_pieces(llama: Any, handler: Any, content: list) -> list[list[int]]:
    """The tokens before and after the image that llama.cpp makes with the export's chat template."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    marker = handler._mtmd_cpp.mtmd_default_marker().decode()
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        llama.metadata["tokenizer.chat_template"]
    )
    messages = [{"role": "user", "content": [{"type": "text", "text": marker}, content[1]]}]
    text = template.render(messages=messages, add_generation_prompt=True)
    return [llama.tokenize(part.encode(), add_bos=False, special=True) for part in text.split(marker)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--report", action="store_true", help="exit with 0 even if answers differ")
    compare(parser.parse_args())


if __name__ == "__main__":
    main()
