"""Every field of the configuration changes bits, shapes or a file: none is there for nothing."""

import json
import shutil
import sys
from dataclasses import fields, replace

import pytest
import torch
from PIL import Image

import train
from disk.layouts import scan
from parts.layer import layers
from plumbing.command import UserError
from plumbing.flags import parse
from plumbing.pictures import loss_curves
from plumbing.processes import join_processes
from plumbing.run_folder import build, check_same_run, load_config, load_run, read_lines, stage_names, text_tokenizer
from plumbing.training import open_log
from public.folders import sizes_of
from public.perceptual import ConvNeXt
from spar import NAMES, PER_STAGE, Config, make_config
from tests.conftest import TINY
from tests.tools.models import model_of, state, words_of
from tests.tools.planted import everything, noise

BASE = TINY | {"steps": (3,) * 9}
SHAPES = {  # field -> another value, with which some parameter is of another shape, or there is another
    "side": 24, "patch": 4, "vision_width": 32, "vision_layers": 3, "d": 64, "llm_layers": 5, "llm_kv_heads": 2,
    "llm_mlp": 64,
    "vocabulary": 500, "tied": False, "p": 4, "pixel_layers": 2, "stream_blocks": 2, "ae_widths": (8, 16, 16),
    "ae_depths": (0, 1, 2), "ae_decoder_depths": (0, 1, 2), "ae_vit_stages": 0, "ae_resample": "conv", "k": 2,
    "queries": 25,
    "connector_layers": 2, "condition_width": 16, "c": 64, "dit_layers": 3, "dit_mlp_ratio": 2.0, "align_hidden": 8,
    "tokenizer": "pixel-only", "symmetric": "with", "router": "concat"}
BITS = {  # field -> a stage that ends in other bits with another value
    "seed": ("P1", 1), "vision_heads": ("P1", 1), "llm_heads": ("P1", 1), "steps": ("P1", (4,) * 9),
    "batch": ("P1", (6,) * 9),
    "sides": ("P1", (8,) * 9), "lr": ("P1", (1e-4,) * 9), "optimizer": ("P1", "adamw"), "muon_lr": ("P1", 5.0),
    "weight_decay": ("P1", (0.5,) * 9),
    "decay_all": ("P1", False),
    "warmup": ("P1", (0.9,) * 9), "final_lr": ("P1", (0.5,) * 9), "clip": ("P1", 0.01), "ema": ("P1", (0.05,) * 9),
    "attention": ("P1", "tiled"),
    "lambda_z": ("P2", 0.1), "dit_heads": ("P3", 2), "dit_cross_heads": ("P3", 1), "positions": ("P3", False),
    "connector_share": ("P3", 1.0), "shift": ("P3", 1.0), "noises_per_picture": ("P3", 1), "drop_words": ("P3", 1.0),
    "precision": ("P3", "bf16"), "pixel_heads": ("T1", 1), "lambda_mse": ("T1", 0.25),
    "lambda_lpips": ("T1", 1.0), "lambda_p": ("T1", 0.5), "lambda_f": ("T1", 0.5),
    "lambda_s": ("T3", 1.0), "lambda_gan": ("T3", 0.1), "gan_start": ("T3", 0.9),
    "gan_width": ("T3", 4),
    "lecam": ("T3", 1.0), "encoder_rate": ("T3", 0.1), "anchor": ("T3", False), "freeze_encoder": ("T3", True),
    "lambda_a": ("U2", 0.1), "align_block": ("U2", 2), "align": ("U2", "none"), "edits": ("U2", (0.25,) * 9),
    "betas": ("P1", (0.8, 0.9)), "gan_as_stage": ("T3", True)}


@pytest.fixture(scope="module")
def end(tmp_path_factory):
    """(stage, changes) -> all that it leaves: its weights and its losses."""
    known = {}

    def run(name: str, **changes):
        key = name, str(changes)
        if key not in known:
            folder = tmp_path_factory.mktemp("stage")
            config = make_config(**BASE | changes)
            model = build(config, "cpu", words_of(replace(config, data="")) if not config.data else None, folder)
            train.train_stage(model, train.stage_named(name), folder)
            lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            weights = {key: (tuple(value.shape), value.numpy().tobytes()) for key, value in state(model).items()}
            known[key] = weights, [{key: line[key] for key in line if key.startswith(("L_", "loss"))} for line in lines]
        return known[key]

    yield run
    build(make_config(**BASE), "cpu")  # what one of them chose for the process is as it was


