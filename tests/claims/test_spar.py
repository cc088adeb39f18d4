"""Claims about the whole model's use of its LLM before it draws."""

import pytest
import torch

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
