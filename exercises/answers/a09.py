"""Exercise 9: be your own teacher."""

from functools import partial

from exercises import answers

changed = partial(answers.changed, "diffusion.py")


def loss(body: str) -> dict:
    return {"diffusion.py": {"alignment_loss": body}}


def head(body: str) -> dict:
    return {"diffusion.py": {"AlignmentHead.__init__": body}}


def forward(*changes: tuple[str, str]) -> dict:
    return changed("DiT.through_blocks", *changes)


def unified(*changes: tuple[str, str]) -> dict:
    return changed("unified_losses", *changes)


CAPTURE = "    if number == self.align_block:\n        f_dit = x"
REPEAT = "repeat(teacher, \"b n d -> (draws b) n d\", draws=len(f_dit) // len(teacher))"
TEACHER = "teacher = f_v if external_teacher is None else external_teacher(batch[\"images\"])"
CLEAN = "with torch.no_grad():\n    z, f_v = clean_latent(batch[\"images\"])"
REFERENCE = "    with torch.no_grad():\n        f_v_reference = features(batch[\"references\"])"
FLOW = "flow_losses(dit, z, tokens, mask, batch[\"noise\"])"

RET = "return {\"L_fm\": L_fm, \"L_align\": alignment_loss(align_head(f_dit), teacher)}"
ASK = "if \"L_align\" not in weights:"

