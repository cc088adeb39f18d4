"""Exercise 7: queries ask a frozen model."""


def condition(text: str) -> dict:
    return {"mllm.py": {"MLLM.condition": text}}


def routed(text: str) -> dict:
    return {"mllm.py": {"MLLM.routed_states": text}}


def reference(text: str) -> dict:
    return {"mllm.py": {"MLLM.with_reference": text}}


READ = ("with torch.no_grad():\n"
        "    at_words, cache = self.llm(self.embed(ids, f_v), mask, keep=self.choice)\n")
LONGER = "mask = torch.cat([mask, mask.new_ones(len(mask), len(self.queries))], 1)\n"
ASK = "at_queries, _ = self.llm(repeat(self.queries, 'q d -> b q d', b=len(ids)), mask, cache, self.choice)\n"
JOIN = "return torch.stack([torch.cat(states, 1) for states in zip(at_words, at_queries)], 2), mask"

ALL = (LONGER + "words = self.embed(ids, f_v).detach()\n"
       "x = torch.cat([words, self.queries.expand(len(ids), *self.queries.shape)], 1)\n")
BY_HAND = ("cos, sin = rotary({positions}, self.llm.rotary_width)\nhidden = []\n"
           "for i, layer in enumerate(self.llm.layers, 1):\n    x, _ = layer(x, cos, sin, mask, {causal})\n"
           "    if i in self.choice:\n        hidden.append({state})\n"
           "return torch.stack(hidden, 2), mask")
NORMED = "self.llm.norm(x) if i == len(self.llm.layers) else x"


def by_hand(positions="word_positions(mask, x)", causal="True", state=NORMED) -> dict:
    return routed(ALL + BY_HAND.format(positions=positions, causal=causal, state=state))


def whole(states: str) -> dict:
    return routed(ALL + "hidden, _ = self.llm(x, mask)\n" + f"return torch.stack({states}, 2), mask")


ROUTE = "H, mask = self.routed_states(ids, mask, f_v)\n"
MIX = "H_mixed, weights = self.router(H)\n"
PLACE = "H_mixed = self.with_reference(H_mixed, ids, f_v)\n"
END = "return Condition(self.connector(H_mixed, mask), mask, weights)"

SPLIT = "at_words, at_queries = H_mixed.split([ids.shape[1], len(self.queries)], 1)\n"
WITH_SINES = "    f = f_v + grid_positions(f_v) if self.positions else f_v\n"
HERE = "    here = (ids == self.words.image_id)[..., None]\n"
SCATTER = "    at_words = at_words.masked_scatter(here, f.to(at_words.dtype))\n"
SINES = "if self.positions:\n    at_queries = at_queries + grid_positions(at_queries[:1])\n"
BACK = "return torch.cat([at_words, at_queries], 1)"
REWRITE = SPLIT + "if f_v is not None:\n" + WITH_SINES + HERE + SCATTER + SINES + BACK

