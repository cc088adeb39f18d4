"""The whole model: its numbers, its parts put together, and its four uses. Start reading the method here.

    picture ─ tokenizer.vision ─ f_v ─┬─ semantic_stream ─ z_s ─┐
                                      ├─ pixel_stream ──── z_p ─┴─ fusion ─ z_f ─ decoder ─ picture
                                      └─ mllm.llm ─ answer
    f_v of a reference, words, queries ─ mllm.llm ─ router ─ connector ─ condition ─ dit ─ z_f ─ decoder ─ picture

`Config` holds every choice (presets differ in these alone); `SPAR` holds the parts; `plumbing.run_folder.load_run`
reads one.

Letters: b batch, h w rows and columns, n = h·w tokens, p channels of the latent, d width of visual tokens, l length and
u width of the condition, k routed layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps

import torch
from einops import rearrange
from torch import Tensor, nn

from diffusion import SAMPLERS, AlignmentHead, DiT, guided, sample
from mllm import MLLM, LanguageModel
from parts.dcae import PixelDecoder, PixelEncoder
from parts.words import TextTokenizer
from tokenizer import Tokenizer, VisionEncoder, pixel_latent

NAMES = ("P1", "P2", "P3", "T1", "T2", "T3", "U1", "U2", "U3")  # the nine stages, in order

DECODED_PIXELS = 2**20  # of the pictures that are decoded together in use: 1024 of 32 px, 5 of 448


@dataclass(frozen=True)
class Protocol:
    """How a run is measured; part of `eval_id`."""

    version: int = 2  # 2: untaught prompts, a strict judge
    count: int = 200  # samples of each figure; half as many for editing's kinds, taught prompts and P3 alone
    seed: int = 0  # of the sampler's noise
    steps: int | None = None  # None, here and below: as the run draws
    guidance: float | None = None
    sampler: str | None = None
    shift: float = 3.0  # of the sampler's σ; 3.0 is in no `eval_id`, which is older than this field

    def of(self, config: "Config") -> "Protocol":
        """With the run's own numbers where none is given."""
        return replace(self, shift=config.sampling_shift, **config.sampling(self.steps, self.guidance, self.sampler))


