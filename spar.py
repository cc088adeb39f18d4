"""The whole model: its numbers, its parts put together, and its four uses. Start reading the method here.

    picture ─ tokenizer.vision ─ f_v ─┬─ semantic_stream ─ z_s ─┐
                                      ├─ pixel_stream ──── z_p ─┴─ fusion ─ z_f ─ decoder ─ picture
                                      └─ mllm.llm ─ answer
    words, f_v of a reference, queries ─ mllm.llm ─ router ─ connector ─ condition ─ dit ─ z_f ─ decoder ─ picture

`Config` holds every number (presets differ in numbers only); `SPAR` holds the parts; `load_run` reads a run folder.
"""

import argparse
import difflib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from data import WORDS
from diffusion import AlignmentHead, DiT, guided, sample
from mllm import MLLM, LanguageModel, WordTokenizer
from tokenizer import PixelDecoder, PixelEncoder, Tokenizer, VisionEncoder

NAMES = ("P1", "P2", "P3", "T1", "T2", "T3", "U1", "U2", "U3")  # the nine stages, in order


SAMPLING = {"steps": 12, "guidance": 1.5, "sampler": "dpm"}  # what drawing takes unless told (paper: 20 steps, guidance 4.5)


@dataclass
class Config:
    """Every number of a run. The letters are the paper's (README, dimension key); defaults are the toy preset."""

    preset: str = "toy"
    seed: int = 0
    # pictures and vision encoder E_s (InternViT)
    side: int = 32  # picture side in pixels
    patch: int = 4  # pixels per ViT patch; a visual token is 2×2 patches
    vision_width: int = 64
    vision_layers: int = 4
    vision_heads: int = 4
    # language model (Qwen2.5)
    d: int = 128  # D_s: width of LLM and visual tokens
    llm_layers: int = 6
    llm_heads: int = 4
    llm_kv_heads: int = 2
    llm_mlp: int = 256
    # tokenizer: streams and pixel autoencoder (DC-AE)
    p: int = 16  # D_p: channels of the compact latent
    pixel_layers: int = 3  # Transformer layers of the pixel stream
    pixel_heads: int = 4
    stream_blocks: int = 3  # residual blocks of each stream
    ae_widths: tuple = (32, 64, 128, 128)  # per stage, each stage halves the side
    ae_depths: tuple = (0, 1, 1, 1)
    ae_decoder_depths: tuple = (0, 1, 1, 1)
    ae_vit_stages: int = 1  # how many of the deepest stages are EfficientViT blocks
    # unified model
    k: int = 4  # layers that DTR chooses from
    queries: int = 16
    connector_layers: int = 2
    connector_start: float = 0.1  # share at which the connector's copied layers begin (paper: 1)
    condition_width: int = 128
    # diffusion transformer (SANA)
    c: int = 128
    dit_layers: int = 4
    dit_heads: int = 4
    dit_cross_heads: int = 4
    dit_mlp_ratio: float = 2.5
    positions: bool = True  # differs from paper: sines of row and column on DiT tokens, reference tokens and queries
    align_block: int = 2  # L_align reads the tokens after this block
    align_hidden: int = 256
    # losses: weights of the terms
    lambda_lpips: float = 0.004  # perceptual (paper: 1.1)
    lpips_weights: str = ""  # file with VGG16's and LPIPS's weights; empty: features of the frozen pixel encoder
    lambda_z: float = 1e-3  # keeps P2's latents small
    lambda_p: float = 1.0  # L_p, pixel stream onto the pixel latents (T1)
    lambda_f: float = 0.02  # differs from paper: L_f holds z_f on the pixel latents, which P3's DiT knows (paper: 0)
    lambda_s: float = 0.05  # L_s, the encoder stays close to itself (T3)
    lambda_gan: float = 0.002  # L_GAN (T3)
    lambda_a: float = 0.5  # L_align (U2, U3)
    gan_start: float = 0.3  # share of T3 after which the adversary joins
    gan_width: int = 16  # channels of the discriminator's first layer
    lecam: float = 0.001
    encoder_rate: float = 0.5  # T3: the encoder's learning rate as a share of the stage's
    # training, one number for each stage: P1 P2 P3 T1 T2 T3 U1 U2 U3
    steps: tuple = (900, 650, 600, 200, 80, 720, 60, 1350, 230)
    batch: tuple = (24, 16, 32, 16, 16, 16, 32, 32, 32)
    lr: tuple = (1e-3, 2e-3, 2e-3, 2e-3, 1e-3, 2e-3, 1e-3, 1.5e-3, 7e-4)
    optimizer: str = "muon"  # muon | adamw
    muon_lr: float = 10.0  # the matrices' rate under Muon, as a multiple of lr
    weight_decay: float = 1e-4
    warmup: float = 0.05  # share of a stage's steps
    final_lr: float = 0.05  # share of lr that the cosine ends at
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.99
    shift: float = 3.0  # moves training's and sampling's σ towards the noise (SANA: 3)
    draws: int = 2  # times and noises for each picture and condition
    drop_words: float = 0.1  # share of emptied prompts, for guidance
    edits: float = 0.5  # share of editing in U2 and U3
    # ablations (README)
    tokenizer: str = "dual"  # dual | semantic-only | pixel-only
    symmetric: str = ""  # "" | with | without: both streams with, or both without, a Transformer
    fusion: str = "dtr"  # dtr | last | mean | concat | static
    align: str = "self"  # self | external | none
    teacher: str = ""  # run folder whose P1 encoder is the external teacher
    anchor: bool = True  # L_s in T3
    freeze_encoder: bool = False  # T3 without training the encoder
    skip_stage: str = ""  # T1 | T2 | T3
    reference: str = "latent"  # tokens: the paper's path | latent: the flow starts at the reference's z_f as well