WRONG = {
    "the reference stands behind <bos>, wherever its places are": reference(
        SPLIT + "if f_v is not None:\n" + WITH_SINES + "    at_words = at_words.clone()\n"
        "    for i, first in enumerate((ids == self.words.bos_id).int().argmax(1).tolist()):\n"
        "        at_words[i, first + 1:first + 1 + f.shape[1]] = f[i]\n" + SINES + BACK),
    "the reference in double precision": reference(
        SPLIT + "if f_v is not None:\n" + WITH_SINES + HERE +
        "    at_words = at_words.double().masked_scatter(here, f.double())\n" + SINES + BACK),
    "the queries are read without gradient too": routed(
        LONGER.replace("mask = ", "longer = ") +
        "with torch.no_grad():\n    at_words, cache = self.llm(self.embed(ids, f_v), mask, keep=self.choice)\n"
        "    at_queries, _ = self.llm(repeat(self.queries, 'q d -> b q d', b=len(ids)), longer, cache, self.choice)\n"
        "mask = longer\n" + JOIN),
    "the queries are detached": routed(READ + LONGER + ASK.replace("self.queries,", "self.queries.detach(),") + JOIN),
    "the words are read with gradient": routed(
        "at_words, cache = self.llm(self.embed(ids, f_v), mask, keep=self.choice)\n" + LONGER + ASK + JOIN),
    "the mask is not made longer": routed(READ + ASK + JOIN),
    "the longer mask stays inside": routed(
        READ + LONGER.replace("mask = ", "longer = ") + ASK.replace("mask", "longer") + JOIN),
    "the mask hides the queries": routed(READ + LONGER.replace("ones", "zeros") + ASK + JOIN),
    "the longer mask begins with the queries": routed(
        READ + "mask = torch.cat([mask.new_ones(len(mask), len(self.queries)), mask], 1)\n" + ASK + JOIN),
    "the LLM reads in both directions": by_hand(causal="False"),
    "the queries see each other in both directions": routed(
        READ + LONGER + "x = repeat(self.queries, 'q d -> b q d', b=len(ids))\n"
        "cos, sin = rotary(word_positions(mask, x, ids.shape[1]), self.llm.rotary_width)\nat_queries = []\n"
        "for i, layer in enumerate(self.llm.layers, 1):\n    x, _ = layer(x, cos, sin, mask, False, cache[i - 1])\n"
        f"    if i in self.choice:\n        at_queries.append({NORMED})\n" + JOIN),
    "a query does not see the other queries": routed(
        READ + LONGER + "one = mask[:, :ids.shape[1] + 1]\n"
        "asked = [self.llm(query.expand(len(ids), 1, -1), one, cache, self.choice)[0] for query in self.queries]\n"
        "at_queries = [torch.cat(states, 1) for states in zip(*asked)]\n" + JOIN),
    "positions count the padding": by_hand("torch.arange(x.shape[1])[None]"),
    "the queries' positions count the padding": by_hand(
        "torch.cat([word_positions(mask, x)[:, :ids.shape[1]], torch.arange(ids.shape[1], x.shape[1])"
        ".expand(len(ids), -1)], 1)"),
    "the queries' positions begin at 0 again": by_hand(
        "torch.cat([word_positions(mask, x)[:, :ids.shape[1]], torch.arange(len(self.queries))"
        ".expand(len(ids), -1)], 1)"),
    "the queries stand before the words": routed(
        "seen = torch.cat([mask.new_ones(len(mask), len(self.queries)), mask], 1)\n"
        "x = torch.cat([repeat(self.queries, 'q d -> b q d', b=len(ids)), self.embed(ids, f_v).detach()], 1)\n"
        "hidden, _ = self.llm(x, seen, keep=self.choice)\nH = torch.stack(hidden, 2)\nq = len(self.queries)\n"
        "return torch.cat([H[:, q:], H[:, :q]], 1), torch.cat([seen[:, q:], seen[:, :q]], 1)"),
    "the queries do not see the words": routed(
        READ + LONGER + "at_queries, _ = self.llm(repeat(self.queries, 'q d -> b q d', b=len(ids)), None, None, "
        "self.choice)\n" + JOIN),
    "the padding is seen": routed(READ.replace("mask, keep", "keep") + LONGER + ASK.replace("mask", "None") + JOIN),
    "the queries see the padding": routed(READ + LONGER + ASK.replace("mask", "torch.ones_like(mask)") + JOIN),
    "the LLM does not read the reference": routed(READ.replace("ids, f_v", "ids") + LONGER + ASK + JOIN),
    "each layer's input, not its result": whole("[hidden[i - 1] for i in self.choice]"),
    "the first K layers": whole("hidden[1:len(self.choice) + 1]"),
    "the last K layers": whole("hidden[-len(self.choice):]"),
    "the chosen layers from deep to shallow": whole("[hidden[i] for i in self.choice[::-1]]"),
    "the deepest state, K times": whole("[hidden[-1]] * len(self.choice)"),
    "the deepest state is not normed": by_hand(state="x"),
    "every chosen state is normed": by_hand(state="self.llm.norm(x)"),
    "the queries' states stand first": routed(READ + LONGER + ASK + JOIN.replace("cat(states", "cat(states[::-1]")),
    "at picture places the router's output is left": condition(ROUTE + MIX + END),
    "the reference reaches the LLM alone": condition(ROUTE + MIX + PLACE.replace("f_v)", "None)") + END),
    "the reference does not reach the LLM": condition(ROUTE.replace("f_v)", "None)") + MIX + PLACE + END),
    "the connector sees the padding": condition(ROUTE + MIX + PLACE + END.replace("H_mixed, mask)", "H_mixed, None)")),
    "the condition's mask is the words'": condition(
        ROUTE.replace("H, mask", "H, longer") + MIX + PLACE + END.replace("H_mixed, mask)", "H_mixed, longer)")),
    "the router's weights are lost": condition(ROUTE + MIX + PLACE + END.replace(", weights", "")),
    "H is detached: the queries learn nothing": condition(ROUTE + MIX.replace("(H)", "(H.detach())") + PLACE + END),
    "what the connector reads is detached":
        condition(ROUTE + MIX + PLACE + END.replace("(H_mixed,", "(H_mixed.detach(),")),
    "the connector has no gradient": condition(
        ROUTE + MIX + PLACE + "with torch.no_grad():\n    tokens = self.connector(H_mixed, mask)\n"
        "return Condition(tokens, mask, weights)"),
    "the condition is the queries' alone": condition(
        ROUTE + MIX + PLACE + "q = len(self.queries)\n"
        "return Condition(self.connector(H_mixed, mask)[:, -q:], mask[:, -q:], weights[:, -q:])"),
    "no router: the mean of the layers": condition(
        ROUTE + MIX + "H_mixed = H.mean(2)\n" + PLACE + END),
    "no connector but its way out": condition(
        ROUTE + MIX + PLACE + "return Condition(self.connector.out(self.connector.norm(H_mixed)), mask, weights)"),
    "the reference is put before the router": condition(
        ROUTE + "H = torch.stack([self.with_reference(H[:, :, i], ids, f_v) for i in range(H.shape[2])], 2)\n"
        + MIX + END),
    "f_v is added, not put in its place": reference(
        SPLIT + "if f_v is not None:\n" + WITH_SINES + HERE +
        "    at_words = at_words + torch.zeros_like(at_words).masked_scatter(here, f.to(at_words.dtype))\n"
        + SINES + BACK),
    "f_v stands in the first places, padding or not": reference(
        SPLIT + "if f_v is not None:\n" + WITH_SINES +
        "    at_words = torch.cat([at_words[:, :1], f, at_words[:, 1 + f.shape[1]:]], 1)\n" + SINES + BACK),
    "f_v stands in the last places of the words": reference(
        SPLIT + "if f_v is not None:\n" + WITH_SINES +
        "    at_words = torch.cat([at_words[:, :-f.shape[1]], f], 1)\n" + SINES + BACK),
    "the first prompt's reference stands in all": reference(
        SPLIT + "if f_v is not None:\n" + WITH_SINES + "    f = f[:1].expand_as(f)\n" + HERE + SCATTER + SINES + BACK),
    "the reference's mean in all of its places": reference(
        SPLIT + "if f_v is not None:\n" + WITH_SINES + "    f = f.mean(1, keepdim=True).expand_as(f)\n" + HERE
        + SCATTER + SINES + BACK),
    "the reference's tokens stand in reverse": reference(
        SPLIT + "if f_v is not None:\n" + WITH_SINES + "    f = f.flip(1)\n" + HERE + SCATTER + SINES + BACK),
    "the reference's tokens go from prompt to prompt": reference(
        SPLIT + "if f_v is not None:\n" + WITH_SINES + "    f = f.transpose(0, 1).contiguous()\n" + HERE + SCATTER
        + SINES + BACK),
    "the reference has no positions": reference(
        SPLIT + "if f_v is not None:\n    f = f_v\n" + HERE + SCATTER + SINES + BACK),
    "the queries have no positions": reference(
        SPLIT + "if f_v is not None:\n" + WITH_SINES + HERE + SCATTER + BACK),
    "positions, asked for or not": reference(
        SPLIT + "if f_v is not None:\n    f = f_v + grid_positions(f_v)\n" + HERE + SCATTER
        + "if len(self.queries) in (4, 9):\n    at_queries = at_queries + grid_positions(at_queries)\n" + BACK),
    "positions at the queries only where there is a reference": reference(
        SPLIT + "if f_v is not None:\n" + WITH_SINES + HERE + SCATTER
        + SINES.replace("\n    ", "\n        ").replace("if", "    if", 1) + BACK),
    "positions take the queries' place": reference(
        SPLIT + "if f_v is not None:\n" + WITH_SINES + HERE + SCATTER
        + "if self.positions:\n    at_queries = at_queries * 0 + grid_positions(at_queries)\n" + BACK),
    "f_v itself is given positions": reference(
        SPLIT + "if f_v is not None:\n    if self.positions:\n        f_v += grid_positions(f_v)\n    f = f_v\n"
        + HERE + SCATTER + SINES + BACK),
    "the reference stands in a row from its first place": reference(
        SPLIT + "if f_v is not None:\n" + WITH_SINES + "    at_words = at_words.clone()\n"
        "    for i, first in enumerate((ids == self.words.image_id).int().argmax(1).tolist()):\n"
        "        room = at_words[i, first:first + f.shape[1]].shape[0]\n"
        "        at_words[i, first:first + room] = f[i, :room]\n" + SINES + BACK),
    "the LLM reads the reference behind <bos>, wherever its places are": routed(
        "with torch.no_grad():\n    x = self.llm.embedding(ids)\n    if f_v is not None:\n        x = x.clone()\n"
        "        for i, first in enumerate((ids == self.words.bos_id).int().argmax(1).tolist()):\n"
        "            x[i, first + 1:first + 1 + f_v.shape[1]] = f_v[i]\n"
        "    at_words, cache = self.llm(x, mask, keep=self.choice)\n" + LONGER + ASK + JOIN),
    "the LLM reads the reference in a row": routed(
        "with torch.no_grad():\n    x = self.llm.embedding(ids)\n    if f_v is not None:\n        x = x.clone()\n"
        "        for i, first in enumerate((ids == self.words.image_id).int().argmax(1).tolist()):\n"
        "            room = x[i, first:first + f_v.shape[1]].shape[0]\n"
        "            x[i, first:first + room] = f_v[i, :room]\n"
        "    at_words, cache = self.llm(x, mask, keep=self.choice)\n" + LONGER + ASK + JOIN),
    "positions only while it trains":
        reference(REWRITE.replace("if self.positions", "if self.positions and self.training")),
    "in use the deepest state alone": condition(
        ROUTE + MIX + "if not self.training:\n    H_mixed = self.router.W_p(self.router.norm(H[:, :, -1]))\n" +
        PLACE + END),
    "the reference goes on only while it trains": condition(ROUTE + MIX + "if self.training:\n    " + PLACE + END),
    "the gradient is switched off, and on again, whatever it was": routed(
        "torch.set_grad_enabled(False)\nat_words, cache = self.llm(self.embed(ids, f_v), mask, keep=self.choice)\n"
        "torch.set_grad_enabled(True)\n" + LONGER + ASK + JOIN),
    "the LLM is frozen in its place, and thawed": routed(
        "self.llm.requires_grad_(False)\n" + ALL.replace(".detach()", "") +
        "hidden, _ = self.llm(x, mask, keep=self.choice)\nself.llm.requires_grad_(True)\n"
        "return torch.stack(hidden, 2), mask"),
    "the LLM is thawed before it reads the queries": routed(
        "self.llm.requires_grad_(True)\n" + READ + LONGER + ASK + JOIN),
    "the LLM reads f_v with gradient": routed(
        "x = self.llm.embedding(ids).detach()\nif f_v is not None:\n"
        "    x = x.masked_scatter((ids == self.words.image_id)[..., None], f_v.to(x.dtype))\n" + LONGER +
        "x = torch.cat([x, self.queries.expand(len(ids), *self.queries.shape)], 1)\n"
        "hidden, _ = self.llm(x, mask, keep=self.choice)\nreturn torch.stack(hidden, 2), mask"),
    "the mask that is given is not read": routed("mask = ids != self.words.pad_id\n" + READ + LONGER + ASK + JOIN),
    "the condition's mask is made of ids": condition(
        ROUTE.replace("(ids, mask", "(ids, ids != self.words.pad_id") + MIX + PLACE + END),
    "padding is 0, whatever the tokenizer says": routed("mask = ids > 0\n" + READ + LONGER + ASK + JOIN),
    "the picture's sign is 3, whatever the tokenizer says": reference(REWRITE.replace("self.words.image_id", "3")),
    "the picture's sign is the word <image>":
        reference(REWRITE.replace("self.words.image_id", "self.words.ids['<image>']")),
    "the reading of words is kept by their ids": routed(
        "key = tuple(ids.flatten().tolist())\nif getattr(self, 'read', (None,))[0] != key:\n"
        "    with torch.no_grad():\n        self.read = key, self.llm(self.embed(ids, f_v), mask, keep=self.choice)\n"
        "at_words, cache = self.read[1]\n" + LONGER + ASK + JOIN),
    "the condition is kept by its ids, in use": condition(
        "key = tuple(ids.flatten().tolist())\nif getattr(self, 'made', (None,))[0] != key or self.training:\n    " +
        (ROUTE + MIX + PLACE).replace("\n", "\n    ") +
        "self.made = key, Condition(self.connector(H_mixed, mask), mask, weights)\nreturn self.made[1]"),
    "H in double precision": routed(READ + LONGER + ASK + JOIN.replace(", 2), mask", ", 2).double(), mask")),
    "float32 in half": condition(
        ROUTE + "with torch.autocast(H.device.type, dtype=torch.bfloat16):\n    H_mixed, weights = self.router(H)\n"
        "H_mixed, weights = H_mixed.to(H.dtype), weights.to(H.dtype)\n" + PLACE + END),
    "the condition is a bag with the three names": {"mllm.py": {"+": "from types import SimpleNamespace",
        "MLLM.condition": ROUTE + MIX + PLACE +
            "return SimpleNamespace(tokens=self.connector(H_mixed, mask), mask=mask, weights=weights)"}},
    "the condition's fields stand in another order": {"mllm.py": {
        "+": "class Told(NamedTuple):\n    weights: Tensor\n    mask: Tensor\n    tokens: Tensor",
        "MLLM.condition": ROUTE + MIX + PLACE + "return Told(weights, mask, self.connector(H_mixed, mask))"}},
    "words and queries change places": reference(
        SPLIT + "if f_v is not None:\n" + WITH_SINES + HERE + SCATTER + SINES
        + BACK.replace("at_words, at_queries", "at_queries, at_words")),
}

