"""Exercise 2: who learns when (Sec. 3.2 to 3.4)."""

from functools import partial

import torch

from exercises.checks.tools import demand

TITLE, MINUTES = "Who learns when", 25
TAUGHT = ("T1", "T2", "T3", "U1", "U2", "U3")
CUT = {"train.py": [f"STAGES.{name}" for name in TAUGHT]}
PREDICT = ["Draw a grid of parts and stages: which part changes its bits in which of T1 to U3?",
           "T1's loss passes through the decoder, which is frozen: does its gradient reach the pixel stream?",
           "What would L_s be in T2, and what would it do there?"]
ANSWERS = ["The picture shows it, as it came out with your table.",
           "Yes. Frozen means that weights do not change; gradients pass through what is frozen.",
           "0 at every step, and nothing: the encoder does not move in T2, so it is what its copy is."]
ABOUT = """Fill in what each of six stages trains (name prefix of the parameters -> share of the stage's rate) and its
losses (symbol -> weight), in the places of the `{}` of STAGES. A weight, or the encoder's rate, is given as the name of
its field in spar.Config, such as "lambda_s" or "encoder_rate"; 1.0 where there is no field. The tables above STAGES
(STREAMS, CONNECTOR, GENERATOR, RECONSTRUCTION, GENERATION) may be used.

T1 teaches the two streams and the fusion alone, between an encoder and a decoder that stay: to reconstruct (L_mse,
L_lpips), z_p to land on the pixel encoder's latents (L_p), and z_f near them (L_f, ours, not the paper's). T2 trains
the decoder too, without L_p. T3 trains the encoder too, projector and all, at its own share of the rate; L_s holds it,
and an adversary joins (L_gan). U1 trains what leads from the language model to the DiT (queries, router, connector) by
flow matching alone (L_fm). U2 trains the DiT and its alignment head too, and adds L_align. U3 is as U2, on other data.
The language model never trains again, nor do the encoders after T3."""
SIZES = dict(  # a model so small that a step takes a blink
    side=16, patch=2, vision_width=16, vision_layers=1, vision_heads=2, d=32, llm_layers=4, llm_heads=2, llm_kv_heads=1,
    llm_mlp=48, k=2, p=8, pixel_layers=1, pixel_heads=2, stream_blocks=1, ae_widths=(8, 16, 32), ae_depths=(0, 1, 1),
    ae_decoder_depths=(0, 1, 1), queries=4, connector_layers=1, condition_width=24, c=32, dit_layers=2, dit_heads=1,
    dit_cross_heads=2, align_block=1, align_hidden=16, gan_width=8, gan_start=0.0, steps=(1,) * 9, batch=(4,) * 9,
    noises_per_picture=1, edits=(0.0,) * 7 + (0.5, 0.5), optimizer="adamw")
WEIGHTS = ("lambda_mse", "lambda_lpips", "lambda_f", "lambda_p", "lambda_s", "lambda_gan", "lambda_a")
PARTS = {"encoder E_s": "tokenizer.vision", "semantic stream": "tokenizer.semantic_stream",
         "pixel stream": "tokenizer.pixel_stream", "fusion F": "tokenizer.fusion", "decoder D_p": "tokenizer.decoder",
         "encoder E_p": "pixel_encoder", "LLM": "mllm.llm", "queries": "mllm.queries", "router": "mllm.router",
         "connector": "mllm.connector", "DiT": "dit", "alignment head": "align_head"}


def any_numbers() -> dict[str, float]:
    """No two fields that a row may name have the same."""
    return {field: 0.5 + float(torch.rand(())) for field in (*WEIGHTS, "encoder_rate", "clip", "connector_share")}


def model_of(own, **changes):
    """A model whose every number is random: what starts with zeros would hand on no gradient."""
    config = own.spar.make_config(**SIZES | {"seed": int(torch.randint(10**6, ()))} | changes)
    model, noise = own.train.build(config, "cpu"), torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    return model


def asked(own, real, name: str, config) -> tuple[dict[str, float], dict[str, float]]:
    """The terms that a stage asks for with their weights, and those that it is to ask for."""
    stage = own.train.stage_named(name)
    demand(stage.trains or stage.losses, f"not written yet: STAGES.{name}")
    for what, number in [*stage.rates(config).items(), *stage.loss_weights(config).items()]:
        demand(not isinstance(number, str), f"{name}: {what} is to have {number!r}, which is no field of spar.Config")
    return stage.loss_weights(config), real.train.stage_named(name).loss_weights(config)


