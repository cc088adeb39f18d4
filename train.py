"""Train SPAR from nothing: nine stages, one loop.

    python train.py                          the toy preset on two CPU cores, all nine stages, then the evaluation
    python train.py --steps-scale 0.02 --out runs/smoke      the same in a few minutes, pictures of noise
    python train.py --plan                   what would be trained, with how many parameters, steps and pictures
    python train.py --router last --from runs/toy --out runs/last      an ablation: trains what the flag touches
    torchrun --standalone --nproc-per-node 8 train.py --preset full    on eight GPUs; --shard spreads the weights too

P1 to P3 make the three public models that the paper starts from; T1 to T3 are its tokenizer stages (Sec. 3.2), U1 to U3
its unified ones (Sec. 3.3). A stage is data (`STAGES`): what trains, on which batches, with which losses. `one_step` is
what all of them do. The same command goes on with a stopped run (plumbing/README.md).
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import plumbing.command  # before torch, whose threads wait as it says
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from benchmarks.cost import bench, plan
from benchmarks.look import watch
from benchmarks.yardstick import take_reading
from data import Batch, Batches, language_batch, open_world, picture_batch, read, text_to_image_batch, to, unified_batch
from diffusion import Noise, text_to_image_losses, unified_losses
from disk.samples import DataFolder
from disk.reading import DiskData, open_folders
from evaluate import evaluate, print_tables
from mllm import language_losses
from parts.adversary import Discriminator, Perceptual, adversary_optimizer, adversary_step
from parts.words import Turns
from plumbing.checkpoints import load_newest, load_stage, save_progress
from plumbing.command import UserError, run_command
from plumbing.devices import check_precision
from plumbing.flags import parse
from plumbing.pictures import draw_data, draw_report, report_so_far
from plumbing.processes import (Stop, decided_by_first, first_process, gather, join_processes, leave_processes,
                                mean_of_metrics, process_rank, unsharded, wait_for_all, wait_for_first)
from plumbing.replay import check_finite, replay
from plumbing.run_folder import bad_samples, build, cut_logs, finished_stages, open_run, stage_names, text_tokenizer
from plumbing.training import Training, begin, freeze_the_rest, keep_stage, open_log, report
from public import openmoji
from public.folders import check_folders, imported_stages, latent_scale, read_public, stand_ins
from public.perceptual import perceptual_networks
from spar import NAMES, SPAR, Config
from tokenizer import Losses, autoencoder_losses, frozen_copy, tokenizer_losses
from world.language import DrawnWorld

# ---------------------------------------------------------------- what a step of each kind of stage computes

Computed = tuple[Losses, Tensor | None]  # the losses; of T1 to T3 also the reconstruction, for the adversary


def language_step(model: SPAR, batch: Batch, weights: dict, extras: "Extras") -> Computed:
    return language_losses(model.mllm, model.tokenizer.vision, batch, weights), None


def autoencoder_step(model: SPAR, batch: Batch, weights: dict, extras: "Extras") -> Computed:
    z = model.pixel_latent(batch["images"])
    return autoencoder_losses(z, model.tokenizer, batch["images"], weights), None


def text_to_image_step(model: SPAR, batch: Batch, weights: dict, extras: "Extras") -> Computed:
    with torch.no_grad():
        z = model.clean_pixel_latent(batch["images"])
    return text_to_image_losses(model.dit, z, model.mllm.text_condition(*batch["words"]), batch["noise"]), None


def tokenizer_step(model: SPAR, batch: Batch, weights: dict, extras: "Extras") -> Computed:
    images = batch["images"]
    return tokenizer_losses(model.tokenizer, images, weights, lambda: model.pixel_latent(images), extras.perceptual,
                            extras.encoder_before, extras.discriminator)


def connector_step(model: SPAR, batch: Batch, weights: dict, extras: "Extras") -> Computed:
    """U1, whose DiT is frozen: SANA is shown the latents that it knows, as UniLIP does (arXiv 2507.23278)."""
    known = (lambda images: (model.clean_pixel_latent(images), None)) if model.config.sana else None
    return unified_step(model, batch, weights, extras, known)


def unified_step(model: SPAR, batch: Batch, weights: dict, extras: "Extras", clean_latent=None) -> Computed:
    return unified_losses(batch, weights, condition=model.mllm.condition, features=model.tokenizer.features,
                          clean_latent=clean_latent or model.clean_latent, dit=model.dit, align_head=model.align_head,
                          external_teacher=extras.external_teacher), None


# ---------------------------------------------------------------- the nine stages


@dataclass(frozen=True)
class Stage:
    """A number may be given as the name of a field of Config. `trains`: name prefix of the parameters -> their share of
    the stage's learning rate. `losses`: symbol -> weight; a weight of 0 leaves the term out."""

    name: str
    about: str
    trains: dict[str, float | str]
    sample: Callable[..., Batch]  # (Batches, numbers of the step's pictures) -> what the losses read
    compute: Callable[..., Computed]  # one of the functions above
    losses: dict[str, float | str]
    captions: float = 0.5  # share of whole captions among the requests; the rest leave something unsaid
    outcomes: float = 0.5  # share of edits whose outcome is said as well, as `SPAR.rewrite` says it
    cost: float = 6.5  # seconds per 1000 pictures of the toy preset on two cores; only the time left is told from it

    def shares(self, config: Config) -> dict[str, float]:
        """What its batches are made of."""
        return {"edits": config.of_stage("edits", self.name), "captions": self.captions, "outcomes": self.outcomes}

    def rates(self, config: Config) -> dict[str, float]:
        """Prefix -> share of the learning rate; 0 leaves it as it is."""
        rates = {prefix: getattr(config, str(rate), rate) for prefix, rate in self.trains.items()}
        return rates | {prefix: 0.0 for prefix in ("tokenizer.vision", *rates)
                        if config.freeze_encoder and self.name == "T3" and prefix.startswith("tokenizer.vision")}

    def loss_weights(self, config: Config) -> dict[str, float]:
        """Symbol -> weight of the terms that this configuration asks for."""
        weights = {symbol: getattr(config, str(weight), weight) for symbol, weight in self.losses.items()}
        if not config.anchor:
            weights.pop("L_s", None)
        if config.align == "none":
            weights.pop("L_align", None)
        return {symbol: weight for symbol, weight in weights.items() if weight}


