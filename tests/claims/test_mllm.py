"""The language side: words, the causal LLM and its cache, answers, and the way to the condition."""

import pytest
import torch

from mllm import MLLM, LanguageModel, language_losses
from parts.positions import rotary, rotate, sine_positions
from parts.words import Turns, UnknownWords, WordTokenizer, dialogue as dialogue_of
from router import ROUTERS

WORDS = WordTokenizer("a red blue green circle square left of what is it ,".split())
TEXT, T = ("a red circle left of it", "blue square"), 7  # T: <bos> and six words
D, QUERIES, VISUAL = 32, 9, 4


def model(router="dtr"):
    torch.manual_seed(0)
    llm = LanguageModel(len(WORDS), D, 4, 4, 2, 48)
    mllm = MLLM(WORDS, llm, k=2, queries=QUERIES, connector_layers=2, condition_width=16, router=router).double()
    for parameter in mllm.parameters():  # at their first size, weights of 0.02 let no token feel another
        torch.nn.init.normal_(parameter, std=0.4)
    return mllm


def prompts(*texts, n=0):
    """Left-padded ids and mask: <bos>, the places of n visual tokens, the words."""
    rows = [[WORDS.bos_id, *[WORDS.image_id] * n, *WORDS.encode(text)] for text in texts]
    width = max(map(len, rows))
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return torch.tensor([[WORDS.pad_id] * (width - len(row)) + row for row in rows]), mask


