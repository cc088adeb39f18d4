import pytest
import torch

from router import ROUTERS, is_uneven, layer_choice

B, L, K, D = 2, 5, 4, 16


def states():
    torch.manual_seed(0)
    return torch.randn(B, L, K, D, dtype=torch.float64)


def test_dtr_starts_as_the_mean():
    assert torch.equal(ROUTERS["dtr"](D, K).weights(torch.randn(2, 3, K, D)), torch.full((2, 3, K), 1 / K))


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_mixes_the_layers_to_their_mean_at_its_start_and_last_to_the_last(name):
    H, router = states(), ROUTERS[name](D, K).double()
    torch.testing.assert_close(router.mix(H, router.weights(H)), H[:, :, -1] if name == "last" else H.mean(2))


def router_named(name, like=None):
    torch.manual_seed(1)
    module = ROUTERS[name](D, K).double()
    for parameter in module.norm.parameters():
        torch.nn.init.normal_(parameter)
    if name == "dtr":  # it starts as the mean, where no claim about choosing could fail; so does concat
        torch.nn.init.normal_(module.gate[-1].weight)
    if name == "concat":
        torch.nn.init.normal_(module.blocks.weight)
    if like is not None:
        module.norm, module.W_p = like.norm, like.W_p
    return module


@pytest.mark.parametrize("name", ROUTERS)
def test_the_weights_of_every_router_are_shares_that_sum_to_1(name):
    out, w = router_named(name)(states())
    assert out.shape == (B, L, D) and w.shape == (B, L, K)
    assert (w >= 0).all()
    torch.testing.assert_close(w.sum(-1), torch.ones(B, L).double())


def test_dtr_weights_differ_from_token_to_token_and_follow_the_deepest_state_alone():
    H, dtr = states(), router_named("dtr")
    w = dtr(H)[1]
    assert (w[0, 0] - w[0, 1]).abs().max() > 1e-3
    shallow, deep = H.clone(), H.clone()
    shallow[:, :, :-1] += torch.randn(B, L, K - 1, D)
    deep[:, :, -1] += torch.randn(B, L, D)
    assert torch.equal(dtr(shallow)[1], w)
    assert (dtr(deep)[1] - w).abs().amax(-1).min() > 1e-4


def test_dtr_is_the_equation_of_the_paper_written_as_loops_in_values_and_gradients():
    H, dtr = states().requires_grad_(), router_named("dtr")
    torch.nn.init.normal_(dtr.alpha)
    dtr.temperature = 0.5
    out, _ = dtr(H)
    for b in range(B):
        for i in range(L):
            w = torch.softmax(dtr.gate(H[b, i, K - 1]) / 0.5, 0)
            mixed = sum(w[k] * dtr.alpha[k] * H[b, i, k] for k in range(K))
            token = dtr.W_p(dtr.norm(mixed))
            torch.testing.assert_close(out[b, i], token)
            a, c = (torch.autograd.grad(x.square().sum(), H, retain_graph=True)[0] for x in (out[b, i], token))
            torch.testing.assert_close(a, c)


def test_dtr_with_all_weight_on_the_last_layer_equals_last():
    dtr = router_named("dtr")
    with torch.no_grad():
        dtr.gate[2].bias[-1] = 1000
    for a, b in zip(dtr(states()), router_named("last", dtr)(states())):
        torch.testing.assert_close(a, b)


def test_dtr_with_uniform_weights_equals_mean():
    dtr = router_named("dtr")
    for parameter in dtr.gate[2].parameters():
        torch.nn.init.zeros_(parameter)
    for a, b in zip(dtr(states()), router_named("mean", dtr)(states())):
        torch.testing.assert_close(a, b)


def test_a_low_temperature_lets_each_token_choose_one_layer():
    dtr = router_named("dtr")
    dtr.temperature = 1e-6
    assert (dtr(states())[1].amax(-1) > 0.999).all()


