"""Real runs of qam_offline.py, what they leave, and what they say to bad input."""

import importlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import ogbench
import pytest
from conftest import DOMAIN, ROOT, folder_of, read_rows, run
from numpy.testing import assert_allclose, assert_array_equal
from refusals import parse, refusal

import qam_offline as qam
from baselines import cgql
from variants import trqam

SCRIPT = "qam_offline.py"
TASK = f"{DOMAIN}-task4"
PAPER_SETTINGS = json.loads((ROOT / "tests/data/paper_settings.json").read_text())

# Script: what the paper's settings call its method.
METHODS = {
    "qam_offline": "QAM",
    "qam_offline_to_online": "QAM",
    "qam_diffusion_variant": "QAM",
    "baselines.fql": "FQL",
    "baselines.dsrl": "DSRL",
    "baselines.fbrac": "FBRAC",
    "baselines.bam": "BAM",
    "variants.qam_fql": "QAM_FQL",
    "variants.qam_edit": "QAM_EDIT",
    "baselines.fedit": "FEDIT",
    "baselines.ifql": "IFQL",
    "baselines.fawac": "FAWAC",
    "baselines.rebrac": "REBRAC",
    "baselines.rlpd": "RLPD",
    "baselines.qsm": "QSM",
    "baselines.dac": "DAC",
    "baselines.rql": "RQL",
    "baselines.qgf": "IFQL",  # its kappa
}


def column(folder, name, file="metrics.csv"):
    return [float(row[name]) for row in read_rows(folder / file)]


# ------------------------------------------------------------------------------------ a whole run


def test_run_leaves_its_files(finished_run, dataset_dir):
    metrics = read_rows(finished_run / "metrics.csv")
    assert column(finished_run, "step") == [20, 40, 60]
    names = {"critic_loss", "flow_loss", "adjoint_loss", "grad_norm", "updates_per_second"}
    assert names < metrics[0].keys()
    evals = read_rows(finished_run / "eval.csv")
    header = "step seed phase success_rate return length episodes wall_seconds"
    assert list(evals[0]) == header.split()
    assert column(finished_run, "step", "eval.csv") == [30, 60]
    assert (evals[0]["phase"], evals[0]["episodes"]) == ("offline", "2")

    saved = json.loads((finished_run / "args.json").read_text())
    assert saved["script"] == str(ROOT / SCRIPT)
    assert (saved["discount"], saved["inv_temp"], saved["sparse"]) == (0.99, 0.5, False)
    data = saved["data"]
    assert data["path"] == [str(dataset_dir / f"{DOMAIN}-v0.npz")]
    assert data["transitions"] == 3000
    assert "3 episodes" in data["words"]
    assert saved["versions"]["jax"] == jax.__version__


def test_a_checkpoint_can_act(finished_run):
    """Loaded from Python, by the script's own functions."""
    _, args = qam.read_run(finished_run)
    networks = qam.make_networks(args, 2, 2)
    states = qam.load_checkpoint(finished_run)["states"]
    params = jax.tree.map(lambda x: x[0], states["params"])
    observations = np.zeros((5, 2))
    actions = qam.sample_actions(args, networks, params, observations, jax.random.key(0))
    assert actions.shape == (5, 4 * 2)
    assert np.abs(actions).max() <= 1


@pytest.mark.slow
def test_seeds_side_by_side_are_the_seeds_alone(finished_run, dataset_dir, tmp_path):
    done = run(SCRIPT, dataset_dir, tmp_path, "--num-seeds", "2", "--eval-every", "60")
    assert done.returncode == 0, done.stderr
    both = folder_of(tmp_path)
    assert column(both, "seed") == [1, 2, 1, 2, 1, 2]
    assert column(both, "seed", "eval.csv") == [1, 2]
    for name in ("critic_loss", "flow_loss", "adjoint_loss"):
        losses = column(both, name)
        assert_allclose(losses[::2], column(finished_run, name), rtol=1e-3)
        assert losses[0] != losses[1]


