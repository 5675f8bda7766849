"""Numbers of docs/derivation.md, from the page's formulas for Gaussian data of variance nu."""

import numpy as np
import pytest
from conftest import ROOT

PAGE = " ".join((ROOT / "docs/derivation.md").read_text().split())


def schedule(num_steps):
    """alpha_k, abar_k, beta_k, sigma_k^2 of (D.13), k = 0 .. N."""
    steps = np.arange(num_steps + 1) / num_steps
    f = np.cos((steps + 0.008) / 1.008 * np.pi / 2) ** 2
    alpha = np.ones(num_steps + 1)
    alpha[1:] = np.maximum(f[1:] / f[:-1], 0.001)
    abar = np.cumprod(alpha)
    beta = 1 - alpha
    variance = np.zeros(num_steps + 1)
    variance[1:] = beta[1:] * (1 - abar[:-1]) / (1 - abar[1:])
    return alpha, abar, beta, variance


def multipliers(num_steps, nu):
    """A_k of (D.20), k = 0 .. N."""
    alpha, abar, beta, _ = schedule(num_steps)
    return (1 - beta / (abar * nu + 1 - abar)) / np.sqrt(alpha)


def diffusion_variance(num_steps, nu, wide=False):
    """(D.20); wide: with 1 - alpha_k in place of sigma_k^2 for k > 1."""
    _, _, beta, variance = schedule(num_steps)
    if wide:
        variance[2:] = beta[2:]
    factors = multipliers(num_steps, nu)
    chain = 1.0
    for k in range(num_steps, 0, -1):
        chain = factors[k] ** 2 * chain + variance[k]
    return chain


def slope(t, nu):
    """b_t of (D.21)."""
    return (t * nu - (1 - t)) / ((1 - t) ** 2 + t**2 * nu)


def behavior_loss(t, nu):
    """L_BC(t) at its optimum."""
    return nu / ((1 - t) ** 2 + t**2 * nu)


def sde_variance(num_steps, nu):
    """(D.21)."""
    h = 1 / num_steps
    chain = 1.0
    for i in range(num_steps - 1):
        t = i * h
        u = t + h
        factor = 1 + h * (2 * slope(t, nu) - 1 / u)
        chain = factor**2 * chain + h * 2 * (1 - t + h) / u
    return (1 + h * slope(1 - h, nu)) ** 2 * chain


def ode_variance(num_steps, nu):
    h = 1 / num_steps
    chain = 1.0
    for i in range(num_steps):
        chain = (1 + h * slope(i * h, nu)) ** 2 * chain
    return chain


def posterior_variance(num_steps, nu, calibrated=False):
    """(D.27), calibrated: with (D.30); the last step has no noise."""
    chain = 1.0
    for i in range(num_steps):
        t = i / num_steps
        u = (i + 1) / num_steps
        r = (t / u) * (1 - u) / (1 - t)
        q = r * (1 - u) / (1 - t)
        c = u * (1 - r**2)
        variance = (1 - u) ** 2 * (1 - r**2)
        if calibrated:
            variance += c**2 * (1 - t) ** 2 * behavior_loss(t, nu)
        if i == num_steps - 1:
            variance = 0.0
        factor = q + c + c * (1 - t) * slope(t, nu)
        chain = factor**2 * chain + variance
    return chain


def moves(num_steps, nu, exact=False):
    """v_policy - v_base (T,) at the loss's optimum for f(a) = a; exact: with rows a to c exact."""
    h = 1 / num_steps
    t = np.arange(num_steps) * h
    adjoints = np.full(num_steps + 1, -1.0)
    for i in range(num_steps - 1, -1, -1):
        u = t[i] + h
        factor = 1 + h * (2 * slope(t[i] if exact else u, nu) - 1 / u)
        if exact and i == num_steps - 1:
            factor = 1 + h * slope(t[i], nu)
        adjoints[i] = factor * adjoints[i + 1]
    variance = 2 * (1 - t + h) / (t + h)
    return -variance / 2 * (adjoints[1:] if exact else adjoints[:-1])