@dataclass
class Config:
    """Every number of a run; each field is a flag of train.py, and its comment that flag's help. The letters are the
    README's (dimension key); defaults are the toy preset."""

    # the run
    preset: str = "toy"  # which set of numbers the others start from
    seed: int = 0  # of weights, data and noise
    reseed: int = 0  # added to it in the stages that are trained now; what --from brings, and tests, stay

    # the public models that the paper starts from, in the place of P1 to P3 (public/README.md)
    internvl: str = ""  # folder of InternVL3: P1 is read from it; its sizes and its text tokenizer too
    dc_ae: str = ""  # folder of DC-AE, f32c32 of SANA 1.1: P2
    sana: str = ""  # folder of SANA, its transformer or the whole pipeline: P3
    public: str = ""  # the files of these folders with their checksums; written by the run itself

    # pictures and vision encoder E_s (InternViT)
    side: int = 32  # picture side in pixels
    sides: tuple = (0,) * 9  # the same for each of P1 P2 P3 T1 T2 T3 U1 U2 U3, in training; 0: side (paper: less in T)
    early: float = 0.0  # share of T3's steps at T2's side, before its own (paper: a whole pass)
    patch: int = 4  # pixels per ViT patch; a visual token is 2×2 patches
    vision_width: int = 64  # v: width of E_s
    vision_layers: int = 4  # layers of E_s
    vision_heads: int = 4  # attention heads of E_s
    imagenet: bool = False  # E_s reads pictures with ImageNet's mean 0 and variance 1, as InternViT has learned to

    # language model (Qwen2.5)
    d: int = 128  # D_s: width of LLM and visual tokens
    llm_layers: int = 6  # layers of the LLM
    llm_heads: int = 4  # heads of its queries
    llm_kv_heads: int = 2  # heads of its keys and values, shared by groups of the queries' heads
    llm_mlp: int = 256  # width inside its feed-forward
    vocabulary: int = 0  # rows of the embedding; 0: one for each word or token
    tied: bool = True  # the output weights are the embedding's

    # tokenizer: streams and pixel autoencoder (DC-AE)
    p: int = 16  # D_p: channels of the compact latent
    pixel_layers: int = 3  # Transformer layers of the pixel stream
    pixel_heads: int = 4  # its attention heads
    stream_blocks: int = 3  # residual blocks of each stream
    ae_widths: tuple = (32, 64, 128, 128)  # channels of the autoencoder's stages, each of which halves the side
    ae_depths: tuple = (0, 1, 1, 1)  # blocks of the encoder's stages; a first 0: one strided convolution
    ae_decoder_depths: tuple = (0, 1, 1, 1)  # blocks of the decoder's stages
    ae_vit_stages: int = 1  # how many of the deepest stages are EfficientViT blocks
    ae_resample: str = "shuffle"  # shuffle: pixels to channels and back | conv: strided, and pixels four times (SANA)

    # unified model
    k: int = 3  # layers that DTR chooses from
    queries: int = 16  # learnable queries behind the words
    connector_layers: int = 2  # the connector's copies of the LLM's last layers
    connector_share: float = 0.1  # share of their change that counts at first (paper: 1)
    condition_width: int = 128  # u: width of what the DiT attends to

    # diffusion transformer (SANA)
    c: int = 128  # width of the DiT
    dit_layers: int = 4  # its blocks
    dit_heads: int = 4  # heads of its linear self-attention
    dit_cross_heads: int = 4  # heads of its cross-attention
    dit_mlp_ratio: float = 2.5  # width inside its Mix-FFN as a multiple of c
    positions: bool = True  # sines of row and column on DiT tokens, reference tokens and queries (paper: none)
    align_block: int = 2  # L_align reads the tokens after this block
    align_hidden: int = 256  # width inside φ_a

    # losses: weights of the terms
    lambda_mse: float = 1.0  # L_mse of T1 to T3, on pictures in [-1, 1] (paper: 1 in [0, 1], which here is 0.25)
    lambda_lpips: float = 0.004  # L_lpips, perceptual (paper: 1.1)
    vgg: str = ""  # VGG16's weight file, for L_lpips with --lpips; empty: features of the frozen pixel encoder
    lpips: str = ""  # LPIPS's weight file, the heads on VGG16
    convnext: str = ""  # ConvNeXt-S's weight file: a tenth of the distance of its logits joins L_lpips (paper: so)
    lambda_z: float = 1e-3  # L_z keeps P2's latents small (DC-AE: none)
    lambda_p: float = 1.0  # L_p, pixel stream onto the pixel latents (T1)
    lambda_f: float = 0.02  # L_f holds z_f on the pixel latents, which P3's DiT knows (paper: 0)
    lambda_s: float = 0.05  # L_s, the encoder stays close to itself (T3; paper: 1)
    lambda_gan: float = 0.002  # L_gan (T3; paper: 0.1)
    lambda_a: float = 0.5  # L_align (U2, U3)
    gan_start: float = 0.3  # share of T3 after which the adversary joins
    gan_width: int = 16  # channels of the discriminator's first layer
    gan_as_stage: bool = False  # its rate, betas, decay and clipping are the stage's (paper: so), else half the rate
    lecam: float = 0.001  # weight of LeCam in the discriminator's loss
    encoder_rate: float = 1.0  # T3: the encoder's learning rate as a share of the stage's (paper: 0.1)

    # training: what has nine numbers has one for each of P1 P2 P3 T1 T2 T3 U1 U2 U3; one number stands for all
    steps: tuple = (850, 900, 600, 200, 80, 780, 60, 2700, 230)  # steps of each stage
    batch: tuple = (24, 16, 32, 16, 16, 16, 32, 32, 32)  # pictures of a step, over all processes
    per_device: tuple = (0,) * 9  # of these, how many a process holds at a time; gradients add up (0: its whole share)
    lr: tuple = (1e-3, 2e-3, 2e-3, 2e-3, 1e-3, 2e-3, 1e-3, 1.5e-3, 7e-4)  # peak learning rate
    optimizer: str = "muon"  # muon | adamw (paper)
    muon_lr: float = 10.0  # the matrices' rate under Muon, as a multiple of lr
    betas: tuple = (0.9, 0.99)  # decay of AdamW's means of gradients and of their squares (paper: 0.9, 0.999)
    weight_decay: tuple = (0.1,) * 9  # share of a weight that lr = 1 takes off it in a step (paper: 1e-4 in T, 0 in U)
    decay_all: bool = True  # also off norms, biases, tables, positions and queries (paper: not)
    warmup: tuple = (0.05,) * 9  # share of a stage's steps in which the rate rises
    final_lr: tuple = (0.05,) * 9  # share of lr that the cosine ends at
    clip: float = 1.0  # largest gradient norm
    ema: tuple = (0.99,) * 9  # decay of the running average of the weights, which is what a run is used with
    shift: float = 3.0  # moves training's σ towards the noise (SANA: 3; paper: 1)
    noises_per_picture: int = 2  # times and noises for each picture, whose condition is computed once
    drop_words: float = 0.1  # share of emptied prompts, for guidance
    edits: tuple = (0.0,) * 7 + (0.375,) * 2  # share of editing in a stage's batches: U2 and U3 alone edit

    # sampling: how a run draws where nothing else is asked for; may change while it goes on
    sampling_steps: int = 16  # steps from noise to a picture (paper: 20)
    guidance: float = 1.5  # how much more the words count (paper: 4.5)
    sampler: str = "renoise"  # renoise | dpm (paper) | euler
    sampling_shift: float = 3.0  # more of the steps near the noise (SANA: 3)

    # ablations
    tokenizer: str = "dual"  # which streams: dual | semantic-only | pixel-only
    symmetric: str = ""  # both streams with, or both without, a Transformer: "" | with | without
    router: str = "dtr"  # what mixes the LLM's layers: dtr | last | mean | concat | static
    align: str = "self"  # the DiT's teacher: self | external | none
    teacher: str = ""  # run folder whose P1 encoder is the external teacher
    anchor: bool = True  # L_s in T3
    freeze_encoder: bool = False  # T3 without training the encoder
    skip_stage: str = ""  # leave out T1 | T2 | T3

    # data on disk; the drawn world has none of it
    data: str = ""  # folder (disk/README.md), or openmoji; empty: the drawn world
    data_u3: str = ""  # another folder, for U3 alone (paper: so); empty: the same
    tokens: int = 1024  # size of the byte-pair vocabulary that is learned from its texts
    longest: int = 48  # tokens of a text; what is longer is cut
    mirror: str = "alone"  # half of the pictures: alone (those read without words: words may name a side) | all | none
    fit: str = "middle"  # what becomes a square of a picture with words: its middle | squash: all of it, squeezed
    max_bad: float = 0.02  # share of its samples that may turn out bad and be replaced; above it the run stops

    # how it is computed, not what: may change while a run goes on
    precision: str = "fp32"  # of products and activations; weights, sums and losses are fp32: fp32 | bf16 | fp16
    attention: str = "auto"  # auto: fused kernels on a GPU, else sdpa | triton | tiled: by hand | sdpa: torch's
    compile: bool = False  # torch.compile for what always sees one shape: encoder, streams, autoencoder, inside the DiT
    checkpointing: bool = False  # forget activations inside layers, compute them again in backward
    workers: int = 0  # processes that make batches ahead of time
    shard: bool = False  # FSDP2: spread weights and optimizer over the processes (default: a copy on each, DDP)
    save_minutes: float = 10.0  # how often a stage in progress is saved
    look_minutes: float = 0.0  # how often held-out losses, memory and pictures of it are written down; 0: never
    board: bool = False  # what log.jsonl is told, for TensorBoard too: in OUT/board; needs `pip install tensorboard`

    @property
    def training_seed(self) -> int:
        return self.seed + self.reseed

    @property
    def grid(self) -> int:
        """Visual tokens, and latents, along a side of the picture."""
        return self.side // (2 * self.patch)

    def sampling(self, steps: int | None = None, guidance: float | None = None, sampler: str | None = None) -> dict:
        """How to draw: as is asked for, and where nothing is, as the run does."""
        asked = {"steps": steps, "guidance": guidance, "sampler": sampler}
        own = {"steps": self.sampling_steps, "guidance": self.guidance, "sampler": self.sampler}
        return own | {key: value for key, value in asked.items() if value is not None}

    def of_stage(self, field: str, name: str) -> float:
        """A stage's own of the nine numbers of a field."""
        return getattr(self, field)[NAMES.index(name)]

    def at(self, name: str) -> "Config":
        """With the side that pictures have in this stage."""
        return replace(self, side=self.of_stage("sides", name) or self.side)

    def parts(self, name: str, ranks: int) -> int:
        """In how many equal parts one of `ranks` processes works through its share of a step."""
        share = self.of_stage("batch", name) // ranks
        held = self.of_stage("per_device", name) or share
        return next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= held)

    def data_of(self, name: str) -> str:
        return name == "U3" and self.data_u3 or self.data


