"""Training on the bandit of experiments/closed_form.py, for the tests of two scripts."""

import jax
import jax.numpy as jnp
import optax

from experiments import closed_form


def gradient_of_value(actions):
    """Of each sample: (B, 2) -> (B, 2)."""
    return jax.grad(lambda actions: closed_form.value(actions).sum())(actions)


def train(network, loss, num_updates):
    """Parameters of a network (x, time) -> (.., 2) after Adam on loss(params, key)."""
    params = network.init(jax.random.key(0), jnp.zeros((1, 3)))
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, num_updates))

    def update(carry, key):
        params, opt_state = carry
        gradients = jax.grad(loss)(params, key)
        updates, opt_state = optimizer.update(gradients, opt_state)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), None

    @jax.jit
    def all_updates(carry):
        keys = jax.random.split(jax.random.key(1), num_updates)
        return jax.lax.scan(update, carry, keys)

    (params, _), _ = all_updates((params, optimizer.init(params)))
    return params
