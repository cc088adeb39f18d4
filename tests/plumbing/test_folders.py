"""Public folders: read, used, written back, and refused where they are not what our code computes.

transformers and diffusers make the folders (tests/tools/public_folders.py), and their models say what is right.
"""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import train
from benchmarks import cost
from disk.layouts import scan
from plumbing.checkpoints import load_stage
from plumbing.command import UserError
from plumbing.flags import parse
from plumbing.run_folder import load_config, load_run
from public.export import export
from public.folders import Weights, check_folders, folder_of, matched, sizes_of
from public.names import SPELLINGS, names_of
from spar import NAMES, PRESETS, make_config
from tests.claims.test_sizes import DC_AE, INTERN_VIT, QWEN, QWEN_BOTH, SANA, SANA_BOTH, on_meta
from tests.conftest import TINY
from tests.tools import public_folders
from tests.tools.commands import call
from tests.tools.models import model_of, state
from tests.tools.planted import everything, folder_of_captions

for package in ("transformers", "diffusers", "safetensors", "tokenizers"):
    pytest.importorskip(package, reason="the public models and their readers are an optional extra")

pytestmark = pytest.mark.usefixtures("without_pictures")
REST = dict(pixel_layers=1, pixel_heads=2, stream_blocks=1, k=2, queries=16, connector_layers=1, align_block=1,
            align_hidden=16, gan_width=8, gan_start=0.0, steps=(2,) * 9, batch=(4,) * 9)
IMAGENET = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def flags(root: Path) -> dict[str, str]:
    return {"internvl": str(root / "internvl"), "dc_ae": str(root / "dc-ae"), "sana": str(root / "sana")}


def config_of(root: Path, **changes):
    given = flags(root) | changes
    return make_config(**REST | given | sizes_of({key: given[key] for key in ("internvl", "dc_ae", "sana")}))


def imported(root: Path, run: Path, upto: str = "P3", **changes):
    """The run's model after the stages up to this one."""
    train.train(config_of(root, **changes), run, list(NAMES[:NAMES.index(upto) + 1]), "cpu")
    return load_run(run)


FORMS = [(0, "as published", "F32", 0, False), (1, "as published", "BF16", 3, False),
         (0, "transformers before 4.52", "BF16", 2, True), (1, "transformers", "F16", 0, False),
         (1, "transformers before 4.52", "F32", 4, False), (0, "transformers", "F32", 3, True)]


