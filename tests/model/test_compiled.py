"""Static cache and compiled steps give the tokens of plain generation."""

import pytest
import torch

from tests.model.checkpoints import save
from tests.tiny import tiny_llava
from tinyllava_switchkd.model import load_pretrained_model
from tinyllava_switchkd.model.compiled import compile_generation

PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
# Rows of different lengths: the second is padded.
PROMPTS = torch.tensor([[10, 20, -200, 30, 40, 50], [10, -200, 30, 7, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def answer(model, prompts=PROMPTS, mask=MASK, **kwargs):
    """(tokens, logits of each step)."""
    kwargs |= {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    output = model.generate(prompts, images=PIXELS, attention_mask=mask, **kwargs)
    return output.sequences, torch.stack(output.logits)


def same(one, other):
    return torch.equal(one[0], other[0]) and torch.allclose(one[1], other[1], atol=1e-5)


@pytest.mark.parametrize("llm", ["qwen2", "llama", "phi"])
def test_static_cache(llm):
    model = tiny_llava(llm)
    assert same(answer(model, cache_implementation="static"), answer(model))


def test_compiled_steps_for_prompts_of_any_length():
    """One graph works for all prompts. The step is traced but not compiled, which would take a minute."""
    model, graphs = tiny_llava(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    longer = torch.full((2, 9), 60)
    cases = [
        (PROMPTS, MASK),
        (PROMPTS[:, :4], MASK[:, :4]),
        (torch.cat([longer, PROMPTS], dim=1), torch.cat([torch.ones_like(longer), MASK], dim=1)),
    ]
    expected = [answer(model, *case) for case in cases]
    torch._dynamo.reset()
    compile_generation(model, max_length=64, backend=backend)
    for case, plain in zip(cases, expected, strict=True):
        assert same(answer(model, *case), plain)
    assert len(graphs) == 1
    assert same(answer(model, cache_implementation="dynamic"), expected[0])
    torch._dynamo.reset()


def test_asked_for_at_load(tmp_path):
    save(tiny_llava(), tmp_path)
    model, *_ = load_pretrained_model(tmp_path, device="cpu", compile=True)
    assert model.language_model.generation_config.cache_implementation == "static"
    assert model.language_model._previous_max_cache_length == model.config.tokenizer_model_max_length
    model.save_pretrained(tmp_path / "again")
    again, *_ = load_pretrained_model(tmp_path, device="cpu")
    assert again.language_model.generation_config.cache_implementation is None