STREAMS = {"tokenizer.semantic_stream": 1.0, "tokenizer.pixel_stream": 1.0, "tokenizer.fusion": 1.0}
CONNECTOR = {"mllm.queries": 1.0, "mllm.router": 1.0, "mllm.connector": 1.0}
GENERATOR = CONNECTOR | {"dit": 1.0, "align_head": 1.0}
RECONSTRUCTION = {"L_mse": "lambda_mse", "L_lpips": "lambda_lpips", "L_f": "lambda_f"}
GENERATION = {"L_fm": 1.0, "L_align": "lambda_a"}

STAGES = [
    Stage("P1", "in place of InternVL3: see and speak", {"tokenizer.vision": 1.0, "mllm.llm": 1.0}, language_batch,
          language_step, {"L_lm": 1.0, "L_caption": 1.0, "L_name": 0.5, "L_text": 0.5}, cost=9),
    Stage("P2", "in place of DC-AE: pixels to latents and back", {"pixel_encoder": 1.0, "tokenizer.decoder": 1.0},
          picture_batch, autoencoder_step, {"L_mse": 1.0, "L_z": "lambda_z"}, cost=5),
    Stage("P3", "in place of SANA: words to latents", {"dit": 1.0, "mllm.connector": 1.0},
          text_to_image_batch, text_to_image_step, {"L_fm": 1.0}, captions=0.5, cost=4),
    # Sec. 3.2: the streams first, on a frozen encoder and decoder; then the decoder too; then the encoder, held by L_s
    Stage("T1", "dual-stream initialisation", STREAMS, picture_batch, tokenizer_step,
          RECONSTRUCTION | {"L_p": "lambda_p"}, cost=5.5),
    Stage("T2", "joint decoder training", STREAMS | {"tokenizer.decoder": 1.0}, picture_batch, tokenizer_step,
          RECONSTRUCTION, cost=7),
    Stage("T3", "encoder fine-tuning with self-distillation",
          STREAMS | {"tokenizer.decoder": 1.0, "tokenizer.vision": "encoder_rate"}, picture_batch, tokenizer_step,
          RECONSTRUCTION | {"L_s": "lambda_s", "L_gan": "lambda_gan"}, cost=9),
    # Sec. 3.3: first what leads to the DiT, which is frozen, on drawing alone; then the DiT too, taught by the
    # tokenizer (Sec. 3.4), on drawing and editing
    Stage("U1", "connector pre-training", CONNECTOR, unified_batch, connector_step, {"L_fm": 1.0}, cost=4),
    Stage("U2", "joint pre-training", GENERATOR, unified_batch, unified_step, GENERATION, captions=0.15),
    Stage("U3", "supervised fine-tuning", GENERATOR, unified_batch, unified_step, GENERATION, captions=0.15),
]