def test_a_layer_whose_alpha_is_0_is_not_heard():
    H, dtr = states(), router_named("dtr")
    with torch.no_grad():
        dtr.alpha[1] = 0
    changed = H.clone()
    changed[:, :, 1] += 1 + torch.randn(B, L, D)
    torch.testing.assert_close(dtr(changed)[0], dtr(H)[0])
    changed[:, :, 0] += torch.randn(B, L, D)
    assert (dtr(changed)[0] - dtr(H)[0]).abs().max() > 1e-3


def test_every_layer_of_every_token_and_alpha_and_gate_get_gradient_from_dtr():
    H, dtr = states().requires_grad_(), router_named("dtr")
    (dtr(H)[0] * torch.randn(B, L, D)).sum().backward()
    assert (H.grad.abs().amax(-1) > 1e-6).all()
    assert (dtr.alpha.grad.abs() > 1e-6).all()
    for name, parameter in dtr.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-6, name


def test_static_gives_all_tokens_the_same_weights_whatever_they_are_and_learns_them():
    static = router_named("static")
    torch.nn.init.normal_(static.logits)
    out, w = static(states())
    assert torch.equal(w, w[:1, :1].expand(B, L, K)) and (w[0, 0, 0] - w[0, 0, 1]).abs() > 1e-3
    assert torch.equal(w, static(torch.randn(B, L, K, D).double())[1])
    (out * torch.randn(B, L, D)).sum().backward()
    assert (static.logits.grad.abs() > 1e-6).all()


def test_concat_is_one_matrix_over_the_states_side_by_side():
    H, concat = states(), router_named("concat")
    mixed = torch.cat([H[:, :, k] for k in range(K)], -1) @ concat.blocks.weight.T
    torch.testing.assert_close(concat(H)[0], concat.W_p(concat.norm(mixed)))


def test_concat_gives_a_layer_whose_block_is_zero_no_share():
    concat = router_named("concat")
    with torch.no_grad():
        concat.blocks.weight[:, 2 * D:3 * D] = 0
    w = concat(states())[1]
    assert (w[..., 2] == 0).all() and (w[..., [0, 1, 3]] > 0.05).all()


@pytest.mark.parametrize("name", ROUTERS)
def test_a_change_of_one_token_moves_no_other_token(name):
    H, module = states(), router_named(name)
    changed = H.clone()
    changed[0, 2] += torch.randn(K, D)
    difference = (module(changed)[0] - module(H)[0]).abs().amax(-1)
    assert difference[0, 2] > 1e-3
    difference[0, 2] = 0
    assert (difference < 1e-12).all()


def test_the_five_routers_differ_pairwise():
    dtr = router_named("dtr")
    modules = {"dtr": dtr, **{name: router_named(name, dtr) for name in ROUTERS if name != "dtr"}}
    torch.nn.init.normal_(modules["static"].logits)  # from zero it starts as the mean
    outs = [module(states())[0] for module in modules.values()]
    assert len(outs) == 5
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(outs) for b in outs[:i])


@pytest.mark.parametrize("layers, k, chosen", [(24, 4, [6, 12, 18, 24]), (28, 4, [7, 14, 21, 28]), (4, 4, [1, 2, 3, 4]),
                                               (26, 4, [6, 12, 18, 26]), (24, 1, [24]), (5, 2, [2, 5]),
                                               (6, 3, [2, 4, 6])])
def test_layers_are_chosen_evenly_and_end_with_the_last(layers, k, chosen):
    assert layer_choice(layers, k) == chosen and not is_uneven(chosen)


@pytest.mark.parametrize("layers, k, chosen", [(6, 4, [1, 2, 3, 6]), (7, 4, [1, 2, 3, 7]), (27, 4, [6, 12, 18, 27])])
def test_a_last_gap_of_half_a_step_more_is_still_even_and_a_larger_one_is_not(layers, k, chosen):
    assert layer_choice(layers, k) == chosen and is_uneven(chosen) == (layers != 27)


@pytest.mark.parametrize("k", [0, -1, 5])
def test_a_choice_of_fewer_than_one_or_more_than_all_layers_raises_value_error(k):
    with pytest.raises(ValueError, match=str(k)):
        layer_choice(4, k)
