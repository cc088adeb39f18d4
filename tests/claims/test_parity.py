"""Same random weights into the public models and into ours: outputs and gradients agree.

`theirs` is built by transformers and diffusers from a small config, so nothing is fetched. Without the two libraries
(an optional extra) each test skips. A weight that only one side has makes `share` fail.
"""

import pytest
import torch

from diffusion import DiT
from mllm import LanguageModel
from parts.dcae import PixelDecoder, PixelEncoder
from public.names import DIT, LANGUAGE, VISION, decoder_rules, encoder_rules, renamed
from tokenizer import VisionEncoder

REASON = "the public models to compare with are an optional extra"
RELATIVE = 1e-5  # largest difference, in units of the reference's largest value


# ---------------------------------------------------------------- weights: names of ours -> names of theirs


def share(ours, theirs, rules, loudness=1.0):
    """Random weights for both. Returns (name, our parameter, those of theirs that, joined along dim 0, are the same).

    rules: of public/names.py, by which the public models' files are read too.
    loudness: size of all weights but norms; with little of it, a norm's eps shows.
    """
    torch.manual_seed(0)
    left, pairs = dict(theirs.named_parameters()), []
    for name, parameter in ours.named_parameters():
        parts = [left.pop(key) for key in renamed(name, rules)]
        value = torch.randn_like(parameter) * loudness * (parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3)
        if parameter.dim() == 1 and not name.endswith("bias"):
            value += 1  # the scale of a norm or of a branch
        with torch.no_grad():
            parameter.copy_(value)
            for part, rows in zip(parts, value.split([len(part) for part in parts])):
                part.copy_(rows.reshape(part.shape))
        pairs.append((name, parameter, parts))
    assert not left, f"only theirs has {sorted(left)}"
    return pairs


def assert_close(name, ours, theirs):
    largest = theirs.abs().max().item()
    assert ours.shape == theirs.shape and largest > 0, name
    assert (ours - theirs).abs().max().item() <= RELATIVE * largest, name


def assert_parity(out, reference, inputs, pairs):
    """Outputs, and the gradients of a random linear functional of them for `inputs` and all shared parameters."""
    assert_close("output", out, reference)
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    pairs = [(f"input {i}", x, [x]) for i, x in enumerate(inputs)] + pairs
    gradients = torch.autograd.grad(out, [x for _, x, _ in pairs], towards)
    references = iter(torch.autograd.grad(reference, [part for *_, parts in pairs for part in parts], towards))
    for (name, _, parts), gradient in zip(pairs, gradients):
        joined = torch.cat([next(references) for _ in parts])
        assert_close(f"gradient of {name}", gradient, joined.reshape(gradient.shape))


def normal(*shape, seed=2, size=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).requires_grad_()


# ---------------------------------------------------------------- vision encoder: InternViT and InternVL's projector

IN_PLACE = [(r"^vision", "vision_tower"), (r"^projector", "multi_modal_projector")]


# side, patch, width, layers, heads, mlp ratio, d
@pytest.mark.parametrize("size", [(16, 4, 32, 2, 4, 4, 24), (32, 4, 24, 3, 3, 2, 40), (24, 2, 32, 1, 8, 3, 16),
                                  (28, 7, 20, 4, 1, 4, 20), (56, 14, 48, 2, 6, 4, 32)], ids=str)
@pytest.mark.parametrize("loudness, larger", [(1, 1), (0.2, 1), (1, 2), (1, 1.5)])
def test_vision_encoder_equals_internvl(size, loudness, larger):
    """E_s with pixel shuffle and projector, as InternVL3: layer scale, biases, no qk-norm, no final norm; on pictures
    of its own side, and on larger ones with its positions interpolated."""
    transformers = pytest.importorskip("transformers", reason=REASON)
    side, patch, width, layers, heads, ratio, d = size
    vision = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, image_size=side,
                  patch_size=patch, intermediate_size=ratio * width, attention_bias=True, use_qk_norm=False,
                  use_mean_pooling=True)
    text = dict(model_type="qwen2", hidden_size=d, num_hidden_layers=0, vocab_size=1)
    config = transformers.InternVLConfig(vision_config=vision, text_config=text)
    theirs = transformers.InternVLModel._from_config(config, attn_implementation="eager").eval()
    theirs.language_model = None  # compared below, with sizes of its own
    ours = VisionEncoder(side, patch, width, layers, heads, ratio, d)
    seen = round(larger * side / (2 * patch)) * 2 * patch
    pairs, images = share(ours, theirs, [*VISION, *IN_PLACE], loudness), normal(2, 3, seen, seen)
    assert_parity(ours(images), theirs.get_image_features(images).pooler_output, [images], pairs)


