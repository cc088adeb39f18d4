"""What a run has trained, back into folders that transformers and diffusers load: copies of those that it began with.

    python sample.py export --run RUN --out DIR --as internvl      encoder and projector after T3 (for VLMEvalKit)
    python sample.py export --run RUN --out DIR --as dc-ae         the decoder after T3
    python sample.py export --run RUN --out DIR --as sana          the DiT after U3

File by file, in the folder's own spelling, shards and number formats: what the run did not train comes out as it was,
byte for byte; what it did is rounded where the folder's numbers are half as long as ours.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from plumbing.command import UserError, write_beside, write_text
from public.folders import Weights, folder_of, matched
from public.qwen import read_json
from spar import SPAR

OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".index.json")
DC_AE_NOTE = """# Only the decoder

These weights are DC-AE's, but for the decoder, which SPAR has trained on: it decodes the fused latents z_f of SPAR's
own tokenizer. The encoder is DC-AE's still, and its latents are not what this decoder expects: encoding with this
folder and decoding again gives a wrong picture. `scaling_factor` is that of z_f.
"""


def export_own(model: SPAR, run: Path, out: Path) -> None:
    """Every weight under its name as safetensors, config.json and what words are made of beside it."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("export needs an extra: pip install safetensors") from None
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"stages": ",".join(model.finished_stages)}
    write_beside(out, lambda beside: save_file(tensors, str(beside), metadata=metadata))
    write_text(out.with_name("config.json"), json.dumps(asdict(model.config), indent=1) + "\n")
    for name in ("vocabulary.json", "tokenizer.json"):
        if (run / name).exists():
            shutil.copyfile(run / name, out.with_name(name))
    print(out)


def export(model: SPAR, public: str, run: Path, out: Path) -> None:
    """`public`: spar, internvl, dc_ae or sana. Raises UserError where the run did not begin with such a folder, or the
    folder has changed since."""
    if public == "spar":
        return export_own(model, run, out)
    from safetensors.torch import save_file  # Weights asks for it
    config, flag = model.config, "--" + public.replace("_", "-")
    if not (source := folder_of(config, public)):
        raise UserError(f"--as {flag[2:]} writes into a copy of the folder that a run began with; {run} began without "
                        f"{flag}: export it --as spar")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already: choose another --out")
    weights = Weights(source, public)
    if changed := [line for line in weights.checksums() if line not in config.public.split(", ")]:
        raise UserError(f"{source} is no longer what {run} began with ({changed[0]}): put the first one back")
    described = read_json(source / "config.json")
    parameters, ours = dict(model.named_parameters()), {}
    for name, keys in matched(weights, model, config, public).items():
        rows = parameters[name].detach().cpu().split([weights.shape(key)[0] for key in keys])
        ours |= dict(zip(keys, rows))
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(weights.files):
        tensors = {}
        for key in (key for key, place in weights.keys.items() if place == file):
            theirs = weights.read(key)
            tensors[key] = ours[key].reshape(theirs.shape).to(theirs.dtype).contiguous() if key in ours else theirs
        write_beside(out / file, lambda beside: save_file(tensors, str(beside), metadata={"format": "pt"}))
    for path in source.iterdir():
        if path.is_file() and (path == weights.index or not path.name.endswith(OTHER_WEIGHTS)):
            shutil.copyfile(path, out / path.name)
    if public == "dc_ae":
        described |= {"scaling_factor": model.latent_scale.item()}
        write_text(out / "config.json", json.dumps(described, indent=2) + "\n")
        write_text(out / "README.md", DC_AE_NOTE)
    print(out)
