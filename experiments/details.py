"""What happens without a detail of the implementation, measured one detail at a time.

    python experiments/details.py bandit --output-dir results/details
    python experiments/details.py write FOLDER

A detail is a text in a script and what takes its place where the detail is left out: CHANGES. The
first command trains each changed policy_loss on the bandit of experiments/closed_form.py, at 5 and
10 steps, seeds 0 and 1, and writes bandit.csv: the distance to the target (squared MMD), infinite
where training has gone astray. The second writes the changed scripts, FOLDER/NAME.py, to be run as
any script is.
"""

import sys
import types
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the scripts
from experiments import closed_form  # noqa: E402

FLOW_STEPS = (5, 10)
SEEDS = (0, 1)
UPDATES = 3000


class Change(NamedTuple):
    script: str
    replace: dict[str, str]  # each key stands once in the script
    on_bandit: bool


QAM = "qam_offline.py"
DIFFUSION = "qam_diffusion_variant.py"
VALUE = "return target_q(observations, jnp.clip(actions, -1, 1)).mean(axis=0).sum()"
# Where critics agree exactly, the standard deviation alone has no gradient.
PESSIMISTIC_VALUE = """q = target_q(observations, jnp.clip(actions, -1, 1))
        return (q.mean(axis=0) - args.rho * jnp.sqrt(q.var(axis=0) + 1e-12)).sum()"""

CHANGES = {
    "as_it_is": Change(QAM, {}, True),
    "no_shift": Change(
        QAM,
        {"return jnp.sqrt(2 * (1 - t + h) / (t + h))": "return jnp.sqrt(2 * (1 - t) / t)"},
        True,
    ),
    "shift_below_only": Change(
        QAM,
        {"return jnp.sqrt(2 * (1 - t + h) / (t + h))": "return jnp.sqrt(2 * (1 - t) / (t + h))"},
        True,
    ),
    "last_step_by_policy": Change(
        QAM,
        {"xs.append(xs[-1] + h * base_velocity(": "xs.append(xs[-1] + h * velocity("},
        True,
    ),
    "no_copy_of_behavior": Change(
        QAM,
        {'{"params": target_params["behavior"]}, obs': '{"params": params["behavior"]}, obs'},
        True,
    ),
    "adjoint_of_next_state": Change(
        QAM,
        {
            "adjoints = lean_adjoint(v_base, xs[:-1], g)": (
                "adjoints = jnp.concatenate([lean_adjoint(v_base, xs[:-1], g)[1:], g[None]])"
            )
        },
        True,
    ),
    "policy_starts_as_behavior": Change(
        QAM,
        {"networks.policy.init(key_policy,": "networks.policy.init(key_behavior,"},
        True,
    ),
    "diffusion_as_it_is": Change(DIFFUSION, {}, True),
    "diffusion_predicts_epsilon": Change(
        DIFFUSION,
        {"return spread * x + signal * predicted": "return predicted"},
        True,
    ),
    "no_clip": Change(
        QAM,
        {VALUE: "return target_q(observations, actions).mean(axis=0).sum()"},
        False,
    ),
    "no_gradient_clip": Change(
        QAM,
        {"optax.clip_by_global_norm(args.max_grad_norm)": "optax.identity()"},
        False,
    ),
    "pessimism_in_adjoint": Change(QAM, {VALUE: PESSIMISTIC_VALUE}, False),
    "no_pessimism": Change(
        QAM,
        {"next_q.mean(axis=0) - rho * next_q.std(axis=0)": "next_q.mean(axis=0)"},
        False,
    ),
    "no_valid": Change(
        QAM,
        {
            "loss = jnp.mean(batch.valid * (q - y) ** 2)": "loss = jnp.mean((q - y) ** 2)",
            "jnp.mean(valid * jnp.mean(error**2, axis=-1))": "jnp.mean(error**2)",
        },
        False,
    ),
    "no_layer_norm": Change(QAM, {"1, layer_norm=True)": "1, layer_norm=False)"}, False),
    "no_target_copies": Change(
        QAM,
        {"optax.incremental_update(old_params, target_params, args.tau)": "old_params"},
        False,
    ),
}


def changed_text(name):
    """The text of a script without the detail."""
    change = CHANGES[name]
    text = (ROOT / change.script).read_text()
    for old, new in change.replace.items():
        if text.count(old) != 1:
            raise ValueError(f"{name}: {change.script} has {text.count(old)} times: {old}")
        text = text.replace(old, new)
    return text


def changed_module(name):
    """The script without the detail, as a module."""
    module = types.ModuleType(name)
    sys.modules[name] = module  # dataclasses look there
    exec(compile(changed_text(name), f"{name}.py", "exec"), module.__dict__)
    return module


def write(folder: Annotated[Path, tyro.conf.Positional]):
    """Write every changed script as FOLDER/NAME.py."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in CHANGES:
        (folder / f"{name}.py").write_text(changed_text(name))
    print(f"wrote {len(CHANGES)} scripts into {folder}")


def bandit(output_dir: Path = Path("results/details")):
    """Train each change on the bandit and write bandit.csv."""
    rng = np.random.default_rng(0)
    target = closed_form.draw_target(rng, closed_form.NUM_SAMPLES)
    rows = []
    for name, change in CHANGES.items():
        if not change.on_bandit:
            continue
        script = changed_module(name)
        for flow_steps in FLOW_STEPS:
            for seed in SEEDS:
                trained = closed_form.train_script(
                    script, "inv_temp", (1.0,), flow_steps, UPDATES, seed
                )
                (distance,) = closed_form.distances_to(target, trained.samples)
                rows.append((name, flow_steps, seed, round(distance, 4)))
                print(*rows[-1], flush=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    header = "change steps seed squared_mmd"
    closed_form.write_csv(output_dir / "bandit.csv", header, rows)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"bandit": bandit, "write": write})
