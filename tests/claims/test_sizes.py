"""The presets `full` and `full-3b` have the sizes of the public models they stand for, part by part; and every preset
fits together. All models are built on the meta device: shapes without weights.
"""

from contextlib import nullcontext

import pytest
import torch

from spar import PRESETS, make_config
from tests.tools.models import model_of

REASON = "the public models to compare with are an optional extra"

# ---------------------------------------------------------------- parameters of the public models

BOTH = {"vision": 304_012_288, "pixel encoder": 153_027_104, "pixel decoder": 159_223_171}
PUBLISHED = {
    "full": BOTH | {"projector": 4_482_816, "embedding": 135_899_904, "layers": 357_898_112, "output": 135_899_904,
                    "dit": 591_747_872},
    "full-3b": BOTH | {"projector": 8_662_016, "embedding": 232_971_264, "layers": 1_310_340_608, "output": 232_971_264,
                       "dit": 1_604_462_752}}
MLLM = ("vision", "projector", "embedding", "layers", "output")


def on_meta(build, *arguments, **options):
    with torch.device("meta"):
        return build(*arguments, **options)


def count(*modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def ours(preset):
    model = on_meta(model_of, make_config(preset=preset))
    vision, llm = model.tokenizer.vision, model.mllm.llm
    return {"vision": count(vision) - count(vision.projector), "projector": count(vision.projector),
            "embedding": count(llm.embedding), "layers": count(llm.layers, llm.norm), "output": count(llm.output),
            "dit": count(model.dit), "pixel encoder": count(model.pixel_encoder),
            "pixel decoder": count(model.tokenizer.decoder)}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_each_part_has_as_many_parameters_as_the_public_model(preset):
    parts = ours(preset)
    assert parts == PUBLISHED[preset]
    billions = {"full": 0.94, "full-3b": 2.09}[preset]  # as InternVL3-1B and InternVL3-2B are listed
    assert round(sum(parts[name] for name in MLLM) / 1e9, 2) == billions


# ---------------------------------------------------------------- the same, from the published configurations

# OpenGVLab/InternVL3-1B and -2B, config.json: vision_config, what llm_config has of its own, and what both share
INTERN_VIT = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
                  image_size=448,
                  patch_size=14, attention_bias=True, use_qk_norm=False, use_mean_pooling=True)
QWEN = {"full": dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, intermediate_size=4864),
        "full-3b": dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, intermediate_size=8960)}
QWEN_BOTH = dict(model_type="qwen2", vocab_size=151674, num_key_value_heads=2, tie_word_embeddings=False)
# dc-ae-f32c32-sana-1.1, as diffusers' convert_dcae_to_diffusers.py builds it
DC_AE = dict(latent_channels=32, downsample_block_type="conv", upsample_block_type="interpolate") | {
    f"{side}_{key}": value for side, layers in (("encoder", (2, 2, 2, 3, 3, 3)), ("decoder", (3, 3, 3, 3, 3, 3)))
    for key, value in dict(block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3, layers_per_block=layers,
                           block_out_channels=(128, 256, 512, 512, 1024, 1024),
                           qkv_multiscales=((),) * 3 + ((5,),) * 3).items()}
# SanaMS_600M_P1_D28 and SanaMS_1600M_P1_D20, as diffusers' convert_sana_to_diffusers.py builds them
SANA = {"full": dict(num_attention_heads=36, num_layers=28, num_cross_attention_heads=16, cross_attention_head_dim=72,
                     cross_attention_dim=1152),
        "full-3b": dict(num_attention_heads=70, num_layers=20, num_cross_attention_heads=20,
                        cross_attention_head_dim=112,
                        cross_attention_dim=2240)}
SANA_BOTH = dict(in_channels=32, out_channels=32, attention_head_dim=32, caption_channels=2304, mlp_ratio=2.5,
                 patch_size=1,
                 attention_bias=False, interpolation_scale=None)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_each_part_has_as_many_parameters_as_its_published_configuration_builds(preset):
    transformers = pytest.importorskip("transformers", reason=REASON)
    diffusers = pytest.importorskip("diffusers", reason=REASON)
    intern = on_meta(transformers.InternVLForConditionalGeneration, transformers.InternVLConfig(
        vision_config=INTERN_VIT, text_config=QWEN_BOTH | QWEN[preset], tie_word_embeddings=False))
    llm, dc_ae = intern.model.language_model, on_meta(diffusers.AutoencoderDC, **DC_AE)
    sana = on_meta(diffusers.SanaTransformer2DModel, **SANA_BOTH, **SANA[preset])
    assert ours(preset) == {
        "vision": count(intern.model.vision_tower), "projector": count(intern.model.multi_modal_projector),
        "embedding": count(llm.embed_tokens), "layers": count(llm.layers, llm.norm), "output": count(intern.lm_head),
        "pixel encoder": count(dc_ae.encoder), "pixel decoder": count(dc_ae.decoder), "dit": count(sana)}


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize("preset", PRESETS)
def test_the_shapes_of_a_preset_fit_together(preset, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # the meta device has no autocast
    config = make_config(preset=preset)
    model, images = on_meta(model_of, config), torch.empty(2, 3, config.side, config.side, device="meta")
    tokens = config.grid**2
    picture, f_v, latents = model.tokenizer(images)
    assert picture.shape == images.shape and f_v.shape == (2, tokens, config.d)
    assert {z.shape for z in (*latents, model.pixel_latent(images))} == {(2, tokens, config.p)}
    ids, mask = model.encode_prompts(["a large red circle", "a blue square"], has_image=True)
    condition, z = model.mllm.condition(ids, mask, f_v), model.as_grid(latents.fused)
    assert condition.tokens.shape == (2, ids.shape[1] + config.queries, config.condition_width)
    assert config.queries == tokens
    assert condition.weights.shape == (*condition.mask.shape, config.k) and config.k == (3 if preset == "toy" else 4)
    velocity, hidden = model.dit(z, torch.empty(2, device="meta"), condition.tokens, condition.mask)
    assert velocity.shape == z.shape == (2, config.p, config.grid, config.grid)
    assert model.align_head(hidden).shape == f_v.shape
    states, _ = model.mllm.llm(model.mllm.embed(ids, f_v), mask)
    assert model.mllm.llm.logits(states[-1]).shape == (*ids.shape, config.vocabulary or len(model.words))
    assert len(config.steps) == len(config.batch) == len(config.lr) == 9


@pytest.mark.parametrize("side, patch", [(16, 2), (8, 1), (24, 3)])  # a latent of 4 pixels for tokens of 4, 2 and 6
def test_the_pixel_encoder_gives_one_latent_for_each_visual_token(tiny, side, patch):
    model, images = model_of(tiny(side=side, patch=patch)), torch.rand(2, 3, side, side) * 2 - 1
    z = model.pixel_latent(images)
    assert z.shape == model.tokenizer(images)[2].pixel.shape
    assert patch != 2 or torch.equal(z, model.pixel_encoder(images))


def test_a_larger_vocabulary_adds_rows_but_no_words_and_untied_weights_are_the_outputs_own(tiny):
    words = len(model_of(tiny()).words)
    model = model_of(tiny(vocabulary=words + 50, tied=False))
    llm = model.mllm.llm
    assert llm.embedding.weight.shape == llm.output.weight.shape == (words + 50, 32)
    assert llm.logits(torch.ones(2, 32)).equal(torch.ones(2, 32) @ llm.output.weight.T)
    assert model.words.decode([words - 1, words, words + 49]) == model.words.words[-1]
    with pytest.raises(ValueError, match="vocabulary 5"):
        model_of(tiny(vocabulary=5))
