"""What each kind of stage learns from: one function for P1, P2, P3, the tokenizer's stages and the unified ones.

Each takes the model, its batch (batches.py), the wanted terms and the stage's helpers, and returns its losses by their
symbols, in float32; the table of stages in stages.py says which are wanted and how they are weighed.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch import distributed as dist

from batches import Batch
from diffusion import add_noise, alignment_loss, equally_long, flow_matching_loss
from processes import average
from runs import UserError
from spar import SPAR
from tokenizer import Discriminator, Perceptual
from world import FACT_WORDS

Losses = dict[str, Tensor]  # symbol -> value; the stage says the weights


@dataclass
class Helpers:
    """What a stage's losses need beside the model. None of it is part of the trained model."""

    perceptual: Perceptual | None = None  # frozen E_p': features for L_lpips
    teacher: nn.Module | None = None  # frozen E_s': the encoder as it was (T3), or the external teacher (U2, U3)
    discriminator: Discriminator | None = None
    adversary: torch.optim.Optimizer | None = None  # the discriminator's
    adversary_joins: bool = False  # once its start step is reached
    shown: tuple[Tensor, Tensor] | None = None  # pictures, and what the step made of them, for the adversary to learn from

    def teach_adversary(self, lecam: float) -> None:
        """The discriminator's own step. It follows the check of the losses, so that a step that is not sound changes nothing.
        Raises UserError where its own loss is not finite."""
        if self.shown is None:
            return
        self.adversary.zero_grad()  # also what the generator's loss left there
        loss = self.discriminator.loss(*self.shown, lecam)
        if not average(loss.detach().clone()).isfinite():
            raise UserError("T3: the discriminator's loss is not finite; lower --lr or --lambda-gan")
        loss.backward()
        for parameter in self.discriminator.parameters():
            average(parameter.grad)
        self.adversary.step()
        self.shown = None


# ---------------------------------------------------------------- losses, one function for each kind of stage


def language_losses(model: SPAR, batch: Batch, wanted: dict, h: Helpers) -> Losses:
    """P1: the next word, on answers (L_lm) and captions (L_caption) about pictures, and on words alone: facts, and requests
    written out (L_text); and names for what each visual token shows (L_name)."""
    mllm, start = model.mllm, batch["start"]
    f_v = model.tokenizer.features(batch["images"])
    _, cache = mllm.llm(mllm.embed(start, f_v))  # <bos> and the picture, read once
    parts = [batch[name] for name in ("short", "long") if name in batch]
    said = sum(len(rows) for _, (rows, _), _ in parts)
    mean = sum(mllm.text_loss(ids, here, cache, owner) * len(here[0]) / said for ids, here, owner in parts)
    losses, nothing = {"L_lm": of_all(mean if parts else 0 * f_v.sum(), said)}, (0 * f_v.sum(), 0)
    ids, here, *owner = batch.get("caption", (None, None))
    losses["L_caption"] = of_all(*((mllm.text_loss(ids, here, cache, *owner), len(here[0])) if here else nothing))
    if "L_name" in wanted and "things" in batch:
        losses["L_name"] = of_all(naming_loss(f_v, batch["things"], model), len(batch["things"][0]))
    if "L_text" in wanted:
        _, bos = mllm.llm(mllm.embed(start[:, :1]))
        losses["L_text"] = of_all(*((mllm.text_loss(*batch["text"], bos), len(batch["text"][1][0])) if "text" in batch else nothing))
    return losses


def of_all(mean: Tensor, count: int) -> Tensor:
    """A mean over `count` words as this process's part: averaged over all processes, it is the mean over all their words."""
    if not dist.is_initialized():
        return mean
    return mean * count / average(torch.tensor(float(count), device=mean.device)).clamp(min=1e-6)


def naming_loss(f_v: Tensor, things: tuple[Tensor, Tensor, Tensor], model: SPAR) -> Tensor:
    """L_name: each visual token `b n d` of a thing's quarter, held against the embeddings of words, is nearest to those of
    the thing's size, colour, shape and place. Grounding, densely: a question then finds what it names by likeness.
    `things`: (which picture `t`, which quarter `t`, which word of each fact `t facts`)."""
    picture, place, right = things
    half = int(f_v.shape[1] ** 0.5) // 2
    quarters = rearrange(f_v, "b (r y s x) d -> b (r s) (y x) d", r=2, s=2, y=half, x=half)
    tokens = quarters[picture, place]  # things, tokens of each, d
    terms = []
    for fact, words in enumerate(FACT_WORDS.values()):
        likeness = tokens @ model.mllm.llm.embedding.weight[[model.words.ids[word] for word in words]].T
        terms.append(F.cross_entropy(likeness.flatten(0, 1).float(), right[:, fact].repeat_interleave(tokens.shape[1])))
    return torch.stack(terms).mean()