RIGHT = {
    "one whole pass, the words detached": whole("[hidden[i] for i in self.choice]"),
    "the LLM's layers by hand, all at once": by_hand(),
    "one query after the other through the cache": routed(
        READ + "rows = []\nfor query in self.queries:\n    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)\n"
        "    states, cache = self.llm(query.expand(len(ids), 1, -1), mask, cache, self.choice)\n"
        "    rows.append(torch.stack(states, 2))\nreturn torch.cat([torch.stack(at_words, 2), *rows], 1), mask"),
    "one prompt after the other, without padding": routed(
        "H, t = [], ids.shape[1]\nfor i in range(len(ids)):\n    row = ids[i:i + 1, mask[i]]\n"
        "    words = self.embed(row, None if f_v is None else f_v[i:i + 1]).detach()\n"
        "    x = torch.cat([words, self.queries[None]], 1)\n    states = torch.stack(self.llm(x)[0], 2)\n"
        "    states = states[:, :, self.choice]\n"
        "    H.append(F.pad(states, (0, 0, 0, 0, t - row.shape[1], 0)))\n"
        "return torch.cat(H), F.pad(mask, (0, len(self.queries)), value=True)"),
    "all states kept, then chosen": routed(
        "with torch.no_grad():\n    words, cache = self.llm(self.embed(ids, f_v), mask)\n"
        "mask = torch.cat((mask, torch.ones(len(ids), len(self.queries), dtype=torch.bool)), dim=1)\n"
        "asked = self.llm(self.queries.unsqueeze(0).expand(len(ids), -1, -1), mask, cache)[0]\n"
        "return torch.cat([torch.stack([s[i] for i in self.choice], dim=2) for s in (words, asked)], dim=1), mask"),
    "where in place of masked_scatter": reference(
        SPLIT + "if f_v is not None:\n" + WITH_SINES + HERE +
        "    order = (here[..., 0].cumsum(1) - 1).clamp(min=0)\n"
        "    spread = f.gather(1, order[..., None].expand(-1, -1, f.shape[2]))\n"
        "    at_words = torch.where(here, spread, at_words)\n" + SINES + BACK),
    "loops over prompts and places": reference(
        "out = H_mixed.clone()\nfor i, row in enumerate(ids):\n    count = 0\n    for place, word in enumerate(row):\n"
        "        if f_v is not None and word == self.words.image_id:\n            out[i, place] = f_v[i, count]\n"
        "            if self.positions:\n                out[i, place] += grid_positions(f_v)[count]\n"
        "            count += 1\nif self.positions:\n"
        "    out[:, ids.shape[1]:] += grid_positions(self.queries[None])\nreturn out"),
    "written into Ĥ itself": reference(
        "if f_v is not None:\n" + WITH_SINES +
        "    H_mixed[:, :ids.shape[1]][ids == self.words.image_id] = f.flatten(0, 1)\n"
        "if self.positions:\n    H_mixed[:, ids.shape[1]:] += grid_positions(self.queries[None])\nreturn H_mixed"),
    "a list of two": routed(READ + LONGER + ASK + JOIN.replace("return ", "return [") + "]"),
    "condition by names": condition(
        "H, seen = self.routed_states(ids, mask, f_v)\nmixed, shares = self.router.forward(H)\n"
        "mixed = self.with_reference(mixed, ids, f_v)\n"
        "return Condition(mask=seen, weights=shares, tokens=self.connector(mixed, seen))"),
}
