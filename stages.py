"""The nine stages as data: what each trains, on which batches, with which losses; and what a step of each computes.

P1 to P3 make the three public models that the paper starts from; T1 to T3 are its tokenizer stages (Sec. 3.2), U1 to U3
its unified ones (Sec. 3.3). The loop that runs them is train.py's.
"""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from batches import Batch, drawing_batch, language_batch, picture_batch, unified_batch
from losses import Helpers, Losses, autoencoder_losses, drawing_losses, language_losses, tokenizer_losses, unified_losses
from runs import UserError, load_stage
from spar import NAMES, SPAR, Config
from tokenizer import VGG16, Discriminator, Perceptual


@dataclass(frozen=True)
class Stage:
    """`trains`: name prefix of the parameters -> their share of the stage's learning rate (a number or a field of Config).
    `losses`: symbol -> weight (the same); a weight of 0 leaves the term out."""

    name: str
    about: str
    trains: dict[str, float | str]
    sample: Callable[..., Batch]  # (batches.Batches, numbers of the step's pictures) -> what the losses read
    compute: Callable[..., Losses]
    losses: dict[str, float | str]
    edits: float | str = 0.0  # share of the batch that edits
    captions: float = 0.5  # share of whole captions among what is drawn: nothing left unsaid; the rest are short requests
    outcomes: float = 0.5  # share of edits whose outcome is said as well, as `SPAR.rewrite` says it
    cost: float = 1.0  # seconds per 1000 pictures of the toy preset on two cores; only the time left is told from it

    def shares(self, config: Config) -> dict[str, float]:
        """What its batches are made of."""
        return {"edits": number(self.edits, config), "captions": self.captions, "outcomes": self.outcomes}


STREAMS = {"tokenizer.semantic_stream": 1.0, "tokenizer.pixel_stream": 1.0, "tokenizer.fusion": 1.0}
BRIDGE = {"mllm.queries": 1.0, "mllm.router": 1.0, "mllm.connector": 1.0}
DRAWER = BRIDGE | {"dit": 1.0, "align_head": 1.0}
SEE = {"L_mse": 1.0, "L_lpips": "lambda_lpips"}
DRAW = {"L_fm": 1.0, "L_align": "lambda_a"}

STAGES = [
    Stage("P1", "in place of InternVL3: see and speak", {"tokenizer.vision": 1.0, "mllm.llm": 1.0}, language_batch,
          language_losses, {"L_lm": 1.0, "L_caption": 1.0, "L_name": 0.5, "L_text": 0.3}, cost=9),
    Stage("P2", "in place of DC-AE: pixels to latents and back", {"pixel_encoder": 1.0, "tokenizer.decoder": 1.0},
          picture_batch, autoencoder_losses, {"L_mse": 1.0, "L_z": "lambda_z"}, cost=5),
    Stage("P3", "in place of SANA: words to latents", {"dit": 1.0, "dit.reference": 0.0, "mllm.connector": 1.0},
          drawing_batch, drawing_losses, {"L_fm": 1.0}, captions=0.85, cost=4),
    Stage("T1", "dual-stream initialisation", STREAMS, picture_batch, tokenizer_losses,
          SEE | {"L_f": "lambda_f", "L_p": "lambda_p"}, cost=5.5),
    Stage("T2", "joint decoder training", STREAMS | {"tokenizer.decoder": 1.0}, picture_batch, tokenizer_losses,
          SEE | {"L_f": "lambda_f"}, cost=7),
    Stage("T3", "encoder fine-tuning with self-distillation",
          STREAMS | {"tokenizer.decoder": 1.0, "tokenizer.vision": "encoder_rate"}, picture_batch, tokenizer_losses,
          SEE | {"L_f": "lambda_f", "L_s": "lambda_s", "L_gan": "lambda_gan"}, cost=9),
    Stage("U1", "connector pre-training", BRIDGE, unified_batch, unified_losses, {"L_fm": 1.0}, cost=4),
    Stage("U2", "joint pre-training", DRAWER, unified_batch, unified_losses, DRAW, "edits", captions=0.15, cost=6.5),
    Stage("U3", "supervised fine-tuning", DRAWER, unified_batch, unified_losses, DRAW, "edits", captions=0.15, cost=6.5),
]


