"""What each kind of stage learns from: one function for P1, P2, P3, the tokenizer's stages and the unified ones.

Each takes the model, the numbers of the batch's samples, the wanted terms and the stage's helpers, and returns its losses
by their symbols; the table of stages in train.py says which are wanted and how they are weighed, and which shares of the
batch are edits, whole captions and edits whose outcome is said.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from data import DrawnWorld
from diffusion import add_noise, alignment_loss, equally_long, flow_matching_loss, logit_normal_times
from spar import SPAR
from tokenizer import Discriminator, Perceptual
from world import FACT_WORDS, Scene, draw

Losses = dict[str, Tensor]  # symbol -> value; the stage says the weights


@dataclass
class Helpers:
    """What a stage's losses need beside the model. None of it is part of the trained model."""

    world: DrawnWorld
    generator: torch.Generator  # noise, times, emptied prompts
    perceptual: Perceptual | None = None  # frozen E_p': features for L_lpips
    teacher: nn.Module | None = None  # frozen E_s': the encoder as it was (T3), or the external teacher (U2, U3)
    discriminator: Discriminator | None = None  # joins when its start step is reached
    adversary: torch.optim.Optimizer | None = None


# ---------------------------------------------------------------- losses, one function for each kind of stage


def language_losses(model: SPAR, numbers: range, wanted: dict, h: Helpers) -> Losses:
    """P1: the next word, on answers (L_lm) and captions (L_caption) about pictures, and on words alone: facts, and requests written out (L_text);
    and names for what each visual token shows (L_name)."""
    images, talks = h.world.conversations(numbers)
    f_v = model.tokenizer.features(images.to(model.device))
    start = torch.tensor([model.before_answer("", has_image=True)] * len(images), device=model.device)
    _, cache = model.mllm.llm(model.mllm.embed(start, f_v))  # <bos> and the picture, read once
    turns = [(i, turn) for i, talk in enumerate(talks) for turn in talk[:-1]]
    turns.sort(key=lambda pair: sum(text.count(" ") for text in pair[1]))
    cut = len(turns) * 3 // 4  # the longest apart, so that the short ones are not padded to their length
    parts = [(dialogue(model, [turn for _, turn in part]), torch.tensor([i for i, _ in part], device=model.device))
             for part in (turns[:cut], turns[cut:])]
    said = sum(said.sum() for (_, said), _ in parts)
    losses = {"L_lm": sum(model.mllm.text_loss(*words, cache, owner) * words[1].sum() / said for words, owner in parts),
              "L_caption": model.mllm.text_loss(*dialogue(model, [talk[-1] for talk in talks]), cache)}
    if "L_name" in wanted:
        losses["L_name"] = naming_loss(f_v, [h.world.scene(index) for index in numbers], model)
    if "L_text" in wanted:
        texts = h.world.texts(numbers)
        _, bos = model.mllm.llm(model.mllm.embed(start[:, :1]))
        losses["L_text"] = model.mllm.text_loss(*dialogue(model, texts), bos)
    return losses


def naming_loss(f_v: Tensor, scenes: list[Scene], model: SPAR) -> Tensor:
    """L_name: each visual token `b n d` of a thing's quarter, held against the embeddings of words, is nearest to those of
    the thing's size, colour, shape and place. Grounding, densely: a question then finds what it names by likeness."""
    half = int(f_v.shape[1] ** 0.5) // 2
    quarters = rearrange(f_v, "b (r y s x) d -> b (r s) (y x) d", r=2, s=2, y=half, x=half)
    found = [(b, thing) for b, scene in enumerate(scenes) for thing in scene.objects]
    tokens = quarters[[b for b, _ in found], [thing.place for _, thing in found]]  # things, tokens of each, d
    terms = []
    for fact, words in FACT_WORDS.items():
        likeness = tokens @ model.mllm.llm.embedding.weight[[model.words.ids[word] for word in words]].T
        right = torch.tensor([words.index(thing.word(fact)) for _, thing in found], device=f_v.device)
        terms.append(F.cross_entropy(likeness.flatten(0, 1), right.repeat_interleave(tokens.shape[1])))
    return torch.stack(terms).mean()


def dialogue(model: SPAR, turns: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """(asked, reply) pairs -> right-padded ids `r l` of both and <eos>, and where the reply stands."""
    asked = [model.words.encode(question) for question, _ in turns]
    rows = [words + model.words.encode(reply) + [model.words.eos_id] for words, (_, reply) in zip(asked, turns)]
    ids, mask = model.encode_rows(rows, left=False)
    lengths = torch.tensor([len(words) for words in asked], device=ids.device)
    return ids, mask & (torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None])


def autoencoder_losses(model: SPAR, numbers: range, wanted: dict, h: Helpers) -> Losses:
    """P2: the pixel autoencoder reconstructs."""
    images = h.world.pictures(numbers).to(model.device)
    z = model.pixel_encoder(images)
    reconstruction = model.tokenizer.decode(z, images.shape[-1])
    losses = {"L_mse": (reconstruction - images).square().mean()}
    return losses | {"L_z": z.square().mean()} if "L_z" in wanted else losses