def autoencoder_losses(model: SPAR, batch: Batch, wanted: dict, h: Helpers) -> Losses:
    """P2: the pixel autoencoder reconstructs."""
    images = batch["images"]
    z = model.pixel_latent(images)
    reconstruction = model.tokenizer.decode(z, images.shape[-1])
    losses = {"L_mse": squared(reconstruction, images)}
    return losses | {"L_z": z.float().square().mean()} if "L_z" in wanted else losses


def squared(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() - b.float()).square().mean()


def drawing_losses(model: SPAR, batch: Batch, wanted: dict, h: Helpers) -> Losses:
    """P3: the DiT learns to draw P2's latents from the LLM's text states, as SANA does."""
    with torch.no_grad():
        z = model.as_grid(model.pixel_latent(batch["images"])).float() * model.latent_scale
    return {"L_fm": flow_losses(model, z, model.mllm.text_condition(*batch["words"]), batch["noise"])[0]}


def tokenizer_losses(model: SPAR, batch: Batch, wanted: dict, h: Helpers) -> Losses:
    """T1 to T3: reconstruct; land on the pixel latents with z_p (L_p) and z_f (L_f); stay what the encoder was (L_s); look
    real (L_gan)."""
    images = batch["images"]
    reconstruction, f_v, latents = model.tokenizer(images)
    losses = {"L_mse": squared(reconstruction, images)}
    if "L_lpips" in wanted:
        losses["L_lpips"] = h.perceptual(reconstruction, images)
    if {"L_p", "L_f"} & wanted.keys():
        with torch.no_grad():
            pixel_latent = model.pixel_latent(images)  # E_p'(I)
    if "L_p" in wanted and latents.pixel is not None:
        losses["L_p"] = squared(latents.pixel, pixel_latent)
    if "L_f" in wanted:
        losses["L_f"] = squared(latents.fused, pixel_latent)
    if "L_s" in wanted:
        with torch.no_grad():
            f_was = h.teacher(images)  # f'_v
        losses["L_s"] = squared(f_v, f_was)
    if "L_gan" in wanted and h.adversary_joins:
        with torch.autocast(images.device.type, enabled=False):
            losses["L_gan"] = h.discriminator.generator_loss(reconstruction.float())
        h.shown = images, reconstruction.detach().float()
    return losses


def unified_losses(model: SPAR, batch: Batch, wanted: dict, h: Helpers) -> Losses:
    """U1 to U3: draw (and edit) z_f through queries, router and connector; the tokenizer teaches the DiT (L_align)."""
    parts, reference = [], None
    if "words" in batch:
        parts.append(model.mllm.condition(*batch["words"]))
    if "instructions" in batch:
        with torch.no_grad():
            reference, f_v = model.clean_latent(batch["references"])
        parts.append(model.mllm.condition(*batch["instructions"], f_v))
    condition = [torch.cat(equally_long(*column)) for column in list(zip(*parts))[:2]]
    with torch.no_grad():
        z, f_v = model.clean_latent(batch["images"])
        teacher = f_v if h.teacher is None else h.teacher(batch["images"])  # f'_v of the clean target
    if reference is not None:
        nothing = torch.zeros_like(z[:len(z) - len(reference)])
        reference = torch.cat([nothing, reference]) if model.config.reference == "latent" else None
    flow, hidden = flow_losses(model, z, condition, batch["noise"], reference)
    losses = {"L_fm": flow}
    if "L_align" in wanted:
        teacher = repeat(teacher, "b n d -> (r b) n d", r=model.config.draws)
        losses["L_align"] = alignment_loss(model.align_head(hidden), teacher)
    return losses


def flow_losses(model: SPAR, z: Tensor, condition, noise: tuple[Tensor, Tensor],
                reference: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """-> (L_fm, tokens inside the DiT) for clean latents z `b p h w`, each at `draws` random times: what is dear, the
    condition, is computed once for all of them."""
    z, tokens, mask, reference = (None if x is None else repeat(x, "b ... -> (r b) ...", r=model.config.draws)
                                  for x in (z, condition[0], condition[1], reference))
    sigma, noise = noise
    velocity, hidden = model.dit(add_noise(z, noise, sigma), sigma, tokens, mask, reference)
    return flow_matching_loss(velocity, z, noise), hidden
