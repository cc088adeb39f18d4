"""What the checks share: comparisons that never broadcast, and the words of a refusal."""

import torch
from torch import Tensor, nn


class Wrong(Exception):
    """What is the matter with an answer, for the learner, in one line."""


def demand(holds, message: str) -> None:
    """Raises Wrong with `message` unless it holds."""
    if not bool(holds):
        raise Wrong(message)


def raises_value_error(call, what: str) -> None:
    """`call()` raises ValueError, of any kind."""
    try:
        call()
    except ValueError:
        return
    except NotImplementedError:
        raise
    except Exception as error:
        raise Wrong(f"{what} raises {type(error).__name__}, not ValueError") from None
    raise Wrong(f"{what} raises no ValueError")


def gradients(value: Tensor, parameters) -> list[Tensor]:
    """Of a scalar, zeros where it does not depend on a parameter; the graph is kept."""
    if not value.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters)]


def same_shape(value, shape: tuple, what: str) -> None:
    demand(isinstance(value, Tensor), f"{what}: a tensor is wanted, not {type(value).__name__}")
    demand(tuple(value.shape) == tuple(shape), f"{what}: its shape is {tuple(value.shape)}, wanted {tuple(shape)}")


def same(value, wanted: Tensor, what: str, tolerance: float = 1e-9) -> None:
    """Shapes first, then values; `tolerance` is of the largest wanted value, or of 1 where that is smaller."""
    same_shape(value, wanted.shape, what)
    demand(torch.isfinite(value).all(), f"{what}: not all numbers are finite")
    error = (value.detach().double() - wanted.detach().double()).abs().max().item() if value.numel() else 0.0
    scale = max(1.0, wanted.detach().abs().max().item()) if wanted.numel() else 1.0
    near = ": is something rounded on the way, or cast to float32?" if tolerance < 1e-8 and error < 1e-5 * scale else ""
    demand(error <= tolerance * scale, f"{what}: off by {error:.2g}{near}")


def states(*modules: nn.Module) -> list[tuple[str, bool]]:
    """Which modules are in training mode, which weights train."""
    return [(name, module.training) for one in modules for name, module in one.named_modules()] + \
        [(name, parameter.requires_grad) for one in modules for name, parameter in one.named_parameters()]


def some_of_each(*modules: nn.Module) -> None:
    """Some weights frozen, some modules in eval: so that what is put back differs from what is set."""
    for module in modules:
        for i, one in enumerate(module.modules()):
            one.training = i % 2 == 0
        for i, parameter in enumerate(module.parameters()):
            parameter.requires_grad_(i % 3 != 0)
