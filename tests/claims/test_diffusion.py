import math

import pytest
import torch

from diffusion import (SAMPLERS, AlignmentHead, DiT, Noise, add_noise, alignment_loss, flow_matching_loss, guided,
                       logit_normal_times, sample, unified_losses)
from parts.positions import sine_positions

MEAN, STD = 1.5, 0.3  # of the Gaussian whose flow is known


def known_velocity(x, sigma, std=STD):
    """E[ε − z | x_t = x] for z ~ N(MEAN, std²): a line in x."""
    sigma = sigma.view(-1, 1, 1, 1)
    slope = (sigma - (1 - sigma) * std**2) / ((1 - sigma)**2 * std**2 + sigma**2)
    return -MEAN + slope * (x - (1 - sigma) * MEAN)


def normal(n, seed=0):
    return torch.randn(n, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dit(**options):
    torch.manual_seed(0)
    model = DiT(p=3, c=16, layers=3, heads=2, cross_heads=2, condition_width=8, align_block=2, **options)
    for name, parameter in model.named_parameters():
        if name == "out.weight" or name.endswith("bias"):  # these start at zero and would hide all else
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 3, 2, 5), torch.full((2,), 0.4), torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool)


def distance(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_the_flow_matching_loss_is_least_at_the_known_velocity_of_a_gaussian(sigma):
    z, noise, sigma = MEAN + STD * normal(50000, 1), normal(50000, 2), torch.full((50000,), sigma).double()
    x_t = add_noise(z, noise, sigma)
    best = known_velocity(x_t, sigma)
    least = flow_matching_loss(best, z, noise)
    for change in (x_t - x_t.mean(), torch.ones_like(x_t)):  # the slope of the line, and its height
        for size in (-0.1, 0.1):
            assert flow_matching_loss(best + size * change, z, noise) > least + 0.5 * (size * change).square().mean()


def test_all_is_noise_at_sigma_1_and_nothing_at_sigma_0():
    z, noise = normal(2, 1), normal(2, 2)
    assert torch.equal(add_noise(z, noise, torch.tensor([1.0, 0.0])), torch.stack([noise[0], z[1]]))


def test_training_times_lie_between_0_and_1_with_their_median_at_one_half():
    times = logit_normal_times(20000, torch.Generator().manual_seed(0))
    assert ((times > 0) & (times < 1)).all()
    assert times.median().item() == pytest.approx(0.5, abs=0.01)
    assert times.quantile(0.8413).item() == pytest.approx(0.7311, abs=0.01)  # one deviation up: sigmoid(1)


def test_a_shift_moves_training_times_as_it_moves_sampling_times():
    plain, shifted = (logit_normal_times(1000, torch.Generator().manual_seed(0), shift) for shift in (1.0, 3.0))
    assert torch.allclose(shifted, 3 * plain / (1 + 2 * plain), atol=1e-5)


@pytest.mark.parametrize("sampler", ["euler", "dpm"])
def test_sampling_with_the_known_velocity_gives_the_gaussian_back(sampler):
    z, _ = sample(known_velocity, normal(20000), 100, sampler)
    assert z.mean().item() == pytest.approx(MEAN, abs=0.01) and z.std().item() == pytest.approx(STD, abs=0.01)


def test_both_samplers_come_to_the_exact_flow_as_steps_grow_and_dpm_is_the_closer():
    exact = MEAN + STD * normal(200)  # what the flow of a Gaussian makes of this noise
    euler, dpm = ([distance(sample(known_velocity, normal(200), n, name)[0], exact) for n in (8, 64, 512)]
                  for name in ("euler", "dpm"))
    assert euler[0] > 4 * euler[1] > 16 * euler[2] and euler[2] < 0.005
    assert dpm[0] > 4 * dpm[1] > 16 * dpm[2] and dpm[2] < 0.0002
    assert all(b < 0.6 * a for a, b in zip(euler, dpm))


@pytest.mark.parametrize("sampler, least, most", [("euler", 0.9, 1.1), ("dpm", 1.5, 2.2)])
def test_dpm_is_of_second_order_and_euler_of_first(sampler, least, most):
    """Sixteen times as many steps divide the error by 16 to the power of the order."""
    exact, flow = MEAN + normal(200), lambda x, sigma: known_velocity(x, sigma, std=1.0)
    coarse, fine = (distance(sample(flow, normal(200), steps, sampler)[0], exact) for steps in (64, 1024))
    assert least < math.log(coarse / fine, 16) < most


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_path_has_one_latent_more_than_steps_from_the_noise_to_z(sampler, steps):
    z, path = sample(known_velocity, normal(5), steps, sampler)
    assert len(path) == steps + 1 and torch.equal(path[0], normal(5)) and torch.equal(path[-1], z)
    assert all(distance(a, b) > 0 for a, b in zip(path, path[1:]))


def test_drawing_the_noise_anew_keeps_the_mean_and_varies_less_as_arithmetic_says():
    """Of a Gaussian x₀ is a line in x, so each step's variance follows from the one before."""
    variance, sigmas = 1.0, [1 - i / 20 for i in range(21)]
    for now, after in zip(sigmas, sigmas[1:]):
        slope = (1 - now) * STD**2 / ((1 - now) ** 2 * STD**2 + now**2)  # of x₀ in x
        variance = (1 - after) ** 2 * slope**2 * variance + after**2
    z, _ = sample(known_velocity, normal(20000), 20, "renoise", generator=torch.Generator().manual_seed(1))
    assert z.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert z.std().item() == pytest.approx(variance**0.5, abs=0.01) and variance**0.5 < 0.9 * STD


def test_the_generator_alone_decides_the_noises_that_are_drawn_anew():
    noises = (torch.Generator().manual_seed(seed) for seed in (0, 0, 1))
    first, again, other = (sample(known_velocity, normal(5), 4, "renoise", generator=noise)[0] for noise in noises)
    assert torch.equal(first, again) and distance(first, other) > 0.01


def test_a_shift_above_1_spends_more_steps_near_the_noise():
    asked = {1.0: [], 3.0: []}
    for shift, sigmas in asked.items():
        sample(lambda x, sigma: sigmas.append(sigma[0].item()) or x, normal(1), 4, "euler", shift)
    assert asked[1.0] == pytest.approx([1, 0.75, 0.5, 0.25]) and asked[3.0] == pytest.approx([1, 0.9, 0.75, 0.5])


@pytest.mark.parametrize("sampler, steps", [("heun", 5), ("dpm", 0), ("euler", -1)])
def test_an_unknown_sampler_or_no_steps_raise_value_error(sampler, steps):
    with pytest.raises(ValueError, match=sampler):
        sample(known_velocity, normal(1), steps, sampler)


def test_guidance_1_is_no_guidance_and_0_is_no_words_and_all_others_lie_on_their_line():
    model, (x, sigma, words, mask) = dit(), inputs()
    velocity = lambda *args: model(*args)[0]
    nothing = (words[:, :2] + 1, mask[:, :2])  # shorter, so that it must be padded
    v = {g: guided(velocity, (words, mask), nothing, g)(x, sigma) for g in (0, 1, 2.5, 4)}
    torch.testing.assert_close(v[1], velocity(x, sigma, words, mask))
    torch.testing.assert_close(v[0], velocity(x, sigma, *nothing))
    assert distance(v[1], v[0]) > 1e-2
    for g in (2.5, 4):
        torch.testing.assert_close(v[g], v[0] + g * (v[1] - v[0]))


def test_a_new_dit_predicts_no_velocity():
    model = DiT(p=3, c=16, layers=3, heads=2, cross_heads=2, condition_width=8, align_block=2)
    assert (model(*inputs())[0] == 0).all()


def test_padding_of_the_condition_changes_nothing():
    model, (x, sigma, words, mask) = dit(), inputs()
    v, longer = model(x, sigma, words, mask)[0], torch.cat([words, 5 * torch.randn(2, 3, 8)], 1)
    assert distance(model(x, sigma, longer, torch.cat([mask, mask[:, :3] & False], 1))[0], v) < 1e-5
    assert distance(model(x, sigma, longer, torch.cat([mask, mask[:, :3]], 1))[0], v) > 1e-2


def test_several_noises_of_each_condition_are_drawn_as_if_it_stood_there_for_each():
    model, (x, sigma, condition, mask) = dit(), inputs()
    x, sigma = torch.cat([x, x.flip(0) + 1]), torch.cat([sigma, sigma / 2])
    for together, apart in zip(model(x, sigma, condition, mask), model(x, sigma, condition.repeat(2, 1, 1),
                                                                       mask.repeat(2, 1))):
        assert distance(together, apart) < 1e-5


def test_x_and_sigma_and_the_words_each_change_the_velocity_of_their_own_row_only():
    model, given = dit(), inputs()
    v, _ = model(*given)
    for i in range(3):
        changed = [x.clone() for x in given]
        changed[i][0] += 0.2
        other, _ = model(*changed)
        assert distance(other[0], v[0]) > 1e-2 and distance(other[1], v[1]) < 1e-5, i


def test_without_attention_a_cell_of_the_grid_moves_only_the_neighbours_that_three_3x3_kernels_reach():
    model, (_, *rest) = dit(), inputs()
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.out.weight)
    x = torch.randn(2, 3, 2, 9)
    other = x.clone()
    other[:, :, 1, 0] += 1
    difference = (model(other, *rest)[0] - model(x, *rest)[0]).abs().amax((0, 1))
    assert ((difference > 0) == (torch.arange(9) < 4)).all()


