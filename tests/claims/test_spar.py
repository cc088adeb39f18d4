"""Claims about the whole model's use of its LLM before it draws."""

import pytest
import torch

import spar
from tests.tools.models import model_of


@pytest.fixture
def model(tiny):
    return model_of(tiny()).eval()


def test_a_prompt_is_written_out_the_same_for_the_same_seed_and_in_words_that_can_be_drawn(model):
    prompts = ["a red circle", "two green squares"] * 4
    first, again, other = (model.rewrite(prompts, seed=seed) for seed in (3, 3, 4))
    assert first == again != other
    assert model.generate(first, steps=1)[0].shape == (8, 3, 16, 16)
    assert not any("<" in text for text in first)


def test_what_is_written_out_for_an_edit_follows_its_instruction_and_is_what_the_llm_answers(model):
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    instructions = ["make the red circle blue", "remove the green square"]
    answers = model.answer(pictures, instructions)
    assert model.rewrite(instructions, pictures) == [f"{a} {b}" for a, b in zip(instructions, answers)]
    assert model.rewrite(instructions, pictures, seed=5) == model.rewrite(instructions, pictures)


def test_pictures_are_decoded_a_few_at_a_time_and_come_out_the_same(model, monkeypatch):
    pictures, together = torch.rand(7, 3, 16, 16) * 2 - 1, []
    whole, drawn = model.reconstruct(pictures), model.generate(["a red circle"] * 7, steps=1)[0]
    model.tokenizer.decoder.register_forward_pre_hook(lambda _, given: together.append(len(given[0])))
    monkeypatch.setattr(spar, "DECODED_PIXELS", 3 * 16**2)
    torch.testing.assert_close(model.reconstruct(pictures), whole)
    torch.testing.assert_close(model.generate(["a red circle"] * 7, steps=1)[0], drawn)
    assert together == [3, 3, 1] * 2
    monkeypatch.setattr(spar, "DECODED_PIXELS", 1)  # a picture larger than that is decoded alone
    torch.testing.assert_close(model.reconstruct(pictures), whole)