def drawing_losses(model: SPAR, numbers: range, wanted: dict, h: Helpers) -> Losses:
    """P3: the DiT learns to draw P2's latents from the LLM's text states, as SANA does."""
    requests = h.world.prompts(numbers, captions=wanted["captions"])
    images = draw([request.scene for request in requests], h.world.side).to(model.device)
    with torch.no_grad():
        z = model.as_grid(model.pixel_encoder(images)) * model.latent_scale
    condition = model.mllm.text_condition(*model.encode_prompts(some_emptied([r.text for r in requests], model, h)))
    return {"L_fm": flow_losses(model, z, condition, h)[0]}


def tokenizer_losses(model: SPAR, numbers: range, wanted: dict, h: Helpers) -> Losses:
    """T1 to T3: reconstruct; land on the pixel latents with z_p (L_p) and z_f (L_f); stay what the encoder was (L_s); look
    real (L_gan)."""
    images = h.world.pictures(numbers).to(model.device)
    reconstruction, f_v, latents = model.tokenizer(images)
    losses = {"L_mse": (reconstruction - images).square().mean()}
    if "L_lpips" in wanted:
        losses["L_lpips"] = h.perceptual(reconstruction, images)
    if {"L_p", "L_f"} & wanted.keys():
        pixel_latent = model.pixel_encoder(images).detach()  # E_p'(I)
    if "L_p" in wanted and latents.pixel is not None:
        losses["L_p"] = (latents.pixel - pixel_latent).square().mean()
    if "L_f" in wanted:
        losses["L_f"] = (latents.fused - pixel_latent).square().mean()
    if "L_s" in wanted:
        with torch.no_grad():
            f_was = h.teacher(images)  # f'_v
        losses["L_s"] = (f_v - f_was).square().mean()
    if "L_gan" in wanted and h.discriminator is not None:
        h.adversary.zero_grad()
        h.discriminator.loss(images, reconstruction, model.config.lecam).backward()
        h.adversary.step()
        losses["L_gan"] = h.discriminator.generator_loss(reconstruction)
    return losses


def unified_losses(model: SPAR, numbers: range, wanted: dict, h: Helpers) -> Losses:
    """U1 to U3: draw (and edit) z_f through queries, router and connector; the tokenizer teaches the DiT (L_align)."""
    split = len(numbers) - round(len(numbers) * wanted["edits"])
    losses, parts = {}, []
    requests, edits = h.world.prompts(numbers[:split], captions=wanted["captions"]), h.world.edits(numbers[split:])
    if requests:
        words = model.encode_prompts(some_emptied([request.text for request in requests], model, h))
        parts.append(model.mllm.condition(*words))
    if edits:
        sources = draw([edit.source for edit in edits], h.world.side).to(model.device)
        told = torch.rand(len(edits), generator=h.generator) < wanted["outcomes"]
        texts = [f"{edit.instruction} {edit.outcome}" if tell else edit.instruction for edit, tell in zip(edits, told.tolist())]
        words = model.encode_prompts(some_emptied(texts, model, h), has_image=True)
        with torch.no_grad():
            reference, f_v = model.clean_latent(sources)
        parts.append(model.mllm.condition(*words, f_v))
    tokens, mask = (torch.cat(equally_long(*column)) for column in list(zip(*parts))[:2])
    targets = draw([r.scene for r in requests] + [edit.target for edit in edits], h.world.side).to(model.device)
    with torch.no_grad():
        z, f_v = model.clean_latent(targets)
        teacher = f_v if h.teacher is None else h.teacher(targets)  # f'_v of the clean target
    if edits and model.config.reference == "latent":
        reference = torch.cat([torch.zeros_like(z[:split]), reference])
    else:
        reference = None
    losses["L_fm"], hidden = flow_losses(model, z, (tokens, mask), h, reference)
    if "L_align" in wanted:
        teacher = repeat(teacher, "b n d -> (r b) n d", r=model.config.draws)
        losses["L_align"] = alignment_loss(model.align_head(hidden), teacher)
    return losses


def flow_losses(model: SPAR, z: Tensor, condition, h: Helpers, reference: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """-> (L_fm, tokens inside the DiT) for clean latents z `b p h w`, each at `draws` random times: what is dear, the
    condition, is computed once for all of them."""
    z, tokens, mask, reference = (None if x is None else repeat(x, "b ... -> (r b) ...", r=model.config.draws)
                                  for x in (z, condition[0], condition[1], reference))
    sigma = logit_normal_times(len(z), h.generator, model.config.shift).to(z.device)
    noise = torch.randn(z.shape, generator=h.generator).to(z.device)
    velocity, hidden = model.dit(add_noise(z, noise, sigma), sigma, tokens, mask, reference)
    return flow_matching_loss(velocity, z, noise), hidden


def some_emptied(texts: list[str], model: SPAR, h: Helpers) -> list[str]:
    """# paper leaves open: the share of prompts emptied for classifier-free guidance; here 10 % (`drop_words`)."""
    emptied = torch.rand(len(texts), generator=h.generator) < model.config.drop_words
    return ["" if empty else text for text, empty in zip(texts, emptied.tolist())]