@pytest.mark.slow
def test_an_edited_script_goes_on(finished_run, tmp_path):
    """A new flag has its default; a metric that went has no column any more."""
    folder = shutil.copytree(finished_run, tmp_path / "run")
    text = (ROOT / SCRIPT).read_text()
    flag = "    dataset_replace_every: int"
    metric = '"flow_loss": behavior_loss, '
    assert flag in text and metric in text
    text = text.replace(flag, f"    weight: float = 0.5  # of a new loss\n{flag}")
    (tmp_path / SCRIPT).write_text(text.replace(metric, ""))
    line = [sys.executable, tmp_path / SCRIPT, "--resume", folder, "--offline-steps", "80"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "was edited since the run" in done.stdout
    assert json.loads((folder / "args.json").read_text())["weight"] == 0.5
    assert column(folder, "step") == [20, 40, 60, 80]
    assert "flow_loss" not in read_rows(folder / "metrics.csv")[0]


def test_shards_take_turns(dataset_dir, tmp_path):
    """For 20 steps each, in the order of their names; which one is known by the step alone."""
    whole = dict(np.load(dataset_dir / f"{DOMAIN}-v0.npz"))
    for episodes in (1, 2, 3):
        shard = {field: array[: 1001 * episodes] for field, array in whole.items()}
        np.savez(tmp_path / f"{DOMAIN}-{episodes}.npz", **shard)
    paths = sorted(tmp_path.glob("*.npz"))

    def episodes_at(step):
        args = qam.Args(env_id=TASK, dataset_replace_every=20)
        return int(qam.load_shard(args, paths, step, qam.make_env(args)).terminals.sum())

    steps = (0, 19, 20, 39, 40, 60, 80)
    assert [episodes_at(step) for step in steps] == [1, 1, 2, 2, 3, 1, 2]


def test_rows_of_a_killed_run_that_are_not_in_its_checkpoint_go(tmp_path, monkeypatch):
    """They would stay: online, what is played after the checkpoint is another episode."""
    monkeypatch.setattr(qam, "tables", {"metrics": [], "eval": [], "episodes": [{"step": 7}]})
    (tmp_path / "metrics.csv").write_text("step,loss\n10,3\n20,2\n30,1\n")
    qam.read_tables(tmp_path, 20)
    assert qam.tables["metrics"] == [{"step": "10", "loss": "3"}, {"step": "20", "loss": "2"}]
    assert qam.tables["eval"] == qam.tables["episodes"] == []


def test_a_seed_that_is_not_finite_is_named_and_the_others_go_on(capsys):
    args = qam.Args(seed=7, num_seeds=3, log_every=10)
    losses = np.array([1.0, np.nan, 2.0])
    qam.check_finite(args, {"critic_loss": losses, "grad_norm": np.ones(3)}, 20)
    assert capsys.readouterr().out == "step 20: seed [8] not finite; others go on\n"
    qam.check_finite(args, {"critic_loss": np.ones(3), "grad_norm": np.ones(3)}, 30)
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit):
        qam.check_finite(args, {"critic_loss": losses, "grad_norm": losses[[1, 0, 1]]}, 20)
    assert "not finite at step 20" in capsys.readouterr().err


def test_loss_that_is_not_finite_stops_the_run(dataset_dir, tmp_path):
    flags = ("--learning-rate", "1e30", "--max-grad-norm", "1e30")
    done = run(SCRIPT, dataset_dir, tmp_path, *flags)
    assert done.returncode == 2
    *_, line = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "is not finite at step" in line
    assert "Traceback" not in done.stderr


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--batch-size 0", "--batch-size must be positive"),
        ("--eval-episodes 0", "--eval-episodes must be positive"),
        ("--hidden-dims 16 0", "--hidden-dims"),
        ("--learning-rate 0", "--learning-rate must be positive"),
        ("--inv-temp -1", "--inv-temp must be positive"),
        ("--tau nan", "--tau must be positive"),
        ("--discount 1.5", "--discount and --tau at most 1"),
        ("--seed -1", "--seed must be positive"),
        ("--seed 4294967296", "--seed must be below 2**32"),
        ("--seed one", "--seed"),
        ("--no-such-flag 3", "--no-such-flag"),
        ("--resume /nowhere", "/nowhere"),
    ],
)
def test_bad_flags_are_named(flags, words, capsys):
    assert words in refusal(capsys, parse, qam, *flags.split())


