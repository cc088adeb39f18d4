"""What the networks of all files are made of: a layer that may forget its insides, a norm that stays in float32, and
SANA's feed-forward.

Computing a layer's insides again in backward trades a third more arithmetic for most of the memory (`--checkpointing`);
a layer is also the unit in which `--shard` spreads a model over processes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint


class Layer(nn.Module):
    recompute = False

    def __call__(self, *inputs, **options):
        if self.recompute and is_grad_enabled():
            return checkpoint(super().__call__, *inputs, use_reentrant=False, preserve_rng_state=False, **options)
        return super().__call__(*inputs, **options)


def layers(module: nn.Module) -> list[Layer]:
    return [layer for layer in module.modules() if isinstance(layer, Layer)]


class RMSNorm(nn.RMSNorm):
    """In its weights' precision, also where autocast hands it half."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class ImageNetScale(nn.Module):
    """Pictures `b 3 H W` in [-1, 1] -> with ImageNet's mean 0 and variance 1, channel by channel, as public networks
    read them; without `on` as they are."""

    def __init__(self, on: bool = True):
        super().__init__()
        for name, values in (("mean", (-0.03, -0.088, -0.188) if on else (0.0,) * 3),
                             ("std", (0.458, 0.448, 0.45) if on else (1.0,) * 3)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class MixFFN(nn.Module):
    """1×1 up, depthwise 3×3, gate, 1×1 down: `b c h w` -> same. The DiT's feed-forward too."""

    def __init__(self, c: int, ratio: float = 4):
        super().__init__()
        hidden = int(ratio * c)
        self.up = nn.Conv2d(c, 2 * hidden, 1)
        self.depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.down = nn.Conv2d(hidden, c, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.depth(F.silu(self.up(x))).chunk(2, dim=1)
        return self.down(x * F.silu(gate))
