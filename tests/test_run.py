"""Real runs of qam_offline.py and of the collector, and what they say to bad input."""

import dataclasses
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from functools import partial
from pathlib import Path

import flax
import gymnasium
import jax
import numpy as np
import ogbench
import pytest
from conftest import DOMAIN, ROOT, command

import qam_offline as qam

SCRIPT = "qam_offline.py"


def run(*args, **kwargs):
    return subprocess.run(command(*args), capture_output=True, text=True, **kwargs)


def folder_of(run_dir):
    (folder,) = run_dir.iterdir()
    return folder


def rows(path):
    header, *lines = path.read_text().splitlines()
    return [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]


def resume(folder, dataset_dir, *flags):
    line = [sys.executable, ROOT / SCRIPT, "--resume", folder, "--dataset-dir", dataset_dir, *flags]
    return [str(part) for part in line]


@pytest.fixture(scope="session")
def finished(dataset_dir, tmp_path_factory):
    """A finished tiny run, and what it printed."""
    run_dir = tmp_path_factory.mktemp("runs")
    done = run(SCRIPT, dataset_dir, run_dir, "--track")
    assert done.returncode == 0, done.stderr
    return folder_of(run_dir), done.stdout + done.stderr


def test_run_folder(finished, dataset_dir):
    folder, printed = finished
    metrics, evals = rows(folder / "metrics.csv"), rows(folder / "eval.csv")
    assert [int(row["step"]) for row in metrics] == [20, 40, 60] and [int(row["step"]) for row in evals] == [30, 60]
    columns = ["step", "seed", "phase", "success_rate", "return", "length", "episodes", "wall_seconds"]
    assert list(evals[0]) == columns and evals[0]["episodes"] == "2" and evals[0]["phase"] == "offline"
    assert {"critic_loss", "flow_loss", "adjoint_loss", "policy_grad_norm", "updates_per_second"} <= set(metrics[0])
    saved = json.loads((folder / "args.json").read_text())
    assert saved["discount"] == 0.99 and saved["inv_temp"] == 1.0 and saved["sparse"] is False
    assert saved["data"]["path"] == [str(dataset_dir / f"{DOMAIN}-v0.npz")] and saved["data"]["transitions"] == 3000
    assert len(saved["data"]["sha256"][0]) == 64 and saved["versions"]["jax"] == jax.__version__
    assert "discount 0.99" in printed and "step 60  seed 1  phase offline  success_rate" in printed
    assert (folder / "wandb").is_dir()  # --track without a network


