"""Exercise 7: queries ask a frozen model (Sec. 3.3)."""

import weakref
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from exercises.checks.tools import demand, same, same_shape
from parts.positions import grid_positions

TITLE, MINUTES = "Queries ask a frozen model", 40
CUT = {"mllm.py": ["MLLM.condition", "MLLM.routed_states", "MLLM.with_reference"]}
PREDICT = ["A word in the middle changes: which of the words, picture tokens and queries change in H? A picture token?",
           "And which change in the condition, behind the connector?",
           "Which parts of the MLLM get a gradient, and how many numbers of the toy are they?"]
ANSWERS = ["In H: the word, the words behind it and all queries; the LLM is causal, and the reference stands before "
           "the words. Of a picture token: itself and all behind it. Of a query: itself and the queries behind it.",
           "All: the connector is bidirectional. Only padding moves nothing.",
           "Queries 2,048, router 25,222, connector 312,578. The LLM, 900,736, gets none."]
ABOUT = """`routed_states` gives H and its mask, `condition` a Condition with the router's weights too. The LLM is
frozen: none of its embeddings of words gets a gradient, nor f_v through it; queries, router and connector learn. `mask`
says what is read, and `image_id` in `ids` where the reference stands, which may be anywhere among the words;
`self.words` knows the ids of its signs. `with_reference` puts the encoder's own tokens at the reference's places of Ĥ;
with `positions` it adds the sines of `grid_positions` to these, and to Ĥ at the queries. In use (`eval`, no gradient)
all is computed as in training; nothing is kept from call to call, and no parameter, mode or input is changed."""
WORDS = "a red green circle square beside what is it".split()
# b, n, q, d, layers, k, router, positions; the last has as many of each as can be
CASES = [(3, 4, 9, 24, 4, 3, "dtr", True), (3, 9, 4, 12, 5, 2, "static", False), (2, 1, 5, 16, 3, 1, "dtr", False),
         (4, 4, 4, 16, 4, 4, "dtr", True)]


_made = weakref.WeakKeyDictionary()  # version -> case -> its model, with the numbers that it started with


def fresh(version, case: tuple):
    """An MLLM as it starts, in float64, its LLM frozen. It is made once for all claims: that takes longer than most."""
    models = _made.setdefault(version, {})
    if case not in models:
        _, _, q, d, layers, k, router, positions = case
        words = version.mllm.WordTokenizer(WORDS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same whenever it is made; `build` moves it by chance
            llm = version.mllm.LanguageModel(len(words), d, layers, heads=2, kv_heads=1, mlp=d + 3)
            model = version.mllm.MLLM(words, llm, k, q, 1, 10, router, 0.7, positions).double()
        models[case] = model, [parameter.detach().clone() for parameter in model.parameters()]
    model, start = models[case]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), start):
            parameter.copy_(value)
    model.requires_grad_(True).llm.requires_grad_(False)
    return model


def build(own, real, case: tuple):
    """An MLLM of both versions with the same random weights."""
    ours, theirs = fresh(own, case), fresh(real, case)
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters()):
            mine.copy_(other + 0.3 * torch.randn_like(other))
            other.copy_(mine)
    return ours, theirs


