"""Exercise 8: stay what you were."""

from exercises.cut import ROOT, bodies_of


def changed(file: str, name: str, *changes: tuple[str, str]) -> dict:
    """The real body with some of its text changed."""
    body = bodies_of((ROOT / file).read_text(), [name])[name]
    for old, new in changes:
        if old not in body:
            raise ValueError(f"{file}: {name} has no {old!r} any more")
        body = body.replace(old, new)
    return {file: {name: body}}


def term(body: str) -> dict:
    return {"tokenizer.py": {"self_distillation": body}}


def losses(*changes: tuple[str, str]) -> dict:
    return changed("tokenizer.py", "tokenizer_losses", *changes)


COPY = "copy.deepcopy(model.tokenizer.vision).requires_grad_(False)"
CALL = "losses[\"L_s\"] = self_distillation(f_v, f_v_before)"
BEFORE = "    with torch.no_grad():\n        f_v_before = encoder_before(images)\n"
WHERE = "if stage.name == \"T3\":"
GAN = "losses[\"L_gan\"] = discriminator.generator_loss(reconstruction.float())"


def before(new: str) -> dict:
    return changed("train.py", "prepare", ("    extras.encoder_before = " + COPY, new))


def prepare(*changes: tuple[str, str]) -> dict:
    return changed("train.py", "prepare", *changes)


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
                                     "tokenizer.semantic_stream(f_v_before))")),
    "z_f is anchored": losses((CALL, "losses[\"L_s\"] = self_distillation(latents.fused, "
                                     "tokenizer.latents(f_v_before).fused)")),
    "E_s' sees the reconstruction": losses(("encoder_before(images)", "encoder_before(reconstruction)")),
    "E_s' sees the pictures mirrored": losses(("encoder_before(images)", "encoder_before(images.flip(-1))")),
    "E_s' is the encoder itself": losses(("encoder_before(images)", "tokenizer.vision(images)")),
    "the copy is taken anew at every step":
        losses((BEFORE, "    import copy\n    f_v_before = copy.deepcopy(tokenizer.vision)(images).detach()\n")),
    "the encoder's tokens are computed without gradient":
        losses((BEFORE, BEFORE + "        f_v = tokenizer.features(images)\n")),
    "the encoder is held to the reconstruction's tokens":
        losses((CALL, "losses[\"L_s\"] = self_distillation(tokenizer.features(reconstruction), f_v_before)")),
    "the arguments of L_s are swapped": losses((CALL, "losses[\"L_s\"] = self_distillation(f_v_before, f_v)")),
    "L_s is there wherever there is a copy": losses(("if \"L_s\" in weights:", "if encoder_before is not None:")),
    "L_s is forgotten": losses(("if \"L_s\" in weights:", "if False:")),
    "L_s is weighed twice": losses((CALL, "losses[\"L_s\"] = weights[\"L_s\"] * self_distillation(f_v, f_v_before)"),),
    "L_gan before the adversary has joined":
        losses((" and discriminator is not None", ""),),
    "L_gan wherever there is an adversary": losses(("\"L_gan\" in weights and ", "")),
    "L_gan with the wrong sign": losses((GAN, "losses[\"L_gan\"] = -discriminator.generator_loss(reconstruction)")),
    "L_gan of the pictures": losses((GAN, "losses[\"L_gan\"] = discriminator.generator_loss(images)")),
    "L_gan of a reconstruction without gradient":
        losses((GAN, "losses[\"L_gan\"] = discriminator.generator_loss(reconstruction.detach())")),
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
    "an alias, not a copy": before("    extras.encoder_before = model.tokenizer.vision"),
    "a shallow copy": before("    extras.encoder_before = copy.copy(model.tokenizer.vision)"),
    "a copy that was given the encoder's own weights": before(
        "    extras.encoder_before = " + COPY + "\n    extras.encoder_before.load_state_dict("
        "model.tokenizer.vision.state_dict(), assign=True)"),
    "a copy that shares the projector": before(
        "    extras.encoder_before = " + COPY + "\n"
        "    extras.encoder_before.projector = model.tokenizer.vision.projector"),
    "a copy that shares the layers": before(
        "    extras.encoder_before = " + COPY + "\n    extras.encoder_before.layers = model.tokenizer.vision.layers"),
    "the encoder is asked again, at every step": before(
        "    extras.encoder_before = lambda images: model.tokenizer.vision(images)"),
    "a new encoder with other weights": before(
        "    extras.encoder_before = SPAR(config, model.words).tokenizer.vision.requires_grad_(False)"),
    "the copy becomes a part of the encoder": before(
        "    model.tokenizer.vision.before = extras.encoder_before = " + COPY),
    "the encoder is swapped for the copy, and the model keeps another": before(
        "    extras.encoder_before = model.tokenizer.vision\n"
        "    model.tokenizer.vision = SPAR(config, model.words).tokenizer.vision"),
    "the copy is made in T2": prepare((WHERE, "if stage.name == \"T2\":")),
    "a copy of the pixel encoder": before("    extras.encoder_before = copy.deepcopy(model.pixel_encoder)"),
    "a copy of the encoder's projector": before(
        "    extras.encoder_before = copy.deepcopy(model.tokenizer.vision.projector)"),
    "nothing guards the copy from a gradient": {
        **before("    extras.encoder_before = copy.deepcopy(model.tokenizer.vision)"),
        "tokenizer.py": {"self_distillation": "return squared(f_v, f_v_before)"} |
        losses((BEFORE, "    f_v_before = encoder_before(images)\n"))["tokenizer.py"]},
    "the adversary learns at the stage's own rate": prepare(("else (lr / 2,)", "else (lr,)")),
    "the adversary trains the model too": prepare(
        ("adversary_optimizer(extras.discriminator,",
         "adversary_optimizer(nn.ModuleList([extras.discriminator, model]),")),
    "no start for the connector": prepare(("if stage.name == \"P3\":", "if False:")),
    "the external teacher is the model's own encoder": prepare(
        ("external.tokenizer.vision", "copy.deepcopy(model.tokenizer.vision)")),
    "L_lpips by the pixel encoder whatever is asked for": prepare(
        ("vgg or model.pixel_encoder", "model.pixel_encoder")),
}

