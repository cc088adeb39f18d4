"""What judges a reconstruction beside the mean square: LPIPS over frozen features, and a PatchGAN discriminator.

Public methods; SPAR uses them in T1 to T3 (Sec. 3.2). Pictures are `b 3 H W` in [-1, 1].
"""

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parts.shared_batch import mean_over_processes


def perceptual_distance(maps: list[Tensor], others: list[Tensor], heads: list[Tensor] | None = None) -> Tensor:
    """LPIPS (arXiv 1801.03924, Eq. 1): unit-normalise each position's feature, squared difference, `heads` weigh the
    channels (None: all 1), mean over positions and batch, sum over layers."""
    total = maps[0].new_zeros((), dtype=torch.float32)
    for i, (a, b) in enumerate(zip(maps, others)):
        a, b = a.float(), b.float()
        difference = (F.normalize(a, dim=1, eps=1e-6) - F.normalize(b, dim=1, eps=1e-6)).square()
        total = total + ((difference if heads is None else difference * heads[i]).sum(1)).mean()
    return total


class Perceptual(nn.Module):
    """The feature network of the perceptual loss, frozen. Offline: the pixel encoder, as P2 left it.

    # differs from paper: there it is LPIPS on VGG16 (`VGG16`, with a weight file) plus a ConvNeXt-S distance.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.requires_grad_(False).eval()

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.network.features(targets)
        return perceptual_distance(self.network.features(images), wanted, getattr(self.network, "heads", None))


class VGG16(nn.Module):
    """VGG16's five stages with LPIPS's heads, from one weight file with torchvision's names (`features.N.weight`) and
    LPIPS's (`linK.model.1.weight`). Raises ValueError if the file lacks one."""

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
            raise ValueError(f"no {missing[0]} in the LPIPS weights: join VGG16's and LPIPS's state dicts in one file")
        for name, conv in wanted.items():
            conv.load_state_dict({key: weights[f"{name}.{key}"] for key in ("weight", "bias")})
        self.heads = nn.ParameterList(weights[f"lin{i}.model.1.weight"] for i in range(5))
        # LPIPS's scaling of pictures in [-1, 1]
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450])[:, None, None])

    def features(self, images: Tensor) -> list[Tensor]:
        x, maps = (images - self.mean) / self.std, []
        for number, stage in enumerate(self.stages):
            x = F.max_pool2d(x, 2) if number else x
            for conv in stage:
                x = F.relu(conv(x))
            maps.append(x)
        return maps


class Discriminator(nn.Module):
    """PatchGAN (arXiv 1611.07004): `b 3 H W` -> one logit per patch `b 1 h w`."""

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        widths = [min(width * 2**i, 8 * width) for i in range(layers + 1)]
        body = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            body += [nn.Conv2d(widths[i - 1], widths[i], 4 if stride == 2 else 3, stride, 1, bias=False),
                     nn.GroupNorm(min(8, widths[i]), widths[i]), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*body, nn.Conv2d(widths[-1], 1, 3, padding=1))
        self.register_buffer("anchors", torch.zeros(2))  # LeCam: running means of the logits, real and fake

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)

    def loss(self, real: Tensor, fake: Tensor, lecam: float = 0.001) -> Tensor:
        """Hinge loss, plus LeCam (arXiv 2104.03310): logits stay near the running mean of the other kind."""
        on_real, on_fake = self(real), self(fake.detach())
        if self.training:
            now = mean_over_processes(torch.stack([on_real.detach().mean(), on_fake.detach().mean()]))
            self.anchors.lerp_(now.to(self.anchors), 0.01)
        hinge = F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()
        distance = (F.relu(on_real - self.anchors[1]).square() + F.relu(self.anchors[0] - on_fake).square()).mean()
        return hinge + lecam * distance

    def generator_loss(self, fake: Tensor) -> Tensor:
        return -self(fake).mean()  # L_GAN


def read_vgg16(path: str) -> VGG16:
    """Raises ValueError for a file that does not hold what `VGG16` needs."""
    try:
        return VGG16(torch.load(Path(path), map_location="cpu", weights_only=True))
    except (ValueError, AttributeError, TypeError, pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"--lpips-weights {path}: {error}".splitlines()[0]) from None


def adversary_optimizer(discriminator: Discriminator, lr: float) -> torch.optim.AdamW:
    """AdamW whose state is there before its first step: where a checkpoint finds none, torch makes it by a step of its
    own, which counts, and a run that was saved before the adversary joins would end in other bits."""
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=lr, betas=(0.5, 0.9))
    for parameter in discriminator.parameters():
        optimizer.state[parameter] = {"step": torch.zeros((), device="cpu"), "exp_avg": torch.zeros_like(parameter),
                                      "exp_avg_sq": torch.zeros_like(parameter)}
    return optimizer


def adversary_step(discriminator: Discriminator, optimizer: torch.optim.Optimizer, real: Tensor, fake: Tensor,
                   lecam: float) -> None:
    """The discriminator's own step, on pictures and copies of them. Raises ValueError where its loss is not finite."""
    optimizer.zero_grad()  # also what the generator's loss left there
    loss = discriminator.loss(real, fake, lecam)
    if not mean_over_processes(loss.detach().clone()).isfinite():
        raise ValueError("T3: the discriminator's loss is not finite; lower --lr or --lambda-gan")
    loss.backward()
    for parameter in discriminator.parameters():
        mean_over_processes(parameter.grad)
    optimizer.step()