def prompts(model, case: tuple, reference: bool, pads: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Prompts of unlike length, `pads` columns of padding before all of them -> (ids, mask, f_v or None)"""
    b, n, _, d, *_ = case
    lengths = (torch.randperm(5)[:b] + 1).tolist()
    texts = [" ".join(WORDS[i] for i in torch.randperm(len(WORDS))[:length]) for length in lengths]
    ids, _ = model.words.prompts(texts, n if reference else 0)
    ids = torch.nn.functional.pad(ids, (pads, 0), value=model.words.pad_id)
    f_v = torch.randn(b, n, d, dtype=torch.float64) if reference else None
    return ids, ids != model.words.pad_id, f_v


@contextmanager
def other_signs(*models):
    """Whose tokenizers have other ids for their four signs."""
    for model in models:
        vars(model.words).update(pad_id=3, bos_id=2, eos_id=1, image_id=0)
    try:
        yield
    finally:
        for model in models:
            for sign in ("pad_id", "bos_id", "eos_id", "image_id"):
                delattr(model.words, sign)


def anywhere(ids: Tensor, mask: Tensor, words) -> Tensor:
    """The prompts with their tokens behind <bos> in any order, and any word where the mask shows none."""
    known = torch.tensor([words.ids[word] for word in WORDS])
    ids = torch.where(mask, ids, known[torch.randint(len(known), ids.shape)])
    for row, seen in zip(ids, mask):
        places = seen.nonzero()[1:, 0]
        row[places] = row[places[torch.randperm(len(places))]]
    return ids


def situations(own, real):
    """(both models, ids, mask, f_v) of every case with a reference, of the first two also without; then with the
    reference anywhere, words at the padding, and other signs"""
    for case in CASES:
        ours, theirs = build(own, real, case)
        for reference in (True, False) if case in CASES[:2] else (True,):
            yield ours, theirs, *prompts(theirs, case, reference, pads=int(torch.randint(3, ())))
    for case in CASES[:2]:
        ours, theirs = build(own, real, case)
        with other_signs(ours, theirs):
            yield ours, theirs, *prompts(theirs, case, True, pads=1)
        ids, mask, f_v = prompts(theirs, case, True, pads=2)
        yield ours, theirs, anywhere(ids, mask, theirs.words), mask, f_v


def whole_pass(model, ids: Tensor, mask: Tensor, f_v: Tensor | None) -> tuple[Tensor, Tensor]:
    """H and its mask by one pass over words and queries together."""
    x = model.llm.embedding(ids).detach().clone()
    for i in range(len(ids) if f_v is not None else 0):
        x[i, ids[i] == model.words.image_id] = f_v[i].detach()
    seen = torch.cat([mask, torch.ones(len(ids), len(model.queries), dtype=torch.bool)], 1)
    hidden, _ = model.llm(torch.cat([x, torch.stack([model.queries] * len(ids))], 1), seen)
    return torch.stack([hidden[layer] for layer in model.choice], 2), seen


def placed(model, H_mixed: Tensor, ids: Tensor, f_v: Tensor | None) -> Tensor:
    """Ĥ with the reference at its places, one after the other."""
    rows = [[*row] for row in H_mixed]
    for i in range(len(ids)):
        if f_v is not None:
            reference = f_v[i] + grid_positions(f_v) if model.positions else f_v[i]
            for token, place in zip(reference, (ids[i] == model.words.image_id).nonzero()[:, 0].tolist()):
                rows[i][place] = token
        if model.positions:
            for token, sines in enumerate(grid_positions(model.queries[None])):
                rows[i][ids.shape[1] + token] = rows[i][ids.shape[1] + token] + sines
    return torch.stack([torch.stack(row) for row in rows])


def conditions(model, ids: Tensor, mask: Tensor, f_v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens, the mask and the router's weights of a condition, by one whole pass."""
    H, seen = whole_pass(model, ids, mask, f_v)
    H_mixed, weights = model.router(H)
    return model.connector(placed(model, H_mixed, ids, f_v), seen), seen, weights


def routed(model, ids: Tensor, mask: Tensor, f_v: Tensor | None) -> tuple[Tensor, Tensor]:
    """`routed_states`, whose shapes are right."""
    result = model.routed_states(ids, mask, f_v)
    demand(isinstance(result, (tuple, list)) and len(result) == 2, "MLLM.routed_states: two things are wanted, H and "
                                                                    "its mask")
    H, seen = result
    long = ids.shape[1] + len(model.queries)
    same_shape(H, (len(ids), long, len(model.choice), model.queries.shape[1]), "H of MLLM.routed_states")
    same_shape(seen, (len(ids), long), "the mask of MLLM.routed_states")
    demand(seen.dtype == torch.bool, f"the mask of MLLM.routed_states: bool is wanted, not {seen.dtype}")
    demand(seen[:, :ids.shape[1]].equal(mask), "the mask of MLLM.routed_states does not begin with that of the words")
    demand(seen[:, ids.shape[1]:].all(), "the mask of MLLM.routed_states hides queries")
    return H, seen


def shapes(own, real):
    """the condition has a token for each word and then for each query, and a mask that shows them"""
    for model, _, ids, mask, f_v in situations(own, real):
        kept = [x.clone() for x in (ids, mask, model.queries)]
        routed(model, ids, mask, f_v)
        condition = model.condition(ids, mask, f_v)
        b, long = len(ids), ids.shape[1] + len(model.queries)
        same_shape(condition.tokens, (b, long, 10), "the condition's tokens")
        same_shape(condition.mask, (b, long), "the condition's mask")
        demand(condition.mask.dtype == torch.bool, "the condition's mask is not bool")
        demand(condition.mask.equal(torch.cat([mask, mask.new_ones(b, len(model.queries))], 1)),
               "the condition's mask: true is wanted at words and queries, false at padding")
        same_shape(condition.weights, (b, long, len(model.choice)), "the condition's weights")
        named = condition.tokens, condition.mask, condition.weights
        demand(isinstance(condition, tuple) and all(a is b for a, b in zip(condition, named)), "MLLM.condition: a "
               "Condition is wanted: (tokens, mask, weights)")
        demand(all(x.equal(y) for x, y in zip(kept, (ids, mask, model.queries))),
               "ids, mask or queries are changed by MLLM.condition")


def at_words(own, real):
    """at the words H holds the K chosen states of the LLM that reads words and reference, and no queries"""
    for model, theirs, ids, mask, f_v in situations(own, real):
        H, _ = routed(model, ids, mask, f_v)
        hidden, _ = theirs.llm(theirs.embed(ids, f_v), mask)
        wanted = torch.stack([hidden[layer] for layer in theirs.choice], 2)
        same(H[:, :ids.shape[1]][mask], wanted[mask], f"H at the words, layers {theirs.choice}")


def at_queries(own, real):
    """at the queries it holds those of an LLM that has read the words before them"""
    for model, theirs, ids, mask, f_v in situations(own, real):
        H, _ = routed(model, ids, mask, f_v)
        wanted, _ = whole_pass(theirs, ids, mask, f_v)
        same(H[:, ids.shape[1]:], wanted[:, ids.shape[1]:], f"H at the queries, layers {theirs.choice}")


def causal(own, real):
    """a query hears of what stands before it, and of nothing behind"""
    for case in CASES[:2]:
        model, _ = build(own, real, case)
        ids, mask, f_v = prompts(model, case, True)
        before, t = routed(model, ids, mask, f_v)[0], ids.shape[1]
        changed = 1
        with torch.no_grad():
            model.queries[changed] += 1
        moved = (routed(model, ids, mask, f_v)[0] - before).abs().amax((0, 2, 3)) > 1e-9
        demand(not moved[:t].any(), "a query was changed, and words before it moved")
        demand(not moved[t:t + changed].any(), "a query was changed, and one before it moved: the LLM is causal")
        demand(moved[t + changed:].all(), "a query was changed, and it, or one behind it, did not move")
        with torch.no_grad():
            model.queries[changed] -= 1
        one, other = (model.words.ids[word] for word in WORDS[:2])
        ids[:, -1] = torch.where(ids[:, -1] == one, other, one)
        moved = (routed(model, ids, mask, f_v)[0] - before).abs().amax((2, 3)) > 1e-9
        demand(not moved[:, :t - 1][mask[:, :-1]].any(), "the last word was changed, and one before it moved")
        demand(moved[:, t:].all(), "the last word was changed, and a query behind it did not move")


def padding(own, real):
    """padding moves nothing: a sequence means the same with more of it, and beside others"""
    for case in CASES[:2]:
        model, _ = build(own, real, case)
        for reference in (False, True):
            ids, mask, f_v = prompts(model, case, reference)
            condition = model.condition(ids, mask, f_v)
            seen = torch.nn.functional.pad(mask, (3, 0))
            for sign in ("<pad>", WORDS[0]):
                wide = torch.nn.functional.pad(ids, (3, 0), value=model.words.ids[sign])
                more = model.condition(wide, seen, f_v)
                same(more.tokens[more.mask], condition.tokens[condition.mask],
                     f"the condition, with three more of padding, where ids have {sign}")
            for i in range(len(ids)):
                short = ids[i:i + 1, mask[i]]
                alone = model.condition(short, torch.ones_like(short, dtype=torch.bool), None if f_v is None else
                                        f_v[i:i + 1])
                same(alone.tokens[0], condition.tokens[i][condition.mask[i]], "the condition of a prompt by itself")


def reference(own, real):
    """at the reference's places stand the encoder's own tokens, in their order; sines there and at the queries"""
    for model, theirs, ids, mask, f_v in ((model, theirs, turned(ids), turned(mask), f_v)
                                          for model, theirs, ids, mask, f_v in situations(own, real)
                                          for order in [torch.randperm(ids.shape[1])]
                                          for turned in (lambda x: x, lambda x: x.flip(1), lambda x: x[:, order])):
        H_mixed = torch.randn(len(ids), ids.shape[1] + len(model.queries), model.queries.shape[1], dtype=torch.float64)
        wanted, given = placed(theirs, H_mixed, ids, f_v), None if f_v is None else f_v.clone()
        out = model.with_reference(H_mixed.clone(), ids, f_v)
        same_shape(out, wanted.shape, "MLLM.with_reference")
        here = ids == model.words.image_id
        t, sines = ids.shape[1], "with sines of row and column" if model.positions else "as they are"
        same(out[:, :t][here], wanted[:, :t][here], f"MLLM.with_reference at the reference's places, f_v {sines}")
        words = mask & ~here
        same(out[:, :t][words], wanted[:, :t][words], "MLLM.with_reference at the words, where Ĥ stays")
        same(out[:, t:], wanted[:, t:], f"MLLM.with_reference at the queries, Ĥ {sines}")
        demand(f_v is None or f_v.equal(given), "MLLM.with_reference changes f_v, which the next condition reads again")
        kind = model.with_reference(H_mixed.float(), ids, None if f_v is None else f_v.float()).dtype
        demand(kind == torch.float32, f"MLLM.with_reference makes {kind} of float32")


def whole(own, real):
    """the condition is that of one pass over the whole sequence: LLM, router, reference, connector"""
    for model, theirs, ids, mask, f_v in situations(own, real):
        condition, (tokens, seen, weights) = model.condition(ids, mask, f_v), conditions(theirs, ids, mask, f_v)
        same_shape(condition.tokens, tokens.shape, "the condition's tokens")
        same_shape(condition.weights, weights.shape, "the condition's weights")
        same(condition.weights[seen], weights[seen], "the router's weights that the condition tells of")
        same(condition.tokens[seen], tokens[seen], "the condition " + ("without" if f_v is None else "with") +
             " a reference")


def learns(own, real):
    """queries, router and connector learn as from that whole pass"""
    for model, theirs, ids, mask, f_v in situations(own, real):
        condition, (tokens, seen, _) = model.condition(ids, mask, f_v), conditions(theirs, ids, mask, f_v)
        same_shape(condition.tokens, tokens.shape, "the condition's tokens")
        probe = torch.randn_like(tokens) * seen[..., None]
        demand(condition.tokens.requires_grad, "nothing in the condition has a gradient")
        names = [name for name, parameter in theirs.named_parameters() if parameter.requires_grad]
        mine, right = (dict(one.named_parameters()) for one in (model, theirs))
        ours = torch.autograd.grad((condition.tokens * probe).sum(), [mine[name] for name in names], allow_unused=True)
        wanted = torch.autograd.grad((tokens * probe).sum(), [right[name] for name in names], allow_unused=True)
        for name, one, other in zip(names, ours, wanted):
            demand(one is not None or other is None or other.abs().max() == 0, f"mllm.{name} gets no gradient")
            if one is not None and other is not None:
                same(one, other, f"the gradient of mllm.{name}", 1e-8)


def frozen(own, real):
    """words and reference are read without gradient, even where the LLM could learn"""
    for case in CASES[:2]:
        model, _ = build(own, real, case)
        model.llm.requires_grad_(True)
        for reference in (False, True):
            ids, mask, f_v = prompts(model, case, reference)
            f_v = torch.zeros(0, dtype=torch.float64).requires_grad_() if f_v is None else f_v.requires_grad_()
            H, seen = routed(model, ids, mask, f_v if reference else None)
            demand(H.requires_grad, "H has no gradient: the queries cannot learn")
            inputs = [model.queries, model.llm.embedding.weight, f_v]
            queries, words, tokens = torch.autograd.grad((H * torch.randn_like(H))[seen].sum(), inputs,
                                                         allow_unused=True)
            demand(tokens is None or not tokens.any(), "f_v gets a gradient through the LLM")
            demand(queries is not None and queries.abs().amax(-1).min() > 0, "a query gets no gradient")
            demand(words is None or words.abs().max() == 0, "the words' embeddings get a gradient")


def in_use(own, real):
    """in use it computes what it computes in training, and leaves the model and torch's modes as they were"""
    for case in CASES[:2]:
        model, _ = build(own, real, case)
        given, asks = prompts(model, case, True, pads=1), [parameter.requires_grad for parameter in model.parameters()]
        (H, seen), tokens = routed(model, *given), model.condition(*given).tokens
        try:
            for training, graph in ((True, True), (True, False), (False, True), (False, False)):
                model.train(training)
                where = ("in training" if training else "in use (after eval)") + ", without gradient" * (not graph)
                with torch.set_grad_enabled(graph):
                    (states, _), condition = routed(model, *given), model.condition(*given)
                    demand(torch.is_grad_enabled() == graph, "torch's gradient mode is another afterwards")
                demand(model.training == training, f"the model {where} is in another mode afterwards")
                demand(asks == [parameter.requires_grad for parameter in model.parameters()],
                       "requires_grad of a parameter is another afterwards")
                demand(condition.tokens.requires_grad == states.requires_grad == graph, f"{where}: the condition and H "
                       f"have {'no ' * graph}gradient")
                same(states[seen], H[seen], f"H {where}")
                same(condition.tokens[seen], tokens[seen], f"the condition {where}")
        finally:
            model.train()


def anew(own, real):
    """asked again it reads again: of another reference, and of an LLM that has changed"""
    for training in (True, False):
        model, _ = build(own, real, CASES[0])
        ids, mask, f_v = prompts(model, CASES[0], True, pads=1)
        try:
            model.train(training)
            (H, seen), condition = routed(model, ids, mask, f_v), model.condition(ids, mask, f_v)
            behind = seen.cumsum(1) > 1  # <bos>, which stands before the reference
            for what, where in (("f_v", behind), ("the LLM", seen)):
                if what == "f_v":
                    f_v = torch.randn_like(f_v)
                else:
                    with torch.no_grad():
                        for parameter in model.llm.parameters():
                            parameter.add_(0.1 * torch.randn_like(parameter))
                (H2, _), condition2 = routed(model, ids, mask, f_v), model.condition(ids, mask, f_v)
                for name, one, other in (("H", H, H2), ("the condition", condition.tokens, condition2.tokens)):
                    moved = (other - one).flatten(2).abs().amax(-1) > 1e-9
                    demand(moved[where].all(), f"{what} was changed between two calls, and {name} did not move with it")
                H, condition = H2, condition2
        finally:
            model.train()


def kinds(own, real):
    """float32 comes out where float32 goes in"""
    for case in CASES[:2]:
        model, _ = build(own, real, case)
        ids, mask, f_v = prompts(model, case, True)
        (H, seen), condition = routed(model, ids, mask, f_v), model.condition(ids, mask, f_v)
        try:
            model.float()
            (half, _), less = routed(model, ids, mask, f_v.float()), model.condition(ids, mask, f_v.float())
        finally:
            model.double()
        for what, one, wanted in (("H", half, H), ("the condition's tokens", less.tokens, condition.tokens),
                                  ("the condition's weights", less.weights, condition.weights)):
            demand(one.dtype == torch.float32, f"{what} are {one.dtype} of float32")
            same(one[seen], wanted[seen], f"{what} in float32", 2e-3)


CLAIMS = [shapes, at_words, at_queries, causal, reference, whole, padding, in_use, learns, frozen, anew, kinds]


def fingerprint(version) -> dict:

    def states(model, ids, mask, f_v):
        model.llm.requires_grad_(True)
        H, seen = model.routed_states(ids, mask, f_v)
        inputs = [model.queries, model.llm.embedding.weight]
        grads = torch.autograd.grad(H.sum(), inputs, allow_unused=True) if H.requires_grad else ()
        return [H[:, mask.shape[1]:], H[:, :mask.shape[1]][mask], seen, *grads]

    def condition(model, ids, mask, f_v):
        tokens, seen, weights = model.condition(ids, mask, f_v)
        inputs = [model.queries, model.router.W_p.weight]
        grads = torch.autograd.grad(tokens[:, -1].sum(), inputs, allow_unused=True) if tokens.requires_grad else ()
        return [tokens[:, -4:], seen, None if weights is None else weights[:, -4:], *grads]

    def placed(model, ids, mask, f_v):
        H_mixed = torch.linspace(-1, 1, ids.shape[1] + len(model.queries), dtype=torch.float64)
        H_mixed = H_mixed[:, None].repeat(len(ids), 1, model.queries.shape[1])
        return [model.with_reference(H_mixed, ids, f_v), f_v]

    def over_cases(compute):
        parts = []
        for case, reference in ((CASES[0], True), (CASES[0], False), (CASES[1], True)):
            model, _ = build(version, version, case)
            given = prompts(model, case, reference, pads=1)
            parts += [part.double().flatten() for part in compute(model, *given) if part is not None]
        return torch.cat(parts)

    return {"MLLM.routed_states": partial(over_cases, states), "MLLM.condition": partial(over_cases, condition),
            "MLLM.with_reference": partial(over_cases, placed)}


def picture(own, path):
    """Who sees whom: how far each token moves with each of what is read, in H and in the condition."""
    from PIL import Image

    from plumbing.pictures import heat_map
    torch.manual_seed(0)
    case = (1, 4, 4, 24, 4, 3, "dtr", True)
    model, _ = build(own, own, case)
    words = ["a", "red", "circle"]
    ids, mask = model.words.prompts([" ".join(words)], 4)
    f_v = torch.randn(1, 4, 24, dtype=torch.float64)
    names = ["<bos>", *(f"f_v {i}" for i in range(4)), *words, *(f"query {i}" for i in range(4))]

    def both(f_v: Tensor) -> tuple[Tensor, Tensor]:
        return model.routed_states(ids, mask, f_v)[0][0].flatten(1), model.condition(ids, mask, f_v).tokens[0]

    with torch.no_grad():
        before, tables = both(f_v), ([], [])
        for place in range(len(names)):
            reference = f_v.clone()
            home = reference[0, place - 1] if 1 <= place < 5 else model.queries[place - 8] if place >= 8 else \
                model.llm.embedding.weight[ids[0, place]]
            kept = home.clone()
            home += 0.1 * torch.randn_like(home)
            for table, after, was in zip(tables, both(reference), before):
                table.append((after - was).norm(dim=-1))
            home.copy_(kept)
    maps = []
    for table, where in zip(tables, ("in H", "in the condition")):
        moved = torch.stack(table, 1)
        maps.append(heat_map((moved / moved.max()) ** 0.3, names, names, f"row: what moves {where}; column: what was "
                             "changed (0.3rd power, the largest is 1)"))
    sheet = Image.new("RGB", (maps[0].width, 2 * maps[0].height), "white")
    for place, one in enumerate(maps):
        sheet.paste(one, (0, place * one.height))
    sheet.save(path)
    return path