@pytest.fixture(scope="module", params=FORMS, ids=str)
def form(request, tmp_path_factory):
    """(folder of folders, theirs by the names of Config's fields, the run's model after P3, the run)"""
    root = tmp_path_factory.mktemp("public")
    theirs = public_folders.make(root, *request.param)
    return root, theirs, imported(root, root / "run"), root / "run"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The first set as published; who changes it copies it first."""
    root = tmp_path_factory.mktemp("plain")
    return root, public_folders.make(root)


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    """A run of all nine stages from the first set, on data on disk, and its folder."""
    run, data = tmp_path_factory.mktemp("trained") / "run", everything(tmp_path_factory.mktemp("data") / "data")
    return imported(folders[0], run, "U3", data=str(data)), run


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


# ---------------------------------------------------------------- what is read is what they compute


@torch.no_grad()
def test_features_and_hidden_states_are_internvls(form):
    _, theirs, model, _ = form
    side, intern = model.config.side, theirs["internvl"].model
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = ((images + 1) / 2 - IMAGENET[0]) / IMAGENET[1]
    f_v = model.tokenizer.features(images)
    assert_close(f_v, intern.get_image_features(pixels).pooler_output)
    ids, mask = model.words.prompts(["what is in the picture?", "a"], model.config.grid**2)
    hidden, _ = model.mllm.llm(model.mllm.embed(ids, f_v), mask)
    reference = theirs["internvl"](input_ids=ids, pixel_values=pixels, attention_mask=mask.long(),
                                   position_ids=(mask.cumsum(1) - 1).clamp(min=0), output_hidden_states=True)
    for ours, right in zip(hidden, reference.hidden_states, strict=True):
        assert_close(ours[mask], right[mask])
    assert_close(model.mllm.llm.logits(hidden[-1])[mask], reference.logits[mask])


@torch.no_grad()
def test_latents_pictures_and_velocities_are_dc_aes_and_sanas(form):
    root, theirs, model, _ = form
    generator, side = torch.Generator().manual_seed(0), 2 * model.pixel_encoder.factor
    images = torch.rand(2, 3, side, side, generator=generator) * 2 - 1
    z = model.pixel_encoder(images)
    right = theirs["dc_ae"].encode(images).latent
    assert_close(z, right.flatten(2).mT)
    assert_close(model.tokenizer.decoder(z), theirs["dc_ae"].decode(right).sample)
    condition, sigma = torch.randn(2, 5, model.config.condition_width, generator=generator), torch.tensor([0.2, 0.9])
    velocity, _ = model.dit(right * 0.41407, sigma, condition, None)
    assert_close(velocity, theirs["sana"](right * 0.41407, condition, 1000 * sigma).sample)
    assert model.latent_scale == pytest.approx(0.41407)


def test_the_connector_starts_from_internvls_last_layers(form):
    model = form[2]
    assert all(a.equal(b) for a, b in zip(model.mllm.connector.layers[-1].parameters(),
                                          model.mllm.llm.layers[-1].parameters()))


def test_u1_shows_a_frozen_sana_its_own_latents_and_u2_measures_those_it_learns(trained):
    model, run = trained
    scales = [torch.load(run / f"{name}.pt", weights_only=True)["latent_scale"].item() for name in NAMES[2:]]
    assert scales[:5] == pytest.approx([0.41407] * 5) and scales[5] == scales[6] != pytest.approx(0.41407)
    before = copy.deepcopy(model)
    for name in NAMES[:6]:
        load_stage(before, run, name)
    shown, stage = {}, train.stage_named("U1")
    config, words = before.config, before.words
    batch = train.Batches(config, "U1", stage.sample, stage.shares(config), words=words,
                          data_folder=scan(Path(config.data)))[0]
    batch.pop("bad")
    before.dit.register_forward_pre_hook(lambda _, given: shown.update(x_t=given[0]))
    stage.compute(before, batch, {"L_fm": 1.0}, train.Extras())
    z, sigma = before.as_grid(before.pixel_latent(batch["images"])) * 0.41407, batch["noise"].sigma
    z = z.repeat(len(sigma) // len(z), 1, 1, 1)
    assert_close(shown["x_t"], train_noise(z, batch["noise"].epsilon, sigma))


def train_noise(z, epsilon, sigma):
    sigma = sigma.view(-1, 1, 1, 1)
    return (1 - sigma) * z + sigma * epsilon


# ---------------------------------------------------------------- the way through, and back


def test_a_run_goes_from_folders_to_use_without_them(trained, tmp_path):
    model, run = trained
    assert model.finished_stages == list(NAMES)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == set(NAMES[3:]), "P1 to P3 take no step"
    moved = shutil.copytree(run, tmp_path / "elsewhere")
    content = json.loads((moved / "config.json").read_text())
    content |= {key: f"/nowhere/{key}" for key in ("internvl", "dc_ae", "sana")}
    (moved / "config.json").write_text(json.dumps(content))
    again = load_run(moved)
    side = model.config.side
    images = torch.rand(2, 3, side, side) * 2 - 1
    assert again.answer(images, ["what?"] * 2, max_new=3) == model.answer(images, ["what?"] * 2, max_new=3)
    assert again.generate(["a hand"] * 2, images)[0].equal(model.generate(["a hand"] * 2, images)[0])
    done = call("evaluate.py", moved, "--count", "2")
    assert done.returncode == 0, done.stderr
    results = json.loads((moved / "results.json").read_text())
    assert {"reconstruction", "understanding", "retrieval", "generation"} <= set(results)


def test_a_second_start_goes_on_and_one_with_other_folders_is_refused(folders, tmp_path, capsys):
    root, run = shutil.copytree(folders[0], tmp_path / "public"), tmp_path / "run"
    imported(root, run, "P2")
    assert "dc_ae/diffusion_pytorch_model.safetensors" in load_config(run).public
    times = {name: (run / f"{name}.pt").stat().st_mtime_ns for name in ("P1", "P2")}
    imported(root, run, "P3")
    assert times == {name: (run / f"{name}.pt").stat().st_mtime_ns for name in ("P1", "P2")}
    other = shutil.copytree(root, tmp_path / "other")
    with pytest.raises(UserError, match="was begun with internvl = "):
        imported(other, run, "P3")
    (run / "P3.pt").unlink()
    path = root / "sana" / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is no longer what .* began with .sana/diffusion_pytorch_model"):
        imported(root, run, "P3")
    content[-1] ^= 1
    path.write_bytes(content)
    imported(root, run, "P3")
    changed_json(root / "dc-ae" / "config.json", "scaling_factor", value=0.5)
    with pytest.raises(UserError, match="is no longer what .* began with .dc_ae/config.json"):
        imported(root, run, "P3")


@pytest.mark.parametrize("model, flag", [("internvl", "internvl"), ("dc_ae", "dc-ae"), ("sana", "sana")])
def test_export_gives_back_untouched_weights_byte_for_byte(form, model, flag, tmp_path):
    root, _, spar, run = form
    source, out = folder_of(spar.config, model), tmp_path / "out"
    export(spar, model, run, out)
    for path in source.glob("*.safetensors"):
        before, after = path.read_bytes(), (out / path.name).read_bytes()
        sizes = [int.from_bytes(content[:8], "little") for content in (before, after)]
        headers = [json.loads(content[8:8 + size]) for content, size in zip((before, after), sizes)]
        for key, entry in headers[0].items():
            if key != "__metadata__":
                begins = [header[key]["data_offsets"] for header in headers]
                parts = [content[8 + size:][slice(*at)] for content, size, at in zip((before, after), sizes, begins)]
                assert headers[1][key]["dtype"] == entry["dtype"] and parts[0] == parts[1], key
    others = {path.name for path in source.iterdir() if path.is_file()}
    assert others <= {path.name for path in out.iterdir()}


def test_what_is_exported_is_loaded_by_transformers_and_diffusers_and_is_ours(trained, folders, tmp_path):
    import diffusers
    import transformers
    model, run = trained
    shutil.copytree(run, tmp_path / "run")
    for flag in ("internvl", "dc-ae", "sana"):
        done = call("sample.py", "export", "--run", tmp_path / "run", "--out", tmp_path / flag, "--as", flag)
        assert done.returncode == 0, done.stderr
    images = torch.rand(2, 3, model.config.side, model.config.side) * 2 - 1
    with torch.no_grad():
        z = model.as_grid(model.tokenizer.latents(model.tokenizer.features(images)).fused)
        autoencoder = diffusers.AutoencoderDC.from_pretrained(tmp_path / "dc-ae")
        assert_close(model.tokenizer.decoder(z.flatten(2).mT), autoencoder.decode(z).sample)
        assert autoencoder.config.scaling_factor == pytest.approx(model.latent_scale.item())
        dit = diffusers.SanaTransformer2DModel.from_pretrained(tmp_path / "sana")
        condition, sigma = torch.randn(2, 5, model.config.condition_width), torch.tensor([0.2, 0.9])
        assert_close(model.dit(z, sigma, condition, None)[0], dit(z, condition, 1000 * sigma).sample)
    written, began = (Weights(path, "internvl") for path in (tmp_path / "internvl", folders[0] / "internvl"))
    changed = {key for key in written.keys if not written.read(key).equal(began.read(key))}
    assert changed and all(key.startswith(("vision_model.", "mlp1.")) for key in changed)
    for name, keys in matched(written, model, model.config, "internvl").items():
        value = torch.cat([written.read(key) for key in keys])
        assert value.reshape(-1).equal(dict(model.named_parameters())[name].reshape(-1)), name
    assert "encoder" in (tmp_path / "dc-ae" / "README.md").read_text()
    assert transformers.AutoConfig.for_model("qwen2")  # the published form needs its own code: transformers' is below


def test_transformers_loads_what_is_exported_in_its_own_form(tmp_path):
    import transformers
    public_folders.make(tmp_path, 1, "transformers")
    model = imported(tmp_path, tmp_path / "run")
    export(model, "internvl", tmp_path / "run", tmp_path / "out")
    theirs = transformers.InternVLForConditionalGeneration.from_pretrained(tmp_path / "out")
    images = torch.rand(2, 3, model.config.side, model.config.side) * 2 - 1
    pixels = ((images + 1) / 2 - IMAGENET[0]) / IMAGENET[1]
    with torch.no_grad():
        assert_close(model.tokenizer.features(images), theirs.model.get_image_features(pixels).pooler_output)


def test_export_needs_a_run_that_began_with_such_a_folder(whole_run, folders, trained, tmp_path):
    done = call("sample.py", "export", "--run", whole_run, "--out", tmp_path / "x", "--as", "sana")
    assert done.returncode == 2 and "began without --sana" in done.stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(UserError, match="is there already"):
        export(trained[0], "sana", trained[1], tmp_path / "full")


# ---------------------------------------------------------------- any subset


@pytest.mark.parametrize("given", [("internvl",), ("dc_ae",), ("sana",), ("dc_ae", "sana")], ids=str)
def test_any_subset_of_the_folders_will_do(given, folders, tmp_path, capsys):
    chosen = {key: value for key, value in flags(folders[0]).items() if key in given}
    small = dict(side=16, patch=2, vision_width=16, vision_layers=2, vision_heads=2, d=32, llm_layers=4, llm_heads=2,
                 llm_kv_heads=1, llm_mlp=48, p=8, ae_widths=(8, 16, 32), ae_depths=(0, 1, 1), c=32, dit_layers=2,
                 ae_decoder_depths=(0, 1, 1), condition_width=24, dit_heads=1, dit_cross_heads=2, positions=False)
    config = make_config(**REST | small | chosen | sizes_of(chosen))
    train.train(config, tmp_path / "run", list(NAMES), "cpu")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    stood_in = {"internvl": "P1", "dc_ae": "P2", "sana": "P3"}
    assert {line["stage"] for line in lines} == set(NAMES) - {stood_in[key] for key in given}
    assert load_run(tmp_path / "run").finished_stages == list(NAMES)


# ---------------------------------------------------------------- refused, in one line


def changed_json(path: Path, *keys, value) -> None:
    content = json.loads(path.read_text())
    part = content
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("folder, keys, value, message", [
    ("internvl", ("vision_config", "qk_normalization"), True, "qk_normalization is True"),
    ("internvl", ("vision_config", "norm_type"), "rms_norm", "norm_type is 'rms_norm'"),
    ("internvl", ("select_layer",), -2, "select_layer is -2"),
    ("internvl", ("ps_version",), "v1", "ps_version is 'v1'"),
    ("internvl", ("downsample_ratio",), 1.0, "downsample_ratio is 1.0"),
    ("internvl", ("llm_config", "architectures"), ["LlamaForCausalLM"], "LlamaForCausalLM"),
    ("internvl", ("llm_config", "rope_theta"), 10000.0, "rope_theta is 10000.0"),
    ("internvl", ("llm_config", "use_sliding_window"), True, "use_sliding_window is True"),
    ("internvl", ("llm_config", "rope_scaling"), {"type": "yarn"}, "rope scaling 'yarn'"),
    ("internvl", ("vision_config", "intermediate_size"), 100, "intermediate_size is 100"),
    ("internvl", ("vision_config",), 3, "has no vision_config"),
    ("internvl", ("llm_config", "hidden_size"), "48", "hidden_size is '48', which is no size"),
    ("internvl", ("llm_config", "hidden_size"), 1e30, "which is no size"),
    ("internvl", ("llm_config", "num_attention_heads"), 0, "num_attention_heads is '0', which is no size"),
    ("internvl", ("llm_config", "num_attention_heads"), 5, "hidden_size 48 is no multiple of 10"),
    ("internvl", ("vision_config", "num_attention_heads"), 3, "vision width 32 is no multiple of 3"),
    ("internvl", ("vision_config", "num_attention_heads"), -1, "which is no size"),
    ("internvl", ("vision_config", "num_hidden_layers"), 10**9, "which is no size"),
    ("internvl", ("vision_config", "patch_size"), 0, "which is no size"),
    ("internvl", ("vision_config", "image_size"), 36, "image_size 36 is no multiple of 8"),
    ("internvl", ("llm_config", "vocab_size"), 4 * 10**7, "which is no size"),
    ("internvl", ("llm_config", "rope_scaling"), "x", "has no rope_scaling"),
    ("internvl", ("llm_config", "rope_parameters"), [1], "has no rope_parameters"),
    ("dc-ae", ("scaling_factor",), float("nan"), "scaling_factor is 'nan', which is no size"),
    ("dc-ae", ("scaling_factor",), 0, "which is no size"), ("dc-ae", ("scaling_factor",), 1e39, "which is no size"),
    ("dc-ae", ("encoder_layers_per_block",), [], "which is no size"),
    ("dc-ae", ("encoder_layers_per_block",), [1, 2], "2 layers_per_block for 3 block_out_channels"),
    ("dc-ae", ("latent_channels",), 0, "which is no size"),
    ("dc-ae", ("downsample_block_type",), "x", "are computed here, not x/interpolate"),
    ("dc-ae", ("_class_name",), "AutoencoderKL", "only 'AutoencoderDC' is computed here"),
    ("sana/transformer", ("_class_name",), "AutoencoderDC", "only 'SanaTransformer2DModel' is computed here"),
    ("sana/transformer", ("num_layers",), 10**7, "which is no size"),
    ("sana/transformer", ("mlp_ratio",), float("inf"), "which is no size"),
    ("sana/transformer", ("num_cross_attention_heads",), 0, "which is no size"),
    ("internvl", ("llm_config", "num_hidden_layers"), 3, "nothing here computes with language_model.model.layers.3"),
    ("internvl", ("llm_config", "num_hidden_layers"), 5, "lacks language_model.model.layers.4"),
    ("internvl", ("llm_config", "intermediate_size"), 81, "has the shape .*where mllm.llm.layers.0"),
    ("internvl", ("vision_config", "image_size"), 40, "has the shape"),
    ("dc-ae", ("encoder_qkv_multiscales",), [[], [], [3]], "encoder_qkv_multiscales is"),
    ("dc-ae", ("decoder_norm_types",), "batch_norm", "decoder_norm_types is 'batch_norm'"),
    ("dc-ae", ("upsample_block_type",), "pixel_shuffle", "are computed here, not Conv/pixel_shuffle"),
    ("dc-ae", ("latent_channels",), 16, "they do not belong together"),
    ("sana/transformer", ("qk_norm",), "rms_norm_across_heads", "qk_norm is 'rms_norm_across_heads'"),
    ("sana/transformer", ("guidance_embeds",), True, "guidance_embeds is True"),
    ("sana/transformer", ("caption_channels",), 57, "has the shape")], ids=str)
def test_what_is_not_computed_here_is_refused_by_name(folder, keys, value, message, folders, tmp_path):
    root = shutil.copytree(folders[0], tmp_path / "public")
    changed_json(root / folder / "config.json", *keys, value=value)
    with pytest.raises(UserError, match=message) as refused:
        check_folders(config_of(root))
    assert "\n" not in str(refused.value)


def with_index(root: Path, change) -> None:
    """The InternVL folder in shards, its index changed."""
    shutil.rmtree(root / "internvl")
    public_folders.save_internvl(root / "internvl", public_folders.internvl(public_folders.SETS[0]), shards=2)
    path = root / "internvl" / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))


def rewritten(root: Path, change) -> None:
    from safetensors.torch import load_file, save_file
    path = root / "internvl" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)


def not_finite(tensors: dict) -> None:
    tensors["mlp1.1.bias"][3] = float("nan")


@pytest.mark.parametrize("harm, message", [
    (lambda root: with_index(root, lambda names: names.update({key: "../x.safetensors" for key in list(names)[:1]})),
     r"names '\.\./x\.safetensors', which is no file of its folder"),
    (lambda root: with_index(root, lambda names: names.update(extra="model-00001-of-00002.safetensors")),
     "lacks extra, which the index names"),
    (lambda root: with_index(root, lambda names: names.pop("mlp1.1.bias")),
     "'mlp1.1.bias', which the index does not name"),
    (lambda root: with_index(root, lambda names: names.pop("language_model.lm_head.weight")), "the index does not na"),
    (lambda root: (root / "internvl" / "model.safetensors").unlink() or (
        root / "internvl" / "model.safetensors.index.json").write_text("[]"), "is no JSON object"),
    (lambda root: rewritten(root, lambda tensors: tensors.pop("language_model.lm_head.weight")), "lacks lm_head.wei"),
    (lambda root: rewritten(root, lambda tensors: tensors.update({"mlp1.1.bias": torch.ones(())})), "has the shape"),
    (lambda root: (root / "internvl" / "config.json").unlink() or os.mkfifo(root / "internvl" / "config.json"),
     "it is no plain file"),
    (lambda root: (root / "internvl" / "added_tokens.json").write_text("[]"), "is no JSON object"),
    (lambda root: (root / "internvl" / "added_tokens.json").write_text('{"<img>": "7"}'), "what is no number"),
    (lambda root: (root / "internvl" / "tokenizer.json").write_text("{}"), "it is no tokenizer"),
    (lambda root: (root / "internvl" / "merges.txt").write_bytes(b"\xff\xfe"), "cannot be read"),
    (lambda root: (root / "internvl" / "model.safetensors").unlink(), "holds no model.safetensors"),
    (lambda root: (root / "internvl" / "model.safetensors").write_bytes(b"\0" * 99), "is not whole"),
    (lambda root: (root / "internvl" / "config.json").write_text("{"), "config.json cannot be read"),
    (lambda root: (root / "internvl" / "config.json").unlink(), "config.json cannot be read"),
    (lambda root: (root / "internvl" / "merges.txt").unlink(), "neither tokenizer.json nor merges.txt"),
    (lambda root: (root / "internvl" / "added_tokens.json").write_text("{}"), "it has no <.endoftext.>"),
    (lambda root: rewritten(root, lambda tensors: tensors.update(more=torch.ones(2))), "nothing here computes with m"),
    (lambda root: rewritten(root, lambda tensors: tensors.pop("mlp1.1.bias")), "lacks mlp1.1.bias"),
    (lambda root: rewritten(root, lambda tensors: tensors.update({"mlp1.1.bias": torch.ones(48, dtype=torch.int8)})),
     "mlp1.1.bias is I8"),
    (lambda root: rewritten(root, not_finite), "mlp1.1.bias is not finite")], ids=range(22))
def test_a_broken_folder_is_refused_in_one_line_before_anything_of_it_is_kept(harm, message, folders, tmp_path):
    root, run = shutil.copytree(folders[0], tmp_path / "public"), tmp_path / "run"
    harm(root)
    with pytest.raises((UserError, ValueError), match=message) as refused:
        imported(root, run, "P1")
    assert "\n" not in str(refused.value) and not (run / "P1.pt").exists()


def test_what_a_refused_start_left_does_not_stay(folders, tmp_path):
    root, run = shutil.copytree(folders[0], tmp_path / "public"), tmp_path / "run"
    merges = (root / "internvl" / "merges.txt").read_text()
    (root / "internvl" / "merges.txt").write_text("#version: 0.2\n")
    weights = (root / "internvl" / "model.safetensors").read_bytes()
    rewritten(root, not_finite)
    with pytest.raises(UserError, match="is not finite"):
        imported(root, run, "P1")
    (root / "internvl" / "merges.txt").write_text(merges)
    (root / "internvl" / "model.safetensors").write_bytes(weights)
    other = root.rename(tmp_path / "other")  # the first path was mistaken, too
    model = imported(other, run, "P1")
    assert len(model.words.encode("the")) == 1, "its byte pairs are those of the mended folder"


def test_an_ablation_takes_over_what_was_read_with_words_and_checksums(folders, tmp_path):
    first = imported(folders[0], tmp_path / "first", "T1")
    config = config_of(folders[0], lambda_s=0.5)
    train.train(config, tmp_path / "second", list(NAMES[:4]), "cpu", source=tmp_path / "first")
    second = load_run(tmp_path / "second")
    assert second.finished_stages == first.finished_stages and second.words.encode("the") == first.words.encode("the")
    for name in NAMES[:4]:
        assert (tmp_path / "second" / f"{name}.pt").read_bytes() == (tmp_path / "first" / f"{name}.pt").read_bytes()
    assert load_config(tmp_path / "second").public == load_config(tmp_path / "first").public != ""
    export(second, "sana", tmp_path / "second", tmp_path / "out")


def test_another_models_folder_is_refused_before_any_stage(folders, tmp_path):
    for wrong in ({"dc_ae": str(folders[0] / "internvl")}, {"sana": str(folders[0] / "dc-ae")},
                  {"internvl": str(folders[0] / "dc-ae")}, {"sana": str(folders[0] / "internvl" / "config.json")}):
        with pytest.raises((UserError, ValueError)):
            config_of(folders[0], **wrong)


def test_a_flag_that_contradicts_a_folder_is_refused_and_the_folder_beats_the_preset(folders, monkeypatch):
    def parsed(*arguments):
        monkeypatch.setattr("sys.argv", ["train.py", "--internvl", str(folders[0] / "internvl"), *arguments])
        return parse("")[0]

    assert parsed("--preset", "full").d == parsed().d == parsed("--d", "48").d == 48
    with pytest.raises(UserError, match="makes d 48, --d makes it 64"):
        parsed("--d", "64")


def test_plan_counts_the_passes_and_the_longest_prompts_of_data_on_disk(tmp_path, capsys):
    data = folder_of_captions(tmp_path / "data")
    config = make_config(**TINY | {"data": str(data), "edits": (0.0,) * 9, "longest": 100})
    told = cost.plan(config, [train.stage_named("U1")], train.one_batch, train.step_module, tmp_path / "run")
    captions = len(scan(data).of("captions"))
    assert f"{2 * 8 / captions:.3g} passes over {captions} captions" in told and "over" not in told.splitlines()[-1]
    short, long = (cost.forecast(make_config(**TINY | {"data": where, "longest": 100}), train.stage_named("U2"),
                                 train.one_batch, train.step_module)["activations"] for where in ("", str(data)))
    assert long > 1.2 * short


def test_plan_checks_the_folders_and_writes_nothing(folders, tmp_path):
    given = [f"--{key.replace('_', '-')}={value}" for key, value in flags(folders[0]).items()]
    done = call("train.py", "--plan", *given, "--k", "2", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all fit") == 3 and "GiB free" in done.stdout and not (tmp_path / "run").exists()
    assert "P1 " not in done.stdout and "T1 " in done.stdout


# ---------------------------------------------------------------- every key and shape of the published models


@pytest.mark.parametrize("preset", ["full", "full-3b"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_key_and_shape_of_the_published_models_is_one_of_ours(preset, spelling):
    import diffusers
    import transformers
    config = make_config(preset=preset)
    model = on_meta(model_of, config)
    intern = on_meta(transformers.InternVLForConditionalGeneration, transformers.InternVLConfig(
        vision_config=INTERN_VIT, text_config=QWEN_BOTH | QWEN[preset], tie_word_embeddings=False))
    renamed = {"as published": public_folders.as_published, "transformers before 4.52": public_folders.before_452}
    theirs = {"internvl": renamed.get(spelling, dict)(intern.state_dict()),
              "dc_ae": on_meta(diffusers.AutoencoderDC, **DC_AE).state_dict(),
              "sana": on_meta(diffusers.SanaTransformer2DModel, **SANA_BOTH, **SANA[preset]).state_dict()}
    assert len(theirs["internvl"]) == {"as published": {"full": 637, "full-3b": 685}}.get(
        spelling, {"full": 733, "full-3b": 781})[preset]
    for name, weights in theirs.items():
        names, used = names_of(name, config, spelling), []
        for own, parameter in model.named_parameters():
            if keys := names(own):
                shapes = [weights[key].shape for key in keys]
                assert sum(shape.numel() for shape in shapes) == parameter.numel(), own
                assert sum(shape[0] for shape in shapes) == parameter.shape[0], own
                used += keys
        assert sorted(used) == sorted(weights), name
    assert set(PRESETS) >= {preset}


def test_state_is_what_a_stage_would_have_left(trained):
    model, run = trained
    content = torch.load(run / "P1.pt", weights_only=True)["ema"]
    assert {name.split(".")[0] for name in content} == {"tokenizer", "mllm"} and set(content) <= set(state(model))