def test_positions_change_the_velocity():
    (x, *rest), plain, model = inputs(), dit(), dit(positions=True)
    model.load_state_dict(plain.state_dict())
    assert distance(model(x, *rest)[0], plain(x, *rest)[0]) > 1e-2


def test_sine_positions_tell_every_cell_by_its_row_in_one_half_and_its_column_in_the_other():
    grid = sine_positions(2, 5, 16, "cpu").view(2, 5, 16)
    assert torch.equal(grid[:, :1, :8].expand(2, 5, 8), grid[..., :8])
    assert torch.equal(grid[:1, :, 8:].expand(2, 5, 8), grid[..., 8:])
    assert torch.pdist(grid.view(10, 16)).min() > 0.1


@pytest.mark.parametrize("block", [0, 4])
def test_an_align_block_that_is_not_there_raises_value_error(block):
    with pytest.raises(ValueError, match="align_block"):
        DiT(p=3, c=16, layers=3, heads=2, cross_heads=2, condition_width=8, align_block=block)


def test_alignment_loss_is_minus_1_for_equal_directions_and_1_for_opposite_and_the_mean_of_tokens():
    f_v = torch.randn(2, 4, 8)
    assert alignment_loss(3 * f_v, f_v).item() == pytest.approx(-1)
    assert alignment_loss(-f_v, f_v).item() == pytest.approx(1)
    assert alignment_loss(torch.cat([f_v[:, :3], -f_v[:, 3:]], 1), f_v).item() == pytest.approx(-0.5)


