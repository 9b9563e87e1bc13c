"""The kernel table, its marginals, and the Gaussian a step is."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ardrag_rl.flow import (
    GaussianStep,
    Kernel,
    Schedule,
    interpolate,
    predict_eps,
    predict_x0,
    randn,
    velocity,
)

LEVELS = Schedule().levels
KERNELS = [
    Kernel("ode"),
    Kernel("flow_sde", 0.7),
    Kernel("flow_sde", 0.3),
    Kernel("dance_sde", 0.5),
    Kernel("cps", 0.6),
    Kernel("renoise"),
]
STOCHASTIC = [k for k in KERNELS if k.name != "ode"]
SHAPE = (2, 4, 3, 5)


def names(kernel):
    return f"{kernel.name}-{kernel.eta}"


def pair(seed=0, shape=SHAPE, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).to(dtype), torch.randn(shape, generator=g).to(dtype)


# --- noise levels ---


def test_schedule_is_ar_drags():
    assert Schedule().timesteps == (1000.0, 755.0, 522.0)
    assert LEVELS == (1.0, 0.755, 0.522, 0.0)
    assert Schedule().num_steps == 3
    assert Schedule((1000, 500)) == Schedule((1000.0, 500.0))


@pytest.mark.parametrize(
    "timesteps",
    [(), (999.0, 500.0), (1000.0, 500.0, 500.0), (1000.0, 200.0, 500.0), (1000.0, 500.0, 0.0), (1000.0, -1.0)],
)
def test_schedule_refuses(timesteps):
    with pytest.raises(ValueError, match="timesteps="):
        Schedule(timesteps)


def test_predictions_invert_the_interpolation():
    x0, eps = pair()
    for t in (0.0, 0.25, 0.755, 1.0):
        x, v = interpolate(x0, eps, t), velocity(x0, eps)
        torch.testing.assert_close(predict_x0(x, v, t), x0)
        torch.testing.assert_close(predict_eps(x, v, t), eps)


# --- the table ---


@pytest.mark.parametrize(
    ("name", "eta", "t", "u", "c", "s"),
    [
        ("ode", 0.7, 0.755, 0.522, 0.522, 0.0),
        ("ode", 0.7, 0.522, 0.0, 0.0, 0.0),
        # at t=1 only the denominator 1-t becomes 1-t' = h
        ("flow_sde", 0.7, 1.0, 0.755, 0.755 - 0.49 / 2, 0.7),
        ("flow_sde", 0.7, 0.755, 0.522, 0.522 - 0.49 * 0.233 / 0.49, 0.7 * math.sqrt(0.755 * 0.233 / 0.245)),
        ("dance_sde", 0.5, 0.755, 0.522, 0.522 - 0.25 * 0.233 / 1.51, 0.5 * math.sqrt(0.233)),
        ("dance_sde", 0.5, 1.0, 0.755, 0.755 - 0.25 * 0.245 / 2, 0.5 * math.sqrt(0.245)),
        ("cps", 0.5, 0.755, 0.522, 0.522 / math.sqrt(2), 0.522 / math.sqrt(2)),
        ("cps", 0.5, 0.522, 0.0, 0.0, 0.0),
        ("renoise", 0.7, 0.755, 0.522, 0.0, 0.522),
        ("renoise", 0.7, 0.522, 0.0, 0.0, 0.0),
    ],
)
def test_table(name, eta, t, u, c, s):
    got = Kernel(name, eta).coefficients(t, u)
    assert [float(x) for x in got] == pytest.approx([c, s], abs=1e-6)
    assert all(x.dtype == torch.float32 for x in got)


def test_euler_leaves_more_noise_than_the_level():
    """Design section 2: flow_sde with eta=.7 at N=3 leaves std .866 and .660 where the levels are .755 and .522."""
    kernel = Kernel("flow_sde", 0.7)
    left = [math.hypot(*kernel.coefficients(LEVELS[n], LEVELS[n + 1])) for n in (0, 1)]
    assert left == pytest.approx([0.866, 0.660], abs=5e-4)


@pytest.mark.parametrize("eta", [0.1, 0.6, 1.0])
def test_cps_preserves_the_noise(eta):
    t = torch.tensor(LEVELS)
    c, s = Kernel("cps", eta).coefficients(t[:-1], t[1:])
    torch.testing.assert_close(c**2 + s**2, t[1:] ** 2)


def test_cps_with_eta_1_is_renoise():
    x, v = pair()
    for t, u in pairwise(LEVELS):
        a, b = Kernel("cps", 1.0).step(x, v, t, u), Kernel("renoise").step(x, v, t, u)
        assert torch.equal(a.mean, b.mean) and torch.equal(a.std, b.std)


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde", "cps"])
def test_little_noise_is_ode(name):
    x, v = pair()
    for t, u in ((1.0, 0.755), (0.755, 0.522)):
        step = Kernel(name, 1e-4).step(x, v, t, u)
        torch.testing.assert_close(step.mean, Kernel("ode").step(x, v, t, u).mean, atol=1e-5, rtol=0)
        assert 0 < float(step.std) < 2e-4


def test_ode_is_eulers_step():
    """Eq. 1: x' = x - h v."""
    x, v = pair()
    for t, u in pairwise(LEVELS):
        step = Kernel("ode").step(x, v, t, u)
        torch.testing.assert_close(step.mean, x - (t - u) * v)
        assert float(step.std) == 0


