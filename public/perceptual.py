"""What the paper's perceptual loss looks with, from files that others have published: VGG16 with LPIPS's heads, and the
logits of ConvNeXt-S.

    --vgg FILE         torchvision's vgg16-397923af.pth
    --lpips FILE       the heads that the package lpips carries: lpips/weights/v0.1/vgg.pth
    --convnext FILE    torchvision's convnext_small-0c510722.pth

Pictures are `b 3 H W` in [-1, 1]. Both networks are written anew here and equal torchvision's and lpips's
(tests/claims/test_tokenizer_losses.py).
"""

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from parts.dcae import resize
from parts.layer import ImageNetScale
from plumbing.command import UserError
from spar import Config


class VGG16(nn.Module):
    """VGG16's five stages with LPIPS's heads, from torchvision's names (`features.N.weight`) and LPIPS's
    (`linK.model.1.weight`). Raises ValueError if one is missing."""

    STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        self.stages, c_in, number = nn.ModuleList(), 3, 0
        wanted = {}
        for widths in self.STAGES:
            stage = nn.ModuleList()
            for c in widths:
                stage.append(nn.Conv2d(c_in, c, 3, padding=1))
                wanted[f"features.{number}"] = stage[-1]
                c_in, number = c, number + 2  # torchvision counts the ReLUs
            self.stages.append(stage)
            number += 1  # and the pooling
        names = [f"{name}.{key}" for name in wanted for key in ("weight", "bias")]
        missing = [name for name in [*names, *(f"lin{i}.model.1.weight" for i in range(5))] if name not in weights]
        if missing:
            raise ValueError(f"it lacks {missing[0]}")
        for name, conv in wanted.items():
            conv.load_state_dict({key: weights[f"{name}.{key}"] for key in ("weight", "bias")})
        self.heads = nn.ParameterList(weights[f"lin{i}.model.1.weight"] for i in range(5))
        self.scale = ImageNetScale()

    def features(self, images: Tensor) -> list[Tensor]:
        x, maps = self.scale(images), []
        for number, stage in enumerate(self.stages):
            x = F.max_pool2d(x, 2) if number else x
            for conv in stage:
                x = F.relu(conv(x))
            maps.append(x)
        return maps


class ChannelLayerNorm(nn.LayerNorm):
    """Over the channels of a map `b c h w`."""

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(super().forward(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")


class ConvNeXtBlock(nn.Module):
    """x + scale · (depthwise 7×7, norm, and an MLP at each place)"""

    def __init__(self, c: int):
        super().__init__()
        # the names of the inner layers are torchvision's, where turning channels last and first are layers too
        self.block = nn.ModuleDict({"0": nn.Conv2d(c, c, 7, padding=3, groups=c), "2": nn.LayerNorm(c, eps=1e-6),
                                    "3": nn.Linear(c, 4 * c), "5": nn.Linear(4 * c, c)})
        self.layer_scale = nn.Parameter(torch.ones(c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = rearrange(self.block["0"](x), "b c h w -> b h w c")
        y = self.block["5"](F.gelu(self.block["3"](self.block["2"](y))))
        return x + self.layer_scale * rearrange(y, "b h w c -> b c h w")


class ConvNeXt(nn.Module):
    """ConvNeXt-S (arXiv 2201.03545): pictures of any size -> `b 1000` logits, as torchvision names its weights."""

    def __init__(self, widths: tuple = (96, 192, 384, 768), depths: tuple = (3, 3, 27, 3), classes: int = 1000):
        super().__init__()
        layers = [nn.Sequential(nn.Conv2d(3, widths[0], 4, stride=4), ChannelLayerNorm(widths[0], eps=1e-6))]
        for i, (c, depth) in enumerate(zip(widths, depths)):
            if i:
                layers.append(nn.Sequential(ChannelLayerNorm(widths[i - 1], eps=1e-6),
                                            nn.Conv2d(widths[i - 1], c, 2, stride=2)))
            layers.append(nn.Sequential(*(ConvNeXtBlock(c) for _ in range(depth))))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(ChannelLayerNorm(widths[-1], eps=1e-6), nn.Flatten(),
                                        nn.Linear(widths[-1], classes))
        self.scale = ImageNetScale()

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(self.scale(resize(images, 224)))
        return self.classifier(x.mean((2, 3), keepdim=True))


def read_weights(path: str) -> dict[str, Tensor]:
    """A state dict; nothing in the file is executed. Raises ValueError."""
    try:
        weights = torch.load(Path(path), map_location="cpu", weights_only=True)
        if not all(isinstance(value, Tensor) for value in weights.values()):
            raise ValueError("it holds more than weights")
        return weights
    except (AttributeError, TypeError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(str(error).splitlines()[0]) from None


def perceptual_networks(config: Config) -> tuple[nn.Module | None, nn.Module | None]:
    """-> (VGG16, ConvNeXt-S), None where the configuration names no file. Raises UserError for a file that is not the
    network's."""
    vgg = convnext = None
    try:
        if config.vgg:
            flag, path = "--vgg", config.vgg
            weights = read_weights(path)
            flag, path = "--lpips", config.lpips
            weights |= read_weights(path)
            flag, path = "--vgg", f"{config.vgg} with --lpips {path}"
            vgg = VGG16(weights)
        if config.convnext:
            flag, path = "--convnext", config.convnext
            convnext = ConvNeXt()
            convnext.load_state_dict(read_weights(path))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{flag} {path}: {' '.join(str(error).split())[:200]}") from None
    return vgg, convnext
