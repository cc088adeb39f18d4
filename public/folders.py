"""The public models' folders: their sizes become a run's, their weights its P1, P2 and P3.

    python train.py --preset full --internvl DIR --dc-ae DIR --sana DIR --data PATH --out RUN

Whatever in a folder our code does not compute is refused by name, in one line; so is a weight that is missing, left
over, of another shape or not finite. Files are read by the package `safetensors`, an optional extra that is imported
here alone, one tensor after the other; nothing in them is executed.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from plumbing.checkpoints import save
from plumbing.command import UserError
from plumbing.run_folder import load_config, text_tokenizer, write_config
from plumbing.training import trained_parameters
from public.names import SPELLINGS, names_of
from public.qwen import read_json
from spar import SPAR, Config

IMPORTED = {"P1": "internvl", "P2": "dc_ae", "P3": "sana"}  # stage -> the public model that may stand in its place
STEM = {"internvl": "model", "dc_ae": "diffusion_pytorch_model", "sana": "diffusion_pytorch_model"}
TOKENIZERS = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
DTYPES = ("F32", "F16", "BF16")
REBUILT = ("rotary_emb.inv_freq",)  # ends of names that old files hold and everyone computes anew


def folder_of(config: Config, model: str) -> Path | None:
    """Where a public model's weights are: SANA's pipelines keep them in `transformer`."""
    folder = getattr(config, model)
    if model == "sana" and folder and (Path(folder) / "transformer" / "config.json").exists():
        return Path(folder) / "transformer"
    return Path(folder) if folder else None


def imported_stages(config: Config) -> dict[str, str]:
    """Stage -> the public model that stands in its place."""
    return {stage: model for stage, model in IMPORTED.items() if getattr(config, model)}


def stand_ins(config: Config) -> str:
    """What of a run of SPAR's own size is not as in the paper for want of a folder or file; empty: nothing."""
    missing = {stage: model for stage, model in IMPORTED.items() if not getattr(config, model)}
    flags = " ".join(f"--{model.replace('_', '-')} DIR" for model in missing.values())
    lines = [f"{', '.join(missing)} are trained; to read them instead: {flags}"] if missing else []
    lines += [] if config.vgg else ["L_lpips reads our own pixel encoder; to read VGG16: --vgg FILE --lpips FILE"]
    lines += [] if config.convnext else ["L_lpips has no classifier's part; to add it: --convnext FILE"]
    return "\n".join([*lines, "(public/README.md)"]) if lines and config.preset.startswith("full") else ""


# ---------------------------------------------------------------- config.json -> sizes


class Described:
    """A folder's config.json, or a part of it: `take` reads a value, `want` also refuses all others."""

    def __init__(self, path: Path, content: dict, where: str = ""):
        self.path, self.content, self.where = path, content, where

    def part(self, *names: str) -> "Described":
        for name in names:
            if isinstance(self.content.get(name), dict):
                return Described(self.path, self.content[name], f"{self.where}{name}.")
        raise UserError(f"{self.path} has no {names[0]}: is it the folder of another model?")

    def take(self, key: str, usual):
        """A size; `usual`: what a file without the key means, whose kind is the value's. A list becomes a tuple."""
        value = self.content.get(key, usual)
        if isinstance(value, list) and isinstance(usual, int) and len(value) == 2 and value[0] == value[1]:
            value = value[0]  # a square's side
        largest, like = 1000 if "layers" in key else 1e6, usual[0] if isinstance(usual, tuple) else usual
        parts = value if isinstance(usual, tuple) and isinstance(value, (list, tuple)) else [value]
        sound = isinstance(usual, tuple) == isinstance(value, (list, tuple)) and 0 < len(parts) <= 10
        if not sound or not all(type(part) in (int, type(like)) and 0 < part <= largest for part in parts):
            raise UserError(f"{self.path}: {self.where}{key} is {str(value)[:50]!r}, which is no size")
        return tuple(value) if isinstance(usual, tuple) else value

    def want(self, wanted: dict[str, tuple]) -> None:
        """key -> what it must be, then what a file without it, or with null, means."""
        for key, (right, *usual) in wanted.items():
            value = self.content.get(key)
            value = (usual or [right])[0] if value is None else value
            if value != right:
                raise UserError(f"{self.path}: {self.where}{key} is {value!r}; only {right!r} is computed here")


