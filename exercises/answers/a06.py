"""Exercise 6: each token picks its layers."""


def weights(body: str) -> dict:
    return {"router.py": {"DTR.weights": body}}


def mix(body: str) -> dict:
    return {"router.py": {"DTR.mix": body}}


def static(body: str) -> dict:
    return {"router.py": {"Static.weights": body}}


GATE = "self.gate(H[:, :, -1]) / self.temperature"

WRONG = {
    "softmax runs over the tokens, not over the layers":
        weights("return (self.gate(H[:, :, -1]) / self.temperature).softmax(1)"),
    "the shallowest state is asked": weights("return (self.gate(H[:, :, 0]) / self.temperature).softmax(-1)"),
    "the mean of the states is asked": weights("return (self.gate(H.mean(2)) / self.temperature).softmax(-1)"),
    "α stands inside the softmax": {"router.py": {
        "DTR.weights": "return (self.alpha * self.gate(H[:, :, -1]) / self.temperature).softmax(-1)",
        "DTR.mix": "return super().mix(H, w)"}},
    "the gate is multiplied by τ, not divided":
        weights("return (self.gate(H[:, :, -1]) * self.temperature).softmax(-1)"),
    "τ is left out": weights("return self.gate(H[:, :, -1]).softmax(-1)"),
    "one choice for the whole sentence":
        weights("w = (self.gate(H[:, :, -1].mean(1)) / self.temperature).softmax(-1)\n"
                "return w[:, None].expand(H.shape[:3])"),
    "a hard choice: the largest alone":
        weights("w = self.gate(H[:, :, -1]) / self.temperature\n"
                "return torch.nn.functional.one_hot(w.argmax(-1), self.k).to(H.dtype)"),
    "τ is kept from getting small":
        weights("return (self.gate(H[:, :, -1]) / max(self.temperature, 0.3)).softmax(-1)"),
    "no softmax": weights("return self.gate(H[:, :, -1]) / self.temperature"),
    "sigmoids, which do not sum to 1": weights("return (self.gate(H[:, :, -1]) / self.temperature).sigmoid()"),
    "α is left out of the mixture": mix("return super().mix(H, w)"),
    "α scales twice": mix("return super().mix(H, w * self.alpha ** 2)"),
    "the mixture is an average: divided by the number of layers": mix("return super().mix(H, w * self.alpha) / self.k"),
    "the states without gradient": mix("return super().mix(H.detach(), w * self.alpha)"),
    "the mixture asks for weights of its own": mix("return super().mix(H, self.weights(H) * self.alpha)"),
    "the weights that are told are scaled by α": mix("w *= self.alpha\nreturn super().mix(H, w)"),
    "H is scaled in its place": mix("with torch.no_grad():\n    H *= self.alpha[:, None]\nreturn super().mix(H, w)"),
    "axes of one are lost": mix("return (w[:, :, None] @ (self.alpha[:, None] * H)).squeeze()"),
    "softmax that overflows": weights("e = (self.gate(H[:, :, -1]) / self.temperature).exp()\n"
                                      "return e / e.sum(-1, keepdim=True)"),
    "Static: even shares kept from the first call": {"router.py": {"Static.weights":
        "if not hasattr(self, 'kept'):\n    self.kept = self.logits.softmax(0)\n"
        "return self.kept.expand(H.shape[:3])"}},
    "Static: in double precision": {"router.py": {"Static.weights":
        "return self.logits.softmax(0, dtype=torch.float64).expand(H.shape[:3])"}},
    "layers that are no whole numbers": {"router.py": {"layer_choice":
        "if not 1 <= k <= layers:\n    raise ValueError\ns = (layers - layers % k) / k\n"
        "return [s * i for i in range(1, k)] + [layers]"}},
    "layer_choice takes K below 0": {"router.py": {"layer_choice":
        "if k == 0 or k > layers:\n    raise ValueError\n"
        "return [layers // k * i for i in range(1, k)] + [layers]"}},
    "layers that can be read once": {"router.py": {"layer_choice":
        "if not 1 <= k <= layers:\n    raise ValueError\ns = layers // k\n"
        "return (layers if i == k else s * i for i in range(1, k + 1))"}},
    "Static: one logit learns": {"router.py": {"Static.weights":
        "w = self.logits.softmax(0)\nreturn torch.cat([w[:1], w[1:].detach()]).expand(H.shape[:3])"}},
    "in use the largest layer alone":
        weights(f"w = ({GATE}).softmax(-1)\nif self.training:\n    return w\n"
                "return torch.nn.functional.one_hot(w.argmax(-1), self.k).to(w.dtype)"),
    "a hard choice where no gradient is asked for":
        weights(f"w = ({GATE}).softmax(-1)\nif torch.is_grad_enabled():\n    return w\n"
                "return torch.nn.functional.one_hot(w.argmax(-1), self.k).to(w.dtype)"),
    "τ only while it trains":
        weights("z = self.gate(H[:, :, -1])\nreturn (z / self.temperature if self.training else z).softmax(-1)"),
    "α only while it trains": mix("return super().mix(H, w * self.alpha if self.training else w)"),
    "Static: even shares in use": static(
        "w = self.logits.softmax(0) if self.training else self.logits.new_full((self.k,), 1 / self.k)\n"
        "return w.expand(H.shape[:3])"),
    "softmax whose gradient overflows":
        weights(f"z = {GATE}\nreturn 1 / (z[..., None, :] - z[..., None]).exp().sum(-1)"),
    "τ without gradient: straight through":
        weights("z = self.gate(H[:, :, -1])\nw = z.softmax(-1)\n"
                "return w + ((z / self.temperature).softmax(-1) - w).detach()"),
    "τ is kept from getting smaller than 0.01":
        weights("return (self.gate(H[:, :, -1]) / max(self.temperature, 0.01)).softmax(-1)"),
    "Static: the shares keep to the first call's shape": static(
        "if getattr(self, 'size', None) is None:\n    self.size = H.shape[:3]\n"
        "return self.logits.softmax(0).expand(self.size)"),
    "Static: axes of one are lost": static("return self.logits.softmax(0).expand(H.shape[:3]).squeeze()"),
    "Static: softmax that overflows": static("e = self.logits.exp()\nreturn (e / e.sum()).expand(H.shape[:3])"),
    "Static: logits are shifted in their place": static(
        "with torch.no_grad():\n    self.logits -= self.logits.max()\ne = self.logits.exp()\n"
        "return (e / e.sum()).expand(H.shape[:3])"),
    "Static: normed sigmoids": static("w = self.logits.sigmoid()\nreturn (w / w.sum()).expand(H.shape[:3])"),
    "the weights are kept while H is the same":
        weights(f"if getattr(self, 'last', (None,))[0] is not H:\n    self.last = H, ({GATE}).softmax(-1)\n"
                "return self.last[1]"),
    "at most four layers are heard":
        weights(f"w = ({GATE}).softmax(-1)\nleast = w.topk(min(4, self.k), -1).values[..., -1:]\n"
                "w = torch.where(w >= least, w, 0.0)\nreturn w / w.sum(-1, keepdim=True)"),
    "only weights above 0 mix": mix("return super().mix(H, w.relu() * self.alpha)"),
    "weights are cut to [0, 1]": mix("return super().mix(H, w.clamp(0, 1) * self.alpha)"),
    "float32 is rounded to half inside":
        weights("with torch.autocast(H.device.type, dtype=torch.bfloat16):\n    z = self.gate(H[:, :, -1])\n"
                "return (z.to(H.dtype) / self.temperature).softmax(-1)"),
    "float32 comes out where half went in":
        mix("kind = torch.promote_types(H.dtype, torch.float32)\n"
            "return super().mix(H.to(kind), (w * self.alpha).to(kind))"),
    "α without gradient": mix("return super().mix(H, w * self.alpha.detach())"),
    "the weights without gradient": mix("return super().mix(H, w.detach() * self.alpha)"),
    "Static: softmax is missing": {"router.py": {"Static.weights":
        "return repeat(self.logits, 'k -> b l k', b=H.shape[0], l=H.shape[1])"}},
    "Static: even shares that nothing can learn": {"router.py": {"Static.weights":
        "return H.new_full(H.shape[:3], 1 / self.k)"}},
    "the last of the chosen layers is not L": {"router.py": {"layer_choice":
        "if not 1 <= k <= layers:\n    raise ValueError\nreturn [layers // k * i for i in range(1, k + 1)]"}},
    "the embedding is among the chosen": {"router.py": {"layer_choice":
        "if not 1 <= k <= layers:\n    raise ValueError\nreturn [layers // k * i for i in range(k - 1)] + [layers]"}},
    "layer_choice takes any k": {"router.py": {"layer_choice":
        "step = max(1, layers // max(1, k))\nreturn [step * i for i in range(1, k)] + [layers]"}},
}