CHOICES = {"ae_resample": ("shuffle", "conv"), "tokenizer": ("dual", "semantic-only", "pixel-only"),
           "symmetric": ("", "with", "without"), "router": ("dtr", "last", "mean", "concat", "static"),
           "align": ("self", "external", "none"), "skip_stage": ("", "T1", "T2", "T3"),
           "optimizer": ("muon", "adamw"), "sampler": SAMPLERS, "precision": ("fp32", "bf16", "fp16"),
           "attention": ("auto", "triton", "tiled", "sdpa"), "fit": ("middle", "squash"),
           "mirror": ("alone", "all", "none")}
HOW = ("precision", "attention", "compile", "checkpointing", "workers", "shard", "save_minutes", "look_minutes",
       "board", "max_bad", "per_device", "sampling_steps", "guidance", "sampler", "sampling_shift")
PER_STAGE = ("sides", "steps", "batch", "per_device", "lr", "weight_decay", "warmup", "final_lr", "ema",
             "edits")  # nine or one

SMALL = dict(  # toy, everything larger: one GPU, minutes (an estimate)
    precision="bf16", k=4,
    side=64, vision_width=192, vision_layers=8, vision_heads=6,
    d=256, llm_layers=8, llm_heads=8, llm_kv_heads=4, llm_mlp=768,
    pixel_layers=4, pixel_heads=8,
    ae_widths=(64, 128, 256, 256), ae_depths=(0, 2, 2, 2), ae_decoder_depths=(0, 2, 2, 2),
    queries=64, connector_layers=3, condition_width=256,
    c=384, dit_layers=8, dit_heads=12, dit_cross_heads=6, align_block=3, align_hidden=512, gan_width=32,
    steps=(1200, 800, 900, 300, 120, 800, 100, 1500, 300), batch=(32, 32, 64, 32, 32, 32, 64, 64, 64),
    lr=(1e-3, 1.5e-3, 1.5e-3, 1.5e-3, 1e-3, 1.5e-3, 1e-3, 1e-3, 5e-4), ema=(0.995,) * 9)

