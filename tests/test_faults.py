"""Faults that runs once had, each seen the way a user saw it."""

import ast
import http.server
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager

import numpy as np
import ogbench
import pytest
from conftest import DOMAIN, ROOT, command, folder_of, read_rows, read_states, resume, run
from refusals import refusal
from stopping import assert_same_rows, assert_same_states

import qam_offline as qam
from tools import collect_dataset

SCRIPT = "qam_offline.py"
TASK = f"{DOMAIN}-task4"

# Saved only when a run is stopped, or before its evaluation at the end.
LONG = "--offline-steps 10000000 --checkpoint-minutes 60 --eval-every 10000000".split()

# Evaluations of some seconds, with next to nothing between them.
LONG_EVALUATIONS = "--offline-steps 60 --eval-every 30 --eval-episodes 60".split()


@contextmanager
def started(line, run_dir, **options):
    """A process in a group of its own whose output goes to files, killed when the block ends."""
    run_dir.mkdir(exist_ok=True)
    environment = dict(os.environ)
    environment.pop("PYTHONUNBUFFERED", None)  # users don't set it
    options = {**options, "env": environment, "start_new_session": True}
    stdout = open(printed_by(run_dir), "w")
    stderr = open(errors_of(run_dir), "w")
    with stdout, stderr:
        process = subprocess.Popen(line, stdout=stdout, stderr=stderr, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def printed_by(run_dir):
    return run_dir.with_suffix(".stdout")


def resuming(folder, *flags):
    """The command that goes on with a run."""
    return [sys.executable, str(ROOT / SCRIPT), "--resume", str(folder), *flags]


def errors_of(run_dir):
    return run_dir.with_suffix(".stderr")


def wait_for(pattern, run_dir, process):
    """Until there is a file of that name in the run's folder."""
    while not list(run_dir.glob(f"*/{pattern}")):
        assert process.poll() is None, errors_of(run_dir).read_text()
        time.sleep(0.01)


def wait_for_second_evaluation(run_dir, process):
    """In the first one, the environments may still be starting."""
    wait_for("eval.csv", run_dir, process)
    time.sleep(0.3)


def assert_stopped(process, run_dir, how):
    """By a signal: saved, with a last line that says how to go on."""
    assert process.wait(timeout=60) == 128 + how
    folder = folder_of(run_dir)
    last_line = printed_by(run_dir).read_text().splitlines()[-1]
    assert last_line.endswith(f"to go on: python {ROOT / SCRIPT} --resume {folder}")


# -------------------------------------------------------------------------------------- evaluation

ARM = "cube-single-play"


@pytest.fixture(scope="module")
def arm_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arm")
    tool = ROOT / "tools/collect_dataset.py"
    line = [sys.executable, tool, ARM, "--episodes", "1", "--out-dir", folder]
    subprocess.run(line, check=True, capture_output=True)
    return folder


def write_telling_script(path):
    """qam_offline.py with another return of an episode: the sum of all that was observed."""
    text = (ROOT / SCRIPT).read_text()
    telling = text.replace("self.scores[1] += reward", "self.scores[1] += self.last[0].sum()")
    assert telling != text
    path.write_text(telling)


def test_score_is_the_same_to_the_bit_for_any_number_of_processes(arm_data, tmp_path):
    """Of an arm that touches things: a bit in one action would be seen."""
    script = tmp_path / "telling.py"
    write_telling_script(script)
    flags = "--hidden-dims 8 --eval-episodes 3 --eval-envs 2 --offline-steps 20 --eval-every 20"
    done = run(script, arm_data, tmp_path / "runs", "--env-id", ARM, *flags.split())
    assert done.returncode == 0, done.stderr
    folder = folder_of(tmp_path / "runs")
    (row,) = read_rows(folder / "eval.csv")
    expected = f"return {row['return']} length {row['length']} episodes 3"
    for num_envs in ("1", "3"):
        line = [sys.executable, ROOT / "tools/evaluate.py", folder, "--envs", num_envs]
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


def evaluation_processes(process):
    line = ["pgrep", "-P", str(process.pid), "-f", "spawn_main"]
    children = subprocess.run(line, capture_output=True, text=True).stdout.split()
    return [int(child) for child in children]


def kill_an_evaluation_process(process):
    first, *_ = evaluation_processes(process)
    os.kill(first, signal.SIGKILL)


def assert_told_of_the_killed_process(process, run_dir):
    assert process.wait(timeout=60) == 1
    errors = errors_of(run_dir).read_text()
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "an evaluation process has died" in line
    assert "--eval-envs" in line
    assert "--resume" in line
    assert read_states(folder_of(run_dir))["step"] > 0


@pytest.mark.slow
def test_evaluation_process_killed_between_evaluations(dataset_dir, tmp_path):
    run_dir = tmp_path / "runs"
    flags = ("--offline-steps", "8000", "--eval-every", "8000", "--log-every", "100")
    line = command(SCRIPT, dataset_dir, run_dir, *flags)
    with started(line, run_dir) as process:
        wait_for("metrics.csv", run_dir, process)
        kill_an_evaluation_process(process)
        assert_told_of_the_killed_process(process, run_dir)


@pytest.mark.slow
def test_evaluation_process_killed_during_an_evaluation(dataset_dir, tmp_path):
    run_dir = tmp_path / "runs"
    line = command(SCRIPT, dataset_dir, run_dir, *LONG_EVALUATIONS)
    with started(line, run_dir) as process:
        wait_for_second_evaluation(run_dir, process)
        kill_an_evaluation_process(process)
        assert_told_of_the_killed_process(process, run_dir)


@pytest.mark.slow
def test_environment_process_of_the_scoring_tool_killed(finished_run, tmp_path):
    line = [
        sys.executable,
        ROOT / "tools/evaluate.py",
        finished_run,
        "--episodes",
        "2000",
        "--envs",
        "2",
    ]
    run_dir = tmp_path / "scoring"
    with started([str(part) for part in line], run_dir) as process:
        while len(evaluation_processes(process)) < 2:
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(5)
        kill_an_evaluation_process(process)
        assert process.wait(timeout=60) == 1
    assert "error: an environment process has died" in errors_of(run_dir).read_text()


# ----------------------------------------------------------------------------------------- signals


@pytest.mark.slow
def test_sigterm_to_the_whole_group_during_an_evaluation(dataset_dir, tmp_path):
    """As batch systems send it: to the environments' processes, too."""
    run_dir = tmp_path / "runs"
    line = command(SCRIPT, dataset_dir, run_dir, *LONG_EVALUATIONS)
    with started(line, run_dir) as process:
        wait_for_second_evaluation(run_dir, process)
        os.killpg(process.pid, signal.SIGTERM)
        assert_stopped(process, run_dir, signal.SIGTERM)


def test_batch_systems_warning(dataset_dir, tmp_path):
    """SIGUSR1 saves and stops."""
    run_dir = tmp_path / "runs"
    line = command(SCRIPT, dataset_dir, run_dir, *LONG)
    with started(line, run_dir) as process:
        wait_for("metrics.csv", run_dir, process)
        process.send_signal(signal.SIGUSR1)
        assert_stopped(process, run_dir, signal.SIGUSR1)
    assert read_states(folder_of(run_dir))["step"] > 0


# ------------------------------------------------------------------------------ folders and output


@pytest.fixture(scope="class")
def running(dataset_dir, tmp_path_factory):
    """(process, its run_dir) of a run that has logged and evaluated."""
    run_dir = tmp_path_factory.mktemp("running")
    flags = ("--eval-every", "200", "--eval-episodes", "1", "--eval-envs", "1")
    line = command(SCRIPT, dataset_dir, run_dir, *LONG, *flags)
    with started(line, run_dir) as process:
        wait_for("eval.csv", run_dir, process)
        yield process, run_dir


class TestWhileARunGoesOn:
    def test_its_output_to_a_file_is_there_at_once(self, running):
        """A line for each row, without carriage returns."""
        process, run_dir = running
        folder = folder_of(run_dir)
        rows = read_rows(folder / "metrics.csv")
        evals = read_rows(folder / "eval.csv")
        printed = printed_by(run_dir).read_bytes().decode()
        assert process.poll() is None
        for row in rows:
            assert f"\nstep {row['step']} seed 1 adjoint_loss" in printed
        for row in evals:
            assert f"\nstep {row['step']} seed 1 success_rate" in printed
        assert max(map(len, printed.splitlines())) <= 110 + len(str(folder))
        assert "\r" not in printed
        assert errors_of(run_dir).read_bytes() == b""


@pytest.mark.slow
def test_two_processes_in_one_folder_leave_what_one_does(finished_run, tmp_path):
    """A requeued job whose first process still runs: both write the same states and rows."""
    alone, shared = [shutil.copytree(finished_run, tmp_path / name) for name in ("one", "two")]
    flags = "--offline-steps 400 --eval-every 200 --log-every 20 --checkpoint-minutes 0".split()
    assert resume(alone, *flags).returncode == 0
    with started(resuming(shared, *flags), tmp_path / "first") as first:
        with started(resuming(shared, *flags), tmp_path / "second") as second:
            assert (first.wait(timeout=120), second.wait(timeout=120)) == (0, 0)
    assert_same_states(alone, shared)
    assert_same_rows(alone, shared, "metrics.csv", "eval.csv")
    assert list(shared.glob("*.part")) == []


def test_paths_are_kept_absolute(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    args = qam.Args(run_dir="~/my runs", dataset_dir="data", resume="../run")
    paths = (args.run_dir, args.dataset_dir, args.resume)
    places = (tmp_path / "home/my runs", tmp_path / "data", tmp_path.parent / "run")
    assert paths == tuple(str(place) for place in places)


@pytest.mark.slow
def test_printed_command_can_be_pasted_anywhere(dataset_dir, tmp_path, monkeypatch):
    """With a space and an accent in all paths, and then on a console that knows ASCII alone."""
    place = tmp_path / "sp ace é"
    run_dir = place / "my runs"
    shutil.copytree(dataset_dir, place / "data")
    line = command(SCRIPT, "data", "my runs", *LONG)
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")
    with started(line, run_dir, cwd=place) as process:
        wait_for("metrics.csv", run_dir, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 128 + signal.SIGINT
    printed = printed_by(run_dir).read_text(encoding="utf-8")
    pasted = re.search("to go on: (.*)", printed)[1] + " --offline-steps 60"
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable), prepend=os.pathsep)
    done = subprocess.run(["bash", "-c", pasted], cwd="/", capture_output=True)
    assert done.returncode == 0, done.stderr
    assert shlex.split(pasted)[3] == str(folder_of(run_dir))


@pytest.mark.slow
def test_the_default_kind_of_keys_changes_nothing(finished_run, dataset_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DEFAULT_PRNG_IMPL", "rbg")
    done = run(SCRIPT, dataset_dir, tmp_path, "--offline-steps", "30", "--eval-every", "30")
    assert done.returncode == 0, done.stderr
    folder = folder_of(tmp_path)
    done = resume(folder, "--offline-steps", "60")
    assert done.returncode == 0, done.stderr
    assert_same_states(finished_run, folder)


@pytest.mark.slow
def test_clock_of_coarse_steps(dataset_dir, tmp_path, monkeypatch):
    """Of 15.6 ms, as on Windows: an update takes no time at all."""
    (tmp_path / "sitecustomize.py").write_text(
        "import time\n"
        "fine = time.perf_counter\n"
        "time.perf_counter = lambda: fine() // 0.0156 * 0.0156\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run(SCRIPT, dataset_dir, tmp_path / "runs", "--log-every", "1", "--eval-every", "60")
    assert done.returncode == 0, done.stderr
    assert len(read_rows(folder_of(tmp_path / "runs") / "metrics.csv")) == 60


@pytest.mark.slow
def test_tracked_run_stays_one_run(dataset_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = ("--track", "--offline-steps", "20", "--eval-every", "40")
    done = run(SCRIPT, dataset_dir, tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    folder = folder_of(tmp_path)
    done = resume(folder, "--offline-steps", "40")
    assert done.returncode == 0, done.stderr
    pieces = [path.name.split("-", 3)[-1] for path in folder.glob("wandb/offline-run-*")]
    assert pieces == [folder.name, folder.name]


# -------------------------------------------------------------------------------------------- data


class DatasetServer(http.server.ThreadingHTTPServer):
    """On this machine; `answer` says how it misbehaves, `asked` which paths were asked for."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), DatasetHandler)
        self.content = content
        self.answer = "whole"
        self.asked = []


class DatasetHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append(self.path)
        self.close_connection = True
        answer = self.server.answer
        content = self.server.content
        if answer == "unavailable" or "-val" in self.path:
            self.send_error(503)
            return
        self.send_response(200)
        if answer == "page":
            content = b"<html>Please log in</html>"
        if answer == "chunk that breaks off":
            self.send_header("Transfer-Encoding", "chunked")
            content = b"186a0\r\n" + content[:5000]  # of 100,000 bytes
        elif answer != "half, length unknown":
            self.send_header("Content-Length", str(len(content)))
        if answer.startswith("half"):
            content = content[: len(content) // 2]
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(dataset_dir, tmp_path, monkeypatch):
    """In place of OGBench's, for a user without data."""
    server = DatasetServer((dataset_dir / f"{DOMAIN}-v0.npz").read_bytes())
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(ogbench.utils, "DATASET_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HOME", str(tmp_path))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_download(server, tmp_path):
    """Only the file that training needs is asked for, and once."""
    path = tmp_path / f".ogbench/data/{DOMAIN}-v0.npz"
    for _ in range(2):
        assert collect_dataset.is_official_there(DOMAIN)
        assert path.read_bytes() == server.content
        assert server.asked == [f"/{DOMAIN}-v0.npz"]
    assert qam.find_dataset(qam.Args(env_id=TASK)) == ("official", [path])


def test_what_is_missing_is_got_by_a_program(dataset_dir, tmp_path, monkeypatch):
    """It is looked for beside the script and one folder above, and not without need."""
    monkeypatch.setenv("HOME", str(tmp_path))
    collected = tmp_path / f".ogbench/collected/{DOMAIN}-v0.npz"
    (tmp_path / "tools").mkdir()
    (tmp_path / "baselines").mkdir()
    told = tmp_path / "told.txt"
    program = f"""
        import pathlib, shutil, sys
        pathlib.Path({str(told)!r}).open("a").write(" ".join(sys.argv[1:]))
        pathlib.Path({str(collected.parent)!r}).mkdir(parents=True)
        shutil.copy({str(dataset_dir / f"{DOMAIN}-v0.npz")!r}, {str(collected)!r})
    """
    (tmp_path / "tools/collect_dataset.py").write_text(textwrap.dedent(program))
    monkeypatch.setattr(qam, "__file__", str(tmp_path / "baselines/script.py"))
    for _ in range(2):
        assert qam.find_dataset(qam.Args(env_id=TASK)) == ("collected", [collected])
    assert told.read_text() == f"{DOMAIN}-v0 --download"


def test_a_script_alone_says_where_data_go(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(qam, "__file__", str(tmp_path / "elsewhere/script.py"))
    sentence = refusal(capsys, qam.find_dataset, qam.Args(env_id=TASK))
    assert f"no {DOMAIN}-v0.npz: see tools/collect_dataset.py, ogbench.download_" in sentence


@pytest.mark.parametrize(
    "answer",
    [
        "half",
        "half, length unknown",
        "page",
        "chunk that breaks off",
        "unavailable",
    ],
)
def test_download_that_goes_wrong(answer, server, tmp_path, capsys):
    """The file never takes the dataset's name, and nothing stays of it."""
    server.answer = answer
    path = tmp_path / "data" / f"{DOMAIN}-v0.npz"
    assert not collect_dataset.download(f"{DOMAIN}-v0", path)
    captured = capsys.readouterr()
    assert f"{DOMAIN}-v0.npz can't be downloaded" in captured.out + captured.err
    assert list(path.parent.iterdir()) == []


def test_dataset_dir_with_another_domains_data(dataset_dir, capsys):
    args = qam.Args(env_id="pointmaze-large-navigate-task1", dataset_dir=str(dataset_dir))
    sentence = refusal(capsys, qam.find_dataset, args)
    assert "pointmaze-large-navigate*.npz" in sentence
    assert f"{DOMAIN}-v0.npz" in sentence


def test_hidden_files_are_no_shards(tmp_path):
    """macOS leaves them beside copied ones."""
    shards = [tmp_path / f"{DOMAIN}-v0-00{i}.npz" for i in range(2)]
    for path in (*shards, tmp_path / f"{DOMAIN}-v0-val.npz", tmp_path / "other.npz"):
        np.savez(path, rewards=np.zeros(3))
        (tmp_path / f"._{path.name}").write_bytes(b"Mac OS X")
    args = qam.Args(env_id=TASK, dataset_dir=str(tmp_path))
    assert qam.find_dataset(args) == ("from --dataset-dir", shards)


@pytest.mark.slow
def test_shard_that_turns_out_damaged_in_its_turn(finished_run, dataset_dir, tmp_path):
    """The run saves before it leaves, and goes on when the shard is mended: with that one."""
    shards = tmp_path / "shards"
    shards.mkdir()
    arrays = dict(np.load(dataset_dir / f"{DOMAIN}-v0.npz"))
    first, second = f"{DOMAIN}-a.npz", f"{DOMAIN}-b.npz"
    np.savez(shards / first, **arrays)
    np.savez(shards / second, **{field: array[:1001] for field, array in arrays.items()})
    content = (shards / second).read_bytes()
    damaged = bytearray(content)
    damaged[5000] ^= 1
    (shards / second).write_bytes(damaged)
    flags = "--dataset-replace-every 20 --checkpoint-minutes 60 --eval-every 60"
    done = run(SCRIPT, shards, tmp_path / "runs", *flags.split())
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {shards / second} can't be used")
    folder = folder_of(tmp_path / "runs")
    assert read_states(folder)["step"] == 20

    (shards / second).write_bytes(content)
    done = resume(folder)
    assert done.returncode == 0, done.stderr
    assert read_states(folder)["step"] == 60
    losses = [row["critic_loss"] for row in read_rows(folder / "metrics.csv")]
    alone = [row["critic_loss"] for row in read_rows(finished_run / "metrics.csv")]
    assert losses[0] == alone[0]
    assert losses[1] != alone[1]


def test_shard_that_is_cut_short_is_found_before_anything_is_recorded(dataset_dir, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    content = (dataset_dir / f"{DOMAIN}-v0.npz").read_bytes()
    (shards / f"{DOMAIN}-a.npz").write_bytes(content)
    (shards / f"{DOMAIN}-b.npz").write_bytes(content[: len(content) // 2])
    done = run(SCRIPT, shards, tmp_path / "runs")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {shards}/{DOMAIN}-b.npz can't be used")
    assert not (tmp_path / "runs").exists()


def test_field_of_text_is_one_sentence(dataset_dir, tmp_path):
    arrays = dict(np.load(dataset_dir / f"{DOMAIN}-v0.npz"))
    arrays["qpos"] = arrays["qpos"].astype("S9")
    np.savez(tmp_path / f"{DOMAIN}-v0.npz", **arrays)
    done = run(SCRIPT, tmp_path, tmp_path / "runs")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "can't be used" in line


# -------------------------------------------------------------------------------------------- code


def test_nothing_depends_on_assert():
    """`python -O` leaves them out; a user would see a traceback."""
    found = []
    for folder in (".", "baselines", "variants", "tools", "experiments", "dev"):
        for path in (ROOT / folder).glob("*.py"):
            tree = ast.parse(path.read_text())
            if any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
                found.append(path.name)
    assert found == []