def listed(values, digits):
    return ", ".join(f"{value:.{digits}f}" for value in values)


@pytest.mark.parametrize("nu", [1.0, 0.05])
@pytest.mark.parametrize("num_steps", [10, 30, 100])
def test_variance_of_what_a_chain_samples(nu, num_steps):
    variances = [
        diffusion_variance(num_steps, nu),
        diffusion_variance(num_steps, nu, wide=True),
        sde_variance(num_steps, nu),
        ode_variance(num_steps, nu),
        posterior_variance(num_steps, nu),
        posterior_variance(num_steps, nu, calibrated=True),
    ]
    columns = " | ".join(f"{variance / nu:.3f}" for variance in variances)
    assert f"| {nu} | {num_steps} | {columns} |" in PAGE


def test_weights_of_the_diffusion():
    """(D.15) and the magnified error of epsilon."""
    for num_steps in (10, 30):
        alpha, abar, beta, _ = schedule(num_steps)
        weights = beta[2:] / (alpha[2:] * (1 - abar[1:-1]))
        error = beta[-1] / np.sqrt(alpha[-1] * (1 - abar[-1]))
        if num_steps == 10:
            middle = f"{weights[1:-1].min():.1f} to {weights[1:-1].max():.1f}"
            assert f"that is {weights[0]:.1f} at $k = 2$, {middle} in between" in PAGE
            assert f"and {weights[-1]:.0f} at $k = N$" in PAGE
            assert f"multiplied by {error:.1f}" in PAGE
        else:
            assert f"({weights[-1]:.0f} and {error:.1f} at $N = 30$)" in PAGE


def test_the_diffusion_forgets_its_start():
    def correlation(num_steps, nu):
        factor = np.prod(multipliers(num_steps, nu)[1:])
        return factor / np.sqrt(diffusion_variance(num_steps, nu))

    few = f"{correlation(10, 1):.3f} ({correlation(10, 0.05):.4f}) at $N = 10$"
    many = f"{correlation(100, 1):.4f} ({correlation(100, 0.05):.4f}) at $N = 100$"
    assert f"{few} and {many}" in PAGE
    assert f"($G_{{10}} = {np.prod(multipliers(10, 1)[1:]):.3f}$ for $\\nu = 1$)" in PAGE


def test_how_far_a_linear_value_moves_the_flow():
    times = np.arange(4) / 10
    target = 1 - times * slope(times, 1)
    assert f"by {target[0]:.0f}, {listed(target[1:], 2)} at $t = 0, 0.1, 0.2, 0.3$" in PAGE
    assert f"moves it by {listed(moves(10, 1)[:4], 2)}; (D.19)" in PAGE
    assert f"rows a-c exact by {listed(moves(10, 1, exact=True)[:4], 2)}." in PAGE


def test_how_much_of_it_the_ode_keeps():
    def fraction(num_steps, nu):
        h = 1 / num_steps
        shifts = moves(num_steps, nu)
        mean = 0.0
        for i in range(num_steps):
            mean = (1 + h * slope(i * h, nu)) * mean + h * shifts[i]
        return mean / nu

    wide = listed([fraction(num_steps, 1) for num_steps in (10, 30, 100)], 2)
    narrow = listed([fraction(num_steps, 0.05) for num_steps in (10, 30, 100)], 2)
    assert f"{wide} for $\\nu = 1$ and {narrow} for $\\nu = 0.05$" in PAGE


def test_how_steep_the_behavior_loss_is():
    times = np.linspace(0.8, 0.9, 10_001)
    mean = behavior_loss(times, 0.05).mean()
    words = f"it is {behavior_loss(0.8, 0.05):.2f} at $t = 0.8$, but its mean over [0.8, 0.9]"
    assert f"{words} is {mean:.2f}" in PAGE