def stage_named(name: str) -> Stage:
    return STAGES[NAMES.index(name)]


# ---------------------------------------------------------------- a stage before its first step


@dataclass
class Extras:
    """What a stage's losses need beside the model. None of it is part of the trained model."""

    perceptual: Perceptual | None = None  # frozen E_p': features for L_lpips
    encoder_before: nn.Module | None = None  # E_s', the frozen copy of the encoder as T3 found it, for L_s
    external_teacher: nn.Module | None = None  # of L_align, in the place of the tokenizer itself (--align external)
    discriminator: Discriminator | None = None
    adversary: torch.optim.Optimizer | None = None  # the discriminator's


class StepModule(nn.Module):
    """Model and losses as one module whose forward is all that a step computes: what DDP and FSDP wrap."""

    def __init__(self, model: SPAR, stage: Stage, extras: Extras):
        super().__init__()
        self.model, self.stage, self.extras = model, stage, extras

    def forward(self, batch: Batch, weights: dict[str, float], joined: bool = True) -> Computed:
        """`joined`: whether the adversary takes part already."""
        extras = self.extras if joined else replace(self.extras, discriminator=None)
        kind = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.model.config.precision]
        with torch.autocast(self.model.device.type, kind, enabled=kind is not None):
            return self.stage.compute(self.model, batch, weights, extras)


def prepare(model: SPAR, stage: Stage) -> Extras:
    """What a stage needs before its first step: frozen copies, the adversary, the connector's start."""
    config, extras, terms = model.config, Extras(), stage.loss_weights(model.config)
    if "L_lpips" in terms:
        vgg, convnext = (network and network.to(model.device) for network in perceptual_networks(config))
        extras.perceptual = Perceptual(vgg or model.pixel_encoder, convnext)
    if "L_s" in terms:
        extras.encoder_before = frozen_copy(model.tokenizer.vision)
    if "L_gan" in terms:
        with model.device:
            extras.discriminator = Discriminator(config.gan_width)
        lr, decay = (config.of_stage(field, stage.name) for field in ("lr", "weight_decay"))
        as_stage = (lr, config.betas, decay) if config.gan_as_stage else (lr / 2,)
        extras.adversary = adversary_optimizer(extras.discriminator, *as_stage)
    if stage.name == "P3":
        model.mllm.connector.copy_layers(model.mllm.llm)  # P1 has trained the LLM since the model was made
    if "L_align" in terms and config.align == "external":
        with model.device:
            external = SPAR(config, model.words)
        load_stage(external, Path(config.teacher), "P1")
        extras.external_teacher = external.tokenizer.vision.requires_grad_(False)
    return extras


def measure_latents(model: SPAR, stage: Stage, world: DrawnWorld | DiskData) -> None:
    """Sets the scale at which what the DiT is to draw has variance 1, on pictures of the stage's `world`: E_p(I) in P3,
    then z_f, from U1 on or, where U1 shows SANA its own latents, from U2 on."""
    if stage.name not in ("P3", "U2" if model.config.sana else "U1"):
        return
    if stage.name == "P3" and model.config.sana and model.config.dc_ae:
        return model.latent_scale.fill_(latent_scale(Path(model.config.dc_ae)))
    z = []
    with torch.no_grad():
        for first in range(0, 512, 32):
            images = world.pictures(range(first, first + 32)).to(model.device)
            z.append(model.pixel_latent(images) if stage.name == "P3" else
                     model.tokenizer.latents(model.tokenizer.features(images)).fused)
    model.latent_scale.fill_(1 / torch.cat(z).std())


def training_of(model: SPAR, stage: Stage, data_folder: DataFolder | None = None) -> Training:
    """A stage before its first step."""
    extras = prepare(model, stage)
    measure_latents(model, stage, open_world(model.config.at(stage.name), NAMES.index(stage.name), data_folder))
    return begin(StepModule(model, stage, extras))


# ---------------------------------------------------------------- one training step


