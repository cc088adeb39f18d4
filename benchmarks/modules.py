"""Forward and backward of our modules against the public ones with the same weights, on CPU.

    pip install "transformers>=5" "diffusers>=0.36"
    python benchmarks/modules.py [--rounds 15]

Both run in one process, by turns and with the order changing each round; the ratio is the median over the rounds of
their time ÷ ours, so above 1 ours is the faster. They use their fast attention (sdpa). Written to
runs/bench/modules-cpu.json, or where `--out` says; the figures that are quoted are in results/modules-cpu.json.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent)]  # the repository's root

import diffusers
import torch
import transformers
from tqdm import tqdm

from diffusion import DiT
from mllm import LanguageModel
from parts.dcae import PixelDecoder, PixelEncoder
from benchmarks.yardstick import processor
from tests.claims import test_parity as parity
from tokenizer import VisionEncoder


def vision(b, side, patch, width, layers, heads, d):
    config = transformers.InternVLConfig(
        vision_config=dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, image_size=side,
                           patch_size=patch, intermediate_size=4 * width, attention_bias=True, use_qk_norm=False,
                           use_mean_pooling=True),
        text_config=dict(model_type="qwen2", hidden_size=d, num_hidden_layers=0, vocab_size=1))
    theirs = transformers.InternVLModel._from_config(config, attn_implementation="sdpa").eval()
    theirs.language_model = None
    ours, images = VisionEncoder(side, patch, width, layers, heads, 4, d), parity.normal(b, 3, side, side)
    parity.share(ours, theirs, parity.VISION_RULES)
    return (ours, lambda: ours(images)), (theirs, lambda: theirs.get_image_features(images).pooler_output)


def language(b, length, d, layers, heads, kv_heads, mlp):
    config = transformers.Qwen2Config(
        vocab_size=200, hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=mlp, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True)
    theirs = transformers.Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    ours, ids = LanguageModel(200, d, layers, heads, kv_heads, mlp), torch.randint(0, 200, (b, length))
    parity.share(ours, theirs, [*parity.LANGUAGE_RULES, (r"^", "model.")])
    mask = torch.arange(length) >= torch.arange(b)[:, None] % 4  # some padding on the left
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = dict(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False)
    return ((ours, lambda: ours.logits(ours(ours.embedding(ids), mask)[0][-1])[mask]),
            (theirs, lambda: theirs(**given).logits[mask]))


def pixel_encoder(b, side, *shape):
    theirs, rules = parity.dc_ae(shape)
    ours, images = PixelEncoder(*shape), parity.normal(b, 3, side, side)
    parity.share(ours, theirs.encoder, [(r"^stages", "down_blocks"), *rules])
    return (ours, lambda: ours(images)), (theirs, lambda: theirs.encode(images).latent.flatten(2).mT)


def pixel_decoder(b, grid, *shape):
    theirs, rules = parity.dc_ae(shape)
    ours, z, last = PixelDecoder(*shape), parity.normal(b, grid**2, shape[0]), len(shape[1]) - 1
    parity.share(ours, theirs.decoder, [(r"^stages\.(\d+)", lambda match: f"up_blocks.{last - int(match[1])}"), *rules])
    return (ours, lambda: ours(z)), (theirs, lambda: theirs.decode(z.mT.unflatten(2, (grid, grid))).sample)


def dit(b, grid, length, p, c, layers, heads, cross_heads, width):
    theirs = diffusers.SanaTransformer2DModel(
        in_channels=p, out_channels=p, num_attention_heads=heads, attention_head_dim=c // heads, num_layers=layers,
        num_cross_attention_heads=cross_heads, cross_attention_head_dim=c // cross_heads, cross_attention_dim=c,
        caption_channels=width, mlp_ratio=2.5, patch_size=1, interpolation_scale=None).eval()
    ours = DiT(p, c, layers, heads, cross_heads, width, 2.5, align_block=1)
    parity.share(ours, theirs, parity.DIT_RULES)
    x, condition = parity.normal(b, p, grid, grid), parity.normal(b, length, width, seed=3)
    sigma = torch.linspace(0.1, 0.9, b)
    mask = torch.arange(length) >= torch.arange(b)[:, None] % 4
    return ((ours, lambda: ours(x, sigma, condition, mask)[0]),
            (theirs, lambda: theirs(x, condition, 1000 * sigma, encoder_attention_mask=mask.long()).sample))


TOY_AE = 16, (32, 64, 128, 128), (0, 1, 1, 1), 1, "shuffle"
LARGER_AE = 32, (64, 128, 256, 256), (0, 2, 2, 2), 1, "shuffle"
CASES = {  # the toy preset's sizes, and larger ones
    "vision encoder, toy": lambda: vision(16, 32, 4, 64, 4, 4, 128),
    "vision encoder, larger": lambda: vision(4, 64, 4, 192, 8, 6, 256),
    "language model, toy": lambda: language(32, 40, 128, 6, 4, 2, 256),
    "language model, larger": lambda: language(8, 128, 256, 8, 8, 4, 768),
    "pixel encoder, toy": lambda: pixel_encoder(16, 32, *TOY_AE),
    "pixel encoder, larger": lambda: pixel_encoder(4, 64, *LARGER_AE),
    "pixel decoder, toy": lambda: pixel_decoder(16, 4, *TOY_AE),
    "pixel decoder, larger": lambda: pixel_decoder(4, 8, *LARGER_AE),
    "DiT, toy": lambda: dit(64, 4, 34, 16, 128, 4, 4, 4, 128),
    "DiT, larger": lambda: dit(16, 8, 80, 32, 384, 8, 12, 6, 256)}


def compare(build, rounds: int) -> dict[str, float]:
    """Milliseconds of both, median ratio, largest difference of the outputs as a share of the largest value."""
    torch.manual_seed(0)
    sides = build()
    with torch.no_grad():
        a, b = (run() for _, run in sides)
    towards = torch.randn(a.shape, generator=torch.Generator().manual_seed(1))

    def once(module, run) -> float:
        module.zero_grad(set_to_none=True)
        start = time.perf_counter()
        (run() * towards).sum().backward()
        return time.perf_counter() - start

    for _ in range(3):
        [once(*side) for side in sides]
    times: list[list[float]] = [[], []]
    for turn in range(rounds):
        for i in ((0, 1), (1, 0))[turn % 2]:
            times[i].append(once(*sides[i]))
    return {"ours_ms": 1e3 * statistics.median(times[0]), "theirs_ms": 1e3 * statistics.median(times[1]),
            "ratio": statistics.median(t / o for o, t in zip(*times)),
            "difference": ((a - b).abs().max() / b.abs().max()).item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/modules-cpu.json"), help="file for the figures")
    given = parser.parse_args()
    rows = {name: compare(build, given.rounds) for name, build in tqdm(CASES.items(), desc="modules")}
    for name, row in rows.items():
        print(f"{name:24} ours {row['ours_ms']:8.1f} ms   theirs {row['theirs_ms']:8.1f} ms   ratio {row['ratio']:.2f} "
              f"  outputs differ by {row['difference']:.0e}")
        assert row["difference"] < 1e-4, name
    about = {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__,
             "transformers": transformers.__version__, "diffusers": diffusers.__version__}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(about | {"modules": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
