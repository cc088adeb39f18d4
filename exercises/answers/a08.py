"""Exercise 8: stay what you were."""

from exercises.answers import changed


def term(body: str) -> dict:
    return {"tokenizer.py": {"self_distillation": body}}


def losses(*changes: tuple[str, str]) -> dict:
    return changed("tokenizer.py", "tokenizer_losses", *changes)


COPY = "copy.deepcopy(encoder).requires_grad_(False)"
CALL = "losses[\"L_s\"] = self_distillation(f_v, encoder_before(images))"
GAN = "losses[\"L_gan\"] = discriminator.generator_loss(reconstruction.float())"
FWD = "reconstruction, f_v, latents = tokenizer(images)"
GUARD = "    with torch.no_grad():\n        z_target = target_latent()"


def copied(body: str) -> dict:
    return {"tokenizer.py": {"frozen_copy": body}}


WRONG = {
    "f_v is detached, not the copy's": term("return squared(f_v.detach(), f_v_before)"),
    "both are detached": term("return squared(f_v.detach(), f_v_before.detach())"),
    "a sum, not a mean": term("return (f_v - f_v_before.detach()).square().sum()"),
    "a sum over channels, a mean over tokens": term("return (f_v - f_v_before.detach()).square().sum(-1).mean()"),
    "a sum over all of a picture, a mean over pictures":
        term("return (f_v - f_v_before.detach()).square().sum((1, 2)).mean()"),
    "of means over the tokens, blind to places": term("return squared(f_v.mean(1), f_v_before.mean(1).detach())"),
    "of means over the channels": term("return squared(f_v.mean(-1), f_v_before.mean(-1).detach())"),
    "of means over the batch": term("return squared(f_v.mean(0), f_v_before.mean(0).detach())"),
    "absolute differences": term("return (f_v - f_v_before.detach()).abs().mean()"),
    "Huber's loss": term("return F.smooth_l1_loss(f_v, f_v_before.detach())"),
    "the length of the difference, not its square":
        term("return (f_v - f_v_before.detach()).square().mean().sqrt()"),
    "half of the mean square": term("return 0.5 * squared(f_v, f_v_before.detach())"),
    "cosine": term("return 1 - F.cosine_similarity(f_v, f_v_before.detach(), dim=-1).mean()"),
    "the wrong sign": term("return -squared(f_v, f_v_before.detach())"),
    "of normalised tokens":
        term("return squared(F.layer_norm(f_v, f_v.shape[-1:]), F.layer_norm(f_v_before, f_v.shape[-1:]).detach())"),
    "the plus is a minus: squares of both, apart":
        term("return f_v.square().mean() - f_v_before.detach().square().mean()"),
    "z_s is anchored": losses((CALL, "losses[\"L_s\"] = self_distillation(latents.semantic, "
                                     "tokenizer.semantic_stream(encoder_before(images)))")),
    "z_f is anchored": losses((CALL, "losses[\"L_s\"] = self_distillation(latents.fused, "
                                     "tokenizer.latents(encoder_before(images)).fused)")),
    "E_s' sees the reconstruction": losses(("encoder_before(images)", "encoder_before(reconstruction)")),
    "E_s' sees the pictures mirrored": losses(("encoder_before(images)", "encoder_before(images.flip(-1))")),
    "E_s' is the encoder itself": losses(("encoder_before(images)", "tokenizer.vision(images)")),
    "the copy is taken anew at every step":
        losses((CALL, "losses[\"L_s\"] = self_distillation(f_v, copy.deepcopy(tokenizer.vision)(images))")),
    "the encoder's tokens are computed without gradient":
        losses((CALL, "with torch.no_grad():\n        f_v = tokenizer.features(images)\n    " + CALL)),
    "the encoder is held to the reconstruction's tokens":
        losses((CALL, CALL.replace("f_v", "tokenizer.features(reconstruction)"))),
    "the arguments of L_s are swapped":
        losses((CALL, "losses[\"L_s\"] = self_distillation(encoder_before(images), f_v)")),
    "L_s is there wherever there is a copy": losses(("if \"L_s\" in weights:", "if encoder_before is not None:")),
    "L_mse is there whether asked for or not":
        losses(("if \"L_mse\" in weights else {}", "")),
    "the discriminator moves": losses((GAN, GAN + "\n        discriminator.loss(images, reconstruction.float())")),
    "E_s' is copied when it is first asked": copied("""
        kept = []
        def ask(images):
            if not kept:
                kept.append(copy.deepcopy(encoder).requires_grad_(False))
            return kept[0](images)
        return ask"""),
    "L_s is forgotten": losses(("if \"L_s\" in weights:", "if False:")),
    "L_s is weighed twice": losses((CALL, CALL + "\n    losses[\"L_s\"] = weights[\"L_s\"] * losses[\"L_s\"]")),
    "L_gan before the adversary has joined":
        losses((" and discriminator is not None", ""),),
    "L_gan wherever there is an adversary": losses(("\"L_gan\" in weights and ", "")),
    "L_gan with the wrong sign": losses((GAN, "losses[\"L_gan\"] = -discriminator.generator_loss(reconstruction)")),
    "L_gan of the pictures": losses((GAN, "losses[\"L_gan\"] = discriminator.generator_loss(images)")),
    "L_gan of a reconstruction without gradient":
        losses((GAN, "losses[\"L_gan\"] = discriminator.generator_loss(reconstruction.detach())")),
    "the discriminator stays frozen": losses((GAN, "discriminator.requires_grad_(False)\n        " + GAN)),
    "the discriminator stays in eval": losses((GAN, "discriminator.eval()\n        " + GAN)),
    "E_s' keeps its first answer": copied(
        f"before, said = {COPY}, []\n\ndef ask(images):\n    if not said:\n        said.append(before(images))\n"
        "    return said[0]\n\nreturn ask"),
    "the tokens of E_s' are asked once and kept": losses((
        CALL, "if not hasattr(encoder_before, 'said'):\n        encoder_before.said = encoder_before(images).detach()"
        "\n    "
        + CALL.replace("encoder_before(images)", "encoder_before.said"))),
    "the copy is kept on the encoder: the next stage finds the old one": copied(
        f"if '_before' not in encoder.__dict__:\n    encoder.__dict__['_before'] = {COPY}\n"
        "return encoder.__dict__['_before']"),
    "a running average, kept up by a hook on the encoder": copied(
        f"before = {COPY}\n\ndef follow(module, given, out):\n    with torch.no_grad():\n"
        "        for old, new in zip(before.parameters(), encoder.parameters()):\n            old.lerp_(new, 0.001)\n\n"
        "encoder.register_forward_hook(follow)\nreturn before"),
    "the decoder's picture is not resized": losses((
        FWD, "f_v = tokenizer.features(images)\nlatents = tokenizer.latents(f_v)\n"
        "reconstruction = tokenizer.decoder(latents.fused)")),
    "the decoded picture has the encoder's own side": losses((
        FWD, "f_v = tokenizer.features(images)\nlatents = tokenizer.latents(f_v)\n"
        "reconstruction = tokenizer.decode(latents.fused, tokenizer.vision.grid * tokenizer.vision.token // 2)")),
    "a new encoder that loads the weights, without ImageNet's scale": copied("""
        layer, patch, width = encoder.layers[0], encoder.token // 2, encoder.cls.shape[-1]
        before = VisionEncoder(encoder.grid * patch, patch, width, len(encoder.layers), layer.attn.heads,
                               layer.mlp[0].out_features / width, encoder.projector[-1].out_features)
        before.to(encoder.cls.device).load_state_dict(encoder.state_dict())
        return before.requires_grad_(False)"""),
    "the target's latents with gradient": losses((GUARD, "    z_target = target_latent()")),
    "the weights by name, cloned but not detached, and nothing detaches": {"tokenizer.py": {
        "frozen_copy": "weights = {name: value.clone() for name, value in encoder.named_parameters()}\n"
                       "return lambda images: torch.func.functional_call(encoder, weights, images)",
        "self_distillation": "return F.mse_loss(f_v, f_v_before)"}},
    "nothing guards the copy from a gradient, inside a function": {"tokenizer.py": {
        "frozen_copy": "before = copy.deepcopy(encoder)\nreturn lambda images: before(images)",
        "self_distillation": "return squared(f_v, f_v_before)"}},
    "the encoder is frozen, copied, and set to train": copied(
        "encoder.requires_grad_(False)\nbefore = copy.deepcopy(encoder)\nencoder.requires_grad_(True)\nreturn before"),
    "the encoder goes to eval, is copied, and goes to train": copied(
        f"encoder.eval()\nbefore = {COPY}\nencoder.train()\nreturn before"),
    "all of the tokenizer is set to train": losses(
        (FWD, "tokenizer.train()\ntokenizer.requires_grad_(True)\n" + FWD)),
    "the discriminator is in train afterwards, whatever it was": losses(
        (GAN, "discriminator.eval()\n        " + GAN + "\n        discriminator.train()")),
    "gradients are switched on afterwards, whatever was": losses(
        (GUARD, "    torch.set_grad_enabled(False)\n    z_target = target_latent()\n    torch.set_grad_enabled(True)")),
    "only for contiguous tokens": term(
        "difference = f_v.view(-1) - f_v_before.detach().view(-1)\nreturn difference @ difference / len(difference)"),
    "the encoder goes to eval with its copy": copied(f"encoder.eval()\nreturn {COPY}"),
    "L_lpips has its pictures swapped":
        losses(("perceptual(reconstruction, images)", "perceptual(images, reconstruction)")),
    "L_p on z_f": losses(("squared(latents.pixel, z_target)", "squared(latents.fused, z_target)")),
    "L_p on z_s": losses(("squared(latents.pixel, z_target)", "squared(latents.semantic, z_target)")),
    "L_p without regard to a missing stream": losses((" and latents.pixel is not None", "")),
    "L_f on z_p": losses(("squared(latents.fused, z_target)", "squared(latents.pixel, z_target)")),
    "the target's latents only where L_p is asked for":
        losses(("if \"L_p\" in weights or \"L_f\" in weights:", "if \"L_p\" in weights:")),
    "the pictures are returned, not the reconstruction": losses(
        ("return losses, reconstruction", "return losses, images")),
    "L_mse of f_v": losses(("squared(reconstruction, images)", "squared(f_v, f_v.detach())")),
    "an alias, not a copy": copied("return encoder"),
    "an alias, frozen": copied("return encoder.requires_grad_(False)"),
    "an alias that gives no gradient": copied("return lambda images: encoder(images).detach()"),
    "a shallow copy": copied("return copy.copy(encoder)"),
    "a shallow copy, frozen": copied("return copy.copy(encoder).requires_grad_(False)"),
    "a copy that was given the encoder's own weights":
        copied(f"before = {COPY}\nbefore.load_state_dict(encoder.state_dict(), assign=True)\nreturn before"),
    "a copy that shares the projector": copied(f"before = {COPY}\nbefore.projector = encoder.projector\nreturn before"),
    "a copy that shares the layers": copied(f"before = {COPY}\nbefore.layers = encoder.layers\nreturn before"),
    "the weights by name, not copied": copied(
        "weights = encoder.state_dict()\nreturn lambda images: torch.func.functional_call(encoder, weights, images)"),
    "a copy with other weights": copied(
        f"before = {COPY}\nfor weight in before.parameters():\n    weight.add_(0.1 * torch.randn_like(weight))\n"
        "return before"),
    "a copy of which one layer was left out":
        copied(f"before = {COPY}\nbefore.layers = before.layers[:-1]\nreturn before"),
    "the copy becomes a part of the encoder": copied(f"encoder.before = {COPY}\nreturn encoder.before"),
    "the encoder is frozen, and its copy is not":
        copied("before = copy.deepcopy(encoder)\nencoder.requires_grad_(False)\nreturn before"),
    "both are frozen": copied(f"encoder.requires_grad_(False)\nreturn {COPY}"),
    "a copy that is kept up: a running average": copied(
        f"before = {COPY}\n\ndef ask(images):\n    with torch.no_grad():\n"
        "        for old, new in zip(before.parameters(), encoder.parameters()):\n            old.lerp_(new, 0.1)\n"
        "        return before(images)\n\nreturn ask"),
    "a copy of the encoder's projector": copied("return copy.deepcopy(encoder.projector).requires_grad_(False)"),
    "the encoder's weights, no encoder": copied("return copy.deepcopy(encoder.state_dict())"),
    "nothing is returned": copied(COPY),
    "nothing guards the copy from a gradient": {"tokenizer.py": {
        "frozen_copy": "return copy.deepcopy(encoder)", "self_distillation": "return squared(f_v, f_v_before)"}},
}

