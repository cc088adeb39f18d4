"""The tokenizer: which loss trains which stream, what a stream can reach, and how its parts start."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parts.dcae import Down, PixelDecoder, PixelEncoder, Up
from tokenizer import ResidualMLP, Tokenizer, VisionEncoder, frozen_copy, tokenizer_losses

SHAPE = dict(p=8, widths=(8, 16, 32, 32), depths=(0, 1, 1, 1), vit_stages=1)


def build(**settings):
    torch.manual_seed(0)
    vision = VisionEncoder(side=32, patch=4, width=16, layers=2, heads=2, mlp_ratio=2, d=24)
    return Tokenizer(vision, PixelDecoder(**SHAPE), **{"d": 24, "p": 8, "pixel_layers": 2, "heads": 2, **settings})


def pictures(b=2, side=32):
    return torch.rand(b, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def grads(module):
    return [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters()]


def descend(parameters, loss, rate, steps=40):
    optimizer = torch.optim.AdamW(parameters, rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(loss())
        losses[-1].backward()
        optimizer.step()
    return losses[0].item(), loss().item()


def test_the_shapes_are_those_of_the_paper():
    tokenizer, images = build(), pictures()
    reconstruction, f_v, latents = tokenizer(images)
    assert reconstruction.shape == images.shape and f_v.shape == (2, 16, 24)
    assert all(z.shape == (2, 16, 8) for z in latents) and PixelEncoder(**SHAPE)(images).shape == (2, 16, 8)
    assert torch.equal(tokenizer.fuse(latents.semantic, latents.pixel), latents.fused)
    other = VisionEncoder(side=24, patch=4, width=16, layers=1, heads=2, mlp_ratio=2, d=24)
    assert other(pictures(side=24)).shape == (2, 9, 24)


def test_a_token_is_where_its_pixels_are():
    vision = build().vision
    vision.layers = nn.ModuleList()  # without attention a token sees its own 8×8 pixels alone
    images, changed = pictures(), pictures()
    changed[:, :, 8:16, 16:24] = 0  # row 1, column 2 of four: token 6
    assert (vision(images) - vision(changed)).abs().amax((0, 2)).nonzero().tolist() == [[6]]


def test_the_pixel_loss_trains_the_pixel_stream_alone_and_pulls_it_onto_the_target():
    tokenizer, images, encoder = build(), pictures(), PixelEncoder(**SHAPE).requires_grad_(False)
    target = encoder(images)
    F.mse_loss(tokenizer(images)[2].pixel, target).backward()
    assert all(grads(tokenizer.pixel_stream)) and any(grads(tokenizer.vision))
    assert not any(grads(tokenizer.semantic_stream) + grads(tokenizer.fusion) + grads(tokenizer.decoder))
    f_v = tokenizer.features(images).detach()
    stream = tokenizer.pixel_stream
    first, last = descend(stream.parameters(), lambda: F.mse_loss(tokenizer.latents(f_v).pixel, target), 1e-2, 100)
    assert last < 0.5 * first


def test_the_semantic_loss_reaches_the_encoder_and_holds_it_near_the_frozen_copy():
    tokenizer, images = build(), pictures()
    with torch.no_grad():
        wanted = copy.deepcopy(tokenizer.vision)(images)
        for parameter in tokenizer.vision.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    vision = tokenizer.vision
    first, last = descend(vision.parameters(), lambda: F.mse_loss(tokenizer.features(images), wanted), 1e-3)
    assert all(grads(tokenizer.vision)) and last < 0.3 * first
    assert not any(grads(tokenizer.pixel_stream) + grads(tokenizer.semantic_stream))


def test_each_loss_of_t1_to_t3_is_between_what_the_paper_says_and_comes_only_where_it_is_asked_for():
    tokenizer, images, target = build(), pictures(), torch.randn(2, 16, 8)
    before = frozen_copy(tokenizer.vision)
    with torch.no_grad():
        for parameter in tokenizer.vision.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    wanted, f_v, latents = tokenizer(images)
    ends = {"L_mse": (wanted, images), "L_p": (latents.pixel, target), "L_f": (latents.fused, target),
            "L_s": (f_v, before(images))}
    for asked in (list(ends), *([symbol] for symbol in ends)):
        losses, reconstruction = tokenizer_losses(tokenizer, images, dict.fromkeys(asked, 7.0), lambda: target,
                                                  encoder_before=before)
        assert set(losses) == set(asked) and reconstruction.equal(wanted)
        for symbol, loss in losses.items():  # the weights are the loop's
            torch.testing.assert_close(loss, F.mse_loss(*ends[symbol]))
    losses["L_s"].backward()
    assert all(grads(tokenizer.vision)) and not any(grads(before) + grads(tokenizer.semantic_stream))


def test_only_the_pixel_stream_mixes_tokens():
    tokenizer = build()
    f_v = torch.randn(1, 16, 24)
    changed = f_v.clone()
    changed[:, 5] += torch.randn(24)
    a, b = tokenizer.latents(f_v), tokenizer.latents(changed)
    semantic, pixel = ((x - y).abs().amax((0, 2)) > 0 for x, y in ((a.semantic, b.semantic), (a.pixel, b.pixel)))
    assert semantic.nonzero().tolist() == [[5]] and pixel.all()


@pytest.mark.parametrize("variant, field", [("semantic-only", "pixel"), ("pixel-only", "semantic")])
def test_a_variant_lacks_the_other_stream(variant, field):
    tokenizer = build(variant=variant)
    reconstruction, _, latents = tokenizer(pictures())
    assert getattr(latents, field) is None and getattr(tokenizer, f"{field}_stream") is None
    assert sum(z is None for z in latents) == 1 and reconstruction.shape == (2, 3, 32, 32)
    reconstruction.mean().backward()
    assert all(grads(tokenizer.fusion))


@pytest.mark.parametrize("layers", (0, 2))
def test_the_streams_can_be_made_alike(layers):
    tokenizer = build(pixel_layers=layers, semantic_layers=layers)
    names = [[type(part) for part in stream] for stream in (tokenizer.semantic_stream, tokenizer.pixel_stream)]
    assert names[0] == names[1] and names[0].count(ResidualMLP) == 3 and len(names[0]) == layers + 4
    assert tokenizer(pictures())[0].shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match="semantic-only"):
        build(variant="both")


def test_decode_resizes_to_the_side_that_is_asked():
    tokenizer, z = build(), torch.randn(2, 16, 8)
    plain = tokenizer.decoder(z)
    assert torch.equal(tokenizer.decode(z, 32), plain)
    for side, antialias in ((28, True), (40, False)):
        wanted = F.interpolate(plain, size=(side, side), mode="bilinear", antialias=antialias)
        torch.testing.assert_close(tokenizer.decode(z, side), wanted)


@pytest.mark.parametrize("size", [(36, 36), (35, 35), (16, 64)])
def test_the_encoder_rejects_a_picture_that_no_square_of_tokens_covers_and_says_what_to_do(size):
    with pytest.raises(ValueError, match="make them square, a multiple of a token's 8 pixels"):
        build().vision(torch.zeros(1, 3, *size))
    with pytest.raises(ValueError, match="choose another side or patch"):
        VisionEncoder(side=36, patch=4, width=16, layers=1, heads=2, mlp_ratio=2, d=24)


@pytest.mark.parametrize("c_in, c_out", [(8, 8), (8, 16), (16, 8)])
def test_shortcuts_average_on_the_way_down_and_repeat_on_the_way_up(c_in, c_out):
    torch.manual_seed(0)
    x, group = torch.randn(2, c_in, 6, 6), 4 * c_in // c_out
    down, up = Down(c_in, c_out), Up(c_out, c_in)
    assert down(x).shape == (2, c_out, 3, 3) and up(down(x)).shape == x.shape
    for parameter in (*down.parameters(), *up.parameters()):
        nn.init.zeros_(parameter)
    small = down(x)
    torch.testing.assert_close(up(small), F.pixel_shuffle(small.repeat_interleave(group, 1), 2))
    # the four pixels of a channel come after one another, then the next channel's: `group` of them go into one mean
    pixels = x.view(2, c_in, 3, 2, 3, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 4 * c_in, 3, 3)
    means = [pixels[:, i * group:(i + 1) * group].mean(1) for i in range(c_out)]
    torch.testing.assert_close(small, torch.stack(means, 1))
    if c_in == c_out:
        torch.testing.assert_close(small, F.avg_pool2d(x, 2))
        torch.testing.assert_close(up(small), F.interpolate(small, scale_factor=2))
    assert Down(c_in, c_out, shortcut=False)(x).shape == (2, c_out, 3, 3)


def test_new_stream_layers_start_small():
    tokenizer = build(d=256, p=128)
    parts = [*tokenizer.pixel_stream.modules(), *tokenizer.semantic_stream.modules(), *tokenizer.fusion.modules()]
    for layer in [part for part in parts if isinstance(part, nn.Linear)]:
        assert layer.bias.abs().max() == 0 and 0.0194 < layer.weight.std() < 0.0206 and layer.weight.mean().abs() < 1e-3
    assert tokenizer.vision.projector[1].weight.std() > 0.03  # the encoder is not a new layer