WRONG = {
    "L_align's weight is taken out of weights": unified((ASK, "if weights.pop(\"L_align\", None) is None:")),
    "hooks stay on the block": forward(
        ("for number, block", "kept = []\nself.blocks[self.align_block - 1].register_forward_hook(\n"
                              "    lambda module, given, out: kept.append(out))\nfor number, block"),
        (CAPTURE, ""), ("return x, f_dit", "return x, kept[-1]")),
    "f_dit is kept on the DiT": forward((CAPTURE, "    if number == self.align_block:\n        self.f_dit = x"),
                                        ("return x, f_dit", "return x, self.f_dit")),
    "the teacher's tokens are normed in place": loss(
        "f_v = f_v.detach()\nf_v /= f_v.norm(dim=-1, keepdim=True)\n"
        "return -(F.normalize(projected, dim=-1) * f_v).sum(-1).mean()"),
    "the DiT and φ_a are left in eval": unified(("L_fm, f_dit =", "dit.eval()\nalign_head.eval()\nL_fm, f_dit =")),
    "gradients are switched on afterwards, whatever was": unified(
        (CLEAN, "torch.set_grad_enabled(False)\nif True:\n    z, f_v = clean_latent(batch[\"images\"])"),
        ("L_fm, f_dit =", "torch.set_grad_enabled(True)\nL_fm, f_dit =")),
    "the batch gets another key": unified(("L_fm, f_dit =", "batch['teacher'] = teacher\nL_fm, f_dit =")),
    "L_fm is left out where there is an external teacher": unified(
        (RET, "found = " + RET[7:] + "\nreturn found if external_teacher is None else {'L_align': found['L_align']}")),
    "φ_a's forward belongs to the first of its copies": head(
        "super().__init__()\nself.a, self.b, self.c = nn.Linear(c, hidden), nn.Linear(hidden, hidden), "
        "nn.Linear(hidden, d)\nself.forward = lambda x: self.c(F.silu(self.b(F.silu(self.a(x)))))"),
    "L_align only of contiguous tokens": loss(
        "d = projected.shape[-1]\nreturn -F.cosine_similarity(projected.view(-1, d), f_v.detach().view(-1, d)).mean()"),
    "1e-5 is added to the product of the lengths": loss(
        "p, t = projected, f_v.detach()\n"
        "return -((p * t).sum(-1) / (p.norm(dim=-1) * t.norm(dim=-1) + 1e-5)).mean()"),
    "1e-5 is added to each length": loss(
        "p, t = projected, f_v.detach()\n"
        "unit = lambda x: x / (x.norm(dim=-1, keepdim=True) + 1e-5)\nreturn -(unit(p) * unit(t)).sum(-1).mean()"),
    "L_fm alone gets no gradient": unified(("    return {\"L_fm\": L_fm}", "    return {\"L_fm\": L_fm.detach()}")),
    "f_v is asked for where nothing reads it":
        unified(("L_fm, f_dit =", "teacher = teacher.detach()\nL_fm, f_dit =")),
    "φ_a starts at zero": head(
        "super().__init__(nn.Linear(c, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), "
        "nn.Linear(hidden, d))\nfor p in self.parameters():\n    nn.init.zeros_(p)"),
    "L_align is weighed already":
        unified(("\"L_align\": alignment_loss(", "\"L_align\": weights[\"L_align\"] * alignment_loss(")),
    "mean square in place of cosine": loss("return (projected.float() - f_v.detach().float()).square().mean()"),
    "mean square of unit vectors: twice too much":
        loss("return (F.normalize(projected, dim=-1) - F.normalize(f_v.detach(), dim=-1)).square().sum(-1).mean()"),
    "cosine over the tokens": loss("return -F.cosine_similarity(projected, f_v.detach(), dim=1).mean()"),
    "cosine over the batch": loss("return -F.cosine_similarity(projected, f_v.detach(), dim=0).mean()"),
    "cosine of whole pictures":
        loss("return -F.cosine_similarity(projected.flatten(1), f_v.detach().flatten(1), dim=-1).mean()"),
    "cosine of the mean token":
        loss("return -F.cosine_similarity(projected.mean(1), f_v.detach().mean(1), dim=-1).mean()"),
    "every token with every token":
        loss("a, b = F.normalize(projected, dim=-1), F.normalize(f_v.detach(), dim=-1)\n"
             "return -(a @ b.transpose(1, 2)).mean()"),
    "plus: pushed away from the teacher": loss("return F.cosine_similarity(projected, f_v.detach(), dim=-1).mean()"),
    "a sum, not a mean": loss("return -F.cosine_similarity(projected, f_v.detach(), dim=-1).sum()"),
    "a sum over tokens, a mean over pictures":
        loss("return -F.cosine_similarity(projected, f_v.detach(), dim=-1).sum(1).mean()"),
    "the teacher is not detached": loss("return -F.cosine_similarity(projected, f_v, dim=-1).mean()"),
    "the student is detached": loss("return -F.cosine_similarity(projected.detach(), f_v, dim=-1).mean()"),
    "a dot product without lengths": loss("return -(projected * f_v.detach()).sum(-1).mean()"),
    "only the teacher has unit length":
        loss("return -(projected * F.normalize(f_v.detach(), dim=-1)).sum(-1).mean()"),
    "only the student has unit length":
        loss("return -(F.normalize(projected, dim=-1) * f_v.detach()).sum(-1).mean()"),
    "the size of the cosine, not its sign":
        loss("return -F.cosine_similarity(projected, f_v.detach(), dim=-1).abs().mean()"),
    "one minus the squared cosine":
        loss("return 1 - F.cosine_similarity(projected, f_v.detach(), dim=-1).square().mean()"),
    "half of one minus the cosine":
        loss("return 0.5 * (1 - F.cosine_similarity(projected, f_v.detach(), dim=-1).mean())"),
    "correlation: channels centred first":
        loss("a, b = projected - projected.mean(-1, keepdim=True), f_v.detach() - f_v.detach().mean(-1, keepdim=True)\n"
             "return -F.cosine_similarity(a, b, dim=-1).mean()"),
    "one for each token, no mean": loss("return -F.cosine_similarity(projected, f_v.detach(), dim=-1)"),
    "the head has one hidden layer":
        head("super().__init__(nn.Linear(c, hidden), nn.SiLU(), nn.Linear(hidden, d))"),
    "the head has GELU":
        head("super().__init__(nn.Linear(c, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), "
             "nn.Linear(hidden, d))"),
    "the head has ReLU":
        head("super().__init__(nn.Linear(c, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), "
             "nn.Linear(hidden, d))"),
    "the head lacks its second SiLU":
        head("super().__init__(nn.Linear(c, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.Linear(hidden, d))"),
    "the head ends in a SiLU":
        head("super().__init__(nn.Linear(c, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), "
             "nn.Linear(hidden, d), nn.SiLU())"),
    "the head ends in the DiT's width":
        head("super().__init__(nn.Linear(c, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), "
             "nn.Linear(hidden, c))"),
    "the head begins with a norm":
        head("super().__init__(nn.LayerNorm(c, elementwise_affine=False), nn.Linear(c, hidden), nn.SiLU(), "
             "nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, d))"),
    "the head has no biases":
        head("super().__init__(nn.Linear(c, hidden, bias=False), nn.SiLU(), nn.Linear(hidden, hidden, bias=False), "
             "nn.SiLU(), nn.Linear(hidden, d, bias=False))"),
    "the last block in place of align_block": forward((CAPTURE, "f_dit = x")),
    "the first block in place of align_block": forward(("number == self.align_block", "number == 1")),
    "what goes into align_block, not what comes out":
        forward((CAPTURE, ""), ("    x = block(x,", CAPTURE + "\n    x = block(x,")),
    "blocks counted from 0": forward(("enumerate(self.blocks, 1)", "enumerate([*self.blocks, nn.Identity()])"),
                                     ("    x = block(x, condition, mask, modulation, height)",
                                      "    if number == len(self.blocks):\n        break\n"
                                      "    x = block(x, condition, mask, modulation, height)"),
                                     ("for number", "f_dit = x\nfor number")),
    "every block from align_block on": forward(("number == self", "number >= self")),
    "f_dit without gradient": forward(("f_dit = x ", "f_dit = x.detach() ")),
    "f_dit cuts the way back for L_fm": forward(("f_dit = x ", "f_dit = x\n        x = x.detach() ")),
    "f_dit is normed": forward(("f_dit = x ", "f_dit = self.norm(x) ")),
    "f_dit is the mean of the blocks": forward(
        (CAPTURE, "    f_dit = x if number == 1 else f_dit + (x - f_dit) / number")),
    "no mask": forward(("condition, mask, modulation", "condition, None, modulation")),
    "the teacher is f_v of the reference": unified(
        (TEACHER, "teacher = f_v if external_teacher is None else external_teacher(batch[\"images\"])\n"
                  "    if \"references\" in batch:\n"
                  "        teacher = torch.cat([teacher[:-len(f_v_reference)], f_v_reference])")),
    "the teacher's rows are repeated one by one":
        unified((REPEAT, "teacher.repeat_interleave(len(f_dit) // len(teacher), 0)")),
    "the teacher's rows in the order (b draws)":
        unified(("\"b n d -> (draws b) n d\"", "\"b n d -> (b draws) n d\"")),
    "only the first round of noises is aligned":
        unified(("alignment_loss(align_head(f_dit), teacher)",
                 "alignment_loss(align_head(f_dit[:len(batch['images'])]), teacher[:len(batch['images'])])")),
    "student and teacher swapped": unified(("alignment_loss(align_head(f_dit), teacher)",
                                            "alignment_loss(teacher, align_head(f_dit))")),
    "f_dit is detached before φ_a": unified(("align_head(f_dit)", "align_head(f_dit.detach())")),
    "the teacher sees what is noised": unified(
        (TEACHER, "teacher = features(batch[\"images\"] + torch.randn_like(batch[\"images\"]))")),
    "an external teacher is ignored": unified((TEACHER, "teacher = f_v")),
    "L_align whether it is asked for or not": unified(("if \"L_align\" not in weights:", "if False:")),
    "L_align is forgotten": unified(("if \"L_align\" not in weights:", "if True:")),
    "L_align is weighed by a half": unified(("alignment_loss(align_head(f_dit), teacher)",
                                             "0.5 * alignment_loss(align_head(f_dit), teacher)")),
    "L_fm holds L_align already": unified(
        ("return {\"L_fm\": L_fm, \"L_align\": alignment_loss(align_head(f_dit), teacher)}",
         "L_align = alignment_loss(align_head(f_dit), teacher)\n"
         "return {\"L_fm\": L_fm + L_align, \"L_align\": L_align}")),
    "the tokenizer learns from L_fm": unified((CLEAN, "if True:\n    z, f_v = clean_latent(batch[\"images\"])")),
    "the encoder learns from the references":
        unified((REFERENCE, "    f_v_reference = features(batch[\"references\"])")),
    "edits are asked without their reference": unified((", f_v_reference))", "))")),
    "the reference is the picture wanted": unified(("features(batch[\"references\"])", "features(batch[\"images\"])")),
    "edits stand before requests": unified(("for part in conditions", "for part in conditions[::-1]")),
    "no mask for what is padded": unified(("mask = torch.cat(equally_long(*(part.mask for part in conditions)))",
                                           "mask = torch.ones(tokens.shape[:2], dtype=torch.bool)")),
    "the condition without gradient": unified(("(part.tokens for part", "(part.tokens.detach() for part")),
}

