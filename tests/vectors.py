"""The reference vectors in data/: how they are read, drawn from and compared with."""

from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

DATA = Path(__file__).parent / "data"


class Case(NamedTuple):
    """A reference case, as a script sees it."""

    arrays: dict  # the file
    args: Any
    networks: Any
    dataset: Any
    batch: Any
    params: dict
    target_params: dict

    def closure(self, name, params, *observations):
        """A network with its parameters, of `params` by network."""
        network = getattr(self.networks, name)
        return partial(network.apply, {"params": params[name]}, *observations)

    def shared(self, params):
        """What critic_loss and policy_loss have in common."""
        return self.args, self.networks, params, self.target_params, self.batch


def nested(arrays, prefix):
    """{"prefix/a/b": x} -> {"a": {"b": x}}"""
    flat = {}
    for key, array in arrays.items():
        if key.startswith(prefix + "/"):
            key = key.removeprefix(prefix + "/")
            flat[key] = jnp.asarray(array)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def of_networks(trees, names):
    """By our names: `names` has the reference's for each of ours."""
    found = {}
    for ours, reference in names.items():
        found[ours] = trees[reference]
        if ours == "log_beta":
            found[ours] = trees[reference]["log_value"]
    return found


def read_case(script, file, names, targets, **coefficients):
    """The case in data/`file`; `targets` are those networks that have a target copy."""
    arrays = dict(np.load(DATA / file))
    args = script.Args(
        hidden_dims=(32, 32, 32, 32),
        num_critics=3,
        horizon=2,
        discount=0.99,
        rho=0.5,
        batch_size=8,
        **coefficients,
    )
    fields = script.Dataset._fields
    dataset = script.Dataset(*(jnp.asarray(arrays[f"dataset/{field}"]) for field in fields))
    indices = jnp.asarray(arrays["indices"])
    trees = nested(arrays, "params")
    target_names = {name: f"target_{names[name]}" for name in targets}
    target_params = of_networks(trees, target_names)
    if "dual/lambda" in arrays:
        target_params["lambda"] = jnp.asarray(arrays["dual/lambda"])
        target_params["kl_average"] = jnp.asarray(arrays["dual/kl_ema"])
    return Case(
        arrays=arrays,
        args=args,
        networks=script.make_networks(args, 6, 3),
        dataset=dataset,
        batch=script.gather_chunks(dataset, indices, args.horizon, args.discount),
        params=of_networks(trees, names),
        target_params=target_params,
    )


@contextmanager
def reference_draws(case, normal, times=("bc_t",)):
    """What a script draws are the reference's numbers: `normal` and `times` have their names."""
    names = iter(normal)
    names_of_times = iter(times)
    uniform = jax.random.uniform

    def next_normal(key, shape):
        name = next(names)
        array = jnp.asarray(case.arrays[f"noise/{name}"])
        assert array.shape == shape
        return array

    def next_times(key, shape, *rest):
        if rest:  # flax may draw kernels, to see what shapes they have
            return uniform(key, shape, *rest)
        array = jnp.asarray(case.arrays[f"noise/{next(names_of_times)}"])
        assert array.shape == shape
        return array

    def steps(key, shape, lowest, beyond):
        name = "reverse_k" if "noise/reverse_k" in case.arrays else "bc_k"  # RQL's; QSM's, DAC's
        array = case.arrays[f"noise/{name}"]
        assert array.shape == shape
        assert lowest <= array.min() < array.max() < beyond
        if name == "reverse_k":
            assert (lowest, beyond) == (0, case.args.flow_steps + 1)  # both ends of the flow
        return jnp.asarray(array)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "normal", next_normal)
        patch.setattr(jax.random, "uniform", next_times)
        patch.setattr(jax.random, "randint", steps)
        yield
    assert list(names) == []


def losses_with_reference_draws(script, case, normal, times=("bc_t",)):
    """critic_loss and policy_loss: (gradients of their sum, metrics)."""
    key = jax.random.key(0)
    q = case.closure("critic", case.params)
    target_q = case.closure("critic", case.target_params)

    def losses(params):
        loss_q, metrics_q = script.critic_loss(*case.shared(params), key)
        loss_pi, metrics_pi = script.policy_loss(*case.shared(params), q, target_q, key)
        return loss_q + loss_pi, {**metrics_q, **metrics_pi, "policy_loss": loss_pi}

    with reference_draws(case, normal, times):
        return jax.jit(jax.grad(losses, has_aux=True))(case.params)


def assert_close(ours, reference, tolerance=1e-4):
    """max |difference| / max |reference| of each array is below the tolerance."""

    def check(a, b):
        assert np.shape(a) == np.shape(b)
        difference = np.abs(np.subtract(a, b))
        assert difference.max() / np.abs(b).max() < tolerance

    jax.tree.map(check, ours, reference)


def all_zero(tree):
    return all(np.all(x == 0) for x in jax.tree.leaves(tree))
