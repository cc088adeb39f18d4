"""Folders as the public models' are, but tiny and random: `python -m tests.tools.public_folders DIR [--set 1]`.

transformers and diffusers build and save them, so a run that starts from them shows that ours reads what is theirs. Of
two sets each has widths, heads and depths that differ from one another, so that no mistaken one goes unseen.
"""

import argparse
import copy
import json
import shutil
from pathlib import Path

import torch

SETS = [
    {"side": 32, "patch": 4, "vision": (32, 3, 2), "language": (48, 4, 6, 3, 80), "p": 8, "widths": (16, 32, 64),
     "depths": (1, 2, 1), "decoder_depths": (2, 1, 3), "vit_stages": 1, "resample": "conv", "dit": (5, 8, 2, 4, 10, 56,
                                                                                                    2.5)},
    {"side": 28, "patch": 7, "vision": (40, 2, 5), "language": (72, 5, 4, 2, 104), "p": 16, "widths": (16, 32, 64, 128),
     "depths": (2, 1, 1, 2), "decoder_depths": (1, 2, 1, 1), "vit_stages": 2, "resample": "shuffle",
     "dit": (7, 16, 3, 8, 14, 88, 2.0)}]
SIGNS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
MERGES = ["t h", "th e", "i n", "a n", "Ġ the", "r e", "Ġ a", "o n", "e r", "a s"]
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def alphabet() -> list[str]:
    """The characters that stand for the 256 bytes, in GPT-2's order."""
    from tokenizers.pre_tokenizers import ByteLevel
    return sorted(ByteLevel.alphabet())


def vocabulary() -> tuple[dict[str, int], dict[str, int]]:
    """-> (word -> id, sign -> id)"""
    words = {token: i for i, token in enumerate([*alphabet(), *("".join(pair.split()) for pair in MERGES)])}
    return words, {sign: len(words) + i for i, sign in enumerate(SIGNS)}


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_slow_tokenizer(folder: Path) -> None:
    """vocab.json, merges.txt, added_tokens.json, as in the published folder."""
    words, signs = vocabulary()
    write_json(folder / "vocab.json", words)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8")
    write_json(folder / "added_tokens.json", signs)


def random_weights(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Larger than where they start, so that no branch and no bias is lost in rounding."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
            if parameter.dim() == 1 and not name.endswith("bias"):
                parameter += 1
    return model.eval()


def internvl(sizes: dict, tied: bool = False):
    import transformers
    width, layers, heads = sizes["vision"]
    d, depth, llm_heads, kv_heads, mlp = sizes["language"]
    words, signs = vocabulary()
    vision = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
                  image_size=sizes["side"], patch_size=sizes["patch"], attention_bias=True)
    text = dict(model_type="qwen2", hidden_size=d, num_hidden_layers=depth, num_attention_heads=llm_heads,
                num_key_value_heads=kv_heads, intermediate_size=mlp, vocab_size=len(words) + len(signs) + 7,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=tied)
    config = transformers.InternVLConfig(vision_config=vision, text_config=text, tie_word_embeddings=tied,
                                         image_token_id=signs["<IMG_CONTEXT>"])
    model = transformers.InternVLForConditionalGeneration._from_config(config, attn_implementation="eager")
    return random_weights(model, 1)


def dc_ae(sizes: dict):
    import diffusers
    resnets = len(sizes["widths"]) - sizes["vit_stages"]
    half = dict(block_types=["ResBlock"] * resnets + ["EfficientViTBlock"] * sizes["vit_stages"],
                block_out_channels=sizes["widths"], qkv_multiscales=[[]] * resnets + [[5]] * sizes["vit_stages"])
    halves = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in half.items()}
    kinds = {"conv": ("Conv", "interpolate"), "shuffle": ("pixel_unshuffle", "pixel_shuffle")}[sizes["resample"]]
    return random_weights(diffusers.AutoencoderDC(
        latent_channels=sizes["p"], encoder_layers_per_block=sizes["depths"], scaling_factor=0.41407,
        decoder_layers_per_block=sizes["decoder_depths"], downsample_block_type=kinds[0], upsample_block_type=kinds[1],
        **halves), 2)


def sana(sizes: dict):
    import diffusers
    heads, width, layers, cross_heads, cross_width, caption, ratio = sizes["dit"]
    return random_weights(diffusers.SanaTransformer2DModel(
        in_channels=sizes["p"], out_channels=sizes["p"], num_attention_heads=heads, attention_head_dim=width,
        num_layers=layers, num_cross_attention_heads=cross_heads, cross_attention_head_dim=cross_width,
        cross_attention_dim=heads * width, caption_channels=caption, mlp_ratio=ratio, sample_size=4,
        interpolation_scale=None), 3)


