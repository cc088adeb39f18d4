"""Exercise 3: softmax in one pass."""

import textwrap

ONE_PASS = """
    scale, shift = LOG2E / math.sqrt(q.shape[-1]), k.shape[2] - q.shape[2]
    out, lse = torch.empty_like(q), wide(q).new_empty(q.shape[:-1])
    for rows in torch.arange(q.shape[2], device=q.device).split(TILE):
        q_tile = wide(q[:, :, rows])
        top = q_tile.new_full(q_tile.shape[:-1], -math.inf)
        total, values = torch.zeros_like(top), torch.zeros_like(q_tile)
        for columns in tiles_of_keys(k, rows, shift, causal):
            k_tile, v_tile = for_each_query_head(k, columns, q), for_each_query_head(v, columns, q)
            mask = visible(rows, columns, shift, causal, key_mask)
            score = hide(q_tile @ k_tile.mT * scale, mask)
            new_top = torch.maximum(top, score.amax(-1))
            base = new_top.clamp(min=LOWEST)
            shrink = (top - base).exp2()
            weight = (score - base[..., None]).exp2()
            total = shrink * total + weight.sum(-1)
            values = shrink[..., None] * values + weight @ v_tile
            top = new_top
        out[:, :, rows] = (values / torch.where(total > 0, total, 1.0)[..., None]).to(out.dtype)
        lse[:, :, rows] = top + total.log2()
    ctx.save_for_backward(q, k, v, key_mask, out, lse)
    ctx.causal = causal
    return out
"""


ROWS, TILES = "torch.arange(q.shape[2], device=q.device).split(TILE)", "tiles_of_keys(k, rows, shift, causal)"


def forward(body: str) -> dict:
    return {"attention.py": {"Tiled.forward": textwrap.dedent(body)}}


def but(*changes: str) -> dict:
    """ONE_PASS with some of its text changed: old, new, old, new, …"""
    body = ONE_PASS
    for old, new in zip(changes[::2], changes[1::2]):
        if old not in body:
            raise ValueError(f"no {old!r} in the body")
        body = body.replace(old, new)
    return forward(body)


def cut_by(method: str) -> dict:
    """Queries and keys in other tiles."""
    return but(ROWS, f"torch.arange(q.shape[2]).{method}", TILES, f"torch.arange(k.shape[2]).{method}")


def against_all_keys(tile: str) -> dict:
    return forward(f"""
        n, m = q.shape[2], k.shape[2]
        scale = 1 / math.sqrt(q.shape[-1])
        columns = torch.arange(m)
        keys, values = for_each_query_head(k, columns, q), for_each_query_head(v, columns, q)
        outs, sums = [], []
        for rows in torch.arange(n).split({tile}):
            score = hide(wide(q[:, :, rows]) @ keys.mT * scale, visible(rows, columns, m - n, causal, key_mask))
            outs.append((score.softmax(-1).nan_to_num(0) @ values).to(q.dtype))
            sums.append(score.logsumexp(-1) / math.log(2))
        out = torch.cat(outs, 2)
        ctx.save_for_backward(q, k, v, key_mask, out, torch.cat(sums, 2))
        ctx.causal = causal
        return out""")


WHOLE = """
    scale, shift = LOG2E / math.sqrt(q.shape[-1]), k.shape[2] - q.shape[2]
    n, m = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    keys, values = for_each_query_head(k, m, q), for_each_query_head(v, m, q)
    score = hide(wide(q) @ keys.mT * scale, visible(n, m, shift, causal, key_mask))
    top = score.amax(-1)
    weight = (score - top.clamp(min=LOWEST)[..., None]).exp2()
    total = weight.sum(-1)
    out = ((weight @ values) / torch.where(total > 0, total, 1.0)[..., None]).to(q.dtype)
    ctx.save_for_backward(q, k, v, key_mask, out, top + total.log2())
    ctx.causal = causal
    return out
"""

SCORES_KEPT = """
    scale, shift = LOG2E / math.sqrt(q.shape[-1]), k.shape[2] - q.shape[2]
    n, scores = torch.arange(q.shape[2]), []
    tiles = torch.arange(k.shape[2]).split(TILE)
    for columns in tiles:
        mask = visible(n, columns, shift, causal, key_mask)
        scores.append(hide(wide(q) @ for_each_query_head(k, columns, q).mT * scale, mask))
    top = torch.stack([score.amax(-1) for score in scores]).amax(0)
    total, values, base = 0, 0, top.clamp(min=LOWEST)[..., None]
    for columns, score in zip(tiles, scores):
        total = total + (score - base).exp2().sum(-1)
        values = values + (score - base).exp2() @ for_each_query_head(v, columns, q)
    out = (values / torch.where(total > 0, total, 1.0)[..., None]).to(q.dtype)
    ctx.save_for_backward(q, k, v, key_mask, out, top + total.log2())
    ctx.causal = causal
    return out
"""