def pictures(b):
    return torch.randn(b, VISUAL, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def with_picture_at(ids, x, f_v):
    """`x` `b l d`, f_v where ids has the places of visual tokens."""
    x = x.clone()
    rows, places = (ids == WORDS.image_id).nonzero(as_tuple=True)
    x[rows, places] = f_v.flatten(0, 1)
    return x


def bridge(mllm, *inputs):
    """What the connector reads, and what the router wrote."""
    read, wrote = [], []
    mllm.connector.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    mllm.router.register_forward_hook(lambda module, args, out: wrote.append(out[0]))
    mllm.condition(*inputs)
    return read[0], wrote[0]


def moved(a, b):
    """Which positions of the first row differ."""
    return ((a - b)[0].abs().amax(-1) > 1e-6).tolist()


def same(a, b):
    torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


def test_words_go_to_ids_and_back():
    text = "a red circle , left of a blue square what is it"
    assert WORDS.decode([WORDS.bos_id, *WORDS.encode(text), WORDS.eos_id, WORDS.pad_id]) == text
    assert WORDS.encode("A red Circle, left of a BLUE square. What is it?") == WORDS.encode(text)


def test_unknown_words_are_all_named_each_with_the_nearest_known_one():
    with pytest.raises(UnknownWords, match="'rod' .nearest: 'red'.*'circles' .nearest: 'circle'"):
        WORDS.encode("a rod circles, rod")
    with pytest.raises(UnknownWords, match="<eos>"):  # nobody may type what only the model may say
        WORDS.encode("a <eos>")


def test_a_word_of_the_llm_sees_itself_and_those_before_it_and_their_order():
    llm = model().llm
    texts = (TEXT[0], "a red square left of it", "red a circle")
    a, b, c = (llm(llm.embedding(prompts(text)[0]))[0][-1] for text in texts)
    assert moved(a, b) == [False] * 3 + [True] * 4
    assert moved(a[:, :4], c) == [False] + [True] * 3


def test_the_llm_holds_the_states_that_are_asked_for_and_the_condition_asks_for_the_chosen():
    mllm, (ids, mask) = model(), prompts(*TEXT)
    states, _ = mllm.llm(mllm.embed(ids), mask)
    for keep in ([0, 2], [3], [1, 4]):
        kept, _ = mllm.llm(mllm.embed(ids), mask, keep=keep)
        assert len(kept) == len(keep) and all(torch.equal(a, states[i]) for a, i in zip(kept, keep))
    held = []
    mllm.llm.register_forward_hook(lambda module, given, out: held.append(out))
    mllm.condition(ids, mask)
    mllm.text_condition(ids, mask)
    assert len(held) == 3 and all(len(kept) == len(mllm.choice) == 2 for kept, _ in held)


def test_rotary_positions_keep_lengths_and_let_a_product_tell_the_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 8).double()
    at = lambda x, place: rotate(x, *(y.double() for y in rotary(torch.tensor([[place]]), 8, base=100)))[0, 0, 0]
    near, near_too, far, turned = (at(q, i) @ at(k, j) for i, j in ((5, 3), (9, 7), (9, 3), (3, 5)))
    torch.testing.assert_close(near, near_too, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(at(q, 5).norm(), q.norm(), atol=1e-5, rtol=1e-5)
    assert (near - far).abs() > 1e-2 and (near - turned).abs() > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_moves_no_hidden_state_of_a_word(side):
    llm, (ids, mask) = model().llm, prompts(*TEXT)
    if side == "right":
        ids[1], mask[1] = ids[1].roll(-4), mask[1].roll(-4)
    alone = llm(llm.embedding(prompts(TEXT[1])[0]))[0]
    for a, b in zip(llm(llm.embedding(ids), mask)[0], alone):
        same(a[1][mask[1]], b[0])


def test_words_computed_after_a_cache_equal_words_computed_at_once():
    llm, (ids, mask) = model().llm, prompts(*TEXT)
    whole, _ = llm(llm.embedding(ids), mask)
    for cut in range(1, T):
        first, cache = llm(llm.embedding(ids[:, :cut]), mask[:, :cut])
        then, _ = llm(llm.embedding(ids[:, cut:]), mask, cache)
        for a, b, c in zip(whole, first, then):
            same(torch.cat([b, c], 1)[mask], a[mask])


def answer_without_cache(mllm, ids, f_v, max_new):
    """One row without padding, everything anew for every word."""
    x, reply = torch.cat([mllm.llm.embedding(ids[:1]), f_v, mllm.llm.embedding(ids[1 + VISUAL:])])[None], []
    while len(reply) < max_new:
        word = mllm.llm.logits(mllm.llm(x)[0][-1][:, -1]).argmax(-1)
        if word.item() == WORDS.eos_id:
            break
        reply.append(word.item())
        x = torch.cat([x, mllm.llm.embedding(word)[:, None]], 1)
    return reply


def questions(seed=0):
    """Four left-padded questions of different lengths about four pictures -> ids, mask, f_v."""
    g = torch.Generator().manual_seed(seed)
    said = [torch.randint(4, len(WORDS), (length,), generator=g).tolist() for length in (6, 1, 3, 4)]
    rows = [[WORDS.bos_id, *[WORDS.image_id] * VISUAL, *words] for words in said]
    ids = torch.tensor([[0] * (7 + VISUAL - len(row)) + row for row in rows])
    return ids, ids > 0, pictures(4)


def test_a_batch_answered_with_cache_equals_each_row_answered_alone_without():
    mllm, lengths = model(), set()
    with torch.no_grad():  # where the model would say its first word it now ends
        mllm.llm.embedding.weight[WORDS.eos_id] = 1.01 * mllm.llm.embedding.weight[4]
    for seed in range(4):
        ids, mask, f_v = questions(seed)
        for max_new in (1, 8):
            replies = mllm.answer(ids, mask, f_v, max_new)
            assert replies == [answer_without_cache(mllm, row[row > 0], f, max_new) for row, f in zip(ids, f_v)]
        lengths |= {len(reply) for reply in replies}
    assert 8 in lengths and len(lengths) > 2  # some end by <eos>, others go on beside them


def test_sampled_answers_are_the_same_for_the_same_seed_and_differ_for_another():
    a, b, c = (model().answer(*questions(), 8, 5.0, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert a == b != c


def dialogue():
    """Two right-padded rows, which places the model says, and what comes before each: <bos> and a picture."""
    ids = torch.tensor([WORDS.encode("what is it of a red circle") + [2], WORDS.encode("is it of a") + [2, 0, 0, 0]])
    return ids, torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0, 0]]).bool(), pictures(2)


