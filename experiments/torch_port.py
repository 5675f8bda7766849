"""The core of QAM in PyTorch: equations (4), (5) and (6) of qam_offline.py.

    python experiments/torch_port.py

checks it against docs/reference_vectors.npz, to the last step: the loss and its gradient. It is no
training script. Needs torch and numpy alone.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

VECTORS = Path(__file__).resolve().parent.parent / "docs/reference_vectors.npz"


def velocity(params, observations, x, t):
    """v(s, x, t): (B, O), (B, D), a number -> (B, D)."""
    y = torch.cat([observations, x, torch.full_like(x[:, :1], t)], dim=1)
    for i in range(3):
        y = y @ params[f"Dense_{i}/kernel"] + params[f"Dense_{i}/bias"]
        if i < 2:
            y = F.gelu(y, approximate="tanh")
    return y


def drift(v, x, t, u):
    return 2 * v(x, t) - x / u


def sigma(t, h):
    return (2 * (1 - t + h) / (t + h)) ** 0.5


@torch.no_grad()
def sample_memoryless_sde(v, v_base, x0, noise):
    """Equation (4): x0 (B, D), noise (T-1, B, D) -> x_0 .. x_T, a list of (B, D)."""
    h = 1 / (len(noise) + 1)
    xs = [x0]
    for i in range(len(noise)):
        mean = xs[i] + h * drift(v, xs[i], i * h, i * h + h)
        xs.append(mean + h**0.5 * sigma(i * h, h) * noise[i])
    return [*xs, xs[-1] + h * v_base(xs[-1], 1 - h)]


def lean_adjoint(v_base, xs, g):
    """Equation (5): x_0 .. x_{T-1}, g at x_T (B, D) -> g_0 .. g_{T-1}, a list of (B, D)."""
    h = 1 / len(xs)
    adjoints = []
    for i in reversed(range(len(xs))):
        x = xs[i].requires_grad_()
        u = i * h + h
        (product,) = torch.autograd.grad(drift(v_base, x, u, u), x, grad_outputs=g)  # J^T g
        g = g + h * product
        adjoints.insert(0, g)
    return adjoints


def adjoint_matching_loss(v, v_base, xs, adjoints):
    """Equation (6); gradients reach `v` alone."""
    h = 1 / len(xs)
    loss = 0
    for i in range(len(xs)):
        x = xs[i].detach()
        t = i * h
        with torch.no_grad():
            base_drift = drift(v_base, x, t, t + h)
        residual = (drift(v, x, t, t + h) - base_drift) / sigma(t, h) + sigma(t, h) * adjoints[i]
        loss = loss + (residual**2).sum(dim=1).mean()
    return loss


def main():
    case = {name: torch.tensor(array) for name, array in np.load(VECTORS).items()}

    def of_network(prefix):
        return {k.removeprefix(prefix): case[k] for k in case if k.startswith(prefix)}

    behavior = of_network("params/behavior/")
    policy = of_network("params/policy/")
    for parameter in policy.values():
        parameter.requires_grad_()

    def v_base(x, t):
        return velocity(behavior, case["observations"], x, t)

    def v_policy(x, t):
        return velocity(policy, case["observations"], x, t)

    xs = sample_memoryless_sde(v_policy, v_base, case["x0"], case["noise"])
    adjoints = lean_adjoint(v_base, xs[:-1], case["g"])
    loss = adjoint_matching_loss(v_policy, v_base, xs[:-1], adjoints)
    loss.backward()

    results = {"xs": torch.stack(xs), "adjoints": torch.stack(adjoints), "adjoint_loss": loss}
    for name, parameter in policy.items():
        results[f"grad/policy/{name}"] = parameter.grad
    for name, result in results.items():
        difference = (result - case[name]).abs().max() / case[name].abs().max()
        print(f"{name:30} differs by {difference:.1e}")
        if not difference < 1e-4:
            raise SystemExit(f"error: {name} is not that of qam_offline.py")


if __name__ == "__main__":
    main()
