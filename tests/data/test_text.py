"""Message: v1's interface, without its shared lists."""

import base64
from io import BytesIO

from PIL import Image

from tests.data.tokenizers import qwen2
from tinyllava_switchkd.data import Message, TextPreprocess


def test_message_feeds_text_preprocess():
    message = Message()
    message.add_message("<image>\nWho?")
    assert message.messages == [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": None}]
    encoded = TextPreprocess(qwen2(), "phi")(message.messages, mode="eval")
    assert encoded["prompt"].endswith("USER: <image>\nWho? ASSISTANT:")
    message.messages[-1]["value"] = "Me"
    message.add_message("And?", "You")
    assert TextPreprocess(qwen2(), "phi")(message.messages)["labels"].max() >= 0


def test_copies_go_their_own_way():
    start = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    message = Message(start)
    message.add_image(Image.new("RGB", (4, 4)))
    other = message.copy()
    other.add_message("c", "d")
    other.messages[0]["value"] = "changed"
    other.add_image(Image.new("RGB", (4, 4)), 2)
    assert message.messages == [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert len(message.images) == 1
    message.add_message("e", "f")
    assert len(start) == 2
    assert len(Message().messages) == 0


def test_gradio_turns():
    message = Message()
    message.add_message("<image>\nWho?", "Me")
    message.add_message("And?")
    message.add_image(Image.new("RGBA", (1600, 300), "red"))
    image, *turns = message.to_gradio_chatbot()
    assert turns == [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Me"},
        {"role": "user", "content": "And?"},
    ]
    assert image["role"] == "user"
    data = image["content"].split("base64,")[1].split('"')[0]
    assert Image.open(BytesIO(base64.b64decode(data))).size == (800, 150)