def turns(ids, said, owner=None):
    return Turns(ids, *said.nonzero(as_tuple=True), owner)


def prefix(mllm, f_v):
    """<bos> and the places of the visual tokens, read."""
    return mllm.read_prefix(prompts(*[""] * len(f_v), n=VISUAL)[0], f_v)


def test_text_losses_are_those_of_each_row_read_alone_after_its_own_picture():
    mllm, (ids, said, before) = model(), dialogue()
    losses = []
    for row, places, first in zip(ids, said, before):
        whole = torch.cat([mllm.llm.embedding(torch.tensor([WORDS.bos_id])), first, mllm.llm.embedding(row)])
        logits = mllm.llm.logits(mllm.llm(whole[None])[0][-1][0])
        losses += [-logits[VISUAL + i].log_softmax(-1)[row[i]].item() for i in range(len(row)) if places[i]]
    loss = mllm.text_losses(turns(ids, said), prefix(mllm, before)).mean()
    assert loss.item() == pytest.approx(sum(losses) / 6)
    loss = mllm.text_losses(turns(ids.flip(0), said.flip(0), torch.tensor([1, 0])), prefix(mllm, before)).mean()
    assert loss.item() == pytest.approx(sum(losses) / 6)


def test_words_without_a_picture_follow_bos_alone_beside_those_with_one():
    mllm, (ids, said, before) = model(), dialogue()
    said[1, 0] = True  # also the word behind <bos>
    begin = WORDS.pad([[WORDS.bos_id, *[WORDS.image_id] * VISUAL]] * 2 + [[WORDS.bos_id]])[0]
    beside = mllm.text_losses(turns(ids, said, torch.tensor([1, 2])), mllm.read_prefix(begin, before))
    alone = mllm.text_losses(turns(ids[1:], said[1:]), mllm.read_prefix(torch.tensor([[WORDS.bos_id]])))
    assert torch.allclose(beside[-len(alone):], alone, atol=1e-5)


def test_text_losses_ignore_words_after_the_last_place_said():
    mllm, (ids, said, before) = model(), dialogue()
    start, other = prefix(mllm, before), ids.clone()
    loss = mllm.text_losses(turns(ids, said), start)
    other[1, 5:] = 7
    assert torch.equal(mllm.text_losses(turns(other, said), start), loss)


def test_the_answer_to_an_empty_question_follows_the_picture_as_it_does_when_the_model_answers():
    """A conversation whose question is the image sign alone: its first word follows the prefix's last state."""
    mllm, f_v = model(), pictures(2)
    replies = ["red", "circle of a"]
    batch = dialogue_of(WORDS, [("", reply) for reply in replies])
    first = [batch.columns[batch.rows == row].min().item() for row in (0, 1)]
    assert first == [0, 0]  # nothing stands before it in its row
    start, losses = prefix(mllm, f_v), []
    for reply, picture in zip(replies, f_v):
        ids, words = prompts("", n=VISUAL)[0], [*WORDS.encode(reply), WORDS.eos_id]
        for word in words:  # as `answer` goes on: behind <bos> and the picture, word after word
            states = mllm.llm(mllm.embed(ids, picture[None]))[0][-1]
            losses.append(-mllm.llm.logits(states[0, -1]).log_softmax(-1)[word].item())
            ids = torch.cat([ids, torch.tensor([[word]])], 1)
    assert mllm.text_losses(batch, start).mean().item() == pytest.approx(sum(losses) / len(losses))
    ids, mask = prompts("", "", n=VISUAL)
    likeliest = mllm.llm.logits(start.last[:, 0]).argmax(-1).tolist()
    assert [reply[:1] for reply in mllm.answer(ids, mask, f_v, 1)] == [
        [] if word == WORDS.eos_id else [word] for word in likeliest]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("n", [0, VISUAL])
