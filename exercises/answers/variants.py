"""What a graded class is asked for in place of the source's own: in each exercise one thing is otherwise.

The source is public, so that its bodies prove nothing. Which change, and its numbers, come from the pack's variant:
`python exercises/make.py --class OUT --variant K`. A pack holds the words, and what comes out on a few inputs; the
bodies below stay with the teacher.
"""

import random
from textwrap import dedent
from typing import NamedTuple

from exercises.answers import changed


class Variant(NamedTuple):
    """One exercise's change."""

    task: str  # beside the docstrings, and before them where they say otherwise
    bodies: dict[str, dict[str, str]]  # file -> name -> what is right now
    dropped: tuple[str, ...]  # claims, by their functions' names, that are the source's alone


def two_streams(chance: random.Random) -> Variant:
    share = chance.choice((0.25, 0.5, 2.0, 3.0))
    return Variant(
        f"The fusion reads the pixel stream first, and {share:g} times as strong: z_f = F([{share:g} z_p ; z_s]); of a "
        f"tokenizer with one stream F(z_s), or F({share:g} z_p).",
        {"tokenizer.py": {"Tokenizer.fuse": dedent(f"""
            z_p = z_p if z_p is None else {share} * z_p
            return self.fusion(torch.cat([z for z in (z_p, z_s) if z is not None], -1))
            """)}},
        ("joined", "equations", "learns", "alone"))


def stages(chance: random.Random) -> Variant:
    """Three stages of six are otherwise."""
    changes = {
        "T1": ("T1 moves the semantic stream and the fusion alone; without L_p.",
               '{"tokenizer.semantic_stream": 1.0, "tokenizer.fusion": 1.0}\nRECONSTRUCTION', "streams"),
        "T2": ("T2 trains the decoder alone, by L_mse and L_lpips.",
               '{"tokenizer.decoder": 1.0}\n{"L_mse": "lambda_mse", "L_lpips": "lambda_lpips"}', "decoder"),
        "T3": ("In T3 the encoder learns at the stage's whole rate, and no adversary joins.",
               'STREAMS | {"tokenizer.decoder": 1.0, "tokenizer.vision": 1.0}\nRECONSTRUCTION | {"L_s": "lambda_s"}',
               "encoder"),
        "U1": ("U1 trains queries and router, and leaves the connector as it is.",
               '{"mllm.queries": 1.0, "mllm.router": 1.0}\n{"L_fm": 1.0}', "connector"),
        "U2": ("U2 trains the DiT and its alignment head, and nothing before them.",
               '{"dit": 1.0, "align_head": 1.0}\nGENERATION', "generator"),
        "U3": ("U3 trains the DiT alone, without L_align.", '{"dit": 1.0}\n{"L_fm": 1.0}', "tuned")}
    chosen = sorted(chance.sample(sorted(changes), 3))
    return Variant(" ".join(changes[name][0] for name in chosen),
                   {"train.py": {f"STAGES.{name}": changes[name][1] for name in chosen}},
                   (*(changes[name][2] for name in chosen), "rates", "terms"))


def sink(chance: random.Random) -> Variant:
    score = chance.choice((-1.0, 0.5, 1.0, 2.0))
    return Variant(
        f"Every query also sees a sink: a key whose score is {score:g} (a natural logarithm, as q·k / √e is) and whose "
        "value is 0. It counts in the denominator, thus in lse; no mask hides it.",
        changed("attention.py", "Tiled.forward",
                ("(q_tile.shape[:-1], -math.inf)", f"(q_tile.shape[:-1], {score} * LOG2E)"),
                ("total = torch.zeros_like(top)", "total = torch.ones_like(top)")),
        ("values", "shared", "causal", "hidden", "maxima", "gradients", "half"))


def louder_noise(chance: random.Random) -> Variant:
    size = chance.choice((0.5, 2.0, 3.0))
    return Variant(
        f"The noise is {size:g} times as strong: the path is x_t = (1 − σ) z + {size:g} σ ε, and the DiT learns its "
        "velocity dx_t/dσ.",
        {"diffusion.py": {
            "add_noise": f"sigma = rearrange(sigma, 'b -> b 1 1 1')\nreturn (1 - sigma) * z + {size} * sigma * noise",
            "flow_matching_loss": f"return (velocity.float() - ({size} * noise - z)).square().mean()"}},
        ("ends", "straight", "squares", "gradient", "least"))