RIGHT = {
    "the external teacher in eval": unified(
        (CLEAN, "if external_teacher is not None:\n    external_teacher.eval()\n" + CLEAN)),
    "the external teacher frozen": unified(
        (TEACHER, TEACHER.replace("external_teacher(batch", "external_teacher.requires_grad_(False)(batch"))),
    "a weight of 0 does not ask for L_align": unified((ASK, "if not weights.get(\"L_align\"):")),
    "f_v of the teacher asked by features": unified(
        (TEACHER, "teacher = (external_teacher or features)(batch[\"images\"])")),
    "condition is given None for requests":
        unified(("condition(*batch[\"words\"])", "condition(*batch[\"words\"], None)")),
    "unit vectors, multiplied":
        loss("a, b = F.normalize(projected.float(), dim=-1), F.normalize(f_v.detach().float(), dim=-1)\n"
             "return -(a * b).sum(-1).mean()"),
    "1 − cos, a constant away": loss("return 1 - F.cosine_similarity(projected, f_v.detach(), dim=-1).mean()"),
    "half the squared distance of unit vectors, less 1":
        loss("a, b = F.normalize(projected, dim=2), F.normalize(f_v.detach(), dim=2)\n"
             "return (a - b).pow(2).sum(2).mean() / 2 - 1"),
    "a loop over pictures and tokens":
        loss("total = 0.0\nf_v = f_v.detach()\nfor a, b in zip(projected.flatten(0, 1), f_v.flatten(0, 1)):\n"
             "    total = total + torch.dot(a, b) / (a.norm() * b.norm())\n"
             "return -total / (f_v.shape[0] * f_v.shape[1])"),
    "torch's embedding loss":
        loss("a, b = projected.flatten(0, 1), f_v.detach().flatten(0, 1)\n"
             "return F.cosine_embedding_loss(a, b, torch.ones(len(a), device=a.device))"),
    "einsum": loss("a, b = (x / x.norm(dim=-1, keepdim=True) for x in (projected, f_v.detach()))\n"
                   "return -torch.einsum('bnd,bnd->', a, b) / a.shape[0] / a.shape[1]"),
    "the head in a loop":
        head("super().__init__()\nwidths = [c, hidden, hidden, d]\nfor i in range(3):\n"
             "    self.append(nn.Linear(widths[i], widths[i + 1]))\n    if i < 2:\n        self.append(nn.SiLU())"),
    "the head, one inside another":
        head("step = lambda a, b: nn.Sequential(nn.Linear(a, b), nn.SiLU())\n"
             "super().__init__(step(c, hidden), step(hidden, hidden), nn.Linear(hidden, d))"),
    "all states in a list, one of them picked": forward(
        ("for number, block", "states = []\nfor number, block"), (CAPTURE, "    states.append(x)"),
        ("return x, f_dit", "return x, states[self.align_block - 1]")),
    "blocks up to align_block, then the rest": forward(
        ("for number, block in enumerate(self.blocks, 1):", "for block in self.blocks[:self.align_block]:"),
        (CAPTURE, ""), ("return x, f_dit", "f_dit = x\nfor block in self.blocks[self.align_block:]:\n"
                        "    x = block(x, condition, mask, modulation, height)\nreturn x, f_dit")),
    "a hook on the block": forward(
        ("for number, block", "kept = []\nhandle = self.blocks[self.align_block - 1].register_forward_hook(\n"
                              "    lambda module, given, out: kept.append(out))\nfor number, block"),
        (CAPTURE, ""), ("return x, f_dit", "handle.remove()\nreturn x, kept[0]")),
    "detach in place of no_grad": unified(
        (CLEAN, "if True:\n    z, f_v = (x if x is None else x.detach() for x in clean_latent(batch[\"images\"]))"),
        ("external_teacher(batch[\"images\"])", "external_teacher(batch[\"images\"]).detach()"),
        (REFERENCE, "    f_v_reference = features(batch[\"references\"]).detach()")),
    "the teacher repeated by torch": unified((REPEAT, "teacher.repeat(len(f_dit) // len(teacher), 1, 1)")),
    "the cosines round by round": unified(
        ("return {\"L_fm\": L_fm, \"L_align\": alignment_loss(align_head(f_dit), teacher)}",
         "rounds = align_head(f_dit).chunk(len(f_dit) // len(f_v))\n"
         "L_align = sum(alignment_loss(one, teacher[:len(one)]) for one in rounds) / len(rounds)\n"
         "return {\"L_fm\": L_fm, \"L_align\": L_align}")),
    "the DiT asked directly, the loss by hand": unified(
        ("L_fm, f_dit = " + FLOW,
         "sigma, epsilon = batch[\"noise\"]\nz = torch.cat([z] * (len(sigma) // len(z)))\n"
         "velocity, f_dit = dit(add_noise(z, epsilon, sigma), sigma, condition=tokens, mask=mask)\n"
         "L_fm = F.mse_loss(velocity, epsilon - z)")),
}