FULL = dict(  # SPAR-1B, by the paper's path: InternVL3-1B, DC-AE f32c32 (SANA 1.1) and SANA 0.6B, to the parameter
    side=448, patch=14, vision_width=1024, vision_layers=24, vision_heads=16, imagenet=True,  # InternViT-300M
    d=896, llm_layers=24, llm_heads=14, llm_kv_heads=2, llm_mlp=4864, vocabulary=151674, tied=False,  # Qwen2.5-0.5B
    p=32, pixel_layers=6, pixel_heads=16, ae_widths=(128, 256, 512, 512, 1024, 1024), ae_depths=(2, 2, 2, 3, 3, 3),
    ae_decoder_depths=(3, 3, 3, 3, 3, 3), ae_vit_stages=3, ae_resample="conv",
    k=4, queries=256, connector_layers=6, connector_share=1.0, condition_width=2304, positions=False,
    c=1152, dit_layers=28, dit_heads=36, dit_cross_heads=16, align_block=6, align_hidden=2048,
    lambda_mse=0.25, lambda_lpips=1.1, lambda_f=0.0, lambda_s=1.0, lambda_gan=0.1, gan_width=64, encoder_rate=0.1,
    shift=1.0, noises_per_picture=1, sampling_steps=20, guidance=4.5, sampler="dpm",
    precision="bf16", checkpointing=True, tokens=32768, longest=512,
    # P1 to P3 stand in for the public models: their numbers are ours. T1 to T3: the paper's steps and rates; it gives
    # each of its 64 GPUs 32 pictures of 224 px, then, in T3 again, 4 of 448 px; 64 and 16 are what 80 GB hold. paper
    # leaves open: how often U1 to U3 pass over their data; here five times, on 64 GPUs as well. differs from paper:
    # T3's two passes, at 224 and at 448 px, are one: the rate falls once, the adversary joins once.
    steps=(50_000, 25_000, 100_000, 100_000, 100_000, 200_000, 22_000, 31_000, 150), early=0.5, gan_start=0.15,
    batch=(64, 64, 64, 64, 64, 64, 128, 128, 128), sides=(0, 0, 0, 224, 224, 0, 0, 0, 0),
    per_device=(32, 16, 64, 64, 64, 16, 128, 128, 128),
    lr=(1e-4, 1e-4, 1e-4, 3e-4, 3e-4, 3e-4, 1e-4, 1e-4, 1e-4),
    optimizer="adamw", ema=(0.9999,) * 9, weight_decay=(1e-4,) * 6 + (0.0,) * 3, decay_all=False,
    warmup=(0.1,) * 6 + (0.003,) * 3, final_lr=(0.1,) * 3 + (1 / 3,) * 2 + (1 / 30,) + (0.1,) * 3,
    betas=(0.9, 0.999), gan_as_stage=True, save_minutes=30.0, look_minutes=60.0,
    edits=(0.0,) * 7 + (0.3, 0.57))  # ten times 1.5 of 51 M; three times 46 of 243 k (BLIP3o-60k, arXiv 2506.18095)