SCORE, SAVE = "hide(q_tile @ k_tile.mT * scale, mask)", "ctx.save_for_backward(q, k, v, key_mask, out, lse)"
SUMS, VALUES, LSE = "weight.sum(-1)", "weight @ v_tile", "lse[:, :, rows] = top + total.log2()"
NARROW = "dtype=torch.float32 if q.dtype in (torch.float16, torch.bfloat16) else torch.float64"

WRONG = {
    "the maximum is that of hidden keys, too": but(
        SCORE, "q_tile @ k_tile.mT * scale", "weight = (score - base[..., None]).exp2()",
        "weight = (score - base[..., None]).exp2()\n            if mask is not None:\n"
        "                weight = weight.masked_fill(~mask, 0)"),
    "hidden scores are −10,000, as BERT has them; who sees nothing gets zeros": but(
        SCORE, "q_tile @ k_tile.mT * scale\n            if mask is not None:\n"
        "                score = score.masked_fill(~mask, -10000.0)",
        "values / torch.where(total > 0, total, 1.0)[..., None]",
        "values.masked_fill(~seen[..., None], 0) / total[..., None]",
        "total, values = torch.zeros_like(top), torch.zeros_like(q_tile)",
        "total, values = torch.zeros_like(top), torch.zeros_like(q_tile)\n"
        "        seen = torch.zeros_like(top, dtype=torch.bool)",
        "            top = new_top",
        "            top = new_top\n            seen = seen | (True if mask is None else mask.any(-1))"),
    "hidden keys are set to 0, and their weights too": but(
        SCORE, "q_tile @ k_tile.mT * scale\n            if mask is not None:\n                score = score * mask",
        "weight = (score - base[..., None]).exp2()",
        "weight = (score - base[..., None]).exp2() * (1 if mask is None else mask)"),
    "lse is the logarithm of the unscaled sum, which overflows":
        but(LSE, "lse[:, :, rows] = (total * top.exp2()).log2()"),
    "lse from a sum of its own, without a maximum": but(
        "total, values = torch.zeros_like(top), torch.zeros_like(q_tile)",
        "total, values, plain = torch.zeros_like(top), torch.zeros_like(q_tile), torch.zeros_like(top)",
        "            top = new_top", "            top, plain = new_top, plain + score.exp2().sum(-1)",
        LSE, "lse[:, :, rows] = plain.log2()"),
    "half precision in float32, all else in float64": but(
        "wide(q).new_empty(q.shape[:-1])", f"q.new_empty(q.shape[:-1], {NARROW})", "wide(q[:, :, rows])",
        "q[:, :, rows].to(lse.dtype)", "for_each_query_head(k, columns, q)",
        "for_each_query_head(k, columns, q).to(lse.dtype)", "for_each_query_head(v, columns, q)",
        "for_each_query_head(v, columns, q).to(lse.dtype)"),
    "float16 stays as it is, bfloat16 alone becomes float32": but(
        "    scale, shift", "    wide = lambda x: x.float() if x.dtype == torch.bfloat16 else x\n    scale, shift",
        "for_each_query_head(k, columns, q)", "for_each_query_head(k, columns, q).to(lse.dtype)",
        "for_each_query_head(v, columns, q)", "for_each_query_head(v, columns, q).to(lse.dtype)"),
    "a tile's values are summed in half precision":
        but(VALUES, "wide(weight.to(q.dtype) @ v_tile.to(q.dtype))"),
    "a tile's weights are summed in half precision": but(SUMS, "wide(weight.to(q.dtype).sum(-1))"),
    "weights, sums and values of a tile in half precision": but(
        "(score - base[..., None]).exp2()", "(score - base[..., None]).exp2().to(q.dtype)",
        SUMS, f"wide({SUMS})", VALUES, f"wide({VALUES}.to(q.dtype))"),
    "hidden keys and values are set to 0 where they stand": but(
        "    out, lse = torch.empty", "    for x in (k, v) if key_mask is not None else ():\n"
        "        x.masked_fill_(~key_mask[:, None, :, None], 0)\n    out, lse = torch.empty"),
    "leaves something for backward only where q learns":
        but(SAVE, f"if ctx.needs_input_grad[0]:\n        {SAVE}"),
    "leaves something for backward only where q, k and v learn":
        but(SAVE, f"if all(ctx.needs_input_grad[:3]):\n        {SAVE}"),
    "32 tiles, however long": cut_by("chunk(32)"),
    "the earlier values keep the unit of their old maximum": but("shrink[..., None] * values", "values"),
    "the earlier sum keeps the unit of its old maximum": but("shrink * total", "total"),
    "neither sum nor values are rescaled": but("shrink * total", "total", "shrink[..., None] * values", "values"),
    "rescaled the wrong way round": but("(top - base).exp2()", "(base - top).exp2()"),
    "divided by the running sum inside the loop":
        but("+ weight @ v_tile\n",
            "+ weight @ v_tile\n            values = values / total[..., None].clamp(min=1e-30)\n",
            "values / torch.where(total > 0, total, 1.0)[..., None]", "values"),
    "−∞ − (−∞): nothing stands for the maximum of a row that has seen nothing":
        but("new_top.clamp(min=LOWEST)", "new_top"),
    "causal without the shift m − n": but("visible(rows, columns, shift,", "visible(rows, columns, 0,"),
    "the shift of the causal mask is one too many":
        but("visible(rows, columns, shift,", "visible(rows, columns, shift + 1,",
            "tiles_of_keys(k, rows, shift,", "tiles_of_keys(k, rows, shift + 1,"),
    "the maximum is that of the tile alone": but("torch.maximum(top, score.amax(-1))", "score.amax(-1)"),
    "each tile has its own maximum, and nothing says so":
        but("torch.maximum(top, score.amax(-1))", "score.amax(-1)", "shrink * total", "total",
            "shrink[..., None] * values", "values"),
    "no maximum is taken off": but("(top - base).exp2()", "torch.ones_like(base)",
                                   "score - base[..., None]", "score", "lse[:, :, rows] = top +", "lse[:, :, rows] ="),
    "the maximum starts at 0": but("-math.inf)\n", "0.0)\n"),
    "lse is a natural logarithm, and backward counts in powers of 2":
        but("top + total.log2()", "top * math.log(2) + total.log()"),
    "lse: only the second half is a natural logarithm": but("top + total.log2()", "top + total.log()"),
    "lse is the logarithm of the sum without its maximum": but("top + total.log2()", "total.log2()"),
    "lse is the maximum": but("top + total.log2()", "top"),
    "lse is the sum": but("top + total.log2()", "total"),
    "natural scores with powers of 2": but("LOG2E / math.sqrt", "1 / math.sqrt"),
    "the scores are not divided by √e": but("LOG2E / math.sqrt(q.shape[-1])", "LOG2E"),
    "the scores are divided by e": but("math.sqrt(q.shape[-1])", "q.shape[-1]"),
    "the mask is left out": but("hide(q_tile @ k_tile.mT * scale, mask)", "q_tile @ k_tile.mT * scale"),
    "one maximum for all rows of a tile": but("score.amax(-1)", "score.amax().expand_as(top)"),
    "one maximum for all heads and pictures": but("score.amax(-1)", "score.amax((0, 1, 3)).expand_as(top)"),
    "one maximum for all heads": but("score.amax(-1)", "score.amax((1, 3))[:, None].expand_as(top)"),
    "the mask of keys is left out": but("causal, key_mask)\n            score", "causal, None)\n            score"),
    "the mask is taken the other way round": but("scale, mask)", "scale, None if mask is None else ~mask)"),
    "the causal mask is left out": but("visible(rows, columns, shift, causal,", "visible(rows, columns, shift, False,",
                                       TILES, "tiles_of_keys(k, rows, shift, False)"),
    "hidden scores are multiplied by 0": but("hide(q_tile @ k_tile.mT * scale, mask)",
                                             "q_tile @ k_tile.mT * scale * (1 if mask is None else mask)"),
    "hidden scores are a large number: who sees nothing gets a mean":
        but("hide(q_tile @ k_tile.mT * scale, mask)",
            "q_tile @ k_tile.mT * scale\n            if mask is not None:\n"
            "                score = score.masked_fill(~mask, -1e9)"),
    "0 / 0 for a row that sees nothing": but("torch.where(total > 0, total, 1.0)[..., None]", "total[..., None]"),
    "rows without a tile of keys are skipped, so nothing is written":
        but("        q_tile =",
            "        if not tiles_of_keys(k, rows, shift, causal):\n            continue\n        q_tile ="),
    "the last tile, not full, is left out":
        but("tiles_of_keys(k, rows, shift, causal):",
            "[c for c in tiles_of_keys(k, rows, shift, causal) if len(c) == TILE]:"),
    "the mean of each tile's softmax":
        but("shrink * total", "total", "weight.sum(-1)", "1", "weight @ v_tile",
            "score.softmax(-1).nan_to_num() @ v_tile", "shrink[..., None] * values", "values"),
    "heads of queries and keys are paired in turns, not as neighbours":
        but("for_each_query_head(k, columns, q), for_each_query_head(v, columns, q)",
            "(wide(x[:, :, columns]).repeat(1, q.shape[1] // x.shape[1], 1, 1) for x in (k, v))"),
    "the whole matrix at once": forward(WHOLE),
    "all tiles of scores are kept until the maximum is known": forward(SCORES_KEPT),
    "what goes to backward is not divided by the sum":
        but("key_mask, out, lse)", "key_mask, out * lse.exp2()[..., None], lse)"),
    "the mask of all queries and all keys is made in one piece":
        but("    for rows in", "    n, m = torch.arange(q.shape[2]), torch.arange(k.shape[2])\n"
            "    whole = visible(n, m, shift, causal, key_mask)\n    for rows in",
            "visible(rows, columns, shift, causal, key_mask)",
            "None if whole is None else whole[:, :, rows][..., columns]"),
    "backward is not told that the mask is causal": but("ctx.causal = causal", "ctx.causal = False"),
    "backward is not told which keys are hidden": but("v, key_mask, out", "v, None, out"),
    "maxima and sums in half precision":
        but("lse[:, :, rows] = top + total.log2()", "lse[:, :, rows] = (top + total.log2()).to(q.dtype).to(lse.dtype)",
            "            top = new_top\n",
            "            top, total, values = (x.to(q.dtype).to(x.dtype) for x in (new_top, total, values))\n"),
    "out is wide where q is half": but("torch.empty_like(q), wide", "torch.empty_like(wide(q)), wide"),
    "everything in float32, whatever the inputs are": but("q_tile @ k_tile.mT", "(q_tile @ k_tile.mT).float()"),
    "q is scaled where it stands": but("    out, lse =", "    q *= scale\n    out, lse =",
                                       "k_tile.mT * scale", "k_tile.mT"),
}