def shapes(config: Config) -> dict[str, tuple]:
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in model_of(config).named_parameters()}


# ---------------------------------------------------------------- fields that show elsewhere


def preset(end, tmp_path, monkeypatch):
    assert make_config(preset="small") != replace(make_config(), preset="small")


def random_vgg(tmp_path):
    """-> (file of VGG16, file of LPIPS's heads)"""
    generator, rows, previous = torch.Generator().manual_seed(0), {}, 3
    widths = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    for number, c in zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), widths):
        rows[f"features.{number}.weight"] = torch.randn(c, previous, 3, 3, generator=generator) / 30
        rows[f"features.{number}.bias"], previous = torch.zeros(c), c
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator)
             for i, c in enumerate((64, 128, 256, 512, 512))}
    torch.save(rows, tmp_path / "vgg.pth")
    torch.save(heads, tmp_path / "lpips.pth")
    return str(tmp_path / "vgg.pth"), str(tmp_path / "lpips.pth")


def vgg(end, tmp_path, monkeypatch):
    networks, heads = random_vgg(tmp_path)
    assert end("T1", vgg=networks, lpips=heads) != end("T1")
    with pytest.raises(UserError, match="--vgg .*lpips.pth .*: it lacks features.0.weight"):
        end("T1", vgg=heads, lpips=heads)


def lpips(end, tmp_path, monkeypatch):
    networks, heads = random_vgg(tmp_path)
    first = end("T1", vgg=networks, lpips=heads)
    weights = torch.load(heads)
    torch.save({key: 2 * value for key, value in weights.items()}, tmp_path / "other.pth")
    assert end("T1", vgg=networks, lpips=str(tmp_path / "other.pth")) != first
    with pytest.raises(UserError, match="--lpips .*nowhere"):
        end("T1", vgg=networks, lpips=str(tmp_path / "nowhere"))


def convnext(end, tmp_path, monkeypatch):
    monkeypatch.setattr("public.perceptual.resize", lambda images, side: images)  # 224 px take a second each
    torch.manual_seed(0)
    torch.save(ConvNeXt().state_dict(), tmp_path / "convnext.pth")
    assert end("T1", convnext=str(tmp_path / "convnext.pth"), side=32, patch=4) != end("T1", side=32, patch=4)
    torch.save({"classifier.2.bias": torch.ones(1000)}, tmp_path / "half.pth")
    with pytest.raises(UserError, match="--convnext .*half.pth: .*Missing key"):
        end("T1", convnext=str(tmp_path / "half.pth"))


