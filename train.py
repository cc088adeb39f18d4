"""Train SPAR from nothing: nine stages, one loop.

    python train.py                          the toy preset on two CPU cores, all nine stages, then the evaluation
    python train.py --steps-scale 0.01       the same in a minute: a smoke test
    python train.py --plan                   what would be trained, with how many parameters, steps and pictures
    python train.py --fusion last --from runs/toy --out runs/last      an ablation, on the stages it does not touch

P1 to P3 make the three public models that the paper starts from; T1 to T3 are its tokenizer stages (Sec. 3.2), U1 to U3
its unified ones (Sec. 3.3). A stage is data (`STAGES`): what trains, on which batches, with which losses. The loop in
`train_stage` runs them all. A run folder holds config.json, log.jsonl, <stage>.pt, results.json and report/.
"""

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import tokenizer as tok
from data import DrawnWorld, PROMPT_KINDS, EDIT_KINDS, draw
from diffusion import add_noise, alignment_loss, flow_matching_loss, logit_normal_times
from spar import SPAR, Config

# ---------------------------------------------------------------- losses: what each kind of stage computes
# Each takes the model, one batch of sample numbers and the stage's helpers, and gives {symbol: (weight, value)}.


@dataclass
class Helpers:
    """What a stage's losses need beside the model: frozen copies, the adversary, the random state."""

    world: DrawnWorld
    generator: torch.Generator
    perceptual: nn.Module | None = None
    teacher: nn.Module | None = None  # E_s', the encoder as it was (T3) or the teacher of L_align (U2, U3)
    discriminator: nn.Module | None = None
    lecam: object | None = None


def language_losses(model: SPAR, numbers: range, h: Helpers) -> dict:
    """P1: next-word loss on answers and captions about pictures, and on facts told in words alone."""
    images, talks = h.world.conversations(numbers)
    words, encode = model.words, model.words.encode
    rows, targets = [], []
    for talk in talks:
        row, target = [], []
        for question, answer in talk:
            asked, said = encode(question), encode(answer) + [words.eos_id]
            row += asked + said
            target += [False] * len(asked) + [True] * len(said)
        rows.append(row)
        targets.append(target)
    f_v = model.tokenizer.features(images.to(model.device))
    losses = {"L_lm": (1.0, model.mllm.text_loss(f_v, *pad(rows, targets, model)))}
    facts = h.world.texts(numbers[:len(numbers) // 4])
    rows = [encode(given) + encode(said) + [words.eos_id] for given, said in facts]
    targets = [[False] * len(encode(given)) + [True] * (len(encode(said)) + 1) for given, said in facts]
    losses["L_text"] = (0.25, model.mllm.text_loss(None, *pad(rows, targets, model)))
    return losses


def pad(rows: list[list[int]], targets: list[list[bool]], model: SPAR) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [model.words.pad_id] * (width - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([row + [False] * (width - len(row)) for row in targets], device=model.device)
    return ids, mask


def autoencoder_losses(model: SPAR, numbers: range, h: Helpers) -> dict:
    """P2: the pixel autoencoder reconstructs."""
    images = h.world.pictures(numbers).to(model.device)
    reconstruction = model.tokenizer.decoder(model.pixel_encoder(images))
    return {"L_mse": (1.0, (reconstruction - images).square().mean())}