def test_condition_equals_one_pass_over_the_whole_sequence_in_values_and_gradients(router, n):
    mllm, (ids, mask), f_v = model(router), prompts(*TEXT, n=n), pictures(2) if n else None
    mllm.llm.requires_grad_(False)
    full = torch.cat([mask, torch.ones(2, QUERIES, dtype=torch.bool)], 1)
    hidden, _ = mllm.llm(torch.cat([mllm.embed(ids, f_v), mllm.queries.expand(2, -1, -1)], 1), full)
    mixed, weights = mllm.router(torch.stack([hidden[2], hidden[4]], 2))
    whole = mllm.connector(with_picture_at(ids, mixed, f_v) if n else mixed, full)
    condition = mllm.condition(ids, mask, f_v)
    assert torch.equal(condition.mask, full)
    same(condition.tokens[full], whole[full])
    same(condition.weights, weights)
    trained = {name: p for name, p in mllm.named_parameters() if p.requires_grad}
    towards = torch.randn(whole.shape) * full[..., None]
    ours, theirs = (torch.autograd.grad((y * towards).sum(), trained.values()) for y in (condition.tokens, whole))
    for name, a, b in zip(trained, ours, theirs):
        assert a.abs().max() > 0, name
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_condition_sends_gradient_to_the_queries_but_not_to_a_frozen_llm_and_never_to_the_prompts_words():
    mllm, (ids, mask) = model(), prompts(*TEXT, n=VISUAL)
    mllm.condition(ids, mask, pictures(2)).tokens.square().sum().backward()
    assert mllm.llm.embedding.weight.grad is None
    mllm.zero_grad()
    mllm.llm.requires_grad_(False)
    mllm.condition(ids, mask, pictures(2)).tokens.square().sum().backward()
    assert all(p.grad is None for p in mllm.llm.parameters())
    assert (mllm.queries.grad.abs().amax(-1) > 1e-9).all()


def test_inside_the_llm_the_queries_see_words_and_picture_and_those_do_not_see_the_queries():
    mllm, (ids, mask), f_v = model(), prompts(TEXT[0], n=VISUAL), pictures(1)
    H, other = bridge(mllm, ids, mask, f_v)[1], prompts("a red square left of it", n=VISUAL)[0]
    assert moved(bridge(mllm, other, mask, f_v)[1], H) == [False] * (3 + VISUAL) + [True] * (T - 3 + QUERIES)
    assert moved(bridge(mllm, ids, mask, f_v + 1)[1], H) == [False] + [True] * (VISUAL + T - 1 + QUERIES)
    tokens = mllm.condition(ids, mask, f_v).tokens
    with torch.no_grad():
        mllm.queries[0] += 1
    assert moved(bridge(mllm, ids, mask, f_v)[1], H) == [False] * (T + VISUAL) + [True] * QUERIES
    assert all(moved(mllm.condition(ids, mask, f_v).tokens, tokens))  # after the connector the words have seen them too


def test_inside_the_connector_every_token_sees_every_other():
    connector, x = model().connector, torch.randn(1, 6, D).double()
    for i in range(6):
        other = x.clone()
        other[0, i] += 1
        assert all(moved(connector(other, None), connector(x, None))), i


def test_the_connector_reads_f_v_itself_at_reference_positions_and_the_router_everywhere_else():
    (ids, mask), f_v = prompts(*TEXT, n=VISUAL), pictures(2)
    read, wrote = bridge(model(), ids, mask, f_v)
    assert torch.equal(read, with_picture_at(ids, wrote, f_v)) and not torch.equal(read, wrote)
    assert torch.equal(*bridge(model(), *prompts(*TEXT)))


def test_with_positions_reference_tokens_and_queries_know_their_cell_of_the_grid_and_words_do_not():
    mllm, (ids, mask), f_v = model(), prompts(*TEXT, n=VISUAL), pictures(2)
    plain = bridge(mllm, ids, mask, f_v)[0]
    mllm.positions = True
    added = bridge(mllm, ids, mask, f_v)[0] - plain
    cells, asked = (sine_positions(side, side, D, "cpu").double().expand(2, -1, -1) for side in (2, 3))
    same(added, torch.cat([with_picture_at(ids, torch.zeros(2, ids.shape[1], D).double(), cells), asked], 1))