NATURAL = but("scale, shift = LOG2E /", "scale, shift = 1 /", ".exp2()", ".exp()", "top + total.log2()",
              "(top + total.log()) * LOG2E")

RIGHT = {
    "leaves something for backward where anything learns":
        but(SAVE, f"if any(ctx.needs_input_grad):\n        {SAVE}"),
    "tiles of 512 queries, against all keys": against_all_keys("512"),
    "all queries against tiles of 256 keys":
        but(ROWS, "[torch.arange(q.shape[2])]", TILES, "torch.arange(k.shape[2]).split(256)"),
    "tiles of 1024": cut_by("split(1024)"),
    "tiles of 400": cut_by("split(400)"),
    "tiles of keys in reverse order": but("in tiles_of_keys(k, rows, shift, causal):",
                                          "in reversed(tiles_of_keys(k, rows, shift, causal)):"),
    "tiles of queries and keys in a random order":
        but("in torch.arange(q.shape[2], device=q.device).split(TILE):",
            "in [torch.arange(q.shape[2]).split(TILE)[i] for i in torch.randperm(-(-q.shape[2] // TILE))]:",
            "in tiles_of_keys(k, rows, shift, causal):",
            "in [tiles_of_keys(k, rows, shift, causal)[i] for i in "
            "torch.randperm(len(tiles_of_keys(k, rows, shift, causal)))]:"),
    "exp and log, with the factor at the end": NATURAL,
    "every tile of keys is visited, also those that a causal mask hides":
        but(TILES, "tiles_of_keys(k, rows, shift, False)"),
    "small tiles of its own": but("split(TILE)", "split(48)", "in tiles_of_keys(k, rows, shift, causal):",
                                  "in torch.arange(k.shape[2]).split(37):"),
    "two passes over the tiles: first the maximum": forward("""
        scale, shift = LOG2E / q.shape[-1] ** 0.5, k.shape[2] - q.shape[2]
        out, lse = torch.zeros_like(q), torch.full(q.shape[:-1], -math.inf, dtype=wide(q).dtype)
        for rows in torch.arange(q.shape[2]).split(TILE):
            tiles = tiles_of_keys(k, rows, shift, causal)
            if not tiles:
                continue
            def score(columns):
                found = torch.einsum("bhne,bhme->bhnm", wide(q[:, :, rows]), for_each_query_head(k, columns, q))
                return hide(scale * found, visible(rows, columns, shift, causal, key_mask))
            top = torch.full(q.shape[:2] + rows.shape, -1e30, dtype=lse.dtype)
            for columns in tiles:
                top = torch.maximum(top, score(columns).max(-1).values)
            total, values = 0, 0
            for columns in tiles:
                weight = torch.exp2(score(columns) - top.unsqueeze(-1))
                total, values = total + weight.sum(-1), values + weight @ for_each_query_head(v, columns, q)
            seen = total > 0
            out[:, :, rows] = torch.where(seen[..., None], values / total[..., None], 0).to(q.dtype)
            lse[:, :, rows] = torch.where(seen, top + torch.log2(total), 0.0)
        ctx.causal = causal
        ctx.save_for_backward(q, k, v, key_mask, out, lse)
        return out"""),
    "all queries at once against one tile of keys": forward("""
        ctx.causal, e, (n, m) = causal, q.shape[-1], (q.shape[2], k.shape[2])
        Q, rows = wide(q), torch.arange(n)
        top = torch.full_like(Q[..., 0], torch.finfo(Q.dtype).min)
        total, out = torch.zeros_like(top), torch.zeros_like(Q)
        for start in range(0, m, TILE):
            columns = torch.arange(start, min(start + TILE, m))
            score = Q @ for_each_query_head(k, columns, q).transpose(-1, -2) / math.sqrt(e)
            score = hide(score, visible(rows, columns, m - n, causal, key_mask))
            new = torch.maximum(top, score.amax(-1))
            weight = torch.exp(score - new[..., None])
            old = torch.exp(top - new)
            total = total.mul(old).add(weight.sum(-1))
            out = out.mul(old[..., None]).add(weight.matmul(for_each_query_head(v, columns, q)))
            top = new
        out = torch.nan_to_num(out / total[..., None], 0.0).to(q.dtype)
        ctx.save_for_backward(q, k, v, key_mask, out, (top + total.log()) / math.log(2))
        return out"""),
    "a tile of queries against all keys it may see": against_all_keys("TILE"),
    "one query at a time": forward("""
        shift = k.shape[2] - q.shape[2]
        out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=wide(q).dtype)
        everything = torch.arange(k.shape[2])
        keys, values = for_each_query_head(k, everything, q), for_each_query_head(v, everything, q)
        for i in range(q.shape[2]):
            mask = visible(torch.tensor([i]), everything, shift, causal, key_mask)
            score = (wide(q[:, :, i, None]) * keys).sum(-1) * (LOG2E / q.shape[-1] ** 0.5)
            if mask is not None:
                score = score.masked_fill(~mask[:, :, 0], -math.inf)
            top = score.amax(-1, keepdim=True).clamp(min=LOWEST)
            weight = (score - top).exp2()
            total = weight.sum(-1, keepdim=True)
            out[:, :, i] = ((weight[..., None] * values).sum(2) / total.clamp(min=1e-30)).to(q.dtype)
            lse[:, :, i] = (top + total.log2())[..., 0]
        ctx.save_for_backward(q, k, v, key_mask, out, lse)
        ctx.causal = causal
        return out"""),
    "each tile's own softmax and lse, merged by logaddexp": forward("""
        scale, shift = 1 / q.shape[-1] ** 0.5, k.shape[2] - q.shape[2]
        out, lse = wide(q).new_zeros(q.shape), wide(q).new_full(q.shape[:-1], -math.inf)
        for rows in torch.arange(q.shape[2]).split(TILE):
            for columns in tiles_of_keys(k, rows, shift, causal):
                score = wide(q[:, :, rows]) @ for_each_query_head(k, columns, q).mT * scale
                score = hide(score, visible(rows, columns, shift, causal, key_mask))
                new = score.logsumexp(-1)
                both = torch.logaddexp(lse[:, :, rows], new)
                finite = both.isfinite()
                a, b = ((x - both).exp().where(finite, 0)[..., None] for x in (lse[:, :, rows], new))
                part = score.softmax(-1).nan_to_num(0.0) @ for_each_query_head(v, columns, q)
                out[:, :, rows] = a * out[:, :, rows] + b * part
                lse[:, :, rows] = both
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, key_mask, out, lse * LOG2E)
        ctx.causal = causal
        return out"""),
}