def as_published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """InternVL's weights under the names of its own code, where q, k and v of the encoder are one."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("model.vision_tower.", "vision_model.").replace("model.multi_modal_projector.", "mlp1.")
        key = key.replace("model.language_model.", "language_model.model.").replace("lm_head", "language_model.lm_head")
        for theirs, own in (("cls_token", "class_embedding"), ("position_embeddings", "position_embedding"),
                            ("patch_embeddings.projection", "patch_embedding"), ("encoder.layer.", "encoder.layers."),
                            ("layernorm_before", "norm1"), ("layernorm_after", "norm2"), ("lambda_", "ls"),
                            ("attention.projection_layer", "attn.proj"), ("mlp1.layer_norm", "mlp1.0"),
                            ("mlp1.linear_1", "mlp1.1"), ("mlp1.linear_2", "mlp1.3")):
            key = key.replace(theirs, own)
        renamed[key] = value
    joined = {}
    for key, value in renamed.items():
        if ".attention.q_proj." in key:
            parts = [renamed[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            joined[key.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
        elif ".attention." not in key:
            joined[key] = value
    return joined


def before_452(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    old = {}
    for key, value in state.items():
        key = key.replace("model.vision_tower", "vision_tower").replace("model.multi_modal", "multi_modal")
        key = key.replace("model.language_model.", "language_model.model.")
        old[key.replace("lm_head", "language_model.lm_head")] = value
    return old


def published_config(config) -> dict:
    """config.json of OpenGVLab's own code."""
    vision, text = config.vision_config, config.text_config
    return {
        "architectures": ["InternVLChatModel"], "downsample_ratio": 0.5, "ps_version": "v2", "select_layer": -1,
        "template": "internvl2_5", "force_image_size": vision.image_size[0],
        "vision_config": {"hidden_size": vision.hidden_size, "num_hidden_layers": vision.num_hidden_layers,
                          "num_attention_heads": vision.num_attention_heads, "hidden_act": "gelu",
                          "intermediate_size": vision.intermediate_size, "image_size": vision.image_size[0],
                          "patch_size": vision.patch_size[0], "qkv_bias": True, "qk_normalization": False,
                          "norm_type": "layer_norm", "layer_norm_eps": 1e-6},
        "llm_config": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": text.hidden_size,
                       "num_hidden_layers": text.num_hidden_layers, "num_attention_heads": text.num_attention_heads,
                       "num_key_value_heads": text.num_key_value_heads, "intermediate_size": text.intermediate_size,
                       "vocab_size": text.vocab_size, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
                       "rope_scaling": {"type": "dynamic", "factor": 2.0}, "use_sliding_window": False,
                       "tie_word_embeddings": config.tie_word_embeddings}}


def save_internvl(folder: Path, model, spelling: str = "as published", dtype: str = "F32", shards: int = 0) -> None:
    """`spelling`: of public.names.SPELLINGS; `shards`: cut into so many files with an index."""
    from safetensors.torch import save_file
    folder.mkdir(parents=True)
    state = {key: value.detach().to(DTYPES[dtype]).contiguous() for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    state = {"as published": as_published, "transformers before 4.52": before_452}.get(spelling, dict)(state)
    if spelling == "as published":
        write_json(folder / "config.json", published_config(model.config))
    else:
        model.config.save_pretrained(folder)
    if not shards:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        keys = sorted(state)
        for i, name in enumerate(names):
            save_file({key: state[key] for key in keys[i::shards]}, folder / name, metadata={"format": "pt"})
        total = sum(value.nbytes for value in state.values())
        write_json(folder / "model.safetensors.index.json", {
            "metadata": {"total_size": total}, "weight_map": {key: names[i % shards] for i, key in enumerate(keys)}})
    write_slow_tokenizer(folder)


def make(root: Path, number: int = 0, spelling: str = "as published", dtype: str = "F32", shards: int = 0,
         tied: bool = False) -> dict:
    """root/internvl, root/dc-ae, root/sana; -> the models that they are, by the names of Config's fields."""
    sizes = SETS[number]
    models = {"internvl": internvl(sizes, tied), "dc_ae": dc_ae(sizes), "sana": sana(sizes)}
    with torch.no_grad():
        for parameter in (parameter for model in models.values() for parameter in model.parameters()):
            parameter.copy_(parameter.to(DTYPES[dtype]))
    save_internvl(root / "internvl", models["internvl"], spelling, dtype, shards)
    more = {"max_shard_size": "150KB"} if shards else {}
    for name, folder in (("dc_ae", root / "dc-ae"), ("sana", root / "sana" / "transformer")):
        copy.deepcopy(models[name]).to(DTYPES[dtype]).save_pretrained(folder, **more)
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--set", type=int, choices=range(len(SETS)), default=0)
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    make(given.folder, given.set)
    print(f"python train.py --internvl {given.folder}/internvl --dc-ae {given.folder}/dc-ae "
          f"--sana {given.folder}/sana --steps-scale 0.01 --k 2 --out runs/from-folders")


if __name__ == "__main__":
    main()