def window(chance: random.Random) -> Variant:
    low, high = chance.choice((0.1, 0.2, 0.3)), chance.choice((0.7, 0.8, 0.9))
    return Variant(
        f"Guidance is given only to latents whose σ lies from {low} to {high}, both included; the others of a batch "
        "get the condition's own velocity. `sample` is the source's.",
        changed("diffusion.py", "guided", (
            "return without + guidance * (with_words - without)",
            f"inside = ((sigma >= {low}) & (sigma <= {high}))[:, None, None, None]\n"
            "    return torch.where(inside, without + guidance * (with_words - without), with_words)")),
        ("on_their_line", "padded"))


def fewer_layers(chance: random.Random) -> Variant:
    count = chance.choice((2, 3))
    return Variant(
        f"A token listens to the {count} layers that it gives the largest weights, which are divided by their sum; the "
        f"others weigh 0. With fewer than {count} layers, to all.",
        {"router.py": {"DTR.weights": dedent(f"""
            w = (self.gate(H[:, :, -1]) / self.temperature).softmax(-1)
            least = w.topk(min({count}, w.shape[-1]), -1).values[..., -1:]
            w = torch.where(w >= least, w, 0.0)
            return w / w.sum(-1, keepdim=True)
            """)}},
        ("soft", "gate_learns", "as_loops"))


def two_sets(chance: random.Random) -> Variant:
    first = chance.choice((1, 2, 3))
    return Variant(
        f"The queries are two sets that do not see each other: the first {first} of them, and the rest, as if the "
        "other were not there, positions included. Each sees all the words.",
        {"mllm.py": {"MLLM.routed_states": dedent(f"""
            with torch.no_grad():
                at_words, cache = self.llm(self.embed(ids, f_v), mask, keep=self.choice)
            parts = [at_words]
            for queries in self.queries.split([{first}, len(self.queries) - {first}]):
                seen = torch.cat([mask, mask.new_ones(len(mask), len(queries))], 1)
                parts.append(self.llm(repeat(queries, "q d -> b q d", b=len(ids)), seen, cache, self.choice)[0])
            mask = torch.cat([mask, mask.new_ones(len(mask), len(self.queries))], 1)
            return torch.stack([torch.cat(states, 1) for states in zip(*parts)], 2), mask
            """)}},
        ("at_queries", "causal", "whole", "learns"))


def another_distance(chance: random.Random) -> Variant:
    words, body = chance.choice((
        ("1 − the cosine between a token now and before, the mean over tokens",
         "return 1 - F.cosine_similarity(f_v.float(), f_v_before.detach().float(), dim=-1).mean()"),
        ("the mean absolute difference", "return (f_v.float() - f_v_before.detach().float()).abs().mean()"),
        ("the Euclidean distance between a token now and before (plus 0.001), the mean over tokens",
         "return ((f_v.float() - f_v_before.detach().float()).norm(dim=-1) + 0.001).mean()")))
    return Variant(f"L_s is {words}.", {"tokenizer.py": {"self_distillation": body}},
                   ("square", "pull", "terms", "reach", "first_steps"))


def harder_tokens(chance: random.Random) -> Variant:
    power = chance.choice((1.5, 2, 3))
    return Variant(
        f"Tokens that are far off count for more: L_align is the mean over tokens of (1 − cos)^{power:g}.",
        {"diffusion.py": {"alignment_loss": dedent(f"""
            cosine = F.cosine_similarity(projected.float(), f_v.detach().float(), dim=-1)
            return ((1 - cosine).clamp(min=0) ** {power}).mean()
            """)}},
        ("ends", "token_by_token", "directions", "both", "target", "another_teacher", "who_gets_a_gradient"))


VARIANTS = {1: two_streams, 2: stages, 3: sink, 4: louder_noise, 5: window, 6: fewer_layers, 7: two_sets,
            8: another_distance, 9: harder_tokens}


def variant_of(number: int, k: int) -> Variant | None:
    """Of variant `k` of a pack; 0 asks for what the source does."""
    return VARIANTS[number](random.Random(f"{k} {number}")) if k and number in VARIANTS else None
