"""Use a trained run: draw, edit, ask, reconstruct, and look at the routing.

    python sample.py generate "a large red circle top-left , a small blue square bottom-right" --count 4
    python sample.py edit --image scene.png "make the red circle blue"
    python sample.py ask --image scene.png "how many objects are there ?"
    python sample.py reconstruct --image scene.png
    python sample.py streams --image scene.png      what each of the two streams carries
    python sample.py route "two green circles"
    python sample.py page --out page.html       all of it, to explore by hovering: one file for any browser
    python sample.py export --out exported      weights and config.json, for other programs; --as internvl, dc-ae or
                                                sana: for theirs, from a run that began with those (public/export.py)

What to draw or to change is first written out by the LLM, and printed; with `--no-rewrite` the words are drawn as they
stand. Pictures are written to --out (default: generate.png and so on) and the path is printed. Pictures of another size
are cut to a square and resized, and that is said. Wrong input ends in one line and exit code 2.
"""

import argparse
from pathlib import Path

import plumbing.command  # before torch, whose threads wait as it says
import torch
from PIL import Image
from torch import Tensor

from diffusion import SAMPLERS
from disk import files
from disk.reading import as_tensor
from exercises.page import write_page
from plumbing.command import Parser, UserError, run_command, write_beside
from plumbing.devices import best_device
from plumbing.pictures import routing_pictures, sheet, streams, to_image
from plumbing.run_folder import load_run
from public.export import export
from spar import SPAR

NEEDS = {"generate": "U1", "edit": "U2", "route": "U1", "ask": "P1", "reconstruct": "T1",
         "streams": "T1", "export": "P1", "page": "P1"}
DRAWING = ("generate", "edit")
READ_BY = {"text": (*DRAWING, "ask", "route"), "image": ("edit", "ask", "reconstruct", "streams", "route"),
           "form": ("export",), **dict.fromkeys(("seed", "steps", "guidance", "sampler", "rewrite", "count"), DRAWING)}
NAMED = {"text": "words", "form": "--as", "rewrite": "--no-rewrite"}


def read_picture(path: Path, side: int) -> Tensor:
    """File -> `1 3 side side` in [-1, 1]. Raises UserError for what is no picture of a known kind."""
    try:
        image = files.read_picture(files.Blob(str(path), 0, path.stat().st_size, files.printable(str(path))))
    except files.BadFile as bad:
        raise UserError(str(bad)) from None
    if image.size != (side, side):
        print(f"{path}: resized from {image.width}×{image.height} to {side}×{side}, "
              "the size that this run was trained on")
    return as_tensor(image, side, None)[None]


def write_picture(image: Image.Image, path: Path) -> None:
    write_beside(path, image.save)
    print(path)


def perform(model: SPAR, use: str, text: str, images: Tensor | None, given: argparse.Namespace) -> Image.Image | str:
    """One use of a model -> a picture, or the answer's words."""
    options = dict(seed=given.seed, steps=given.steps, guidance=given.guidance, sampler=given.sampler)
    if use == "ask":
        return model.answer(images, [text])[0]
    if use == "reconstruct":
        return to_image(torch.cat([images[0], model.reconstruct(images)[0]], 2))
    if use == "streams":
        return streams(model, images)
    if use == "route":
        return sheet([], extra=routing_pictures(model, text, images))
    references = None if images is None else images.repeat(given.count, 1, 1, 1)
    prompts = [text] * given.count
    if given.rewrite:
        prompts = model.rewrite(prompts, references, given.seed)
        print("\n".join(prompts))
    return to_image(torch.cat(list(model.generate(prompts, references, **options)[0]), 2))


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("use", choices=list(NEEDS))
    parser.add_argument("text", nargs="?", default=None, help="prompt, instruction or question")
    parser.add_argument("--image", type=Path, help="picture to edit, ask about or reconstruct (route: a reference)")
    parser.add_argument("--run", type=Path, default=Path("runs/toy"), help="run folder (default runs/toy)")
    parser.add_argument("--out", type=Path, help="picture to write (default <use>.png)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="of the sampler (default: the run's)")
    parser.add_argument("--guidance", type=float, default=None, help="how much more the words count")
    parser.add_argument("--sampler", choices=SAMPLERS, default=None)
    parser.add_argument("--rewrite", action=argparse.BooleanOptionalAction, default=True,
                        help="let the LLM write the prompt or the edit's outcome out first; the paper does not")
    parser.add_argument("--as", dest="form", choices=("spar", "internvl", "dc-ae", "sana"), default="spar",
                        help="export: whose folder to write; those of public models need a run that began with them")
    parser.add_argument("--count", type=int, default=1, help="pictures of one prompt, side by side")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    given = parser.read()
    if given.use == "generate" and given.image is not None:
        raise UserError("generate draws from words alone: to change a picture, "
                        "python sample.py edit --image FILE \"…\"")
    for field, uses in READ_BY.items():
        if given.use not in uses and getattr(given, field) != parser.get_default(field):
            raise UserError(f"{given.use} does not read {NAMED.get(field, f'--{field}')}: leave it out")
    if given.use in READ_BY["text"] and not (given.text or "").strip():
        raise UserError(f"{given.use} needs words: python sample.py {given.use} \"…\"")
    if given.use in ("edit", "ask", "reconstruct", "streams") and given.image is None:
        raise UserError(f"{given.use} needs a picture: add --image FILE")
    if given.count < 1 or given.steps is not None and given.steps < 1:
        raise UserError("--count and --steps must be at least 1")
    out = given.out or Path({"export": "exported", "page": "page.html"}.get(given.use, f"{given.use}.png"))
    if given.use == "export" and given.form == "spar" and not out.suffix:
        out = out / "model.safetensors"
    endings = {"export": (".safetensors",), "page": (".html",)}.get(given.use, (".png", ".jpg", ".jpeg", ".webp"))
    if given.form == "spar" and out.suffix.lower() not in endings:
        raise UserError(f"--out {out}: end the name in {' or '.join(endings)}")
    model = load_run(given.run, best_device(given.device))
    done = set(model.finished_stages)
    if NEEDS[given.use] not in done and not (given.use in ("reconstruct", "streams") and "T2" in done):
        raise UserError(f"{given.use} needs stage {NEEDS[given.use]}, which {given.run} does not have: "
                        f"go on with `python train.py --out {given.run}`")
    if given.use == "export":
        return export(model, given.form.replace("-", "_"), given.run, out)
    if given.use == "page":
        return write_page(model, given.run, out)
    images = None if given.image is None else read_picture(given.image, model.config.side).to(model.device)
    result = perform(model, given.use, given.text, images, given)
    print(result) if isinstance(result, str) else write_picture(result, out)


if __name__ == "__main__":
    run_command(main)
