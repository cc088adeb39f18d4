"""What the networks of all files are made of: a layer that may forget its insides, and a norm that stays in float32.

Computing a layer's insides again in backward trades a third more arithmetic for most of the memory (`--checkpointing`); a
layer is also the unit in which `--shard` spreads a model over processes.
"""

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