RIGHT = {
    "products of matrices in place of einsum":
        mix("return ((w * self.alpha).unsqueeze(2) @ H).squeeze(2)"),
    "a loop over the layers": mix(
        "out = torch.zeros_like(H[:, :, 0])\nfor n in range(self.k):\n"
        "    out = out + w[..., n, None] * self.alpha[n] * H[:, :, n]\nreturn out"),
    "softmax by log-softmax": weights("return torch.log_softmax(self.gate(H[:, :, -1]) / self.temperature, 2).exp()"),
    "softmax by hand": weights(
        "z = self.gate(H[..., -1, :]) / self.temperature\ne = (z - z.amax(-1, keepdim=True)).exp()\n"
        "return e / e.sum(-1, keepdim=True)"),
    "a ValueError of one's own": {"router.py": {"+": "class CannotRoute(ValueError):\n    pass",
        "layer_choice": "if k not in range(1, layers + 1):\n    raise CannotRoute(k)\n"
                        "return (*range(layers // k, layers // k * k, layers // k), layers)[:k]"}},
    "layers as numpy's whole numbers": {"router.py": {"+": "import numpy as np", "layer_choice":
        "if not 1 <= k <= layers:\n    raise ValueError(k)\nc = np.arange(1, k + 1) * (layers // k)\nc[-1] = layers\n"
        "return list(c)"}},
    "layers as a range, where there is one": {"router.py": {"layer_choice":
        "if not 1 <= k <= layers:\n    raise ValueError(k)\ns = layers // k\n"
        "return range(s, layers + 1, s) if layers % k == 0 else [*range(s, s * k, s), layers]"}},
    "Static by expand, layer_choice by a loop": {"router.py": {
        "Static.weights": "return torch.softmax(self.logits, -1).expand(*H.shape[:3])",
        "layer_choice": "if k < 1 or k > layers:\n    raise ValueError('no')\nchosen = []\nfor i in range(k):\n"
                        "    chosen.append((i + 1) * (layers // k))\nchosen[-1] = layers\nreturn chosen"}},
}