RIGHT = {
    "a module that hides the copy in a list": copied("""
        class Before(nn.Module):
            def __init__(self):
                super().__init__()
                self.held = [copy.deepcopy(encoder).requires_grad_(False)]  # no part of any state_dict

            def forward(self, images):
                with torch.no_grad():
                    return self.held[0](images)

        return Before()"""),
    "a module that calls the encoder with copied weights": copied("""
        class Before(nn.Module):
            def __init__(self):
                super().__init__()
                self.weights = {name: value.detach().clone() for name, value in encoder.state_dict().items()}

            def forward(self, images):
                return torch.func.functional_call(encoder, self.weights, (images,))

        return Before()"""),
    "a copy whose weights are buffers": copied("""
        before = copy.deepcopy(encoder)
        for module in before.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, weight.detach())
        return before"""),
    "E_s' asked picture by picture": losses((CALL, CALL.replace(
        "encoder_before(images)", "torch.cat([encoder_before(one) for one in images.split(1)])"))),
    "E_s' asked by the name of its argument": losses((CALL, CALL.replace("(images)", "(images=images)"))),
    "E_s' asked by vmap": losses((CALL, "with torch.no_grad():\n"
        "        wanted = torch.func.vmap(lambda one: encoder_before(one[None])[0])(images)\n"
        "    losses[\"L_s\"] = self_distillation(f_v, wanted)")),
    "F.mse_loss, nothing detached: the copy is frozen": term("return F.mse_loss(f_v, f_v_before)"),
    "no_grad alone: the copy's weights could train": {"tokenizer.py": {
        "frozen_copy": "return copy.deepcopy(encoder)",
        "self_distillation": "return torch.mean((f_v_before - f_v) ** 2)"}
        | losses((CALL, "with torch.no_grad():\n        f_v_before = encoder_before(images)\n"
                        "    losses[\"L_s\"] = self_distillation(f_v, f_v_before)"))["tokenizer.py"]},
    "detach alone": copied("return copy.deepcopy(encoder)"),
    "length squared over the number of numbers":
        term("difference = (f_v - f_v_before.detach()).flatten()\nreturn difference @ difference / len(difference)"),
    "means of means": term("return (f_v - f_v_before.detach()).pow(2).mean(-1).mean(1).mean(0)"),
    "the tokenizer's parts one after the other": losses(
        ("reconstruction, f_v, latents = tokenizer(images)",
         "f_v = tokenizer.vision(images)\nlatents = tokenizer.latents(f_v)\n"
         "reconstruction = tokenizer.decode(latents.fused, images.shape[-1])")),
    "E_s' first, all but L_s by F.mse_loss": {"tokenizer.py": {
        "tokenizer_losses":
        "f_v_before = None\nif encoder_before is not None:\n    with torch.no_grad():\n"
        "        f_v_before = encoder_before(images)\n"
        "reconstruction, f_v, (z_s, z_p, z_f) = tokenizer(images)\nwanted = target_latent().detach()\n"
        "terms = {'L_mse': lambda: F.mse_loss(reconstruction, images),\n"
        "         'L_lpips': lambda: perceptual(reconstruction, images),\n"
        "         'L_p': lambda: None if z_p is None else F.mse_loss(z_p, wanted),\n"
        "         'L_f': lambda: F.mse_loss(z_f, wanted),\n"
        "         'L_s': lambda: self_distillation(f_v, f_v_before),\n"
        "         'L_gan': lambda: None if discriminator is None else -discriminator(reconstruction).mean()}\n"
        "found = {name: terms[name]() for name in weights}\n"
        "return {name: value for name, value in found.items() if value is not None}, reconstruction"}},
    "a copy in eval, frozen weight by weight": copied(
        "before = copy.deepcopy(encoder).eval()\nfor weight in before.parameters():\n"
        "    weight.requires_grad = False\nreturn before"),
    "a copy that loads the weights": copied(
        "before = copy.deepcopy(encoder)\nbefore.load_state_dict(encoder.state_dict())\n"
        "return before.requires_grad_(False).train(False)"),
    "the weights by name, copied": copied(
        "weights = {name: value.detach().clone() for name, value in encoder.state_dict().items()}\n"
        "return lambda images: torch.func.functional_call(encoder, weights, images)"),
    "a copy that is asked without gradient": copied(
        "before = copy.deepcopy(encoder)\nreturn torch.no_grad()(lambda images: before(images))"),
}