def imagenet(end, tmp_path, monkeypatch):
    torch.manual_seed(0)
    plain = model_of(make_config(**TINY)).tokenizer.vision
    torch.manual_seed(0)
    normalised, images = model_of(make_config(**TINY | {"imagenet": True})).tokenizer.vision, torch.ones(1, 3, 16, 16)
    mean, std = (torch.tensor(rgb).view(3, 1, 1) for rgb in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    as_others_do = ((images + 1) / 2 - mean) / std
    assert torch.allclose(normalised(images), plain(as_others_do), atol=1e-5) and not normalised(images).equal(
        plain(images))


def folder_of_a_public_model(field):
    """What each of them does: test_folders.py; here that a run says what it began with."""
    def check(end, tmp_path, monkeypatch):
        pytest.importorskip("safetensors")
        with pytest.raises((UserError, ValueError), match="nowhere"):
            sizes_of({field: str(tmp_path / "nowhere")})

    check.__name__ = field
    return check


internvl, dc_ae, sana = map(folder_of_a_public_model, ("internvl", "dc_ae", "sana"))


def public(end, tmp_path, monkeypatch):
    """Written by the run itself; a later start keeps it (test_folders.py)."""
    config = make_config(**TINY | {"public": "sana/a.safetensors 00"})
    check_same_run(config, tmp_path)
    (tmp_path / "P1.pt").touch()  # before that a run has computed nothing, and may become another
    again = make_config(**TINY)
    check_same_run(again, tmp_path)
    assert load_config(tmp_path).public == again.public == config.public


def per_device(end, tmp_path, monkeypatch):
    """Gradients add up over the parts of a step, whose samples and noises are the same. (P1's means are of words, of
    which a part has more than another.)"""
    for name in ("P2", "P3", "T3", "U2"):
        (weights, lines), (in_parts, others) = end(name), end(name, per_device=(2,) * 9)
        assert weights != in_parts and len(lines) == len(others)
        for line, other in zip(lines, others):
            assert other == pytest.approx(line, rel=2e-4, abs=1e-5), name
    config = make_config(**BASE | {"per_device": (3,) * 9})
    assert [config.parts("P2", ranks) for ranks in (1, 2, 4, 8)] == [4, 2, 1, 1]  # 8 pictures: 2, 2, 2, 1 at a time
    stage, held = train.stage_named("P2"), []
    compute = stage.compute
    watched = replace(stage, compute=lambda model, batch, *rest: held.append(len(batch["images"])) or compute(
        model, batch, *rest))
    train.train_stage(build(config, "cpu"), watched, tmp_path)
    assert held == [2] * 12
    with pytest.raises(ValueError, match="--batch 9 is the nearest"):
        train.Batches(config, "P2", stage.sample, {}, 0, 3)


def teacher(end, tmp_path, monkeypatch):
    folders = []
    for seed in (1, 2):
        folders.append(str(tmp_path / str(seed)))
        train.train(make_config(**TINY | {"seed": seed}), tmp_path / str(seed), ["P1"], "cpu")
    assert end("U2", align="external", teacher=folders[0]) != end("U2", align="external", teacher=folders[1])


def skip_stage(end, tmp_path, monkeypatch):
    assert set(stage_names(Config())) - set(stage_names(Config(skip_stage="T2"))) == {"T2"}


def on_disk(tmp_path, name="P1", **changes):
    """A run, up to a stage, on data on disk; -> its folder."""
    root, run = tmp_path / "data", tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    everything(root) if not root.exists() else None
    stages = list(NAMES[:NAMES.index(name) + 1])
    train.train(make_config(**TINY | {"steps": (1,) * 9, "data": str(root)} | changes), run, stages, "cpu")
    return run


def data(end, tmp_path, monkeypatch):
    run = on_disk(tmp_path)
    words = text_tokenizer(make_config(**TINY | {"data": str(tmp_path / "data")}), run)
    assert len(words) != len(words_of(make_config(**TINY)))


def data_u3(end, tmp_path, monkeypatch):
    """U3 alone reads it, words by the same byte pairs."""
    shutil.copytree(everything(tmp_path / "data"), tmp_path / "more")
    for path in (tmp_path / "more").glob("*.txt"):
        path.write_text("another caption")
    seen, make = {}, train.unified_batch

    def watched(source, numbers):
        seen[source.name] = str(source.data_folder.root)
        return make(source, numbers)

    monkeypatch.setattr(train, "STAGES", [replace(stage, sample=watched) if stage.sample is make else stage
                                          for stage in train.STAGES])
    run = on_disk(tmp_path, "U3", data_u3=str(tmp_path / "more"))
    assert seen == {"U1": str(tmp_path / "data"), "U2": str(tmp_path / "data"), "U3": str(tmp_path / "more")}
    assert load_run(run).finished_stages[-1] == "U3"
    with pytest.raises(UserError, match="--data-u3 PATH needs --data"):
        parse("", ["--data-u3", "x"])


def reseed(end, tmp_path, monkeypatch):
    """Other noise, data and new weights in the stages that are trained; the run's seed, and with it its tests, stay."""
    assert end("T1") != end("T1", reseed=1) == end("T1", seed=1)
    source, other = tmp_path / "source", tmp_path / "other"
    train.train(make_config(**TINY), source, ["P1", "P2"], "cpu")
    train.train(make_config(**TINY | {"reseed": 1}), other, ["P1", "P2", "P3"], "cpu", source)
    assert (source / "P1.pt").read_bytes() == (other / "P1.pt").read_bytes() and load_run(other).config.seed == 0


def tokens(end, tmp_path, monkeypatch):
    few, more = (len(json.loads((on_disk(tmp_path, tokens=count) / "vocabulary.json").read_text())["merges"])
                 for count in (264, 268))
    assert few == 4 and more == 8


def samples(tmp_path, name, **changes):
    """A stage's first batch of data on disk."""
    root = tmp_path / "data"
    everything(root) if not root.exists() else None
    config = make_config(**TINY | {"data": str(root)} | changes)
    stage = train.stage_named(name)
    return train.Batches(config, name, stage.sample, stage.shares(config), data_folder=scan(root))[0]


def longest(end, tmp_path, monkeypatch):
    run = on_disk(tmp_path)
    lengths = [len(text_tokenizer(make_config(**TINY | {"data": "x", "longest": count}), run).encode("a" * 90))
               for count in (4, 48)]
    assert lengths == [4, 48]


def mirror(end, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for i in range(40):
        (tmp_path / "data" / f"{i}.png").write_bytes(noise(i))
    alone, all_of_them, none = (samples(tmp_path, "P2", mirror=value)["images"] for value in ("alone", "all", "none"))
    assert torch.equal(alone, all_of_them) and not torch.equal(alone, none)  # with words: test_disk.py


def early(end, tmp_path, monkeypatch):
    """T3's first steps see pictures of T2's side, the rest those of its own; a held-out batch is of the latter."""
    config, stage = make_config(**TINY | {"early": 0.5, "sides": (0,) * 4 + (8,) + (0,) * 4}), train.stage_named("T3")
    source = train.Batches(config, "T3", stage.sample, {})
    half = config.of_stage("steps", "T3") / 2
    for step in range(config.of_stage("steps", "T3")):
        assert source[step]["images"].shape == (config.of_stage("batch", "T3"), 3, *[8 if step < half else 16] * 2)
    parted = train.Batches(config, "T3", stage.sample, {}, parts=2)
    assert [part["images"].shape[-1] for part in parted[0] + parted[99]] == [8, 8, 16, 16]
    assert torch.equal(torch.cat([part["images"] for part in parted[0]]).sort(0)[0], source[0]["images"].sort(0)[0])
    assert train.Batches(config, "T2", stage.sample, {}).early is None
    changes = {"early": 0.5, "sides": (0,) * 4 + (8,) + (0,) * 4}
    assert end("T3", **changes) != end("T3", early=0.0, sides=changes["sides"])


def fit(end, tmp_path, monkeypatch):
    """Words that name a thing at the edge go with pictures that still show it."""
    (tmp_path / "data").mkdir()
    for i in range(40):
        wide = Image.new("RGB", (32, 16), "white")
        wide.paste("black", (0, 0, 4, 16))
        wide.save(tmp_path / "data" / f"{i}.png")
        (tmp_path / "data" / f"{i}.txt").write_text("a red circle")
    cut, squeezed = (samples(tmp_path, "P3", fit=value, mirror="none")["images"] for value in ("middle", "squash"))
    assert (cut == 1).all()
    assert (squeezed[:, :, :, :1] < 0).all() and (squeezed[:, :, :, 3:] > 0.9).all()
    assert torch.equal(*(samples(tmp_path, "P2", fit=value)["images"] for value in ("middle", "squash")))


def look_minutes(end, tmp_path, monkeypatch):
    """A look writes down what one pass over the first held-out batch gives, and changes no bit of the training."""
    for name in ("P1", "T3", "U2"):
        assert end(name) == end(name, look_minutes=60.0)
    config, stage = make_config(**BASE | {"look_minutes": 1e-9, "steps": (1,) * 9}), train.stage_named("T3")
    model, seen = build(config, "cpu"), []
    compute = stage.compute
    train.train_stage(model, replace(stage, compute=lambda model, batch, *rest: seen.append(batch) or compute(
        model, batch, *rest)), tmp_path, keep=False)
    held_out = train.Batches(config, "T3", stage.sample, {}, split="test")[0]["images"]
    assert len(seen) == 2 and torch.equal(seen[1]["images"], held_out)
    line, = (line for line in read_lines(tmp_path / "log.jsonl") if "held_out" in line)
    weights = stage.loss_weights(config)
    with torch.no_grad():
        extras = train.prepare(model, stage)  # the model as the step left it
        losses = stage.compute(model, {"images": held_out}, weights, replace(extras, discriminator=None))[0]
    assert {"L_mse", "L_lpips", "L_f"} <= set(line["held_out"])
    for symbol in ("L_mse", "L_f"):
        assert line["held_out"][symbol] == pytest.approx(losses[symbol].item(), rel=1e-4)
    assert (tmp_path / "report" / "T3.png").exists() and loss_curves(tmp_path).size[0] > 0


def board(end, tmp_path, monkeypatch):
    """TensorBoard is told what log.jsonl is told, and forgets what is done again as that does."""
    with monkeypatch.context() as without, pytest.raises(UserError, match="pip install tensorboard"):
        without.setitem(sys.modules, "tensorboard", None)
        parse("", ["--board"])  # before the first stage begins
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert end("T3") == end("T3", board=True)
    for first in (0, 10):
        with open_log(tmp_path, "T3", first, board=True) as log:
            for step in range(first, 21 - first, 10):
                log({"stage": "T3", "step": step, "L_mse": 0.25 + first + step})
    with open_log(tmp_path, "T3", 20, board=True) as log:
        log({"stage": "T3", "step": 20, "held_out": {"L_mse": 0.75}, "memory": 7})
    told = events.EventAccumulator(str(tmp_path / "board" / "T3")).Reload()
    curves = {name: [(one.step, one.value) for one in told.Scalars(name)] for name in told.Tags()["scalars"]}
    assert curves == {"L_mse": [(0, 0.25), (10, 20.25)], "held_out/L_mse": [(20, 0.75)], "memory": [(20, 7.0)]}


def max_bad(end, tmp_path, monkeypatch):
    root = everything(tmp_path / "data")
    for i in range(24):
        (root / f"z{i}.png").write_bytes(noise(i)[:200])  # half of what P2 reads
    on_disk(tmp_path, "P2", max_bad=1.0, steps=(4,) * 9)
    with pytest.raises(UserError, match="more than --max-bad 0.0"):
        on_disk(tmp_path, "P2", max_bad=0.0, steps=(4,) * 9)


def compile(end, tmp_path, monkeypatch):
    plain, compiled = (build(make_config(**TINY | {"compile": value}), "cpu") for value in (False, True))
    assert compiled.tokenizer.vision._compiled_call_impl and not plain.tokenizer.vision._compiled_call_impl


def checkpointing(end, tmp_path, monkeypatch):
    """The bits stay (test_precision.py); what is kept for backward does not."""
    for value in (False, True):
        module = train.training_of(model_of(make_config(**TINY | {"checkpointing": value})),
                                   train.stage_named("P2")).module
        assert {layer.recompute for layer in layers(module)} == {value}


def workers(end, tmp_path, monkeypatch):
    loader, counts = train.DataLoader, []
    monkeypatch.setattr(train, "DataLoader", lambda *args, num_workers, **options: counts.append(num_workers) or loader(
        *args, num_workers=num_workers, **options))
    assert end("P2", workers=2) == end("P2") and 2 in counts


def shard(end, tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert join_processes("cpu", False) == "cpu"
    with pytest.raises(UserError, match="--shard spreads a model over processes"):
        join_processes("cpu", True)


def save_minutes(end, tmp_path, monkeypatch):
    for minutes in (60.0, 0.0):
        train.train(make_config(**BASE | {"save_minutes": minutes}), tmp_path / str(minutes), ["P1"], "cpu")
        assert (tmp_path / str(minutes) / "resume").exists() == (minutes == 0)


def sampling_steps(end, tmp_path, monkeypatch):
    assert len(model_of(make_config(**BASE | {"sampling_steps": 3})).generate(["a red circle"])[1]) == 4


def draws_otherwise(field, value):
    def check(end, tmp_path, monkeypatch):
        paths = []
        for changes in ({}, {field: value}):
            torch.manual_seed(0)
            model = model_of(make_config(**BASE | {"sampling_steps": 3} | changes))
            torch.nn.init.normal_(model.dit.out.weight)  # one that has learned nothing draws the same in any way
            paths.append(model.generate(["a red circle"])[1][-1])
        assert not torch.equal(*paths)

    check.__name__ = field
    return check


guidance, sampler, sampling_shift = (draws_otherwise(*pair) for pair in (("guidance", 3.0), ("sampler", "dpm"),
                                                                         ("sampling_shift", 1.0)))


ELSEWHERE = {test.__name__: test for test in (
    preset, per_device, internvl, dc_ae, sana, public, imagenet, vgg, lpips, convnext, teacher, skip_stage, data,
    data_u3, reseed, tokens,
    longest, mirror, early, fit, look_minutes, board, max_bad, compile, checkpointing, workers, shard, save_minutes,
    sampling_steps, guidance, sampler,
    sampling_shift)}


@pytest.mark.parametrize("field", [field.name for field in fields(Config)])
@pytest.mark.usefixtures("without_pictures")
def test_every_field_changes_bits_shapes_or_a_file(field, end, tmp_path, monkeypatch):
    if field in SHAPES:
        assert shapes(make_config(**BASE)) != shapes(make_config(**BASE | {field: SHAPES[field]}))
    elif field in BITS:
        name, value = BITS[field]
        assert end(name) != end(name, **{field: value})
    else:
        ELSEWHERE[field](end, tmp_path, monkeypatch)


def test_without_a_change_the_bits_are_the_same(end):
    for name in {name for name, _ in BITS.values()}:
        assert end(name) == end(name, preset="toy"), name


@pytest.mark.parametrize("field, value", [("weight_decay", 0.5), ("warmup", 0.9), ("final_lr", 0.5), ("ema", 0.05)])
def test_of_nine_numbers_each_stage_reads_its_own(field, value, end):
    usual = getattr(make_config(**BASE), field)
    assert end("P2", **{field: (value, *usual[1:])}) == end("P2")
    assert end("P2", **{field: (usual[0], value, *usual[2:])}) != end("P2")


def test_a_stage_with_a_side_of_its_own_sees_pictures_of_it_and_the_run_is_used_with_its_own(tmp_path):
    config = make_config(**BASE | {"sides": (0, 0, 8, 24, 8, 0, 24, 24, 0)})
    for name, side in zip(NAMES, (16, 16, 8, 24, 8, 16, 24, 24, 16)):
        stage = train.stage_named(name)
        batch = train.Batches(config, name, stage.sample, stage.shares(config))[0]
        assert batch["images"].shape[-1] == side
        if "noise" in batch:
            assert batch["noise"].epsilon.shape[-1] == side // 4
    train.train(config, tmp_path / "run", list(NAMES), "cpu")
    assert load_run(tmp_path / "run").generate(["a red circle"])[0].shape[-1] == 16
    with pytest.raises(UserError, match="--sides 18 is no multiple of a token's 8 pixels"):
        parse("", ["--sides", "18"])


def test_one_number_stands_for_all_stages_and_a_few_are_refused(monkeypatch):
    def config_of(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        return parse("")[0]

    assert config_of("--weight-decay", "0.3", "--batch", "8").weight_decay == (0.3,) * 9
    assert config_of("--batch", "8").batch == (8,) * 9
    with pytest.raises(UserError, match="--ema takes one number, or 9"):
        config_of("--ema", "0.5,0.6")


def test_weight_decay_leaves_norms_biases_tables_positions_and_queries_alone_where_the_paper_does():
    decayed = {}
    for stage in ("P1", "U2"):
        model = model_of(make_config(**BASE | {"decay_all": False, "weight_decay": (0.1,) * 9}))
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for group in train.training_of(model, train.stage_named(stage)).optimizer.param_groups:
            decayed |= {names[id(parameter)]: group["weight_decay"] for parameter in group["params"]}
    spared = {name for name, decay in decayed.items() if decay == 0}
    assert {"tokenizer.vision.cls", "tokenizer.vision.positions", "mllm.queries", "dit.table", "dit.blocks.0.table",
            "mllm.llm.norm.weight", "dit.out.bias"} <= spared
    assert all(decayed[name] == 0.1 for name in ("mllm.llm.embedding.weight", "dit.out.weight", "dit.embed.weight",
                                                 "tokenizer.vision.patches.weight", "dit.blocks.0.ffn.depth.weight"))
    assert not any(name.endswith(("qkv.weight", "mlp.0.weight", "mlp.2.weight")) for name in spared)


def test_a_run_with_numbers_for_some_stages_alone_is_refused_in_one_line(tmp_path):
    for field in PER_STAGE:
        content = vars(make_config(**BASE)) | {field: [1] * 8}
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"{field} has 8 numbers"):
            load_config(tmp_path)


@pytest.mark.usefixtures("without_pictures")
def test_a_term_of_weight_0_is_left_out_of_what_is_computed(end):
    for field, symbol in (("lambda_mse", "L_mse"), ("lambda_lpips", "L_lpips"), ("lambda_f", "L_f")):
        lines = end("T1", **{field: 0.0})[1]
        assert lines and all(symbol not in line and line["loss"] > 0 for line in lines)
