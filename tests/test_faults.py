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
import threading
import time
from contextlib import contextmanager

import numpy as np
import ogbench
import pytest
from conftest import DOMAIN, ROOT, command, folder_of, read_rows, read_states, resume, run
from refusals import refusal

import qam_offline as qam

SCRIPT = "qam_offline.py"
TASK = f"{DOMAIN}-task4"

# Saved only when a run is stopped, or before its evaluation at the end.
LONG = "--offline-steps 10000000 --checkpoint-every 10000000 --eval-every 10000000".split()

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
    assert "Traceback" not in errors_of(run_dir).read_text()
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
    telling = text.replace("self.scores[1] += reward", "self.scores[1] += observation.sum()")
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
    (line,) = errors_of(run_dir).read_text().splitlines()
    assert line.startswith("error: an evaluation process has died")
    assert "--eval-envs" in line
    assert "--resume" in line
    assert read_states(folder_of(run_dir))["step"] > 0


def test_evaluation_process_killed_between_evaluations(dataset_dir, tmp_path):
    run_dir = tmp_path / "runs"
    flags = ("--offline-steps", "8000", "--eval-every", "8000", "--log-every", "100")
    line = command(SCRIPT, dataset_dir, run_dir, *flags)
    with started(line, run_dir) as process:
        wait_for("metrics.csv", run_dir, process)
        kill_an_evaluation_process(process)
        assert_told_of_the_killed_process(process, run_dir)


def test_evaluation_process_killed_during_an_evaluation(dataset_dir, tmp_path):
    run_dir = tmp_path / "runs"
    line = command(SCRIPT, dataset_dir, run_dir, *LONG_EVALUATIONS)
    with started(line, run_dir) as process:
        wait_for_second_evaluation(run_dir, process)
        kill_an_evaluation_process(process)
        assert_told_of_the_killed_process(process, run_dir)


def test_environment_process_of_the_scoring_tool_killed(finished_run, tmp_path):
    line = [sys.executable, ROOT / "tools/evaluate.py", finished_run, "--episodes", "2000"]
    run_dir = tmp_path / "scoring"
    with started([str(part) for part in line], run_dir) as process:
        while len(evaluation_processes(process)) < 2:
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(5)
        kill_an_evaluation_process(process)
        assert process.wait(timeout=60) == 1
    printed = errors_of(run_dir).read_text()
    assert "Traceback" not in printed
    assert printed.splitlines()[-1].startswith("error: an environment process has died")


# ----------------------------------------------------------------------------------------- signals


def test_sigterm_to_the_whole_group_during_an_evaluation(dataset_dir, tmp_path):
    """As batch systems send it: to the environments' processes, too."""
    run_dir = tmp_path / "runs"
    line = command(SCRIPT, dataset_dir, run_dir, *LONG_EVALUATIONS)
    with started(line, run_dir) as process:
        wait_for_second_evaluation(run_dir, process)
        # Who gets it first is left to chance: here the main process does not.
        for child in evaluation_processes(process):
            os.kill(child, signal.SIGTERM)
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGTERM)
        assert_stopped(process, run_dir, signal.SIGTERM)


def test_closed_terminal(dataset_dir, tmp_path):
    run_dir = tmp_path / "runs"
    line = command(SCRIPT, dataset_dir, run_dir, *LONG)
    # The tests themselves may run under nohup, whose children ignore SIGHUP.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with started(line, run_dir) as process:
        signal.signal(signal.SIGHUP, before)
        wait_for("metrics.csv", run_dir, process)
        process.send_signal(signal.SIGHUP)
        assert_stopped(process, run_dir, signal.SIGHUP)
    folder = folder_of(run_dir)
    *_, last_row = read_rows(folder / "metrics.csv")
    assert read_states(folder)["step"] >= int(last_row["step"])


def test_batch_systems_warning_to_a_run_under_nohup(dataset_dir, tmp_path):
    """Under nohup a closed terminal is nothing; SIGUSR1 saves and stops."""
    run_dir = tmp_path / "runs"
    line = command(SCRIPT, dataset_dir, run_dir, *LONG)
    with started(["nohup", *line], run_dir) as process:
        wait_for("metrics.csv", run_dir, process)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
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
            assert f"\nstep {row['step']}  seed 1  adjoint_loss" in printed
        for row in evals:
            assert f"\nstep {row['step']}  seed 1  phase offline  success_rate" in printed
        assert "\r" not in printed
        assert errors_of(run_dir).read_bytes() == b""

    def test_no_other_process_gets_its_folder(self, running):
        process, run_dir = running
        done = resume(folder_of(run_dir))
        assert process.poll() is None
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert "in use" in done.stderr