def one_step(now: Training, batches: Iterator, step: int, check: Callable, stopping: bool = False) -> dict:
    """The same nine things in every stage. -> the losses by symbol, their weighted sum "loss", the norm of the
    "gradient", the learning "rate", the seconds of "waiting" for data, the "bad" samples of all processes, and whether
    one of them wants to stop. `check(now, step, metrics, parts)` raises where a number is not finite."""
    config, steps = now.config, now.config.of_stage("steps", now.stage.name)
    parts, bad, waiting = read(batches, f"{now.stage.name} step {step}")  # 1. read
    now.clock("waiting")  # what the time since the last of these went to; only a bench listens
    rate, losses_of, pairs = now.set_rate(step, steps), [], []  # 2. rate
    now.optimizer.zero_grad()
    for part in parts:  # one, or as many as it takes to fit the device (--per-device): their gradients add up
        batch = to(part, now.device)
        losses, reconstruction = now.module(batch, now.loss_weights, step >= config.gan_start * steps)  # 3. forward
        loss = sum(now.loss_weights[symbol] * value for symbol, value in losses.items())
        now.clock("forward")
        now.scaler.scale(loss / len(parts)).backward()  # 4. backward
        now.clock("backward")
        losses_of.append({symbol: value.detach() for symbol, value in (losses | {"loss": loss}).items()})
        if "L_gan" in losses:
            pairs.append((batch["images"], reconstruction.detach().float()))
    now.scaler.unscale_(now.optimizer)
    norm = unsharded(nn.utils.clip_grad_norm_(list(now.weights.values()), config.clip))  # 5. clip
    mean = {symbol: sum(of_part[symbol] for of_part in losses_of) / len(parts) for symbol in losses_of[0]}
    metrics = mean_of_metrics(mean | {"gradient": norm, "stopping": stopping, "bad": len(bad)})
    check(now, step, metrics, parts)  # 6. check: raises before anything has changed
    now.scaler.step(now.optimizer)  # 7. update
    now.scaler.update()
    if pairs:
        adversary_step(now.extras.discriminator, now.extras.adversary, pairs, config.lecam,
                       config.clip * config.gan_as_stage)  # 8. adversary
    now.move_average(step)  # 9. average
    now.clock("optimizer")
    return metrics | {"rate": rate, "waiting": waiting, "bad": gather(bad) if metrics["bad"] else []}


# ---------------------------------------------------------------- one stage


def train_stage(model: SPAR, stage: Stage, run: Path, seconds_after: Callable = lambda speed: 0.0, keep: bool = True,
                data_folder: DataFolder | None = None, clock: Callable | None = None) -> None:
    """Trains one stage and, with `keep`, writes <stage>.pt. `seconds_after(speed)`: estimate for the stages after it.
    `data_folder`: the data on disk, None: the drawn world. `clock`: a bench's."""
    config, index, device = model.config, NAMES.index(stage.name), model.device
    steps, batch = config.steps[index], config.batch[index]
    torch.manual_seed(1000 * config.training_seed + index)
    source = Batches(config, stage.name, stage.sample, stage.shares(config), *process_rank(), model.words, data_folder,
                     config.parts(stage.name, process_rank()[1]))
    now = training_of(model, stage, data_folder)
    now.clock = clock or now.clock
    look = watch(now, model, source, run, one_batch, step_module)
    first, spent = load_newest(now, run)
    if first_process():
        cut_logs(run, stage.name, first)
    wait_for_all()
    batches = iter(DataLoader(source, batch_size=None, sampler=range(first, steps), num_workers=config.workers,
                              pin_memory=device.type == "cuda", worker_init_fn=Stop.leave_to_parent))
    bar = tqdm(range(first, steps), desc=f"stage {index + 1} of 9  {stage.name}", dynamic_ncols=True,
               disable=not first_process())
    check, count_bad = partial(check_finite, run=run if keep else None), bad_samples(run, data_folder, config.max_bad)
    start, last_save, waited = time.time(), time.time(), 0.0
    with Stop() as stop, open_log(run, stage.name, first, config.board) as log:
        for step in bar:
            metrics = one_step(now, batches, step, check, stop.signal > 0)
            passed, waited = time.time() - start, waited + metrics["waiting"]
            if metrics["bad"]:
                count_bad(stage.name, step, metrics["bad"])
            if first_process() and (step % 10 == 0 or step == steps - 1):
                speed = (step + 1 - first) * batch / passed
                left = seconds_after(speed) + (steps - step - 1) * batch / speed
                report(now, step, metrics, bar, log, spent + passed, speed, left, waited / passed)
            look(step, (step + 1 - first) * batch / passed, log)
            due = metrics["stopping"] or decided_by_first(time.time() - last_save >= 60 * config.save_minutes, device)
            if keep and step + 1 < steps and due:
                save_progress(run, stage.name, step + 1, now.state() | {"step": step + 1, "seconds": spent + passed})
                last_save = time.time()
                if metrics["stopping"]:
                    bar.close()
                    stop.leave(f"{stage.name} is saved after step {step + 1} of {steps}: "
                               "the same command goes on from there")
        if keep:
            keep_stage(now, run, model.latent_scale, steps * batch, spent + time.time() - start)
            if decided_by_first(stop.signal > 0, device):
                stop.leave(f"{stage.name} is finished and saved: the same command goes on with the next stage")


