"""The perceptual and adversarial losses of the tokenizer, against plain arithmetic and a plain VGG16."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parts.adversary import Discriminator, Perceptual, perceptual_distance
from parts.dcae import PixelEncoder
from public.perceptual import VGG16, ConvNeXt


def encoder():
    torch.manual_seed(0)
    return PixelEncoder(p=8, widths=(8, 16, 32, 32), depths=(0, 1, 1, 1), vit_stages=1)


def maps():
    torch.manual_seed(1)
    return [torch.randn(2, c, side, side) for c, side in ((5, 4), (3, 2))]


def plain_vgg():
    """torchvision's vgg16().features without its last pooling: 13 convolutions, each with its ReLU, 4 poolings."""
    torch.manual_seed(2)
    layers, c_in = [], 3
    for c in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512):
        layers += [nn.MaxPool2d(2)] if c == "M" else [nn.Conv2d(c_in, c, 3, padding=1), nn.ReLU()]
        c_in = c_in if c == "M" else c
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def vgg():
    plain = plain_vgg()
    weights = {f"features.{key}": value for key, value in plain.state_dict().items()}
    for i, c in enumerate((64, 128, 256, 512, 512)):
        weights[f"lin{i}.model.1.weight"] = torch.rand(1, c, 1, 1)
    return plain, weights


def test_the_perceptual_distance_is_zero_for_equal_maps_and_blind_to_their_scale():
    a, b = maps(), [x.roll(1, 0) for x in maps()]
    distance = perceptual_distance(a, b)
    assert perceptual_distance(a, a) == 0 and distance > 0.1
    scaled = [3 * a[0], a[1] * torch.rand(2, 1, 2, 2).add(0.5)]  # each position by itself
    torch.testing.assert_close(perceptual_distance(scaled, b), distance)


@pytest.mark.parametrize("with_heads", (False, True))
def test_the_perceptual_distance_equals_a_loop_over_positions(with_heads):
    a, b = maps(), [x.flip(1) for x in maps()]
    heads = [torch.rand(1, x.shape[1], 1, 1) for x in a] if with_heads else None
    total = 0.0
    for i, (x, y) in enumerate(zip(a, b)):
        n, c, h, w = x.shape
        for m, row, column in ((m, r, s) for m in range(n) for r in range(h) for s in range(w)):
            u, v = x[m, :, row, column], y[m, :, row, column]
            weight = heads[i].flatten() if with_heads else torch.ones(c)
            total += float((weight * (u / u.norm() - v / v.norm()) ** 2).sum()) / (n * h * w)
    assert perceptual_distance(a, b, heads).item() == pytest.approx(total, rel=1e-5)


def test_the_perceptual_loss_gives_gradient_to_the_images_alone():
    loss = Perceptual(encoder())
    images, targets = (torch.rand(2, 3, 32, 32).requires_grad_() for _ in range(2))
    value = loss(images, targets)
    value.backward()
    assert value > 0 and images.grad.abs().sum() > 0 and targets.grad is None
    assert all(p.grad is None and not p.requires_grad for p in loss.parameters())
    assert loss(images, images).item() == pytest.approx(0, abs=1e-6)
    assert loss(images + 0.01, images) < loss(images + 0.3 * torch.randn_like(images), images)


def test_the_perceptual_loss_compares_the_stem_and_every_stage():
    network = encoder()
    assert [tuple(x.shape[1:]) for x in network.features(torch.zeros(1, 3, 32, 32))] == [
        (16, 16, 16), (32, 8, 8), (32, 4, 4), (32, 4, 4)]