def other_shape(arrays):
    arrays["observations"] = arrays["observations"][:, :1]


def not_finite(arrays):
    arrays["observations"][5] = np.nan


def open_end(arrays):
    arrays["terminals"][-1] = False


def no_field(arrays):
    del arrays["qpos"]


def too_short(arrays):
    for name, array in arrays.items():
        arrays[name] = array[-3:]


@pytest.mark.parametrize("damage", [other_shape, not_finite, open_end, no_field, too_short])
def test_bad_data_is_named(damage, dataset_dir, tmp_path, capsys):
    args = qam.Args(env_id=TASK, horizon=4)
    arrays = dict(np.load(dataset_dir / f"{DOMAIN}-v0.npz"))
    damage(arrays)
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    assert str(path) in refusal(capsys, qam.load_dataset, args, path, qam.make_env(args))


def test_torn_data_stops_a_run_before_it_makes_a_folder(dataset_dir, tmp_path):
    path = tmp_path / f"{DOMAIN}-v0.npz"
    content = (dataset_dir / path.name).read_bytes()
    path.write_bytes(content[:5000])
    done = run(SCRIPT, tmp_path, tmp_path / "runs")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {path} can't be used")
    assert not (tmp_path / "runs").exists()


def test_run_dir_that_is_a_file(dataset_dir, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    args = qam.Args(env_id=TASK, run_dir=str(tmp_path / "file"))
    path = dataset_dir / f"{DOMAIN}-v0.npz"
    dataset = qam.load_dataset(args, path, qam.make_env(args))
    sentence = refusal(capsys, qam.open_run_folder, args, "official", [path], dataset)
    assert "--run-dir" in sentence


def test_dataset_dir_without_data(tmp_path, capsys):
    args = qam.Args(env_id=TASK, dataset_dir=str(tmp_path))
    assert "--dataset-dir" in refusal(capsys, qam.find_dataset, args)


def test_run_of_another_script(finished_run, tmp_path, capsys):
    saved = json.loads((finished_run / "args.json").read_text())
    saved["script"] = "baselines/fql.py"
    (tmp_path / "args.json").write_text(json.dumps(saved))
    sentence = refusal(capsys, parse, qam, "--resume", str(tmp_path))
    assert "no run of qam_offline.py" in sentence
    assert "baselines/fql.py" in sentence


def test_run_without_a_checkpoint(tmp_path, capsys):
    assert "start the run anew" in refusal(capsys, qam.load_checkpoint, tmp_path)


# --------------------------------------------------------------------------- domains and settings


@pytest.mark.parametrize(
    "domain",
    [
        "cube-double-play",
        "scene-noisy",
        "puzzle-4x6-play",
        "pointmaze-teleport-stitch",
        "antmaze-medium-explore",
        "humanoidmaze-medium-stitch",
        "antsoccer-arena-navigate",
    ],
)
def test_state_based_domains_are_known(domain):
    name, _, _ = domain.rpartition("-")
    expected = (domain, f"{name}-singletask-v0", f"{domain}-v0")
    assert qam.parse_env_id(domain) == expected


@pytest.mark.parametrize(
    "env_id, domain, environment_id, dataset",
    [
        (
            "scene-play-task1",
            "scene-play",
            "scene-singletask-task1-v0",
            "scene-play-v0",
        ),
        (
            "cube-double-play-singletask-task2-v0",
            "cube-double-play",
            "cube-double-singletask-task2-v0",
            "cube-double-play-v0",
        ),
        (
            "cube-quadruple-play-100m-task3",
            "cube-quadruple-play",
            "cube-quadruple-singletask-task3-v0",
            "cube-quadruple-play-100m-v0",
        ),
    ],
)
def test_forms_of_an_env_id(env_id, domain, environment_id, dataset):
    assert qam.parse_env_id(env_id) == (domain, environment_id, dataset)


@pytest.mark.parametrize("script", METHODS)
def test_settings_are_the_papers(script):
    script_args = importlib.import_module(script).Args
    for domain, settings in PAPER_SETTINGS.items():
        args = script_args(env_id=domain)
        common = settings["common"]
        assert args.horizon == common["horizon_length"]
        for name in ("discount", "rho", "sparse"):
            assert getattr(args, name) == common[name]
        for name, value in settings[METHODS[script]].items():
            assert getattr(args, name, value) == value


@pytest.mark.parametrize(
    "mode, method", [("simple", "CGQL"), ("mse", "CGQL_MSE"), ("linex", "CGQL_LINEX")]
)
def test_settings_of_cgql_are_the_papers(mode, method):
    for domain, settings in PAPER_SETTINGS.items():
        args = cgql.Args(env_id=domain, mode=mode)
        for name, value in settings[method].items():
            assert getattr(args, name) == value


@pytest.mark.parametrize("domain, kl_budget", [("cube-triple-play", 0.5), ("scene-play", 1.0)])
def test_budgets_of_trqam(domain, kl_budget):
    """Its paper is another one."""
    assert trqam.Args(env_id=domain).kl_budget == kl_budget


def test_a_flag_goes_before_the_papers_setting():
    args = qam.Args(env_id="antmaze-medium-navigate", rho=0.1, sparse=True)
    values = (args.horizon, args.discount, args.rho, args.inv_temp, args.sparse)
    assert values == (1, 0.99, 0.1, 1.0, True)


# ---------------------------------------------------------------------------- data and environment


def test_collected_data_is_official_in_form(dataset_dir):
    arrays = np.load(dataset_dir / f"{DOMAIN}-v0.npz")
    for name in arrays.files:
        assert arrays[name].dtype == (bool if name == "terminals" else np.float32)
    path = str(dataset_dir / f"{DOMAIN}-v0.npz")
    name = f"{DOMAIN}-singletask-task4-v0"
    _, data, _ = ogbench.make_env_and_datasets(name, dataset_path=path)
    assert len(data["observations"]) == 3000
    assert {"rewards", "masks", "next_observations"} < data.keys()


@pytest.mark.slow
def test_collected_data_is_the_same_by_another_number_of_workers(dataset_dir, tmp_path):
    """And when the collection was interrupted on the way."""
    tool = ROOT / "tools/collect_dataset.py"
    line = [sys.executable, tool, DOMAIN, "--episodes", "3", "--workers", "1"]
    line += ["--out-dir", tmp_path]
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(".*/train_*.npz")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    process.wait()
    subprocess.run([*line, "--overwrite"], check=True, capture_output=True)
    for name in (f"{DOMAIN}-v0.npz", f"{DOMAIN}-v0-val.npz"):
        first = np.load(dataset_dir / name)
        second = np.load(tmp_path / name)
        assert first.files == second.files
        for field in first.files:
            assert_array_equal(first[field], second[field])


def test_evaluation_never_drops_an_action():
    """Chunks of four against the environment stepped by hand, over a whole episode."""
    args = qam.Args(env_id=TASK, horizon=4)
    chunks = np.random.default_rng(0).uniform(-1, 1, (250, 8))
    chunked = qam.ChunkedEpisode(qam.make_env(args))
    chunked.reset(seed=7)
    for chunk in chunks:
        observation, _, _, truncated, info = chunked.step(chunk)
    assert truncated
    by_hand = qam.make_env(args)
    by_hand.action_space.seed(7)
    np.random.seed(7)
    by_hand.reset(seed=7)
    for action in chunks.reshape(-1, 2):
        expected, *_ = by_hand.step(action)
    assert_array_equal(observation, expected)
    assert info["scores"].tolist() == [0.0, -1000.0, 1000.0]


def test_sparse_rewards(dataset_dir):
    """What is not 0 becomes -1."""
    path = Path(dataset_dir) / f"{DOMAIN}-v0.npz"
    args = qam.Args(env_id=TASK, horizon=4)
    env = qam.make_env(args)
    dense = qam.load_dataset(args, path, env)
    args.sparse = True
    sparse = qam.load_dataset(args, path, env)
    assert_array_equal(sparse.rewards, -1.0 * (dense.rewards != 0))
    assert_array_equal(sparse.masks, dense.masks)
    assert {*sparse.rewards} == {-1, 0}
