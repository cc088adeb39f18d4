"""Dynamic Token Routing (paper, Sec. 3.3): every token picks its own mixture of the language model's layers.

In: K hidden states of the frozen LLM, `b l k d`, shallow to deep, of which the last alone has passed the LLM's final
norm. Out: one state per token, `b l d`, and the weights w, `b l k`, of its mixture: a picture of which depth each token
listens to (DTR's α, which scales each layer for all tokens, is not in it; a reference's tokens go on without it).

    DTR      weights per token, asked of the token's deepest state   Ĥ_i = W_p Σ_k w_i^(k) α^(k) H_i^(k)
    Last     the deepest layer alone, as most unified models do
    Mean     the plain average
    Concat   all K side by side, one Linear(K·d, d)
    Static   one learned weight per layer, shared by all tokens

All but Last start as the mean: at its start a router is a fixed function of H, and P3 reads the LLM through that.

    python router.py               shape trace

Letters: b batch, l sequence, k layers to choose from, d width of the LLM.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor, nn


def layer_choice(layers: int, k: int) -> list[int]:
    """Sec. 3.3: which of the L hidden states the K routed ones are: s, 2s, … with s = ⌊L/K⌋, the last one L. The
    embedding, state 0, is not among them (configuration). Raises ValueError unless 1 ≤ K ≤ L.

    24 layers and K = 4 give 6, 12, 18, 24; the toy's 6 and K = 3 give 2, 4, 6. The rule is made for L far above K: of 6
    layers K = 4 takes 1, 2, 3, 6, three of them from the lower half. A run says so when it starts (`is_uneven`).
    """
    if not 1 <= k <= layers:
        raise ValueError(f"cannot route {k} of {layers} layers: k must be between 1 and the LLM's layers")
    step = layers // k
    return [step * i for i in range(1, k)] + [layers]


def is_uneven(choice: list[int]) -> bool:
    """Whether the gap before the last of the chosen layers is more than 1.5 times the others."""
    return len(choice) > 1 and choice[-1] - choice[-2] > 1.5 * choice[0]


class Router(nn.Module):
    """What all five share: `forward(H: b l k d) -> (Ĥ: b l d, weights: b l k)`, with the same norm and projection W_p.

    # differs from paper: the equation has no norm before W_p; the authors' configuration has a LayerNorm
    """

    def __init__(self, d: int, k: int):
        super().__init__()
        self.k = k
        self.norm = nn.LayerNorm(d)
        self.W_p = nn.Linear(d, d)  # `MLLM` starts it as the identity

    def weights(self, H: Tensor) -> Tensor:
        """`b l k d` -> how much each token takes of each layer, `b l k`, summing to 1."""
        raise NotImplementedError

    def mix(self, H: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("b l k, b l k d -> b l d", w, H)

    def forward(self, H: Tensor) -> tuple[Tensor, Tensor]:
        w = self.weights(H)
        return self.W_p(self.norm(self.mix(H, w))), w


class DTR(Router):
    """w_i = softmax(g(H_i^(K)) / τ), g: Linear(d, d/2) → SiLU → Linear(d/2, K); α ∈ R^K learned, starts at 1."""

    def __init__(self, d: int, k: int, temperature: float = 1.0):
        super().__init__(d, k)
        self.gate = nn.Sequential(nn.Linear(d, d // 2), nn.SiLU(), nn.Linear(d // 2, k))
        nn.init.zeros_(self.gate[-1].weight)  # paper leaves open: starts as the plain mean of the layers
        nn.init.zeros_(self.gate[-1].bias)
        self.alpha = nn.Parameter(torch.ones(k))
        self.temperature = temperature  # τ

    def weights(self, H):
        deepest = H[:, :, -1]  # it has read the most, so it is asked which depths to listen to
        return (self.gate(deepest) / self.temperature).softmax(-1)  # Sec. 3.3: w_i = softmax(g(H_i^(K)) / τ)

    def mix(self, H, w):
        return super().mix(H, w * self.alpha)  # Sec. 3.3: Ĥ_i = W_p(Σ_k w_i^(k) α^(k) H_i^(k)), W_p in `forward`


class Last(Router):
    def weights(self, H):
        one = torch.zeros(self.k, device=H.device, dtype=H.dtype)
        one[-1] = 1
        return repeat(one, "k -> b l k", b=H.shape[0], l=H.shape[1])


class Mean(Router):
    def weights(self, H):
        return H.new_full(H.shape[:3], 1 / self.k)


class Concat(Router):
    """Its weights say how much of the result each layer's block of the matrix brings (share of the norms)."""

    def __init__(self, d: int, k: int):
        super().__init__(d, k)
        self.blocks = nn.Linear(k * d, d, bias=False)
        self.blocks.weight = nn.Parameter(torch.eye(d).repeat(1, k) / k)  # paper leaves open: starts as the mean

    def parts(self, H):
        return torch.einsum("b l k i, o k i -> b l k o", H, rearrange(self.blocks.weight, "o (k i) -> o k i", k=self.k))

    def weights(self, H):
        size = self.parts(H).detach().norm(dim=-1)
        return size / size.sum(-1, keepdim=True).clamp(min=1e-12)

    def mix(self, H, w):
        return self.blocks(rearrange(H, "b l k d -> b l (k d)"))


class Static(Router):
    """w = softmax(logits), the same for every token."""

    def __init__(self, d: int, k: int):
        super().__init__(d, k)
        self.logits = nn.Parameter(torch.zeros(k))

    def weights(self, H):
        return repeat(self.logits.softmax(0), "k -> b l k", b=H.shape[0], l=H.shape[1])


ROUTERS = {"dtr": DTR, "last": Last, "mean": Mean, "concat": Concat, "static": Static}


if __name__ == "__main__":
    b, l, k, d = 2, 7, 4, 128
    H = torch.randn(b, l, k, d)
    print(f"layers       {layer_choice(24, k)} of 24,  {layer_choice(6, 3)} of 6")
    print("H            b l k d", tuple(H.shape))
    for name, router in ROUTERS.items():
        out, w = router(d, k)(H)
        assert out.shape == (b, l, d) and w.shape == (b, l, k) and torch.allclose(w.sum(-1), torch.ones(b, l))
        print(f"{name:12} Ĥ b l d {tuple(out.shape)}   w b l k {tuple(w.shape)}   first token {w[0, 0].tolist()}")
