"""The names of weights, ours and those of the three public models that the paper starts from: one table, read when
their files are read, when they are written back, and by the tests that hold our modules against theirs.

    InternVL3     P1   tokenizer.vision, mllm.llm            three spellings: as published, and transformers' two
    DC-AE         P2   pixel_encoder, tokenizer.decoder      diffusers.AutoencoderDC
    SANA          P3   dit                                   diffusers.SanaTransformer2DModel

A rule is a pattern in a name of ours and what stands in its place; `{q,k,v}` in a name of theirs means three of their
weights, which joined along their first dimension are the one of ours. Sources: the modules of transformers 5.24 and
diffusers 0.42 themselves, and OpenGVLab/InternVL's internvl_chat.
"""

import re
from collections.abc import Callable

from spar import Config

Rules = list[tuple[str, str | Callable]]

# ---------------------------------------------------------------- InternVL3

VISION: Rules = [  # transformers; q, k and v apart
    (r"^patches", "vision.embeddings.patch_embeddings.projection"), (r"^layers", "vision.encoder.layer"),
    (r"^positions", "vision.embeddings.position_embeddings"), (r"^cls", "vision.embeddings.cls_token"),
    (r"norm1", "layernorm_before"), (r"norm2", "layernorm_after"), (r"attn\.qkv", "attention.{q,k,v}_proj"),
    (r"attn\.out", "attention.projection_layer"), (r"mlp\.0", "mlp.fc1"), (r"mlp\.2", "mlp.fc2"), (r"scale", "lambda_"),
    (r"^projector\.0", "projector.layer_norm"), (r"^projector\.1", "projector.linear_1"),
    (r"^projector\.3", "projector.linear_2")]
VISION_AS_PUBLISHED: Rules = [
    (r"^patches", "vision.embeddings.patch_embedding"), (r"^layers", "vision.encoder.layers"),
    (r"^positions", "vision.embeddings.position_embedding"), (r"^cls", "vision.embeddings.class_embedding"),
    (r"attn\.out", "attn.proj"), (r"mlp\.0", "mlp.fc1"), (r"mlp\.2", "mlp.fc2"), (r"scale", "ls")]
LANGUAGE: Rules = [
    (r"^embedding", "embed_tokens"), (r"norm1", "input_layernorm"), (r"norm2", "post_attention_layernorm"),
    (r"attn\.([qkv])\b", r"self_attn.\1_proj"), (r"attn.out", "self_attn.o_proj"), (r"(gate|up|down)", r"mlp.\1_proj"),
    (r"^(?!output)", "language."), (r"^output", "head")]
SPELLINGS = {  # how a file begins the names of encoder, projector, language model and its output weights
    "as published": dict(vision="vision_model", projector="mlp1", language="language_model.model",
                         head="language_model.lm_head"),
    "transformers before 4.52": dict(vision="vision_tower", projector="multi_modal_projector",
                                     language="language_model.model", head="language_model.lm_head"),
    "transformers": dict(vision="model.vision_tower", projector="model.multi_modal_projector",
                         language="model.language_model", head="lm_head")}

# ---------------------------------------------------------------- DC-AE

FFN: Rules = [(r"ffn\.up", "conv_inverted"), (r"ffn\.depth", "conv_depth"), (r"ffn\.down", "conv_point")]


def autoencoder_rules(stages: int, vit_stages: int) -> Rules:
    """Of encoder and decoder both, whose stages are numbered shallow to deep; ours run deep to shallow in the
    decoder."""
    vit = rf"^(\w+\.[{''.join(map(str, range(stages - vit_stages, stages)))}]\.\d+\.)"
    return [(r"^stem", "conv_in"), (r"^out", "conv_out"), (r"^norm", "norm_out"), (vit + "qkv", r"\1attn.to_{q,k,v}"),
            (vit + "nearby.0", r"\1attn.to_qkv_multiscale.0.proj_in"), (vit + "out", r"\1attn.to_out"),
            (vit + "nearby.1", r"\1attn.to_qkv_multiscale.0.proj_out"), (vit + "norm", r"\1attn.norm_out"),
            (vit + "ffn_norm", r"\1conv_out.norm"), *((vit + a, r"\1conv_out." + b) for a, b in FFN)]


def encoder_rules(stages: int, vit_stages: int) -> Rules:
    return [(r"^stages", "down_blocks"), *autoencoder_rules(stages, vit_stages)]


def decoder_rules(stages: int, vit_stages: int) -> Rules:
    deep_first = (r"^stages\.(\d+)", lambda match: f"up_blocks.{stages - 1 - int(match[1])}")
    return [deep_first, *autoencoder_rules(stages, vit_stages)]


# ---------------------------------------------------------------- SANA

DIT: Rules = [
    (r"^embed", "patch_embed.proj"), (r"^time\.mlp\.0", "time_embed.emb.timestep_embedder.linear_1"),
    (r"^time\.mlp\.2", "time_embed.emb.timestep_embedder.linear_2"), (r"^modulation\.1", "time_embed.linear"),
    (r"^caption\.0", "caption_projection.linear_1"), (r"^caption\.2", "caption_projection.linear_2"),
    (r"^out", "proj_out"), (r"^blocks", "transformer_blocks"), (r"attn\.qkv", "attn1.to_{q,k,v}"),
    (r"attn\.out", "attn1.to_out.0"), (r"cross\.q\.", "attn2.to_q."), (r"cross\.kv", "attn2.to_{k,v}"),
    (r"cross\.out", "attn2.to_out.0"), (r"table", "scale_shift_table"), *((a, f"ff.{b}") for a, b in FFN)]

# ---------------------------------------------------------------- a model's own names -> theirs


def renamed(name: str, rules: Rules) -> list[str]:
    """A name of ours -> the names of theirs that make it up, in order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    head, letters, tail = (re.split(r"[{}]", name) + ["", ""])[:3]
    return [head + letter + tail for letter in letters.split(",")]


def names_of(model: str, config: Config, spelling: str = "transformers") -> Callable[[str], list[str]]:
    """-> a function of a parameter's name in SPAR: the names of its parts in the public `model` (internvl, dc_ae or
    sana), none where it has none there. `spelling`: of SPELLINGS, for InternVL3."""
    autoencoder = len(config.ae_widths), config.ae_vit_stages
    parts = {"internvl": {"tokenizer.vision.": ("", VISION_AS_PUBLISHED if spelling == "as published" else VISION),
                          "mllm.llm.": ("", LANGUAGE)},
             "dc_ae": {"pixel_encoder.": ("encoder.", encoder_rules(*autoencoder)),
                       "tokenizer.decoder.": ("decoder.", decoder_rules(*autoencoder))},
             "sana": {"dit.": ("", DIT)}}[model]

    def names(name: str) -> list[str]:
        for ours, (theirs, rules) in parts.items():
            if name.startswith(ours):
                keys = [theirs + key for key in renamed(name.removeprefix(ours), rules)]
                if model != "internvl":
                    return keys
                split = [key.partition(".") for key in keys]
                return [f"{SPELLINGS[spelling][part]}.{rest}" for part, _, rest in split]
        return []

    return names