def begin(own, real, model, name: str):
    """A stage of `own` before its first step -> (the stage in progress, what it is to train: name -> rate)"""
    asked(own, real, name, model.config)
    stage, right = (version.train.stage_named(name) for version in (own, real))
    rates, lr = right.rates(model.config), model.config.of_stage("lr", name)
    trained = getattr(real, "plumbing.training").trained_parameters(model, right)
    trains = {key: lr * rates[prefix] for prefix, pairs in trained.items() for key, _ in pairs}
    now = own.train.begin(own.train.StepModule(model, stage, own.train.prepare(model, stage)))
    for key in sorted(now.weights.keys() - trains.keys()):
        demand(False, f"{name} lists {key} ({part_of(key)}), which is frozen in it")
    for key in sorted(trains.keys() - now.weights.keys()):
        demand(False, f"{name} does not list {key} ({part_of(key)}), which it is to train")
    return now, trains


def step(own, now) -> set[str]:
    """One step -> the names of the parameters that have moved"""
    model, stage = now.module.model, now.stage
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    source = own.train.Batches(now.config, stage.name, stage.sample, stage.shares(now.config), words=model.words)
    own.train.one_step(now, iter([source[0]]), 0, lambda *told: None)
    return {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}


def part_of(parameter: str) -> str:
    return next((part for part, prefix in PARTS.items() if f"{parameter}.".startswith(f"{prefix}.")), parameter)


def moves(own, real, name: str) -> None:
    now, trains = begin(own, real, model_of(own), name)
    found, wanted = asked(own, real, name, now.config)
    for symbol in {**found, **wanted}:
        demand(symbol in wanted, f"{name} asks for {symbol}, which it is not to have")
        demand(symbol in found, f"{name} does not ask for {symbol}")
    moved = step(own, now)
    for key in sorted(moved ^ trains.keys()):
        demand(False, f"{name} {'moves' if key in moved else 'leaves as it is:'} {key} ({part_of(key)})")


def streams(own, real):
    """T1 moves both streams and the fusion, between an encoder and a decoder that stay as they are; its losses"""
    moves(own, real, "T1")


def decoder(own, real):
    """T2 moves the decoder too; its losses"""
    moves(own, real, "T2")


def encoder(own, real):
    """T3 moves the encoder too, projector and all; its losses"""
    moves(own, real, "T3")


def connector(own, real):
    """U1 moves what leads to the DiT: queries, router and connector; its losses"""
    moves(own, real, "U1")


def generator(own, real):
    """U2 moves the DiT and φ_a too, and never what understands: encoder and LLM; its losses"""
    moves(own, real, "U2")


def tuned(own, real):
    """U3 moves what U2 moves; its losses"""
    moves(own, real, "U3")


def rates(own, real):
    """in T3 the encoder learns at its own share of the rate, all else at the whole rate"""
    for share in (0.1, 0.35 + float(torch.rand(())) / 10):
        model = model_of(own, **any_numbers() | {"encoder_rate": share})
        for name in TAUGHT:
            now, trains = begin(own, real, model, name)
            keys = {id(parameter): key for key, parameter in model.named_parameters()}
            peaks = {keys[id(p)]: group["peak"] for group in now.optimizer.param_groups for p in group["params"]}
            for key, peak in trains.items():
                demand(abs(peaks[key] - peak) < 1e-9, f"{name}: {key} ({part_of(key)}) learns at {peaks[key]:.3g}, "
                                                      f"wanted {peak:.3g}, where encoder_rate is {share:.3g}")


def terms(own, real):
    """each term has the weight that the configuration gives it, in every stage"""
    model = model_of(own, **any_numbers())
    for name in TAUGHT:
        now, _ = begin(own, real, model, name)
        its_own, wanted = asked(own, real, name, model.config)
        for symbol, weight in wanted.items():
            if symbol not in its_own:  # another claim says so
                continue
            found = now.loss_weights[symbol]
            demand(abs(found - weight) < 1e-9, f"{name}: {symbol} weighs {found:.4g} where the configuration says "
                                               f"{weight:.4g}: is its field named, or a number of one configuration?")


def nothing(own, real):
    """a term whose weight is 0 in the configuration is left out"""
    for field in WEIGHTS:
        with_it, without = (own.spar.make_config(**SIZES | {field: weight}) for weight in (0.7, 0.0))
        for name in TAUGHT:
            (_, full), (found, wanted) = asked(own, real, name, with_it), asked(own, real, name, without)
            for symbol in sorted(full.keys() - wanted.keys()):
                demand(symbol not in found, f"{name} asks for {symbol} where {field} is 0")


