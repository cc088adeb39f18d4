"""What judges a reconstruction beside the mean square: LPIPS over frozen features, and a PatchGAN discriminator.

Public methods; SPAR uses them in T1 to T3 (Sec. 3.2). Pictures are `b 3 H W` in [-1, 1].
"""

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
    """L_lpips, in float32 also where autocast hands it half: `network.features` of the pictures compared. Offline that
    is the pixel encoder, as P2 left it. With a `classifier` also the mean squared difference of its logits, weighed as
    in the paper: LPIPS + 0.1 of it, of which L_lpips is the 1.1th part, as its weight there is 1.1.

    # differs from paper: without the public weights (public/perceptual.py) there is no VGG16 and no classifier.
    """

    def __init__(self, network: nn.Module, classifier: nn.Module | None = None):
        super().__init__()
        self.network, self.classifier = network, classifier
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            images, targets = images.float(), targets.float()
            with torch.no_grad():
                wanted = self.network.features(targets)
            distance = perceptual_distance(self.network.features(images), wanted, getattr(self.network, "heads", None))
            if self.classifier is None:
                return distance
            with torch.no_grad():
                logits = self.classifier(targets)
            return (distance + 0.1 * F.mse_loss(self.classifier(images), logits)) / 1.1


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


def adversary_optimizer(discriminator: Discriminator, lr: float, betas: tuple[float, float] = (0.5, 0.9),
                        weight_decay: float = 0.01) -> torch.optim.AdamW:
    """AdamW whose state is there before its first step: where a checkpoint finds none, torch makes it by a step of its
    own, which counts, and a run that was saved before the adversary joins would end in other bits."""
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=lr, betas=betas, weight_decay=weight_decay)
    for parameter in discriminator.parameters():
        optimizer.state[parameter] = {"step": torch.zeros((), device="cpu"), "exp_avg": torch.zeros_like(parameter),
                                      "exp_avg_sq": torch.zeros_like(parameter)}
    return optimizer


def adversary_step(discriminator: Discriminator, optimizer: torch.optim.Optimizer, pairs: list[tuple[Tensor, Tensor]],
                   lecam: float, clip: float = 0.0) -> None:
    """The discriminator's own step, on parts of a batch: pictures and copies of them. Raises ValueError where its loss
    is not finite."""
    optimizer.zero_grad()  # also what the generator's loss left there
    real, fake = map(torch.cat, zip(*pairs)) if len(pairs) > 1 else pairs[0]
    loss = discriminator.loss(real, fake, lecam)
    if not mean_over_processes(loss.detach().clone()).isfinite():
        raise ValueError("T3: the discriminator's loss is not finite; lower --lr or --lambda-gan")
    loss.backward()
    for parameter in discriminator.parameters():
        mean_over_processes(parameter.grad)
    if clip:
        nn.utils.clip_grad_norm_(discriminator.parameters(), clip)
    optimizer.step()