@pytest.mark.parametrize("name", ["ode", "cps", "renoise"])
def test_the_last_step_gives_the_clean_prediction(name):
    x, v = pair()
    step = Kernel(name).step(x, v, LEVELS[-2], 0.0)
    torch.testing.assert_close(step.mean, predict_x0(x, v, LEVELS[-2]))
    assert not step.stochastic and not Kernel(name).stochastic(0.0)


@pytest.mark.parametrize("kernel", KERNELS, ids=names)
def test_levels_of_a_batch(kernel):
    """t of shape (B,): one level for each latent."""
    x, v = pair(shape=(3, 4, 3, 5))
    t, u = torch.tensor([1.0, 0.755, 0.6]), torch.tensor([0.755, 0.522, 0.1])
    step = kernel.step(x, v, t, u)
    for i in range(3):
        alone = kernel.step(x[i], v[i], float(t[i]), float(u[i]))
        torch.testing.assert_close(step.mean[i], alone.mean)
        torch.testing.assert_close(step.std.expand(3, 1, 1, 1)[i].squeeze(), alone.std)
    assert step.std.shape == (3, 1, 1, 1)
    if kernel.name != "ode":
        assert step.log_prob(x).shape == (3,)


def test_levels_broadcast_over_leading_dimensions():
    x, v = pair(shape=(2, 3, 4, 3, 5))
    t, u = torch.tensor([1.0, 0.755, 0.522]), torch.tensor([0.755, 0.522, 0.1])
    step = Kernel("cps", 0.5).step(x, v, t, u)  # (3,) against (2, 3)
    torch.testing.assert_close(step.mean[:, 1], Kernel("cps", 0.5).step(x[:, 1], v[:, 1], 0.755, 0.522).mean)
    assert step.log_prob(x).shape == (2, 3)


@pytest.mark.parametrize("kernel", KERNELS, ids=names)
def test_sensitivity_is_the_gradient_of_the_mean(kernel):
    x, v = pair()
    for t, u in ((1.0, 0.755), (0.755, 0.522)):
        leaf = v.clone().requires_grad_()
        (grad,) = torch.autograd.grad(kernel.step(x, leaf, t, u).mean.sum(), leaf)
        torch.testing.assert_close(grad, kernel.sensitivity(t, u).expand_as(grad), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS, ids=names)
def test_arithmetic_is_float32(kernel):
    x, v = pair(dtype=torch.bfloat16)
    step = kernel.step(x, v, 0.755, 0.522)
    assert step.mean.dtype == torch.float32 and step.std.dtype == torch.float32
    assert torch.equal(step.mean, kernel.step(x.float(), v.float(), 0.755, 0.522).mean)
    assert step.sample(torch.Generator().manual_seed(0)).dtype == torch.float32
    if step.stochastic:
        assert step.log_prob(x).dtype == torch.float32


# --- refusals ---


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde"])
def test_euler_sdes_refuse_the_last_step(name):
    x, v = pair()
    with pytest.raises(ValueError, match=f"{name}.*last step.*'ode'"):
        Kernel(name).step(x, v, 0.522, 0.0)
    with pytest.raises(ValueError, match="last step"):
        Kernel(name).coefficients(torch.tensor([1.0, 0.522]), torch.tensor([0.755, 0.0]))