def import_stage(model: SPAR, stage: Stage, run: Path, data_folder: DataFolder | None) -> None:
    """Writes <stage>.pt from a public folder."""
    prepare(model, stage)
    measure_latents(model, stage, open_world(model.config.at(stage.name), NAMES.index(stage.name), data_folder))
    print(f"stage {NAMES.index(stage.name) + 1} of 9  {stage.name}: read from {read_public(model, stage, run)}")


# ---------------------------------------------------------------- a whole run


def train(config: Config, run: Path, stages: list[str], device: str, source: Path | None = None,
          resume: bool = True, changed: bool = False) -> None:
    """Trains the named stages that `run` has not finished. `source`: a run whose untouched stages are taken over.
    `changed`: what --data holds may be other than when the run began."""
    names, trained = stage_names(config), set(stages) - set(imported_stages(config))
    data = open_folders({name: config.data_of(name) for name in names}, trained, dict(zip(NAMES, config.edits)))
    if first_process():
        check_folders(config, run)
        open_run(config, run, stages, source, resume, data, changed)
    wait_for_first()
    words, sound = text_tokenizer(config, run), finished_stages(run, config)
    if set(stages) - sound and first_process():
        take_reading(run, device, "start")
        if not config.data:
            print(draw_data(run, DrawnWorld(config.side, config.seed)))
    for position, name in enumerate(names):
        later = [other for other in names[position:] if other in stages and other not in sound]
        if name in sound:
            if first_process():
                print(f"stage {NAMES.index(name) + 1} of 9  {name}: finished before, in {run}")
        elif name in stages and name in imported_stages(config):
            if first_process():
                import_stage(build(config, device, words, run, names[:position]), stage_named(name), run, data[name])
            wait_for_all()
        elif name in stages:
            model = build(config, device, words, run, names[:position])
            left = partial(seconds_after, config, name, later[1:])
            train_stage(model, stage_named(name), run, left, data_folder=data[name])
            if first_process():
                take_reading(run, device, name)
            if name in ("P1", "P2", "T3", "U1") and first_process():  # something to look at while the rest trains
                print(report_so_far(run, device, name, data[name]))
        elif later:
            raise UserError(f"stage {later[0]} needs {name}, which {run} does not have: add it to --stages")
        else:
            break


def seconds_after(config: Config, name: str, later: list[str], speed: float) -> float:
    """What the later stages will take, from this one's pictures a second and the stages' known relation."""
    slower = 1000 / speed / stage_named(name).cost
    pictures = {other: config.of_stage("steps", other) * config.of_stage("batch", other) for other in later}
    return sum(slower * stage_named(other).cost * count / 1000 for other, count in pictures.items())


def one_batch(config: Config, stage: Stage) -> Batch:  # for a forecast
    return Batches(config, stage.name, stage.sample, stage.shares(config), words=text_tokenizer(config))[0]


def step_module(model: SPAR, stage: Stage) -> StepModule:  # for a forecast
    freeze_the_rest(model, stage)
    return StepModule(model, stage, prepare(model, stage))


def main() -> None:
    config, rest = parse(__doc__.splitlines()[0])
    if rest.plan:
        return print(plan(config, STAGES, one_batch, step_module, rest.out))
    if rest.replay:
        return print(replay(rest.replay, rest.device, STAGES, training_of, one_step, {"Noise": Noise, "Turns": Turns}))
    check_precision(config.precision, rest.device)
    if rest.bench:
        return bench(config, rest.device, rest.out, STAGES, one_batch, step_module, train_stage)
    device, start = join_processes(rest.device, config.shard), time.time()
    if first_process() and not rest.out.exists() and (said := stand_ins(config)):
        print(plan(config, STAGES, one_batch, step_module, rest.out), said, sep="\n")
    if Path(config.data) == openmoji.folder(config.side) and first_process():
        openmoji.write(config.side)
    wait_for_first()
    train(config, rest.out, rest.stages, device, rest.source, rest.resume == "auto", rest.changed_data)
    leave_processes()
    print_tables(evaluate(rest.out, device=device, **{"only": rest.only} if rest.only else {}))
    print(draw_report(rest.out, device))
    print(f"{rest.out}: {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    run_command(main)