@pytest.mark.parametrize("n", [0, VISUAL])
def test_padding_moves_no_token_of_the_condition(n):
    mllm, (ids, mask), f_v = model(), prompts(*TEXT, n=n), pictures(2) if n else None
    batch = mllm.condition(ids, mask, f_v)
    alone = mllm.condition(*prompts(TEXT[1], n=n), f_v[1:] if n else None)
    same(batch.tokens[1][batch.mask[1]], alone.tokens[0])
    same(batch.weights[1][batch.mask[1]], alone.weights[0])
    if not n:
        plain = mllm.text_condition(ids, mask)
        same(plain.tokens[1][mask[1]], mllm.text_condition(*prompts(TEXT[1])).tokens[0])


@pytest.mark.parametrize("router", ROUTERS)
def test_words_reach_the_connector_in_u1_as_in_p3_through_any_router_at_its_start(router):
    start, (ids, mask) = model(router), prompts(*TEXT)
    start.router = MLLM(WORDS, start.llm, 2, QUERIES, 2, 16, router).double().router
    read, _ = bridge(start, ids, mask)
    hidden, _ = start.llm(start.llm.embedding(ids), mask)
    mixed = hidden[4] if router == "last" else (hidden[2] + hidden[4]) / 2
    known = torch.nn.functional.layer_norm(mixed, (D,))
    same(read[:, :T][mask], known[mask])
    same(start.text_condition(ids, mask).tokens, start.connector(known, mask))


def test_copy_layers_equals_the_last_layers_of_the_llm_and_shares_no_storage_and_trains():
    mllm = model()
    mllm.llm.requires_grad_(False)
    mllm.connector.copy_layers(mllm.llm)
    originals = [*mllm.llm.layers[-2:].parameters(), *mllm.llm.norm.parameters()]
    copies = [*mllm.connector.layers.parameters(), *mllm.connector.norm.parameters()]
    for a, b in zip(copies, originals, strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr() and a.requires_grad and not b.requires_grad


def test_a_batch_without_words_has_losses_of_zero_and_a_gradient_for_every_process():
    mllm, vision = model(), torch.nn.Linear(1, D).double()
    prefix = torch.tensor([[WORDS.bos_id] + [WORDS.image_id] * VISUAL] * 2)
    losses = language_losses(mllm, vision, {"images": torch.ones(2, VISUAL, 1).double(), "prefix": prefix}, {})
    assert {symbol: value.item() for symbol, value in losses.items()} == {"L_lm": 0, "L_caption": 0, "L_text": 0}
    sum(losses.values()).backward()
    assert vision.weight.grad is not None and not vision.weight.grad.any()


@pytest.mark.parametrize("tied", (True, False))
def test_logits_computed_some_at_a_time_give_the_same_losses_and_gradients(tied, monkeypatch):
    torch.manual_seed(0)
    llm = LanguageModel(40, d=16, layers=1, heads=2, kv_heads=1, mlp=24, tied=tied)
    words, results, shapes = torch.randint(0, 40, (11,)), [], []
    compute = llm.logits
    llm.logits = lambda hidden: shapes.append(len(hidden)) or compute(hidden)
    for limit in (2**26, 3 * 40):
        monkeypatch.setattr("mllm.LOGITS", limit)
        states = torch.randn(11, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        losses = llm.word_losses(states, words)
        results.append([losses, *torch.autograd.grad(losses.square().sum(), [states, llm.embedding.weight, *(
            [] if tied else [llm.output.weight])], allow_unused=True)])
    assert shapes[:5] == [11, 3, 3, 3, 2] and sorted(shapes[5:]) == [2, 3, 3, 3]  # once more in backward
    for whole, parts in zip(*results):
        assert (whole is None and parts is None) or torch.allclose(whole, parts, atol=1e-6)