def test_alignment_trains_the_dit_up_to_its_block_and_neither_the_rest_nor_the_teacher():
    model, head, teacher = dit(), AlignmentHead(16, 12, 8), torch.randn(2, 10, 8, requires_grad=True)
    alignment_loss(head(model(*inputs())[1]), teacher).backward()
    trained = [any(p.grad is not None and p.grad.abs().max() > 0 for p in block.parameters()) for block in model.blocks]
    assert trained == [True, True, False] and model.out.weight.grad is None and teacher.grad is None


def test_the_teacher_is_what_the_tokenizer_says_of_the_picture_wanted():
    model, head = dit(), AlignmentHead(16, 12, 6)
    images, references, drawn = torch.randn(3, 4, 6), torch.randn(1, 4, 6), torch.randn(3, 3, 2, 2)
    noise = Noise(torch.rand(6), torch.randn(6, 3, 2, 2))  # two noises a picture, in rounds of the whole batch
    asked = []

    class Asked:
        def __init__(self, b, f_v):
            asked.append(f_v)
            self.tokens, self.mask = torch.ones(b, 4, 8), torch.ones(b, 4, dtype=torch.bool)

    def losses(wanted, reference):
        batch = {"words": (2, None), "instructions": (1, None), "references": reference, "images": wanted,
                 "noise": noise}
        return unified_losses(batch, {"L_fm": 1.0, "L_align": 0.5}, condition=lambda b, mask, f_v=None: Asked(b, f_v),
                              features=lambda pictures: pictures, clean_latent=lambda pictures: (drawn, pictures),
                              dit=model, align_head=head)

    found = losses(images, references)
    with torch.no_grad():
        z = drawn.repeat(2, 1, 1, 1)
        velocity, f_dit = model(add_noise(z, noise.epsilon, noise.sigma), noise.sigma, torch.ones(6, 4, 8),
                                torch.ones(6, 4, dtype=torch.bool))
        cosines = torch.cosine_similarity(head(f_dit), images.repeat(2, 1, 1), dim=-1)
    torch.testing.assert_close(found["L_align"].detach(), -cosines.mean())
    torch.testing.assert_close(found["L_fm"].detach(), flow_matching_loss(velocity, z, noise.epsilon))
    assert asked[0] is None and asked[1] is references  # the LLM reads the reference, and the teacher never does
    assert losses(images, references + 1)["L_align"].equal(found["L_align"])
    assert not losses(images + 1, references)["L_align"].equal(found["L_align"])