@pytest.mark.parametrize("kernel", KERNELS, ids=names)
@pytest.mark.parametrize(("t", "u"), [(0.5, 0.5), (0.3, 0.5), (1.2, 0.5), (0.5, -0.1), (755.0, 522.0), (math.nan, 0.1)])
def test_bad_levels(kernel, t, u):
    with pytest.raises(ValueError, match="0 <= t_next < t <= 1"):
        kernel.coefficients(t, u)


def test_bad_kernels():
    with pytest.raises(ValueError, match=r"'sde' is unknown.*flow_sde"):
        Kernel("sde")
    for eta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="eta="):
            Kernel("flow_sde", eta)
    with pytest.raises(ValueError, match="0 < eta <= 1"):
        Kernel("cps", 1.1)


@pytest.mark.parametrize("kernel", KERNELS, ids=names)
def test_stochastic_says_where_there_is_a_density(kernel):
    assert kernel.stochastic(0.5) == (kernel.name != "ode")
    assert not kernel.stochastic(0.0)


# --- marginals ---


MEAN, STD = 0.3, 0.5  # of a Gaussian x0


def marginal(u):
    """Mean and std of x_u."""
    return (1 - u) * MEAN, math.sqrt((1 - u) ** 2 * STD**2 + u**2)


def exact_velocity(x, t):
    """E[eps - x0 | x_t = x]."""
    mean, std = marginal(t)
    clean = MEAN + (1 - t) * STD**2 / std**2 * (x - mean)
    return t / std**2 * (x - mean) - clean


EULER = [Kernel("ode"), Kernel("flow_sde", 0.7), Kernel("flow_sde", 0.3), Kernel("dance_sde", 0.5)]


@pytest.mark.parametrize("kernel", EULER, ids=names)
def test_euler_keeps_the_marginal_to_first_order(kernel):
    """The variance after one step with the exact velocity is wrong by O(h^2): half the step, a quarter of the error."""
    t, points = 0.6, torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    errors = []
    for h in (0.2, 0.1, 0.05):
        step = kernel.step(points, exact_velocity(points, t), t, t - h)
        a, b = step.mean.flatten().double().tolist()  # x' = a + (b - a) x + s z
        mean, std = marginal(t - h)
        assert a + (b - a) * marginal(t)[0] == pytest.approx(mean, abs=1e-6)  # the mean is exact
        errors.append(abs((b - a) ** 2 * marginal(t)[1] ** 2 + float(step.std) ** 2 - std**2))
    assert 3 < errors[0] / errors[1] < 5 and 3 < errors[1] / errors[2] < 5


