"""Half precision learns what full precision learns; what needs float32 stays float32."""

import functools
import json
import shutil
from dataclasses import replace

import pytest
import torch

import train
from parts.layer import Layer
from plumbing import devices, run_folder
from plumbing.command import UserError
from plumbing.run_folder import load_run
from spar import NAMES, make_config
from tests.conftest import TINY
from tests.tools.models import model_of, run_stage, state

# Largest difference of a loss, as a share of it (or of 1, where it is smaller). fp16 skips its first steps, until it
# has found a scale at which no gradient overflows.
BAND = {"bf16": 0.02, "fp16": 0.03}


def losses(precision, name, tiny, folder, **changes):
    torch.manual_seed(0)
    model = model_of(tiny(precision=precision, steps=(12,) * 9, lr=(1e-3,) * 9, **changes))
    lines = run_stage(model, name, folder)
    return [{key: value for key, value in line.items() if key == "loss" or key.startswith("L_")}
            for line in lines], state(model)


@pytest.fixture(scope="module")
def full_losses(tmp_path_factory):
    """Stage -> its losses in fp32."""
    tiny = lambda **changes: make_config(**TINY | changes)
    return functools.cache(lambda name: losses("fp32", name, tiny, tmp_path_factory.mktemp("full") / name)[0])


@pytest.mark.parametrize("precision", list(BAND))
@pytest.mark.parametrize("name", NAMES)
def test_every_stage_has_the_losses_of_float32_within_a_band(name, precision, full_losses, tiny, tmp_path):
    full, (half, rough) = full_losses(name), losses(precision, name, tiny, tmp_path / precision)
    assert len(full) == len(half) == 3
    for a, b in zip(full, half):
        assert a.keys() == b.keys()
        for symbol in a:
            band = BAND[precision] * (2
                                      if symbol == "L_gan" else 1)  # its adversary has learned from the other pictures
            assert abs(a[symbol] - b[symbol]) <= band * max(1, abs(a[symbol])), symbol
    assert full != half  # it did compute in another precision
    assert all(value.dtype == torch.float32 for value in rough.values())
    content = torch.load(tmp_path / precision / f"{name}.pt", weights_only=True)
    tensors = [x for x in torch.utils._pytree.tree_leaves(content) if isinstance(x, torch.Tensor)]
    assert all(x.dtype == torch.float32 for x in tensors if x.is_floating_point())  # weights, average, optimizer


@pytest.mark.parametrize("name", ["P1", "P2", "P3", "T3", "U2"])
def test_every_loss_is_float32(name, tiny, tmp_path):
    kinds, stage = {}, train.stage_named(name)

    def watched(*given):
        losses, reconstruction = stage.compute(*given)
        kinds.update({symbol: value.dtype for symbol, value in losses.items()})
        return losses, reconstruction

    run_stage(model_of(tiny(precision="bf16")), replace(stage, compute=watched), tmp_path)
    assert kinds and set(kinds.values()) == {torch.float32}


@pytest.mark.parametrize("name", ["P1", "P2", "U2"])
def test_recomputing_layers_changes_no_bit(name, tiny, tmp_path):
    ends = {}
    for recompute in (False, True):
        ends[recompute] = losses("fp32", name, tiny, tmp_path / str(recompute), checkpointing=recompute)
    for key in ends[False][1]:
        assert torch.equal(ends[False][1][key], ends[True][1][key]), key


def test_a_layer_that_recomputes_keeps_nothing_of_its_inside():
    class Wide(Layer):
        def forward(self, x):
            return (x[:, None] * torch.ones(100)[:, None]).sin().sum(1)

    kept = {}
    for recompute in (False, True):
        layer, sizes = Wide(), []
        layer.recompute = recompute
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            layer(torch.ones(4, 5, requires_grad=True))
        kept[recompute] = max(sizes, default=0)
    assert kept[False] == 2000 and kept[True] <= 20


def test_half_precision_is_refused_where_it_is_slower_with_the_factor(monkeypatch):
    clock = iter([0, 1, 1, 2, 2, 3, 3, 4, 10, 50, 50, 90, 90, 130, 130, 170])  # fp32: 1 s a product, bf16: 40 s
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(clock))
    with pytest.raises(UserError, match="takes 40 times as long for products in bf16 as in fp32; use --precision fp32"):
        devices.check_precision("bf16", "cpu")
    devices.check_precision("bf16", "cuda")
    devices.check_precision("fp32", "cpu")