RIGHT = {
    "F.mse_loss, nothing detached: the copy is frozen": {
        "tokenizer.py": {"self_distillation": "return F.mse_loss(f_v, f_v_before)"} |
        losses((BEFORE, "    f_v_before = encoder_before(images)\n"))["tokenizer.py"]},
    "no_grad alone: the copy's weights could train": {
        **before("    extras.encoder_before = copy.deepcopy(model.tokenizer.vision)"),
        "tokenizer.py": {"self_distillation": "return torch.mean((f_v_before - f_v) ** 2)"}},
    "detach alone": {
        **before("    extras.encoder_before = copy.deepcopy(model.tokenizer.vision)"),
        **losses((BEFORE, "    f_v_before = encoder_before(images)\n"))},
    "length squared over the number of numbers":
        term("difference = (f_v - f_v_before.detach()).flatten()\nreturn difference @ difference / len(difference)"),
    "means of means":
        term("return (f_v - f_v_before.detach()).pow(2).mean(-1).mean(1).mean(0)"),
    "the tokenizer's parts one after the other": losses(
        ("reconstruction, f_v, latents = tokenizer(images)",
         "f_v = tokenizer.vision(images)\nlatents = tokenizer.latents(f_v)\n"
         "reconstruction = tokenizer.decode(latents.fused, images.shape[-1])")),
    "E_s' first, everything by F.mse_loss": {"tokenizer.py": {
        "tokenizer_losses":
        "f_v_before = None\nif encoder_before is not None:\n    with torch.no_grad():\n"
        "        f_v_before = encoder_before(images)\n"
        "reconstruction, f_v, (z_s, z_p, z_f) = tokenizer(images)\nwanted = target_latent().detach()\n"
        "terms = {'L_mse': lambda: F.mse_loss(reconstruction, images),\n"
        "         'L_lpips': lambda: perceptual(reconstruction, images),\n"
        "         'L_p': lambda: None if z_p is None else F.mse_loss(z_p, wanted),\n"
        "         'L_f': lambda: F.mse_loss(z_f, wanted),\n"
        "         'L_s': lambda: F.mse_loss(f_v, f_v_before),\n"
        "         'L_gan': lambda: None if discriminator is None else -discriminator(reconstruction).mean()}\n"
        "found = {name: terms[name]() for name in weights}\n"
        "return {name: value for name, value in found.items() if value is not None}, reconstruction"}},
    "the copy where L_s is asked for": prepare((WHERE, "if \"L_s\" in terms:")),
    "a copy for every stage, in eval": before(
        "    pass\nextras.encoder_before = copy.deepcopy(model.tokenizer.vision).eval()\n"
        "for parameter in extras.encoder_before.parameters():\n    parameter.requires_grad = False"),
    "a new encoder that loads the weights": before(
        "    extras.encoder_before = type(model.tokenizer.vision)(\n        config.side, config.patch, "
        "config.vision_width, config.vision_layers,\n        config.vision_heads, 4, config.d, config.imagenet)"
        ".to(model.device)\n    extras.encoder_before.load_state_dict(model.tokenizer.vision.state_dict())"),
    "a copy of the whole model, of which the encoder is kept": before(
        "    whole = copy.deepcopy(model)\n    extras.encoder_before = whole.tokenizer.vision.requires_grad_(False)"),
}