PRESETS: dict[str, dict] = {
    "toy": {},
    "small": SMALL,
    "full": FULL,
    "full-3b": FULL | dict(  # SPAR-3B: InternVL3-2B (Qwen2.5-1.5B) and SANA 1.6B
        d=1536, llm_layers=28, llm_heads=12, llm_mlp=8960, c=2240, dit_layers=20, dit_heads=70, dit_cross_heads=20),
}


def make_config(**changes) -> Config:
    """The preset named in `changes` (default toy) with `changes` laid over it."""
    return Config(**{**PRESETS[changes.get("preset", "toy")], **changes})


def in_use(method: Callable) -> Callable:
    """A use of the model: without gradient, and on a GPU with products in the run's own precision."""
    @wraps(method)
    def use(model: "SPAR", *given, **options):
        with torch.no_grad(), torch.autocast(model.device.type, model.half, enabled=model.half is not None):
            return method(model, *given, **options)
    return use


class SPAR(nn.Module):
    """Tokenizer, multimodal language model and diffusion transformer, with what a user does with them."""

    half: torch.dtype | None = None  # of products in use; `load_run` sets it on a GPU

    def __init__(self, config: Config, words: TextTokenizer):
        """`words`: what the LLM reads and writes; the drawn world's: `plumbing.run_folder.text_tokenizer(config)`."""
        super().__init__()
        self.config, self.words = config, words
        semantic_layers, pixel_layers = {"": (0, config.pixel_layers), "with": (config.pixel_layers,) * 2,
                                         "without": (0, 0)}[config.symmetric]
        autoencoder = config.ae_vit_stages, config.ae_resample
        vision = VisionEncoder(config.side, config.patch, config.vision_width, config.vision_layers,
                               config.vision_heads, 4, config.d, config.imagenet)  # E_s
        decoder = PixelDecoder(config.p, config.ae_widths, config.ae_decoder_depths, *autoencoder)  # D_p
        # E_p; after P2 it is frozen, and the paper writes E_p'
        self.pixel_encoder = PixelEncoder(config.p, config.ae_widths, config.ae_depths, *autoencoder)
        self.tokenizer = Tokenizer(vision, decoder, config.d, config.p, pixel_layers, config.pixel_heads,
                                   config.stream_blocks, config.tokenizer, semantic_layers)
        rows = config.vocabulary or len(words)
        if rows < len(words):
            raise ValueError(f"vocabulary {rows}: there are {len(words)} words or tokens, take as many or 0")
        llm = LanguageModel(rows, config.d, config.llm_layers, config.llm_heads, config.llm_kv_heads, config.llm_mlp,
                            config.tied)
        self.dit = DiT(config.p, config.c, config.dit_layers, config.dit_heads, config.dit_cross_heads,
                       config.condition_width, config.dit_mlp_ratio, config.align_block, config.positions)
        self.align_head = AlignmentHead(config.c, config.align_hidden, config.d)  # φ_a
        self.mllm = MLLM(words, llm, config.k, config.queries, config.connector_layers, config.condition_width,
                         config.router, config.connector_share, config.positions)  # last, as the router is in it
        self.register_buffer("latent_scale", torch.ones(()))  # for variance 1, see train.measure_latents (paper: 10.6)

    @property
    def device(self) -> torch.device:
        return self.latent_scale.device

    # ------------------------------------------------------------ words and latents

    def encode_prompts(self, texts: list[str], has_image: bool = False, to_draw: bool = False) -> tuple[Tensor, Tensor]:
        encode = self.words.requests if to_draw else self.words.prompts
        ids, mask = encode(texts, self.config.grid**2 if has_image else 0)
        return ids.to(self.device), mask.to(self.device)

    def clean_latent(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures -> (what the DiT learns to draw: z_f · scale as `b p h w`, f_v `b n d`)."""
        f_v = self.tokenizer.features(images)
        return self.as_grid(self.tokenizer.latents(f_v).fused).float() * self.latent_scale, f_v

    def pixel_latent(self, images: Tensor) -> Tensor:
        """E_p(I) `b n p`, one latent for each visual token."""
        return pixel_latent(self.pixel_encoder, images, images.shape[-1] // self.tokenizer.vision.token)

    def clean_pixel_latent(self, images: Tensor) -> Tensor:
        """What P3's DiT learns to draw: E_p(I) · scale `b p h w`."""
        return self.as_grid(self.pixel_latent(images)).float() * self.latent_scale

    def as_grid(self, z: Tensor) -> Tensor:
        return rearrange(z, "b (h w) p -> b p h w", h=int(z.shape[1] ** 0.5))

    # ------------------------------------------------------------ the four uses: an edit is drawn with a reference

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """`b 3 H W` -> `b 3 H W`, both in [-1, 1]."""
        return self.in_parts(lambda part: self.tokenizer(part)[0], images).clamp(-1, 1)

    @in_use
    def answer(self, images: Tensor | None, questions: list[str], max_new: int = 24, temperature: float = 0.0,
               generator: torch.Generator | None = None) -> list[str]:
        """One answer for each question about its picture (None: questions about words alone)."""
        f_v = None if images is None else self.tokenizer.features(images)
        ids, mask = self.encode_prompts(questions, images is not None)
        replies = self.mllm.answer(ids, mask, f_v, max_new, temperature, generator)
        return [self.words.decode(reply) for reply in replies]

    def rewrite(self, prompts: list[str], references: Tensor | None = None, seed: int = 0,
                temperature: float = 0.5) -> list[str]:
        """Each prompt as the LLM writes it out before it is drawn. To draw: one whole caption that fulfils it, what the
        words leave open chosen at `temperature`. To edit a reference `b 3 H W`: the instruction and its likeliest
        outcome, which P1 has taught as the answer to it.

        # differs from paper: there the words go to the generator as they stand, which has to settle colours and places
        # for the whole picture at once; the LLM settles them one after the other. `generate` draws them as they stand.
        """
        if self.config.data or self.config.internvl:  # only the drawn world teaches to write out
            return prompts
        if references is not None:
            return [f"{text} {outcome}" for text, outcome in zip(prompts, self.answer(references, prompts))]
        generator = torch.Generator().manual_seed(seed)
        requests = [self.words.request + text for text in prompts]
        return self.answer(None, requests, temperature=temperature, generator=generator)

    @in_use
    def generate(self, prompts: list[str], references: Tensor | None = None, seed: int = 0, steps: int | None = None,
                 guidance: float | None = None, sampler: str | None = None, text_only: bool = False):
        """Draw each prompt, or edit its reference picture `b 3 H W` as it says.

        Returns (pictures `b 3 H W`, path: latents `b p h w` from noise to picture, DTR weights `b l k` or None).
        `text_only` conditions on the LLM's text states as stage P3 does, before queries and connector exist.
        """
        b, config = len(prompts), self.config
        steps, guidance, sampler = config.sampling(steps, guidance, sampler).values()
        f_v = None if references is None else self.tokenizer.features(references)
        words, empty = (self.encode_prompts(texts, f_v is not None, to_draw=True) for texts in (prompts, [""] * b))
        if text_only:
            condition, nothing = self.mllm.text_condition(*words), self.mllm.text_condition(*empty)
        else:
            condition, nothing = self.mllm.condition(*words, f_v), self.mllm.condition(*empty, f_v)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(b, config.p, config.grid, config.grid, generator=generator)

        flow = guided(lambda *given: self.dit(*given)[0], condition[:2], nothing[:2], guidance)
        z, path = sample(flow, noise.to(self.device), steps, sampler, config.sampling_shift, generator)
        return self.decode(z), path, condition.weights

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents `b p h w` -> pictures in [-1, 1], in float32: DC-AE's decoder overflows in half."""
        tokens = rearrange(z.float() / self.latent_scale, "b p h w -> b (h w) p")
        with torch.autocast(self.device.type, enabled=False):
            return self.in_parts(lambda part: self.tokenizer.decode(part, self.config.side), tokens).clamp(-1, 1)

    def in_parts(self, decoded: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """`decoded` of a few of the `batch` at a time: a decoder's maps are the largest that there are."""
        return torch.cat([decoded(part) for part in batch.split(max(1, DECODED_PIXELS // self.config.side**2))])