def trained_parameters(model: SPAR, stage: Stage) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """prefix -> the (name, parameter) pairs that train in this stage; each parameter under its longest prefix."""
    found: dict[str, list] = {prefix: [] for prefix in stage.trains}
    for name, parameter in model.named_parameters():
        fits = [prefix for prefix in stage.trains if name == prefix or name.startswith(prefix + ".")]
        if fits and number(stage.trains[max(fits, key=len)], model.config):
            found[max(fits, key=len)].append((name, parameter))
    return found


def freeze_the_rest(model: SPAR, stage: Stage) -> None:
    """Only what the stage trains asks for gradients."""
    model.requires_grad_(False)
    for pairs in trained_parameters(model, stage).values():
        for _, parameter in pairs:
            parameter.requires_grad_()


def number(value: float | str, config: Config) -> float:
    """A number as it is, a name as that field of the configuration."""
    if value == "encoder_rate" and config.freeze_encoder:
        return 0.0
    return getattr(config, value) if isinstance(value, str) else value


def wanted_terms(stage: Stage, config: Config) -> dict[str, float]:
    """symbol -> weight of the terms that this configuration asks for."""
    off = {"L_s"} if not config.anchor else set()
    off |= {"L_align"} if config.align == "none" else set()
    weights = {symbol: number(weight, config) for symbol, weight in stage.losses.items() if symbol not in off}
    return {symbol: weight for symbol, weight in weights.items() if weight}


# ---------------------------------------------------------------- a stage's step


def prepare(model: SPAR, stage: Stage) -> Helpers:
    """What a stage needs before its first step: frozen copies, the adversary, the connector's start."""
    f, h = model.config, Helpers()
    lr = f.lr[NAMES.index(stage.name)]
    if "L_lpips" in wanted_terms(stage, f):
        h.perceptual = Perceptual(read_vgg16(f.lpips_weights) if f.lpips_weights else model.pixel_encoder).to(model.device)
    if stage.name == "T3":
        h.teacher = copy.deepcopy(model.tokenizer.vision).requires_grad_(False)
    if "L_gan" in wanted_terms(stage, f):
        with model.device:
            h.discriminator = Discriminator(f.gan_width)
        h.adversary = torch.optim.AdamW(h.discriminator.parameters(), lr=lr / 2, betas=(0.5, 0.9))
    if stage.name == "P3":
        model.mllm.connector.copy_layers(model.mllm.llm)
    if "L_align" in stage.losses and f.align == "external":
        with model.device:
            external = SPAR(f, model.words)
        load_stage(external, Path(f.teacher), "P1")
        h.teacher = external.tokenizer.vision.requires_grad_(False)
    return h


def measure_latents(model: SPAR, stage: Stage, world) -> None:
    """Sets the scale at which the latents that the DiT is to draw have variance 1, on the pictures of the stage's `world`."""
    if stage.name not in ("P3", "U1"):
        return
    z = []
    with torch.no_grad():
        for first in range(0, 512, 32):
            images = world.pictures(range(first, first + 32)).to(model.device)
            z.append(model.pixel_latent(images) if stage.name == "P3" else model.tokenizer(images)[2].fused)
    model.latent_scale.fill_(1 / torch.cat(z).std())


def read_vgg16(path: str) -> VGG16:
    try:
        return VGG16(torch.load(path, map_location="cpu", weights_only=True))
    except (ValueError, AttributeError, TypeError, pickle.UnpicklingError, RuntimeError) as error:
        raise UserError(f"--lpips-weights {path}: {error}".splitlines()[0]) from None


class Objective(nn.Module):
    """Model and losses as one module whose forward is all that a step computes: what DDP and FSDP wrap."""

    def __init__(self, model: SPAR, stage: Stage, helpers: Helpers):
        super().__init__()
        self.model, self.stage, self.helpers = model, stage, helpers

    def forward(self, batch: Batch, wanted: dict) -> Losses:
        kind = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.model.config.precision]
        with torch.autocast(self.model.device.type, kind, enabled=kind is not None):
            return self.stage.compute(self.model, batch, wanted, self.helpers)