CHOICES = {"tokenizer": ("dual", "semantic-only", "pixel-only"), "symmetric": ("", "with", "without"),
           "fusion": ("dtr", "last", "mean", "concat", "static"), "align": ("self", "external", "none"),
           "skip_stage": ("", "T1", "T2", "T3"), "reference": ("tokens", "latent"), "optimizer": ("muon", "adamw")}

PRESETS: dict[str, dict] = {
    "toy": {},
}


def make_config(**changes) -> Config:
    """The preset named in `changes` (default toy) with `changes` laid over it."""
    return Config(**{**PRESETS[changes.get("preset", "toy")], **changes})


class SPAR(nn.Module):
    """Tokenizer, multimodal language model and diffusion transformer, with what a user does with them."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = f = config
        symmetric = {"": (0, f.pixel_layers), "with": (f.pixel_layers,) * 2, "without": (0, 0)}[f.symmetric]
        self.words = WordTokenizer(WORDS)
        vision = VisionEncoder(f.side, f.patch, f.vision_width, f.vision_layers, f.vision_heads, 4, f.d)
        decoder = PixelDecoder(f.p, f.ae_widths, f.ae_decoder_depths, f.ae_vit_stages)
        self.pixel_encoder = PixelEncoder(f.p, f.ae_widths, f.ae_depths, f.ae_vit_stages)  # E_p, then frozen as E_p'
        self.tokenizer = Tokenizer(vision, decoder, f.d, f.p, symmetric[1], f.pixel_heads, f.stream_blocks,
                                   f.tokenizer, symmetric[0])
        llm = LanguageModel(len(self.words), f.d, f.llm_layers, f.llm_heads, f.llm_kv_heads, f.llm_mlp)
        self.mllm = MLLM(self.words, llm, f.k, f.queries, f.connector_layers, f.condition_width, f.fusion,
                         f.connector_start, f.positions)
        self.dit = DiT(f.p, f.c, f.dit_layers, f.dit_heads, f.dit_cross_heads, f.condition_width, f.dit_mlp_ratio,
                       f.align_block, f.positions, f.reference == "latent")
        self.align_head = AlignmentHead(f.c, f.align_hidden, f.d)
        self.register_buffer("latent_scale", torch.ones(()))  # makes the DiT's data variance 1 (paper: 10.6)

    @property
    def device(self) -> torch.device:
        return self.latent_scale.device

    # ------------------------------------------------------------ words and latents

    def encode_rows(self, rows: list[list[int]], left: bool = True) -> tuple[Tensor, Tensor]:
        """Rows of ids -> (ids `b t`, mask `b t`, true = a word), padded on the left or on the right."""
        width = max(map(len, rows))
        pads = [[self.words.pad_id] * (width - len(row)) for row in rows]
        ids = torch.tensor([pad + row if left else row + pad for pad, row in zip(pads, rows)], device=self.device)
        return ids, ids != self.words.pad_id

    def encode_prompts(self, texts: list[str], has_image: bool = False) -> tuple[Tensor, Tensor]:
        """What stands before an answer or before the queries: <bos>, the place of a picture, the words."""
        return self.encode_rows([self.before_answer(text, has_image) for text in texts])

    def before_answer(self, question: str, has_image: bool) -> list[int]:
        images = [self.words.image_id] * (self.config.side // (2 * self.config.patch)) ** 2 if has_image else []
        return [self.words.bos_id, *images, *self.words.encode(question)]

    def clean_latent(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures -> (what the DiT learns to draw: z_f · scale as `b p h w`, f_v `b n d`)."""
        f_v = self.tokenizer.features(images)
        z_f = self.tokenizer.latents(f_v).fused
        return self.as_grid(z_f) * self.latent_scale, f_v

    def as_grid(self, z: Tensor) -> Tensor:
        return rearrange(z, "b (h w) p -> b p h w", h=int(z.shape[1] ** 0.5))

    # ------------------------------------------------------------ the four uses

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """`b 3 H W` -> `b 3 H W`, both in [-1, 1]."""
        return self.tokenizer(images)[0].clamp(-1, 1)

    @torch.no_grad()
    def answer(self, images: Tensor | None, questions: list[str], max_new: int = 24, temperature: float = 0.0,
               generator: torch.Generator | None = None) -> list[str]:
        """One answer for each question about its picture (None: questions about words alone)."""
        f_v = None if images is None else self.tokenizer.features(images)
        ids, mask = self.encode_prompts(questions, images is not None)
        replies = self.mllm.answer(ids, mask, f_v, max_new, temperature, generator)
        return [self.words.decode(reply) for reply in replies]

    def rewrite(self, prompts: list[str], references: Tensor | None = None, seed: int = 0, temperature: float = 0.5) -> list[str]:
        """Each prompt as the LLM writes it out before it is drawn. To draw: one whole caption that fulfils it, what the words
        leave open chosen at `temperature`. To edit a reference `b 3 H W`: the instruction and its likeliest outcome.

        # differs from paper: there the words go to the generator as they stand, which has to settle colours and places for
        # the whole picture at once; the LLM settles them one after the other. `generate` alone is the paper's path.
        """
        if references is not None:
            return [f"{text} {outcome}" for text, outcome in zip(prompts, self.answer(references, prompts))]
        generator = torch.Generator().manual_seed(seed)
        return self.answer(None, [f"describe {text}" for text in prompts], temperature=temperature, generator=generator)

    @torch.no_grad()
    def generate(self, prompts: list[str], references: Tensor | None = None, seed: int = 0, steps: int = SAMPLING["steps"],
                 guidance: float = SAMPLING["guidance"], sampler: str = SAMPLING["sampler"], text_only: bool = False):
        """Draw each prompt, or edit its reference picture `b 3 H W` as it says.

        Returns (pictures `b 3 H W`, path: list of latents `b p h w` from noise to picture, DTR weights `b l k`).
        `text_only` conditions on the LLM's text states as stage P3 does, before queries and connector exist.
        """
        b, f = len(prompts), self.config
        f_v = latent = None
        if references is not None:
            latent, f_v = self.clean_latent(references)
            latent = latent if f.reference == "latent" else None
        words, empty = (self.encode_prompts(texts, references is not None) for texts in (prompts, [""] * b))
        if text_only:
            condition, nothing = self.mllm.text_condition(*words), self.mllm.text_condition(*empty)
        else:
            condition, nothing = self.mllm.condition(*words, f_v), self.mllm.condition(*empty, f_v)
        grid = f.side // (2 * f.patch)
        noise = torch.randn(b, f.p, grid, grid, generator=torch.Generator().manual_seed(seed)).to(self.device)

        def velocity(x, sigma, tokens, mask):
            reference = None if latent is None else latent.repeat(len(x) // b, 1, 1, 1)  # guided: with words and without
            return self.dit(x, sigma, tokens, mask, reference)[0]

        z, path = sample(guided(velocity, condition[:2], nothing[:2], guidance), noise, steps, sampler, f.shift)
        return self.decode(z), path, condition.weights

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents `b p h w` -> pictures in [-1, 1]."""
        tokens = rearrange(z / self.latent_scale, "b p h w -> b (h w) p")
        return self.tokenizer.decode(tokens, self.config.side).clamp(-1, 1)


# ---------------------------------------------------------------- run folders


class UserError(Exception):
    """A mistake that the user can mend; the message says how, in one line."""


class Parser(argparse.ArgumentParser):
    """Flags whose mistakes become UserErrors; an unknown flag names the nearest."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        raise UserError(message)

    def read(self, arguments: list[str] | None = None) -> argparse.Namespace:
        given, unknown = self.parse_known_intermixed_args(arguments)  # flags may stand before the words
        if unknown and not unknown[0].startswith("-"):
            raise UserError(f"what does {unknown[0]!r} belong to? Put the words in quotes")
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1, 0)[0]
            raise UserError(f"unknown option {unknown[0]}: did you mean {near}?")
        return given


