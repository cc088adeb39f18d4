"""Muon with AdamW beside it: matrices move along the orthogonalised momentum, everything else as in AdamW.

# differs from paper: it trains with AdamW alone (`--optimizer adamw`). On two CPU cores steps are dear, and Muon needs
# fewer of them; torch.optim.Muon runs its Newton–Schulz steps in bf16, which such CPUs cannot do at speed.
Reference: K. Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024),
kellerjordan.github.io/posts/muon.
"""

import math

import torch
from einops import rearrange
from torch import Tensor

BLOCK = 128  # rows orthogonalised at a time: the cost grows with the square of the smaller side


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Newton–Schulz: `… r c` -> the same with all singular values moved towards 1 (five steps bring them to
    between about 0.7 and 1.2)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if x.shape[-1] >= 2 * x.shape[-2]:  # long rows: all steps on the small r × r side, x is touched twice
        gram, one = x @ x.mT, torch.eye(x.shape[-2], device=x.device, dtype=x.dtype)
        turn = step = a * one + b * gram + c * gram @ gram
        for _ in range(steps - 1):
            gram = step @ gram @ step
            step = a * one + b * gram + c * gram @ gram
            turn = step @ turn
        x = turn @ x
    else:
        for _ in range(steps):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For matrices (groups with `matrices: True`, lr a share of the unit step) and for the rest AdamW's update."""

    def __init__(self, groups: list[dict], weight_decay: float = 0.0, momentum: float = 0.95, betas=(0.9, 0.99)):
        defaults = dict(lr=1e-3, weight_decay=weight_decay, momentum=momentum, betas=betas, matrices=False)
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            alike: dict[tuple, list] = {}  # matrices of one shape are orthogonalised together: fewer, larger products
            for parameter in (p for p in group["params"] if p.grad is not None):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                if not group["matrices"]:
                    self.adam(parameter, self.state[parameter], group)
                    continue
                state = self.state[parameter]
                average = state.setdefault("momentum", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(average, group["momentum"])
                ahead = ahead.flatten(1)  # a convolution is a matrix from its neighbourhood to its channels
                rows, columns = ahead.shape
                many = rows // BLOCK if columns > BLOCK and rows > BLOCK and rows % BLOCK == 0 else 1
                ahead = rearrange(ahead, "(many rows) columns -> many rows columns", many=many)
                alike.setdefault(ahead.shape, []).append((parameter, ahead))
            for (many, rows, columns), pairs in alike.items():
                size = group["lr"] * max(1, rows / columns) ** 0.5
                steps = orthogonalise(torch.stack([ahead for _, ahead in pairs]))
                for (parameter, _), step in zip(pairs, steps):
                    parameter.sub_(size * step.reshape(parameter.shape))

    @staticmethod
    def adam(parameter, state, group):
        if not state:
            state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        (first, second), grad = group["betas"], parameter.grad
        state["mean"].lerp_(grad, 1 - first)
        state["square"].lerp_(grad.square(), 1 - second)
        mean, square = state["mean"] / (1 - first ** state["step"]), state["square"] / (1 - second ** state["step"])
        parameter.sub_(group["lr"] * mean / (square.sqrt() + 1e-8))


def is_inner_matrix(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether Muon moves it: matrices inside a network; embeddings and first or last layers are AdamW's."""
    outer = ("embedding", "llm.output", "positions", "queries", "cls", "patches", "stem", "table", "dit.out",
             "decoder.out")
    return parameter.ndim > 1 and math.prod(parameter.shape[1:]) > 25 and not any(word in name for word in outer)