def described(folder: Path) -> Described:
    return Described(folder / "config.json", read_json(folder / "config.json"))


def divides(path: Path, whole: int, parts: int, what: str) -> None:
    if whole % parts:
        raise UserError(f"{path}: {what} {whole} is no multiple of {parts}")


def internvl_sizes(folder: Path) -> dict:
    """As published (vision_config, llm_config) and in transformers' form (vision_config, text_config)."""
    whole = described(folder)
    vision, language = whole.part("vision_config"), whole.part("llm_config", "text_config")
    whole.want({"downsample_ratio": (0.5,), "ps_version": ("v2",), "select_layer": (-1,), "vision_feature_layer": (-1,),
                "vision_feature_select_strategy": ("default",), "projector_hidden_act": ("gelu",)})
    width, mlp = vision.take("hidden_size", 1024), vision.take("intermediate_size", 4096)
    vision.want({"qk_normalization": (False,), "use_qk_norm": (False,), "norm_type": ("layer_norm",),
                 "layer_norm_eps": (1e-6,), "hidden_act": ("gelu",), "num_channels": (3,), "use_mask_token": (False,),
                 "use_absolute_position_embeddings": (True,), "use_mean_pooling": (True,), "intermediate_size": (
                     4 * width, mlp)})
    if "qkv_bias" not in vision.content:
        vision.want({"attention_bias": (True, False)})
    else:
        vision.want({"qkv_bias": (True,)})
    d, heads = language.take("hidden_size", 4096), language.take("num_attention_heads", 32)
    language.want({"model_type": ("qwen2",), "architectures": (["Qwen2ForCausalLM"],), "hidden_act": ("silu",),
                   "rms_norm_eps": (1e-6,), "use_sliding_window": (False,), "head_dim": (d // heads,)})
    rope = language.part("rope_parameters") if language.content.get("rope_parameters") else language
    rope.want({"rope_theta": (1e6, 1e4)})
    scaling = language.part("rope_scaling") if language.content.get("rope_scaling") else rope
    kind = scaling.content.get("rope_type", scaling.content.get("type", "default"))
    if kind not in ("default", "dynamic"):  # dynamic: beyond 32768 tokens
        raise UserError(f"{whole.path}: rope scaling {str(kind)[:50]!r} is not computed here")
    tied = not {f"{names['head']}.weight" for names in SPELLINGS.values()} & set(Weights(folder, "internvl").keys)
    if tied and language.content.get("tie_word_embeddings", whole.content.get("tie_word_embeddings")) is False:
        raise UserError(f"{folder} lacks lm_head.weight, though its config.json ties no weights: fetch it again")
    side, patch, vision_heads, kv_heads = (part.take(key, usual) for part, key, usual in (
        (vision, "image_size", 448), (vision, "patch_size", 14), (vision, "num_attention_heads", 16),
        (language, "num_key_value_heads", 32)))
    for multiple, of, what in ((width, vision_heads, "vision width"), (side, 2 * patch, "image_size"),
                               (d, 2 * heads, "hidden_size"), (heads, kv_heads, "heads")):
        divides(whole.path, multiple, of, what)
    return {"side": side, "patch": patch, "vision_width": width, "vision_layers": vision.take("num_hidden_layers", 24),
            "vision_heads": vision_heads, "imagenet": True, "d": d, "llm_heads": heads, "llm_kv_heads": kv_heads,
            "llm_layers": language.take("num_hidden_layers", 32), "vocabulary": language.take("vocab_size", 151936),
            "llm_mlp": language.take("intermediate_size", 22016), "tied": tied}


def dc_ae_sizes(folder: Path) -> dict:
    whole = described(folder)
    whole.want({"_class_name": ("AutoencoderDC", None)})
    widths = whole.take("encoder_block_out_channels", (128, 256, 512, 512, 1024, 1024))
    kinds = whole.content.get("encoder_block_types", "ResBlock")
    vit_stages = kinds.count("EfficientViTBlock") if isinstance(kinds, list) else 0
    scales = [[]] * (len(widths) - vit_stages) + [[5]] * vit_stages
    usual = ["EfficientViTBlock" if scale else "ResBlock" for scale in scales] if vit_stages else kinds
    whole.want({"in_channels": (3,), "attention_head_dim": (32,), "decoder_block_out_channels": (list(widths),),
                "decoder_norm_types": ("rms_norm",), "decoder_act_fns": ("silu",), "decoder_conv_act_fn": ("relu",),
                "encoder_out_shortcut": (True,), "decoder_in_shortcut": (True,),
                "encoder_block_types": (usual, "ResBlock"), "decoder_block_types": (usual, "ResBlock"),
                "encoder_qkv_multiscales": (scales,), "decoder_qkv_multiscales": (scales,)})
    ways = tuple(whole.content.get(key, usual) for key, usual in (("downsample_block_type", "pixel_unshuffle"),
                                                                  ("upsample_block_type", "pixel_shuffle")))
    known = {("pixel_unshuffle", "pixel_shuffle"): "shuffle", ("Conv", "interpolate"): "conv",
             ("conv", "interpolate"): "conv"}
    if ways not in known:
        raise UserError(f"{whole.path}: only {' or '.join('/'.join(way) for way in known)} are computed here, "
                        f"not {'/'.join(map(str, ways))[:60]}")
    depths = [whole.take(f"{half}_layers_per_block", (3,) * len(widths)) for half in ("encoder", "decoder")]
    p, _ = whole.take("latent_channels", 32), latent_scale(folder)
    for depth in depths:
        if len(depth) != len(widths):
            raise UserError(f"{whole.path}: {len(depth)} layers_per_block for {len(widths)} block_out_channels")
    divides(whole.path, widths[-1], p, "the last width")
    return {"p": p, "ae_widths": widths, "ae_depths": depths[0], "ae_decoder_depths": depths[1],
            "ae_vit_stages": vit_stages, "ae_resample": known[ways]}


def sana_sizes(folder: Path) -> dict:
    whole = described(folder)
    whole.want({"_class_name": ("SanaTransformer2DModel", None)})
    p, heads, cross_heads = (whole.take(key, usual) for key, usual in (
        ("in_channels", 32), ("num_attention_heads", 70), ("num_cross_attention_heads", 20)))
    c = heads * whole.take("attention_head_dim", 32)
    whole.want({"out_channels": (p,), "patch_size": (1,), "attention_bias": (False,), "qk_norm": (None,),
                "norm_elementwise_affine": (False,), "norm_eps": (1e-6,), "interpolation_scale": (None,),
                "guidance_embeds": (False,), "timestep_scale": (1.0,), "cross_attention_dim": (c, 2240),
                "cross_attention_head_dim": (c // cross_heads, 112)})
    divides(whole.path, c, cross_heads, "width")
    return {"p": p, "c": c, "dit_heads": heads, "dit_cross_heads": cross_heads, "positions": False,
            "dit_layers": whole.take("num_layers", 20), "condition_width": whole.take("caption_channels", 2304),
            "dit_mlp_ratio": float(whole.take("mlp_ratio", 2.5))}


SIZES = {"internvl": internvl_sizes, "dc_ae": dc_ae_sizes, "sana": sana_sizes}


def sizes_of(given: dict) -> dict:
    """Fields of Config as the folders among `given` flags have them. Raises UserError, ValueError where two folders, or
    a folder and a flag, disagree."""
    sizes, source = {}, {key: "--" + key.replace("_", "-") for key in given}
    for model, read in SIZES.items():
        if not given.get(model):
            continue
        folder = folder_of(Config(**{model: given[model]}), model)
        for key, value in read(folder).items():
            known = sizes.get(key, given.get(key, value))
            if known != value:
                raise UserError(f"{folder / 'config.json'} makes {key} {value}, {source[key]} makes it {known}: "
                                f"they do not belong together")
            sizes[key], source[key] = value, "--" + model.replace("_", "-")
    return sizes


# ---------------------------------------------------------------- weights


class Weights:
    """The tensors of a folder, in one file or in shards with an index. Raises UserError for what is not whole."""

    def __init__(self, folder: Path, model: str):
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError:
            raise UserError("public folders need an extra: pip install safetensors") from None
        self.folder, self.model, self.index = folder, model, folder / f"{STEM[model]}.safetensors.index.json"
        single = folder / f"{STEM[model]}.safetensors"
        if single.exists():
            names, listed = [single.name], None
        elif self.index.exists():
            listed = read_json(self.index).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
                raise UserError(f"{self.index} maps no weights to files: fetch it again")
            names = sorted(set(listed.values()))
            if outside := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")
                           or not name.isprintable()]:
                raise UserError(f"{self.index} names {outside[0]!r}, which is no file of its folder")
        else:
            raise UserError(f"{folder} holds no {single.name} and no index of shards: fetch the folder again")
        self.files, self.keys = {}, {}
        for name in names:
            try:
                if not (folder / name).is_file():
                    raise OSError("no such plain file")
                self.files[name] = safe_open(str(folder / name), framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{folder / name} is not whole ({error}): fetch it again") from None
            for key in self.files[name].keys():
                if listed is not None and listed.get(key) != name:
                    raise UserError(f"{folder / name} holds {key!r}, which the index does not name: fetch it again")
                self.keys[key] = name
        if lost := sorted(set(listed or ()) - set(self.keys)):
            raise UserError(f"{folder / listed[lost[0]]} lacks {lost[0]}, which the index names: fetch it again")

    def shape(self, key: str) -> tuple[int, ...]:
        part = self.files[self.keys[key]].get_slice(key)
        if part.get_dtype() not in DTYPES:
            raise UserError(f"{self.folder / self.keys[key]}: {key} is {part.get_dtype()}, not one of "
                            f"{', '.join(DTYPES)}: fetch the weights that are not quantised")
        return tuple(part.get_shape())

    def read(self, key: str) -> Tensor:
        return self.files[self.keys[key]].get_tensor(key)

    def checksums(self) -> list[str]:
        """Of each file "model/name" and the beginning of its SHA-256; of the small ones those that are read."""
        lines, small = [], ("config.json", *((*TOKENIZERS, self.index.name) if self.model == "internvl" else ()))
        names = [*self.files, *(name for name in small if (self.folder / name).is_file())]
        for name in tqdm(sorted(names), desc=f"checksums of {self.folder.name}", leave=False):
            with (self.folder / name).open("rb") as file:
                lines.append(f"{self.model}/{name} {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}")
        return lines


def trailing(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the 1s at its end: a 1×1 convolution is a matrix."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def matched(weights: Weights, module: nn.Module, config: Config, model: str) -> dict[str, list[str]]:
    """Our parameter -> its parts in the folder. Every one of ours is there, every one of theirs is used, shapes are
    equal, or it raises UserError."""
    spellings = [spelling for spelling, begin in SPELLINGS.items() if model != "internvl" or any(
        key.startswith(begin["vision"] + ".") for key in weights.keys)]
    if not spellings:
        raise UserError(f"{weights.folder}: no weight begins with "
                        + ", ".join(begin["vision"] for begin in SPELLINGS.values()) + ": it is no InternVL3")
    names, parts = names_of(model, config, spellings[-1] if model == "internvl" else "transformers"), {}
    for name, parameter in module.named_parameters():
        if not (keys := names(name)):
            continue
        if missing := [key for key in keys if key not in weights.keys]:
            raise UserError(f"{weights.folder} lacks {missing[0]}, which {name} is made of")
        shapes = [weights.shape(key) or (1,) for key in keys]
        joined = sum(shape[0] for shape in shapes), *shapes[0][1:]
        if trailing(joined) != trailing(tuple(parameter.shape)) or len({shape[1:] for shape in shapes}) > 1:
            raise UserError(f"{weights.folder / weights.keys[keys[0]]}: {keys[0]} has the shape "
                            f"{' + '.join(map(str, shapes))}, where {name} has {tuple(parameter.shape)}")
        parts[name] = keys
    used = {key for keys in parts.values() for key in keys}
    if left := [key for key in weights.keys if key not in used and not key.endswith(REBUILT)]:
        raise UserError(f"{weights.folder / weights.keys[left[0]]}: nothing here computes with {left[0]}"
                        + (f" and {len(left) - 1} more" if len(left) > 1 else ""))
    return parts


def check_folders(config: Config, run: Path | None = None) -> list[str]:
    """Everything but the numbers: headers are read, and, where `run` has begun with such folders, their files compared
    with those. -> a line for each folder. Raises UserError."""
    lines, models = [], list(imported_stages(config).values())
    if models:
        with torch.device("meta"):
            module = SPAR(config, text_tokenizer(config))
    known = load_config(run).public.split(", ") if models and run and (run / "config.json").exists() else []
    for model in models:
        weights = Weights(folder_of(config, model), model)
        matched(weights, module, config, model)
        if begun := [line for line in known if line.startswith(f"{model}/")]:
            if changed := set(begun) ^ set(weights.checksums()):
                raise UserError(f"{weights.folder} is no longer what {run} began with ({min(changed)}): "
                                "choose another --out")
        numbers = sum(torch.Size(weights.shape(key)).numel() for key in weights.keys)
        lines.append(f"{weights.folder}: {len(weights.keys)} weights, {numbers / 1e6:.1f} M numbers, all fit")
    return lines


def read_public(module: SPAR, stage, run: Path) -> str:
    """The numbers of the folder that stands in for a train.Stage into the model's parameters, and all that the stage
    would have trained into <stage>.pt; config.json names the folder's files with their checksums from then on. -> what
    was read, in a line. Raises UserError."""
    config, model = module.config, IMPORTED[stage.name]
    weights, parameters = Weights(folder_of(config, model), model), dict(module.named_parameters())
    files, known = weights.checksums(), config.public.split(", ") if config.public else []
    with torch.no_grad():
        for name, keys in tqdm(matched(weights, module, config, model).items(), desc=model, leave=False):
            value = torch.cat([weights.read(key) for key in keys]).float()
            if not value.isfinite().all():
                raise UserError(f"{weights.folder / weights.keys[keys[0]]}: {keys[0]} is not finite: fetch it again")
            parameters[name].copy_(value.view_as(parameters[name]))
    ema = {name: parameter.detach().cpu().clone() for pairs in trained_parameters(module, stage).values()
           for name, parameter in pairs}
    config.public = ", ".join(dict.fromkeys([*known, *files]))
    write_config(config, run)
    save(run / f"{stage.name}.pt", {"ema": ema, "latent_scale": module.latent_scale.cpu(), "seconds": 0.0})
    return files[0].split()[0] + (f" and {len(files) - 1} more files" if len(files) > 1 else "")


def latent_scale(folder: Path) -> float:
    """At which the latents of a folder of DC-AE are what SANA draws."""
    return float(described(folder).take("scaling_factor", 1.0))