def best_device(wish: str) -> str:
    """"auto" -> cuda where there is one, else cpu. Raises UserError for a device that torch cannot use here."""
    if wish == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wish == "cuda" and not torch.cuda.is_available() or wish == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"this machine's torch has no {wish}: use --device cpu")
    return wish


def run_command(command) -> None:
    """Runs a script's main; a mistake of the user ends in one line and exit code 2, without traceback."""
    try:
        command()
    except (UserError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def stage_names(config: Config) -> list[str]:
    return [name for name in NAMES if name != config.skip_stage]


def changes(config: Config) -> dict:
    """The fields in which a configuration differs from its preset."""
    preset = asdict(make_config(preset=config.preset))
    return {key: value for key, value in asdict(config).items() if value != preset[key] and key != "seed"}


def load_config(run: Path) -> Config:
    try:
        found = json.loads((run / "config.json").read_text())
        return Config(**{key: tuple(value) if isinstance(value, list) else value for key, value in found.items()})
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no run in {run}: train one with `python train.py --out {run}`") from None
    except (json.JSONDecodeError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise UserError(f"{run / 'config.json'} is not from this train.py ({error}): train again into another --out") from None


def load_run(run: Path, device: str = "cpu", upto: str = NAMES[-1]) -> SPAR:
    """The model of a run folder after its finished stages (at most `upto`), which `model.finished` names.
    Raises UserError where the folder is missing, is another's or holds no finished stage."""
    model = SPAR(load_config(run)).to(device).eval()
    names = stage_names(model.config)
    model.finished = [name for name in names if (run / f"{name}.pt").exists() and NAMES.index(name) <= NAMES.index(upto)]
    if not model.finished:
        raise UserError(f"{run} holds no finished stage: go on with `python train.py --out {run}`")
    for name in model.finished:
        load_stage(model, run, name)
    return model


def load_stage(model: SPAR, run: Path, name: str) -> dict:
    """Lays the averaged weights of <name>.pt over the model; returns the file's content. What a stage did not train stays."""
    content = torch.load(run / f"{name}.pt", map_location=model.device, weights_only=True)
    known = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in content["ema"].items():
            known[key].copy_(value)
        model.latent_scale.copy_(content["latent_scale"])
    return content