# ---------------------------------------------------------------- language model: Qwen2

# d, layers, heads, heads of keys and values, mlp
LANGUAGE_SIZES = [(32, 2, 4, 2, 48), (24, 3, 3, 1, 40), (48, 1, 6, 6, 64), (40, 4, 5, 5, 24)]


def language_models(size, causal_lm=False, tied=True):
    transformers = pytest.importorskip("transformers", reason=REASON)
    d, layers, heads, kv_heads, mlp = size
    config = transformers.Qwen2Config(
        vocab_size=29, hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=mlp, rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=tied)
    theirs = transformers.Qwen2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    return LanguageModel(29, d, layers, heads, kv_heads, mlp, tied), theirs if causal_lm else theirs.model


def padding(kind, length):
    """Mask `3 length`, true = a word: the rows differ in how much of them is padding, the first has none."""
    place, hidden = torch.arange(length)[None], torch.tensor([0, 2, length // 2])[:, None]
    left, right = place >= hidden, place < length - hidden
    return {"none": left | right | True, "left": left, "right": right, "middle": abs(place - 3) * 2 >= hidden}[kind]


@pytest.mark.parametrize("size", LANGUAGE_SIZES, ids=str)
@pytest.mark.parametrize("kind, length", [("none", 6), ("none", 33), ("left", 13), ("right", 13), ("middle", 11)])
@pytest.mark.parametrize("loudness", [1, 0.2])
def test_all_hidden_states_equal_qwen2_where_there_are_words(size, kind, length, loudness):
    """Embeddings, each layer's result and the normed last one; padding is masked and does not count as a position."""
    ours, theirs = language_models(size)
    pairs = share(ours, theirs, [*LANGUAGE, (r"^language\.", "")], loudness)[1:]  # x comes from outside, not from words
    x, mask = normal(3, length, size[0], size=loudness), padding(kind, length)
    reference = theirs(inputs_embeds=x, attention_mask=mask.long(), position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                       output_hidden_states=True).hidden_states
    hidden, _ = ours(x, None if kind == "none" else mask)
    assert len(hidden) == len(reference) == size[1] + 1
    assert_parity(torch.stack(hidden)[:, mask], torch.stack(reference)[:, mask], [x], pairs)


@pytest.mark.parametrize("size", LANGUAGE_SIZES, ids=str)
@pytest.mark.parametrize("kind, length", [("none", 17), ("left", 11)])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_with_and_without_tied_embeddings_equal_qwen2(size, kind, length, tied):
    """From ids to logits; a tied embedding's gradient comes from both of its ends."""
    ours, theirs = language_models(size, causal_lm=True, tied=tied)
    pairs = share(ours, theirs, [*LANGUAGE, (r"^language", "model"), (r"^head", "lm_head")])
    ids, mask = torch.randint(0, 29, (3, length), generator=torch.Generator().manual_seed(3)), padding(kind, length)
    reference = theirs(input_ids=ids, attention_mask=mask.long(), position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    logits = ours.logits(ours(ours.embedding(ids), mask)[0][-1])
    assert_parity(logits[mask], reference[mask], [], pairs)


# ---------------------------------------------------------------- pixel autoencoder: DC-AE

# p, widths, depths, stages with attention, resampling
AUTOENCODERS = [(16, (8, 16, 32, 64), (0, 1, 2, 1), 1, "shuffle"), (16, (16, 32, 32, 64), (1, 2, 1, 2), 2, "shuffle"),
                (8, (16, 32, 32, 32), (0, 2, 1, 1), 2, "shuffle"), (8, (16, 32, 32, 32), (0, 2, 1, 1), 2, "conv"),
                (16, (16, 32, 32, 64), (2, 1, 1, 1), 2, "conv")]
RESAMPLING = {"shuffle": dict(downsample_block_type="pixel_unshuffle", upsample_block_type="pixel_shuffle"),
              "conv": dict(downsample_block_type="conv", upsample_block_type="interpolate")}


def dc_ae(shape):
    """The public one."""
    diffusers = pytest.importorskip("diffusers", reason=REASON)
    p, widths, depths, vit_stages, resample = shape
    resnets = len(widths) - vit_stages
    half = dict(block_types=("ResBlock",) * resnets + ("EfficientViTBlock",) * vit_stages, block_out_channels=widths,
                layers_per_block=depths, qkv_multiscales=((),) * resnets + ((5,),) * vit_stages)
    halves = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in half.items()}
    return diffusers.AutoencoderDC(
        latent_channels=p, decoder_norm_types="rms_norm", decoder_act_fns="silu", **RESAMPLING[resample],
        **halves).eval()


@pytest.mark.parametrize("shape", AUTOENCODERS, ids=str)
@pytest.mark.parametrize("h, w", [(16, 16), (32, 32), (48, 48), (32, 64)])
def test_pixel_encoder_equals_dc_ae(shape, h, w):
    """E_p, from few latents (where theirs takes its quadratic form of linear attention) to many."""
    ours, theirs, images = PixelEncoder(*shape), dc_ae(shape), normal(2, 3, h, w)
    pairs = share(ours, theirs.encoder, encoder_rules(len(shape[1]), shape[3]))
    assert_parity(ours(images), theirs.encode(images).latent.flatten(2).mT, [images], pairs)


@pytest.mark.parametrize("shape", AUTOENCODERS, ids=str)
@pytest.mark.parametrize("side", [2, 4, 6])
def test_pixel_decoder_equals_dc_ae(shape, side):
    """D_p; our stages run deep to shallow, theirs are numbered shallow to deep."""
    ours, theirs, z = PixelDecoder(*shape), dc_ae(shape), normal(2, side**2, shape[0])
    pairs = share(ours, theirs.decoder, decoder_rules(len(shape[1]), shape[3]))
    assert_parity(ours(z), theirs.decode(z.mT.unflatten(2, (side, side))).sample, [z], pairs)


# ---------------------------------------------------------------- diffusion transformer: SANA

# p, c, layers, heads, heads of the cross-attention, width of the condition, MLP ratio
DIT_SIZES = [(8, 32, 2, 2, 4, 24, 2.5), (16, 48, 3, 3, 2, 40, 4), (4, 40, 1, 1, 5, 16, 2.5)]


@pytest.mark.parametrize("size", DIT_SIZES, ids=str)
@pytest.mark.parametrize("h, w, length, padded", [(4, 4, 7, False), (4, 4, 7, True), (3, 5, 12, True), (6, 2, 9, True),
                                                  (1, 7, 5, True)])
@pytest.mark.parametrize("loudness", [1, 0.2])
def test_dit_equals_sana(size, h, w, length, padded, loudness):
    """Linear attention, Mix-FFN, AdaLN-single, masked cross-attention; our σ is their timestep / 1000."""
    diffusers = pytest.importorskip("diffusers", reason=REASON)
    p, c, layers, heads, cross_heads, width, ratio = size
    theirs = diffusers.SanaTransformer2DModel(
        in_channels=p, out_channels=p, num_attention_heads=heads, attention_head_dim=c // heads, num_layers=layers,
        num_cross_attention_heads=cross_heads, cross_attention_head_dim=c // cross_heads, cross_attention_dim=c,
        caption_channels=width, mlp_ratio=ratio, patch_size=1, interpolation_scale=None).eval()
    ours = DiT(*size, align_block=1)
    pairs = share(ours, theirs, DIT, loudness)
    x, condition = normal(3, p, h, w), normal(3, length, width, seed=3)
    sigma = torch.tensor([0.05, 0.5, 0.97]).requires_grad_()
    mask = padding("left", length) & padding("right", length).flip(0) if padded else None
    velocity, _ = ours(x, sigma, condition, mask)
    reference = theirs(x, condition, 1000 * sigma, encoder_attention_mask=None if mask is None else mask.long()).sample
    assert_parity(velocity, reference, [x, sigma, condition], pairs)