def test_runs_started_in_the_same_second(tmp_path):
    args = qam.Args(env_id=TASK, run_dir=str(tmp_path))
    assert qam.open_run_folder(args) != qam.open_run_folder(args)


def test_paths_are_kept_absolute(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    args = qam.Args(run_dir="~/my runs", dataset_dir="data", resume="../run")
    paths = (args.run_dir, args.dataset_dir, args.resume)
    places = (tmp_path / "home/my runs", tmp_path / "data", tmp_path.parent / "run")
    assert paths == tuple(str(place) for place in places)


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


def test_other_settings_of_jax_are_refused_by_name(finished_run, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    done = resume(finished_run)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "jax_enable_x64" in line


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
        if answer == "flipped":
            content = content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
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
    """Only the file that training needs is asked for."""
    (path,) = qam.find_dataset(qam.Args(env_id=TASK))
    assert path == tmp_path / f".ogbench/data/{DOMAIN}-v0.npz"
    assert path.read_bytes() == server.content
    assert server.asked == [f"/{DOMAIN}-v0.npz"]
    assert qam.find_dataset(qam.Args(env_id=TASK)) == [path]
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "answer",
    [
        "half",
        "half, length unknown",
        "page",
        "flipped",
        "chunk that breaks off",
        "unavailable",
    ],
)
def test_download_that_goes_wrong(answer, server, tmp_path, capsys):
    """The file never takes the dataset's name, and nothing stays of it."""
    server.answer = answer
    path = tmp_path / "data" / f"{DOMAIN}-v0.npz"
    assert qam.download(f"{DOMAIN}-v0", path) is False
    assert f"{DOMAIN}-v0.npz can't be downloaded" in capsys.readouterr().out
    assert list(path.parent.iterdir()) == []


def test_dataset_dir_with_another_domains_data(dataset_dir, capsys):
    args = qam.Args(env_id="pointmaze-large-navigate-task1", dataset_dir=str(dataset_dir))
    sentence = refusal(capsys, qam.find_dataset, args)
    assert "pointmaze-large-navigate-v0.npz" in sentence
    assert f"{DOMAIN}-v0.npz" in sentence


def test_hidden_files_are_no_shards(tmp_path):
    """macOS leaves them beside copied ones."""
    (tmp_path / "._part-0.npz").write_bytes(b"Mac OS X")
    for name in ("part-0.npz", "part-1.npz", f"{DOMAIN}-v0-val.npz"):
        np.savez(tmp_path / name, rewards=np.zeros(3))
    args = qam.Args(env_id=TASK, dataset_dir=str(tmp_path))
    assert qam.find_dataset(args) == [tmp_path / "part-0.npz", tmp_path / "part-1.npz"]


def test_shard_that_turns_out_damaged_in_its_turn(dataset_dir, tmp_path):
    """The run saves before it leaves, and goes on when the shard is mended."""
    shards = tmp_path / "shards"
    shards.mkdir()
    content = bytearray((dataset_dir / f"{DOMAIN}-v0.npz").read_bytes())
    first, second = np.random.default_rng(1).permutation(["a.npz", "b.npz"])
    (shards / first).write_bytes(content)
    damaged = content.copy()
    damaged[5000] ^= 1
    (shards / second).write_bytes(damaged)
    flags = "--dataset-replace-every 20 --checkpoint-every 1000 --eval-every 60"
    done = run(SCRIPT, shards, tmp_path / "runs", *flags.split())
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {shards / second} can't be read")
    folder = folder_of(tmp_path / "runs")
    assert read_states(folder)["step"] == 20

    (shards / second).write_bytes(content)
    done = resume(folder)
    assert done.returncode == 0, done.stderr
    assert read_states(folder)["step"] == 60


def test_shard_that_is_cut_short_is_found_before_anything_is_recorded(dataset_dir, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    content = (dataset_dir / f"{DOMAIN}-v0.npz").read_bytes()
    (shards / "a.npz").write_bytes(content)
    (shards / "b.npz").write_bytes(content[: len(content) // 2])
    done = run(SCRIPT, shards, tmp_path / "runs")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {shards / 'b.npz'} is no whole npz file")
    assert not (tmp_path / "runs").exists()


def test_field_of_text_is_one_sentence(dataset_dir, tmp_path):
    arrays = dict(np.load(dataset_dir / f"{DOMAIN}-v0.npz"))
    arrays["qpos"] = arrays["qpos"].astype("S9")
    np.savez(tmp_path / f"{DOMAIN}-v0.npz", **arrays)
    done = run(SCRIPT, tmp_path, tmp_path / "runs")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "can't be read" in line


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