@pytest.mark.parametrize("kernel", EULER, ids=names)
def test_euler_marginal_by_monte_carlo(kernel):
    """59 steps from pure noise with the exact velocity end near the marginal at t=0.1."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, 1, 1, 1, generator=g)
    levels = torch.linspace(1, 0.1, 60).tolist()
    for t, u in pairwise(levels):
        x = kernel.step(x, exact_velocity(x, t), t, u).sample(g)
    mean, std = marginal(levels[-1])
    assert float(x.mean()) == pytest.approx(mean, abs=0.01)
    assert float(x.std()) == pytest.approx(std, abs=0.02)


@pytest.mark.parametrize("kernel", [Kernel("cps", 0.3), Kernel("cps", 0.8), Kernel("renoise")], ids=names)
@pytest.mark.parametrize(("t", "u"), [(1.0, 0.755), (0.755, 0.522), (0.522, 0.0)])
def test_marginal_is_kept_exactly(kernel, t, u):
    """With the true x0 and eps behind x, cps and renoise give (1-t') x0 + t' N(0, I): they keep the noise level."""
    g = torch.Generator().manual_seed(1)
    n = 200_000
    x0, eps = 0.3 + 0.5 * torch.randn(n, 1, 1, 1, generator=g), torch.randn(n, 1, 1, 1, generator=g)
    out = kernel.step(interpolate(x0, eps, t), velocity(x0, eps), t, u).sample(g)
    mean, std = marginal(u)
    assert float(out.mean()) == pytest.approx(mean, abs=4 * std / math.sqrt(n))
    assert float(out.std()) == pytest.approx(std, abs=4 * std / math.sqrt(2 * n))
    residual = out - (1 - u) * x0  # the noise in it, and nothing of x0
    assert float(residual.std()) == pytest.approx(u, abs=4 * u / math.sqrt(2 * n) + 1e-6)


# --- the Gaussian ---


@pytest.mark.parametrize("kernel", STOCHASTIC, ids=names)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_log_prob_and_kl_are_torchs(kernel, reduction):
    x, v = pair()
    action, other_v = pair(1)
    step, other = kernel.step(x, v, 0.755, 0.522), kernel.step(x, other_v, 0.755, 0.522)
    p, q = Normal(step.mean, step.std), Normal(other.mean, other.std)
    reduce = getattr(torch, reduction)
    torch.testing.assert_close(step.log_prob(action, reduction), reduce(p.log_prob(action), (-3, -2, -1)))
    torch.testing.assert_close(step.kl(other, reduction), reduce(kl_divergence(p, q), (-3, -2, -1)))
    assert step.log_prob(action, reduction).shape == (2,)


def test_mean_is_the_default_reduction():
    x, v = pair()
    step = Kernel("cps").step(x, v, 0.755, 0.522)
    size = x[0].numel()
    torch.testing.assert_close(step.log_prob(v) * size, step.log_prob(v, "sum"))
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        step.log_prob(v, "median")  # type: ignore[arg-type]


def test_kl_is_zero_to_itself_only_and_of_one_kernel():
    x, v = pair()
    step = Kernel("cps").step(x, v, 0.755, 0.522)
    assert torch.equal(step.kl(step), torch.zeros(2))
    wide = replace(step, std=torch.as_tensor(step.std).expand(2, 1, 1, 1))
    assert torch.equal(step.kl(wide), wide.kl(step))
    assert (step.kl(Kernel("cps").step(x, v + 0.1, 0.755, 0.522)) > 0).all()
    with pytest.raises(ValueError, match="same kernel"):
        step.kl(Kernel("cps", 0.2).step(x, v, 0.755, 0.522))


def test_deterministic_steps_have_no_density():
    x, v = pair()
    for step in (Kernel("ode").step(x, v, 0.755, 0.522), Kernel("renoise").step(x, v, 0.522, 0.0)):
        assert step.sample() is step.mean
        assert not step.stochastic
        for call in (lambda s=step: s.log_prob(x), lambda s=step: s.kl(s)):
            with pytest.raises(ValueError, match="deterministic"):
                call()


def test_samples_have_the_steps_moments():
    step = GaussianStep(torch.full((100_000, 1, 1, 1), 2.0), 0.3)
    out = step.sample(torch.Generator().manual_seed(0))
    assert float(out.mean()) == pytest.approx(2.0, abs=4e-3) and float(out.std()) == pytest.approx(0.3, abs=3e-3)


def test_one_generator_for_each_row_draws_what_each_would_alone():
    x, v = pair(shape=(3, 4, 3, 5))
    step = Kernel("cps").step(x, v, 0.755, 0.522)
    batch = step.sample([torch.Generator().manual_seed(i) for i in range(3)])
    for i in range(3):
        alone = Kernel("cps").step(x[i : i + 1], v[i : i + 1], 0.755, 0.522)
        assert torch.equal(batch[i : i + 1], alone.sample([torch.Generator().manual_seed(i)]))
    assert not torch.equal(batch[0] - step.mean[0], batch[1] - step.mean[1])
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        step.sample([torch.Generator(), torch.Generator()])


def test_one_generator_is_reproducible():
    x, v = pair()
    step = Kernel("cps").step(x, v, 0.755, 0.522)
    a, b = (step.sample(torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(
        randn((2, 3), torch.Generator().manual_seed(0)), torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    )


def test_the_batch_steps_refuse_a_partly_deterministic_density():
    """A batch in which one entry takes the last step has no density as a whole, but can be sampled."""
    x, v = pair()
    step = Kernel("cps").step(x, v, torch.tensor([0.755, 0.522]), torch.tensor([0.522, 0.0]))
    assert not step.stochastic
    out = step.sample(torch.Generator().manual_seed(0))
    assert torch.equal(out[1], step.mean[1]) and not torch.equal(out[0], step.mean[0])
    with pytest.raises(ValueError, match="deterministic"):
        step.log_prob(x)