def told_apart(config):
    """The configuration with a number of its own in each field that is one: none is 0 or 1, and no two are the same."""
    for i, (field, value) in enumerate(vars(config).items()):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, field, 1.5 + i)
    return config


def any_weight(own, real):
    """a term weighs what its own field says, or 1 where it has none"""
    config = told_apart(own.spar.make_config())
    its_own = {"L_mse": "lambda_mse", "L_lpips": "lambda_lpips", "L_f": "lambda_f", "L_p": "lambda_p",
               "L_s": "lambda_s", "L_gan": "lambda_gan", "L_align": "lambda_a"}
    for name in TAUGHT:
        for symbol, weight in asked(own, real, name, config)[0].items():
            right = getattr(config, its_own.get(symbol, ""), 1.0)
            demand(weight == right, f"{name}: {symbol} weighs {weight:g} where {its_own.get(symbol, 'nothing')} is "
                                    f"{right:g}")


def any_model(own, real):
    """so it is in every model: a part trains whole or not at all, at the stage's rate or the encoder's"""
    for changes in ({}, *({"router": router} for router in real.router.ROUTERS), {"symmetric": "with"},
                    {"symmetric": "without"}, {"tokenizer": "semantic-only"}, {"tokenizer": "pixel-only"},
                    {"freeze_encoder": True}):
        config, where = own.spar.make_config(**changes), "".join(f", where {key} {changes[key]}" for key in changes)
        with torch.device("meta"):
            model = own.spar.SPAR(config, own.train.text_tokenizer(config))
        told_apart(model.config)
        keys = [key for key, _ in model.named_parameters()]
        for name in TAUGHT:
            asked(own, real, name, model.config)
            stage = own.train.stage_named(name)
            rates = stage.rates(model.config)
            for prefix, rate in rates.items():
                demand(rate in (None, 0, 1, model.config.encoder_rate), f"{name}: {prefix} learns at {rate} of the "
                       "rate: the whole of it, 1.0, or its field, encoder_rate")
                demand(changes or not rate or any(f"{key}.".startswith(f"{prefix}.") for key in keys),
                       f"{name}: no parameter's name begins with {prefix}")
            trained = getattr(real, "plumbing.training").trained_parameters(model, stage)
            found = {key: rates[prefix] for prefix, pairs in trained.items() for key, _ in pairs}
            for part, prefix in PARTS.items():
                held = {found.get(key, 0.0) for key in keys if f"{key}.".startswith(f"{prefix}.")}
                demand(len(held) < 2, f"{name} trains a part of the {part} alone, or at several rates{where}")


CLAIMS = [streams, decoder, encoder, connector, generator, tuned, rates, terms, nothing, any_model, any_weight]


def fingerprint(version) -> dict:
    fields = {field: 0.5 + i / 16 for i, field in enumerate(WEIGHTS)}
    config = version.spar.make_config(**SIZES | fields | {"encoder_rate": 0.25})
    symbols = ("L_mse", "L_lpips", "L_f", "L_p", "L_s", "L_gan", "L_fm", "L_align")
    with torch.device("meta"):
        model = version.spar.SPAR(config, version.train.text_tokenizer(config))

    def row(name):
        stage = version.train.stage_named(name)
        rates, weights = stage.rates(config), stage.loss_weights(config)
        trained = getattr(version, "plumbing.training").trained_parameters(model, stage)
        shares = {key: rates[prefix] for prefix, pairs in trained.items() for key, _ in pairs}
        return torch.tensor([*(shares.get(key, 0.0) for key, _ in model.named_parameters()),
                             *(weights.get(symbol, 0.0) for symbol in symbols)])

    return {f"STAGES.{name}": partial(row, name) for name in TAUGHT}


def picture(own, path):
    """Which share of each part's parameters has moved after a step of each stage."""
    from plumbing.pictures import heat_map
    table = torch.zeros(len(PARTS), len(TAUGHT))
    for column, name in enumerate(TAUGHT):
        torch.manual_seed(column)
        now, _ = begin(own, own, model_of(own), name)
        moved, keys = step(own, now), [key for key, _ in now.module.model.named_parameters()]
        for row, part in enumerate(PARTS):
            inside = [key for key in keys if part_of(key) == part]
            table[row, column] = sum(key in moved for key in inside) / len(inside)
    heat_map(table, [*PARTS], [*TAUGHT], "what moves in which stage (share of its tensors)").save(path)
    return path