def test_vgg16_reads_one_file_and_equals_a_plain_vgg16(vgg):
    plain, weights = vgg
    network, images = VGG16(weights), torch.rand(1, 3, 32, 32) * 2 - 1
    mean, std = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 3, 1, 1)  # LPIPS's scaling
    x, wanted = (images - mean) / std, []
    for i, layer in enumerate(plain):
        x = layer(x)
        if i in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
            wanted.append(x)
    with torch.no_grad():
        for ours, theirs in zip(network.features(images), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
    others, distance = images.flip(3), 0
    for i, (a, b) in enumerate(zip(network.features(images), network.features(others))):
        difference = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square()
        distance = distance + (weights[f"lin{i}.model.1.weight"] * difference).sum(1).mean()
    torch.testing.assert_close(Perceptual(network)(images, others), distance)


@pytest.mark.parametrize("name", ("features.0.weight", "features.28.weight", "features.5.bias", "lin4.model.1.weight"))
def test_vgg16_names_what_the_file_lacks(vgg, name):
    with pytest.raises(ValueError, match=name):
        VGG16({key: value for key, value in vgg[1].items() if key != name})


def test_vgg16_takes_its_heads_along_to_another_device(vgg):
    network = VGG16(vgg[1]).to("meta")
    assert all(head.device.type == "meta" for head in network.heads)


def test_vgg16_with_the_published_heads_equals_lpips(vgg):
    lpips = pytest.importorskip("lpips", reason="what we compare with is an optional extra")
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    plain = [module for module in theirs.net.modules() if isinstance(module, nn.Conv2d)]
    weights = {key: value for key, value in vgg[1].items() if key.startswith("features")}
    for conv, number in zip(plain, (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), strict=True):
        conv.load_state_dict({key: weights[f"features.{number}.{key}"] for key in ("weight", "bias")})
    heads = {f"lin{i}.model.1.weight": getattr(theirs, f"lin{i}").model[1].weight.detach() for i in range(5)}
    images, others = torch.rand(2, 2, 3, 48, 48) * 2 - 1
    with torch.no_grad():
        right = theirs(images, others).mean()
    torch.testing.assert_close(Perceptual(VGG16(weights | heads))(images, others), right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", (64, 224, 300))
def test_convnext_equals_torchvisions(side):
    torchvision = pytest.importorskip("torchvision", reason="what we compare with is an optional extra")
    torch.manual_seed(3)
    theirs = torchvision.models.convnext_small().eval()
    for name, parameter in theirs.named_parameters():
        nn.init.normal_(parameter, std=0.5 if "layer_scale" in name else 0.05)
    ours, images = ConvNeXt().eval(), torch.rand(1, 3, side, side) * 2 - 1
    ours.load_state_dict(theirs.state_dict())
    pixels = F.interpolate((images + 1) / 2, size=(224, 224), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(rgb).view(3, 1, 1) for rgb in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        logits, right = ours(images), theirs((pixels - mean) / std)
    assert logits.std() > 0.01 and (logits - right).abs().max() < 1e-4 * right.abs().max()


def test_a_classifier_joins_the_perceptual_loss_with_a_tenth_and_half_precision_stays_out_of_it():
    class Logits(nn.Module):
        def forward(self, images):
            assert images.dtype == torch.float32
            return images.flatten(1)[:, :10]

    network, (images, others) = encoder(), torch.rand(2, 2, 3, 32, 32)
    plain, right = Perceptual(network)(images, others), (images - others).flatten(1)[:, :10].square().mean()
    with torch.autocast("cpu", torch.bfloat16):
        joined = Perceptual(network, Logits())(images.bfloat16().float(), others)
        assert Perceptual(network)(images, others).equal(plain)
    near = Perceptual(network, Logits())(images, others)
    torch.testing.assert_close(near, (plain + 0.1 * right) / 1.1)
    torch.testing.assert_close(joined, near, rtol=0.05, atol=0)


class Known(Discriminator):
    """The first pixel is the logit."""

    def forward(self, images):
        return images[:, :1, :1, :1] * self.anchors.new_ones(1)


def logits(*values):
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).clone()


def test_the_discriminator_gives_one_logit_per_patch():
    assert Discriminator(8)(torch.zeros(2, 3, 32, 32)).shape == (2, 1, 4, 4)
    assert Discriminator(8, layers=2)(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 16, 16)


def test_the_hinge_loss_has_its_known_values():
    known = Known(8).eval()
    for real, fake, wanted in (((0.0, 0.0), (0.0, 0.0), 2.0), ((2.0, 1.0), (-1.0, -3.0), 0.0),
                               ((-1.0, 0.5), (0.5, -2.0), (2 + 0.5) / 2 + 1.5 / 2)):
        assert known.loss(logits(*real), logits(*fake), lecam=0).item() == pytest.approx(wanted)
    assert known.generator_loss(logits(0.5, 1.5)).item() == pytest.approx(-1)


def test_lecam_holds_logits_near_the_running_mean_of_the_other_kind():
    known = Known(8).eval()
    known.anchors.copy_(torch.tensor([0.5, -0.25]))  # real, fake
    real, fake = logits(1.0, -1.0), logits(0.0, 2.0)
    lecam = known.loss(real, fake, lecam=1) - known.loss(real, fake, lecam=0)
    assert lecam.item() == pytest.approx((1.25**2 + 0) / 2 + (0.5**2 + 0) / 2)


def test_lecams_anchors_move_only_in_training():
    known = Known(8).train()
    known.loss(logits(1.0, 3.0), logits(-1.0, -2.0))
    torch.testing.assert_close(known.anchors, torch.tensor([0.02, -0.015]))
    known.eval().loss(logits(1.0, 3.0), logits(-1.0, -2.0))
    known.train().generator_loss(logits(5.0))
    torch.testing.assert_close(known.anchors, torch.tensor([0.02, -0.015]))
    assert "anchors" in known.state_dict()


def test_the_discriminators_loss_stops_at_the_fake_and_the_generators_does_not():
    torch.manual_seed(0)
    judge = Discriminator(8)
    real, fake = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32).requires_grad_()
    judge.loss(real, fake).backward()
    assert fake.grad is None and all(p.grad is not None for p in judge.parameters())
    judge.generator_loss(fake).backward()
    assert fake.grad.abs().sum() > 0


def test_the_discriminator_learns_to_tell_two_kinds_apart():
    torch.manual_seed(0)
    judge, real, fake = Discriminator(8), torch.rand(8, 3, 32, 32), torch.rand(8, 3, 32, 32).round()
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
    for _ in range(30):
        optimizer.zero_grad()
        judge.loss(real, fake).backward()
        optimizer.step()
    assert judge(real).mean() > judge(fake).mean() + 1 and judge.anchors[0] > judge.anchors[1]