def test_compiled_parts_compute_the_same(tiny, tmp_path):
    """By the graph that torch.compile traces; making machine code of it takes a compiler and minutes."""
    ends = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        model = model_of(tiny(compile=compiled, vision_layers=1, dit_layers=1))
        devices.compile_parts(model, backend="aot_eager") if compiled else None
        ends[compiled] = [run_stage(model, name, tmp_path / str(compiled)) for name in ("T1", "U2")]
    for a, b in zip(*([line for stage in ends[kind] for line in stage] for kind in (False, True))):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


@pytest.mark.parametrize("kinds", [("fp32", "fp16"), ("fp16", "fp32"), ("fp16", "fp16")], ids=" to ".join)
def test_a_stage_goes_on_in_another_precision(kinds, tiny, tmp_path, monkeypatch, capsys):
    """From its last step, with the scale of fp16's loss where there is one."""
    class Left(Exception):
        pass

    def until(run, stage, step, saved):
        save(run, stage, step, saved)
        if step == 4:
            raise Left

    save, begin, scales = train.save_progress, train.begin, []
    configs = [tiny(precision=kind, steps=(6,) * 9, save_minutes=0.0) for kind in kinds]
    with monkeypatch.context() as patch, pytest.raises(Left):
        patch.setattr(train, "save_progress", until)
        patch.setattr(train, "begin", lambda module: scales.append(begin(module)) or scales[-1])
        train.train(configs[0], tmp_path, ["P1"], "cpu")
    before = scales.pop().scaler.state_dict()
    monkeypatch.setattr(train, "begin", lambda module: scales.append(begin(module)) or scales[-1])
    restored, load = [], train.load_newest

    def watched(now, run):
        result = load(now, run)
        restored.append((result[0], now.scaler.state_dict()))
        return result

    monkeypatch.setattr(train, "load_newest", watched)
    train.train(configs[1], tmp_path, ["P1"], "cpu")
    assert restored[0][0] == 4 and "going on from the one before" not in capsys.readouterr().out
    fresh = torch.amp.GradScaler("cpu").state_dict()
    assert restored[0][1] == {"fp32": {}, "fp16": before or fresh}[kinds[1]]
    assert (tmp_path / "P1.pt").exists() and all(value.isfinite().all() for value in scales[0].weights.values())


def test_in_use_half_precision_draws_nearly_the_same_picture_and_decodes_in_float32(whole_run, monkeypatch):
    model, images = load_run(whole_run), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    kinds = []
    monkeypatch.setattr(torch.nn.Conv2d, "forward", watched(torch.nn.Conv2d.forward, kinds))
    full = [model.generate(["a red circle"] * 2, references)[0] for references in (None, images)]
    assert set(kinds) == {torch.float32}
    model.half = torch.bfloat16
    kinds.clear()
    half = [model.generate(["a red circle"] * 2, references)[0] for references in (None, images)]
    assert torch.bfloat16 in kinds and kinds[-1] == torch.float32
    for a, b in zip(full, half):
        assert b.dtype == torch.float32 and 0 < (a - b).abs().mean() < 0.05
    assert len(model.answer(images, ["how many objects are there ?"] * 2, max_new=3)) == 2


def watched(forward, kinds):
    def call(self, x):
        y = forward(self, x)
        kinds.append(y.dtype)
        return y
    return call


@pytest.mark.parametrize("precision, half", [("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_run_is_used_on_a_gpu_in_its_own_precision_and_elsewhere_in_float32(precision, half, whole_run, tmp_path,
                                                                              monkeypatch):
    run = shutil.copytree(whole_run, tmp_path / "run")
    content = json.loads((run / "config.json").read_text()) | {"precision": precision}
    (run / "config.json").write_text(json.dumps(content))
    assert load_run(run).half is None
    set_up = []
    monkeypatch.setattr(run_folder, "set_up_torch", set_up.append)
    monkeypatch.setattr(torch, "device", lambda name: torch_device("cpu" if str(name) == "cuda" else name))
    assert load_run(run, "cuda").half is half and set_up == ["cuda"]


torch_device = torch.device