def test_eval_only_gives_the_same_score_with_any_number_of_processes(finished, tmp_path):
    """The untrained policy's score is 0 anyway, so the last action of each episode is compared too."""
    folder = shutil.copytree(finished[0], tmp_path / "run")
    scores = []
    for flags in (["--eval-envs", "1"], ["--eval-envs", "2"]):
        line = [sys.executable, ROOT / SCRIPT, "--eval-only", folder, *flags, "--eval-episodes", "3"]
        done = subprocess.run(list(map(str, line)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        scores.append(re.search(r"success_rate.*episodes \d+", done.stdout)[0])
    assert scores[0] == scores[1] and scores[0].endswith("episodes 3")


class Recorded(qam.ChunkedEpisode):
    """Tells each episode's fate in a number that depends on every action: the return is a sum of its actions."""

    def step(self, chunk):
        observation, reward, terminated, truncated, scores = super().step(chunk)
        self.scores["return"] += float(np.sum(chunk))
        return observation, reward, terminated, truncated, scores


def test_an_episode_depends_on_its_number_alone(finished):
    folder, _ = finished
    args, saved = qam.resolve_args(qam.Args(eval_only=str(folder), eval_episodes=3))
    networks = qam.make_networks(args, saved["observation_dim"], saved["action_dim"])
    states = qam.load_checkpoint(folder)["states"]
    states = qam.TrainState(states["params"], None, None, states["step"])
    act = lambda params, s, key, n: qam.sample_actions(args, networks, params, s[None], jax.random.fold_in(key, n))[0]
    make = partial(Recorded, f"{DOMAIN.rsplit('-', 1)[0]}-singletask-task4-v0", args.horizon)
    returns = []
    for num_envs in (1, 2):
        mode = gymnasium.vector.AutoresetMode.DISABLED
        envs = gymnasium.vector.AsyncVectorEnv([make] * num_envs, context="spawn", autoreset_mode=mode)
        (row,) = qam.evaluate(args, jax.jit(jax.vmap(act, (None, 0, None, 0))), states, envs, folder, [])
        returns.append(row["return"])
        envs.close()
        assert row["episodes"] == 3
    assert returns[0] == pytest.approx(returns[1], rel=1e-4) and returns[0] != -1000


def test_readme_way_to_load_a_checkpoint(finished):
    folder, _ = finished
    args, saved = qam.resolve_args(qam.Args(eval_only=str(folder)))
    networks = qam.make_networks(args, saved["observation_dim"], saved["action_dim"])
    params = jax.tree.map(lambda x: x[0], qam.load_checkpoint(folder)["states"]["params"])
    actions = qam.sample_actions(args, networks, params, np.zeros((5, 2), np.float32), jax.random.key(0))
    assert actions.shape == (5, 4 * 2) and np.abs(actions).max() <= 1


LONGER = "--offline-steps 400 --eval-every 200 --checkpoint-every 50 --hidden-dims 8".split()


@pytest.fixture(scope="session")
def uninterrupted(dataset_dir, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole")
    assert run(SCRIPT, dataset_dir, run_dir, *LONGER).returncode == 0
    return folder_of(run_dir)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_run_ends_as_if_it_had_not_been(uninterrupted, dataset_dir, tmp_path, how):
    """Interrupted at a random moment and resumed: the same bits as without, no gap or duplicate in the CSV files."""
    whole, line = uninterrupted, command(SCRIPT, dataset_dir, tmp_path / "cut", *LONGER)
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while not list((tmp_path / "cut").glob("*/checkpoint.previous.msgpack")):
        time.sleep(0.01)
        assert process.poll() is None
    time.sleep(random.random() / 2)
    process.send_signal(how)
    printed = process.communicate()[0]
    cut = folder_of(tmp_path / "cut")
    if how != signal.SIGKILL and process.returncode:  # it may have been through already
        assert process.returncode == 128 + how and f"--resume {cut}" in printed
    if how == signal.SIGKILL:  # what a torn write leaves behind
        (cut / "checkpoint.msgpack").write_bytes((cut / "checkpoint.msgpack").read_bytes()[:-9])
    done = subprocess.run(resume(cut, dataset_dir), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("is damaged" in done.stderr) == (how == signal.SIGKILL)
    again = subprocess.run(resume(cut, dataset_dir), capture_output=True, text=True)
    assert again.returncode == 0 and "damaged" not in again.stderr, again.stderr
    states = [qam.load_checkpoint(folder)["states"] for folder in (whole, cut)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    for file, untimed in (("eval.csv", "wall_seconds"), ("metrics.csv", "updates_per_second")):
        first, second = (
            [{k: v for k, v in row.items() if k != untimed} for row in rows(f / file)] for f in (whole, cut)
        )
        assert first == second


def test_seeds_side_by_side_are_the_seeds_alone(dataset_dir, finished, tmp_path):
    alone, _ = finished
    assert run(SCRIPT, dataset_dir, tmp_path, "--num-seeds", "2").returncode == 0
    both = folder_of(tmp_path)
    first = [row for row in rows(both / "metrics.csv") if row["seed"] == "1"]
    for name in ("critic_loss", "flow_loss", "adjoint_loss"):
        expected = [float(row[name]) for row in rows(alone / "metrics.csv")]
        np.testing.assert_allclose([float(row[name]) for row in first], expected, rtol=1e-3)
    assert [row["seed"] for row in rows(both / "eval.csv")] == ["1", "2", "1", "2"]


def test_shards_take_turns(dataset_dir, tmp_path):
    """Two shards of different length and rewards: the losses are those of a run on each shard's steps."""
    arrays = dict(np.load(dataset_dir / f"{DOMAIN}-v0.npz"))
    for name, episodes in (("a", 1), ("b", 2)):
        np.savez(tmp_path / f"{name}.npz", **{field: values[: 1001 * episodes] for field, values in arrays.items()})
    done = run(SCRIPT, tmp_path, tmp_path / "runs", "--dataset-replace-every", "20")
    assert done.returncode == 0, done.stderr
    folder = folder_of(tmp_path / "runs")
    names = [Path(path).name for path in json.loads((folder / "args.json").read_text())["data"]["path"]]
    assert names == ["a.npz", "b.npz"]
    first = names[np.random.default_rng(1).permutation(2)[0]]
    (tmp_path / "one").mkdir()
    shutil.copy(tmp_path / first, tmp_path / "one")
    assert run(SCRIPT, tmp_path / "one", tmp_path / "alone").returncode == 0
    losses = [[row["critic_loss"] for row in rows(f / "metrics.csv")] for f in (folder, folder_of(tmp_path / "alone"))]
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]
    assert (
        run(SCRIPT, tmp_path, tmp_path / "half", "--dataset-replace-every", "20", "--offline-steps", "30").returncode
        == 0
    )
    half = folder_of(tmp_path / "half")  # resumed in the middle of the second shard's turn
    done = subprocess.run(resume(half, tmp_path, "--offline-steps", "60"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [row["critic_loss"] for row in rows(half / "metrics.csv")] == losses[0]


def test_video_of_an_evaluation_episode(finished, tmp_path):
    """One mp4 of 1000 frames at most, written once, although the other process still plays."""
    folder = shutil.copytree(finished[0], tmp_path / "run")
    env = qam.ChunkedEpisode(f"{DOMAIN.rsplit('-', 1)[0]}-singletask-task4-v0", 4)
    env.unwrapped.render = lambda: np.zeros((16, 16, 3), np.uint8)  # no display is needed for this test
    env.reset(seed=0, options={"videos": {0: str(folder / "episode.mp4")}})
    for _ in range(250):
        env.step(np.zeros(8))
    written = (folder / "episode.mp4").stat()
    env.step(np.zeros(8))
    assert written.st_size > 0 and (folder / "episode.mp4").stat().st_mtime_ns == written.st_mtime_ns


@pytest.mark.parametrize(
    "args, words",
    [
        (dict(env_id="cube-duble-play"), "cube-double-play"),
        (dict(env_id="visual-cube-double-play"), "cube-double-play"),
        (dict(env_id="powderworld-easy-play"), "state-based"),
        (dict(env_id="scene-play-task9"), "task1 to task5"),
        (dict(env_id=""), "nearest"),
        (dict(eval_episodes=0), "--eval-episodes"),
        (dict(batch_size=-1), "--batch-size"),
        (dict(hidden_dims=()), "--hidden-dims"),
        (dict(discount=1.5), "--discount"),
        (dict(discount=float("nan")), "--discount"),
        (dict(flow_steps=1), "--flow-steps"),
        (dict(learning_rate=0.0), "--learning-rate"),
        (dict(seed=-1), "--seed"),
        (dict(resume="/nowhere"), "/nowhere"),
        (dict(eval_only=str(ROOT / "tests")), "no run"),
        (dict(dataset_dir=str(ROOT / "tests")), "--dataset-dir"),
    ],
)
def test_bad_flags_end_in_one_sentence(args, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        qam.main(qam.Args(**args))
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and words in printed and printed.count("\n") == 1


def damage(kind, folder):
    path = folder / f"{DOMAIN}-v0.npz"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
        return
    arrays = dict(np.load(path))
    if kind == "foreign":
        arrays = {"weights": np.zeros(3)}
    if kind == "nan":
        arrays["qpos"][5] = np.nan
    if kind == "open end":
        arrays["terminals"][-1] = False
    if kind == "short":
        arrays = {field: values[-3:] for field, values in arrays.items()}
    if kind == "other dimensions":
        arrays["observations"] = np.zeros((len(arrays["actions"]), 7), np.float32)
    np.savez(path, **arrays)


@pytest.mark.parametrize("kind", ["truncated", "foreign", "nan", "open end", "short", "other dimensions"])
def test_bad_data_ends_in_one_sentence(kind, dataset_dir, tmp_path, capsys):
    folder = shutil.copytree(dataset_dir, tmp_path / "data")
    damage(kind, folder)
    args = qam.Args(env_id=f"{DOMAIN}-task4", dataset_dir=str(folder), horizon=4, hidden_dims=(8,), offline_steps=1)
    with pytest.raises(SystemExit) as stopped:
        qam.main(dataclasses.replace(args, run_dir=str(tmp_path / "runs")))
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and str(folder) in printed and printed.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_bad_folders_end_in_one_sentence(finished, dataset_dir, tmp_path):
    (tmp_path / "file").write_text("")
    done = run(SCRIPT, dataset_dir, tmp_path / "file")
    assert done.returncode == 2 and "--run-dir" in done.stderr and "Traceback" not in done.stderr
    foreign = shutil.copytree(finished[0], tmp_path / "foreign")
    saved = json.loads((foreign / "args.json").read_text())
    (foreign / "args.json").write_text(json.dumps(saved | {"script": "fql"}))
    done = subprocess.run(resume(foreign, dataset_dir), capture_output=True, text=True)
    assert done.returncode == 2 and "another script" in done.stderr
    done = subprocess.run(resume(finished[0], dataset_dir, "--tau", "0.1"), capture_output=True, text=True)
    assert done.returncode == 2 and "another tau" in done.stderr


def test_loss_that_is_not_finite_stops_the_run(dataset_dir, tmp_path):
    done = run(SCRIPT, dataset_dir, tmp_path, "--learning-rate", "999", "--max-grad-norm", "1e12")
    assert done.returncode == 1 and re.search(r"error: \w+_loss is not finite at step \d+", done.stderr)
    assert "Traceback" not in done.stderr


def test_every_state_based_domain_is_known():
    domains = "cube-double-play scene-noisy puzzle-4x6-play pointmaze-teleport-stitch antmaze-giant-navigate".split()
    for domain in [*domains, "humanoidmaze-medium-stitch", "antsoccer-arena-navigate", "antmaze-medium-explore"]:
        _, environment_id, dataset = qam.split_env_id(domain)
        assert environment_id in gymnasium.registry and dataset == f"{domain}-v0"
    assert qam.split_env_id("cube-double-play-singletask-task2-v0")[1] == "cube-double-singletask-task2-v0"
    assert qam.split_env_id("scene-play-task1")[1] == "scene-singletask-task1-v0"


def test_paper_settings_are_resolved():
    args, _ = qam.resolve_args(qam.Args(env_id="puzzle-4x4-play"))
    assert (args.horizon, args.discount, args.rho, args.sparse, args.inv_temp) == (5, 0.99, 0.5, True, 30.0)
    args, _ = qam.resolve_args(qam.Args(env_id="antmaze-medium-navigate", rho=0.1))
    assert (args.horizon, args.discount, args.rho, args.inv_temp) == (1, 0.99, 0.1, 1.0)


def test_collected_data_is_official_in_form_and_the_same_for_any_number_of_workers(dataset_dir, tmp_path):
    tool = [sys.executable, ROOT / "tools/collect_dataset.py", DOMAIN, "--episodes", "3", "--workers", "1"]
    process = subprocess.Popen([*tool, "--out-dir", tmp_path], stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(".*/train_*.npz")):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)  # interrupted; the same command goes on
    process.wait()
    subprocess.run([*tool, "--out-dir", tmp_path, "--overwrite"], check=True, capture_output=True)
    for name in (f"{DOMAIN}-v0.npz", f"{DOMAIN}-v0-val.npz"):
        first, second = np.load(dataset_dir / name), np.load(tmp_path / name)
        assert first.files == second.files
        for field in first.files:
            np.testing.assert_array_equal(first[field], second[field])
            assert first[field].dtype == (bool if field == "terminals" else np.float32)
    name = f"{DOMAIN}-singletask-task4-v0"
    _, train, _ = ogbench.make_env_and_datasets(name, dataset_path=str(dataset_dir / f"{DOMAIN}-v0.npz"))
    assert len(train["observations"]) == 3000 and set(train) >= {"rewards", "masks", "next_observations"}


def test_script_keeps_its_limits():
    text = (ROOT / SCRIPT).read_text()
    lines = text.splitlines()
    sections = {re.search(r"- (\d)\.", line)[1]: i for i, line in enumerate(lines) if re.match(r"# -{20}", line)}
    assert len(lines) <= 650 and sections["8"] - sections["4"] <= 250
    block = "\n".join(line[2:] for line in lines[1 : lines.index("# ///", 1)])
    needed = (ROOT / "requirements.txt").read_text().splitlines()
    assert set(tomllib.loads(block)["dependencies"]) <= set(needed)


def test_checkpoint_is_plain_data(finished):
    """No pickle: the bytes are msgpack, which can't run code when loaded."""
    content = (finished[0] / "checkpoint.msgpack").read_bytes()
    assert set(flax.serialization.msgpack_restore(content[32:])) == {"states", "log"}


def test_evaluation_never_drops_an_action():
    """The chunk wrapper against the environment stepped by hand: same seeds, same actions, same result."""
    env = qam.ChunkedEpisode(f"{DOMAIN.rsplit('-', 1)[0]}-singletask-task4-v0", 4)
    actions = np.random.default_rng(0).uniform(-1, 1, (250, 4, 2))
    results = []
    for chunked in (True, False):
        observation, _ = env.reset(seed=7)
        for chunk in actions:
            if chunked:
                observation, _, _, truncated, scores = env.step(chunk.ravel())
            else:
                for action in chunk:
                    observation, reward, _, truncated, _ = env.env.step(action)
        results.append(observation)
        assert truncated
    np.testing.assert_array_equal(*results)
    assert scores["length"] == 1000


def test_noise_of_acting_is_bound_to_the_key():
    args = qam.Args(hidden_dims=(8,), num_critics=2, horizon=2)
    networks = qam.make_networks(args, 3, 1)
    params = qam.init_state(args, networks, 3, 1, jax.random.key(0)).params
    act = partial(qam.sample_actions, args, networks, params, np.ones((4, 3), np.float32))
    np.testing.assert_array_equal(act(jax.random.key(1)), act(jax.random.key(1)))
    assert not np.array_equal(act(jax.random.key(1)), act(jax.random.key(2)))


def test_sparse_rewards(dataset_dir):
    """Every reward that is not 0 becomes a -1; a dense copy of the file's rewards is the reference."""
    env = qam.ChunkedEpisode(f"{DOMAIN.rsplit('-', 1)[0]}-singletask-task4-v0", 4)
    path = dataset_dir / f"{DOMAIN}-v0.npz"
    load = lambda sparse: qam.load_dataset(qam.Args(env_id=f"{DOMAIN}-task4", horizon=4, sparse=sparse), path, env)
    dense, sparse = load(False), load(True)
    np.testing.assert_array_equal(sparse.rewards, -1.0 * (dense.rewards != 0))
    np.testing.assert_array_equal(sparse.masks, dense.masks)
    assert sparse.rewards.dtype == np.float32 and {-1, 0} == set(sparse.rewards)
