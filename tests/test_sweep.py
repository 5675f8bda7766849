"""tools/sweep.py: plans, jobs run here, and jobs on a real Slurm of one node."""

import csv
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from conftest import DOMAIN, ROOT, command, folder_of, run
from stopping import assert_same_rows, assert_same_states, has_checkpoint
from test_other_systems import LACKING

from tools import sweep as tool

SWEEP = ROOT / "tools/sweep.py"
STATES = ("waiting", "running", "done", "failed", "stale")
# Long enough to be stopped on the way.
LONG = "--offline-steps 4000 --eval-every 4000 --log-every 200".split()


def sweep(*words, **options):
    line = [sys.executable, SWEEP, *words]
    return subprocess.run([str(word) for word in line], capture_output=True, text=True, **options)


def plan(out, dataset_dir, scripts=("qam_offline.py",), seeds=2, flags=LONG):
    """OUT/jobs.csv with tiny runs, and its rows."""
    # The flags of a tiny run, without what the plan says itself.
    tiny = command("qam_offline.py", dataset_dir, out, *flags)[6:]
    del tiny[:2]
    words = ["--scripts", *[ROOT / script for script in scripts], "--tasks", f"{DOMAIN}-task4"]
    done = sweep("plan", out, *words, "--seeds", seeds, "--dataset-dir", dataset_dir, *tiny)
    assert done.returncode == 0, done.stderr
    return read_jobs(out)


def read_jobs(out):
    with (out / "jobs.csv").open() as file:
        return list(csv.DictReader(file))


def job_folder(out, i):
    return out / "runs" / f"{i:05d}"


def run_of(out, i):
    (folder,) = job_folder(out, i).glob("*/")
    return folder


def states_of(out):
    """{id: waiting, running, ..}"""
    done = sweep("status", out)
    lines = [line.split() for line in done.stdout.splitlines()]
    return {int(words[0]): words[1] for words in lines if len(words) > 2 and words[1] in STATES}


def wait_until(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.2)


@pytest.fixture(scope="module")
def uninterrupted(dataset_dir, tmp_path_factory):
    """The run of job 0, in one go."""
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    done = run("qam_offline.py", dataset_dir, run_dir, *LONG)
    assert done.returncode == 0, done.stderr
    return folder_of(run_dir)


@pytest.mark.slow
def test_a_plan_crosses_everything(tmp_path):
    words = "--seeds 4 --num-seeds 2 --set inv_temp=1,3 tau=0.1,0.2 --batch-size 8".split()
    scripts = [ROOT / "qam_offline.py", ROOT / "variants/trqam.py"]
    done = sweep("plan", tmp_path / "a", "--scripts", scripts[0], "--tasks", "scene-play", *words)
    assert done.returncode == 0, done.stderr
    jobs = read_jobs(tmp_path / "a")
    assert len(jobs) == 5 * 4 * 2
    assert "40 jobs, 80 runs" in done.stdout
    assert len({job["command"] for job in jobs}) == len(jobs)
    assert "--env-id scene-play-task5 --inv-temp 3 --tau 0.2 --batch-size 8" in jobs[-1]["command"]
    assert "--seed 3 --num-seeds 2" in jobs[-1]["command"]
    done = sweep("plan", tmp_path / "paper", "--preset", "paper", "--num-seeds", "12")
    assert "800 jobs, 9600 runs" in done.stdout
    task = "cube-double-play-task2"
    done = sweep("plan", tmp_path / "b", "--scripts", *scripts, "--tasks", task, "--online")
    assert done.returncode == 0, done.stderr
    names = {job["command"].split()[1].rpartition("/")[2] for job in read_jobs(tmp_path / "b")}
    assert names == {"qam_offline_to_online.py", "trqam_offline_to_online.py"}


def test_a_setting_of_one_script_and_a_relative_path(tmp_path):
    scripts = [ROOT / "qam_offline.py", ROOT / "baselines/fql.py"]
    words = "--tasks scene-play-task1 --seeds 1 --dataset-dir data --set tau=0.1".split()
    words += ["qam_offline.py:inv_temp=1,3", "fql.py:alpha=2"]
    done = sweep("plan", tmp_path, "--scripts", *scripts, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    commands = [job["command"] for job in read_jobs(tmp_path)]
    chosen = [" ".join(shlex.split(command)[4:8]) for command in commands]
    assert chosen == ["--tau 0.1 --inv-temp 1", "--tau 0.1 --inv-temp 3", "--tau 0.1 --alpha 2"]
    assert all(f"--dataset-dir {tmp_path / 'data'}" in command for command in commands)


@pytest.mark.parametrize(
    "words, says",
    [
        ("--tasks scene-play-task1 --hidden-dim 8", "no --hidden-dim; the nearest that it has is"),
        ("--tasks scene-play-task1 --set kl=1", "no --kl; a flag of one script is given as"),
        ("--tasks scene-play-task1 --tau x", "does not take"),
        ("--tasks scene-play --set fql.py:alpha=1", "fql.py is none of the scripts"),
        ("--tasks scene-play-task9", "does not take"),
        ("--tasks scene-play --set inv_temp", "NAME=VALUE"),
        ("--tasks scene-play --seeds 3 --num-seeds 2", "divide"),
        ("--tasks scene-play --seed 4", "jobs.csv"),
        ("", "--tasks"),
    ],
)
def test_a_plan_that_can_not_be_is_refused(tmp_path, words, says):
    done = sweep("plan", tmp_path, "--scripts", ROOT / "qam_offline.py", *words.split())
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "jobs.csv").exists()


# Leaves what a run leaves, and says what it was told.
SCRIPT = """
import json, os, pathlib, signal, sys, time

words = sys.argv[1:]
folder = pathlib.Path(words[words.index("--run-dir") + 1], "run")
folder.mkdir(exist_ok=True)
print("told", *words, flush=True)
for name in ("CUDA_VISIBLE_DEVICES", "JAX_COMPILATION_CACHE_DIR"):
    print(name, os.environ.get(name), flush=True)
steps = int(words[words.index("--offline-steps") + 1])
(folder / "args.json").write_text(json.dumps({"offline_steps": steps}))
(folder / "checkpoint.msgpack").touch()
if "--dies" in words and "--resume" not in words:
    os.kill(os.getpid(), signal.SIGKILL)
while "--until" in words and not os.path.exists(words[words.index("--until") + 1]):
    time.sleep(0.1)
header = "step,seed,phase,success_rate"
(folder / "eval.csv").write_text(f"{header}\\n{steps},1,offline,1.0\\n")
"""


def write_jobs(out, *flags, prefix="python"):
    """OUT/jobs.csv: a job of the script above for each of the `flags`."""
    out.mkdir(parents=True, exist_ok=True)
    script = out / "script.py"
    script.write_text(SCRIPT)
    with (out / "jobs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "command", "run_folder"))
        for i, words in enumerate(flags):
            folder = job_folder(out, i)
            command = f"{prefix} {shlex.quote(str(script))} --offline-steps 1 {words}"
            command += f" --run-dir {shlex.quote(str(folder))}"
            writer.writerow((i, command, folder))


def edit(out, old, new):
    path = out / "jobs.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def log_of(out, i=0):
    return (out / f"logs/{i:05d}.log").read_text()


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("\n1,", "\n0,", "id 0: another row has that id"),
        ("\n1,", "\none,", "the row with id one can't be read"),
        ("00001", "00000", "id 1: another row has its run_folder"),
        ("--tau 2", "--tau '2", "the row with id 1 can't be read"),
        ("1 --tau 2", "many --tau 2", "the row with id 1 can't be read"),
        ("--tau 2 --run-dir", "--tau 2 --run_folder", "id 1: its command needs --run-dir"),
    ],
)
def test_a_row_that_can_not_be_is_named(tmp_path, old, new, says):
    write_jobs(tmp_path, "--tau 1", "--tau 2")
    edit(tmp_path, old, new)
    for what in ("status", "run"):
        done = sweep(what, tmp_path)
        assert done.returncode == 2
        assert says in done.stderr
        assert "Traceback" not in done.stderr


def test_a_row_may_be_any_command(tmp_path, monkeypatch):
    """And jobs find what others have compiled, unless the user says where."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    write_jobs(tmp_path, "", prefix="python -u")
    assert sweep("run", tmp_path).returncode == 0
    assert states_of(tmp_path) == {0: "done"}
    assert tool.kind_of(tool.read_jobs(tmp_path)[0]) == "script.py --offline-steps 1"
    assert f"JAX_COMPILATION_CACHE_DIR {tmp_path / 'compiled'}" in log_of(tmp_path)
    write_jobs(tmp_path / "own", "")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    assert sweep("run", tmp_path / "own").returncode == 0
    assert "JAX_COMPILATION_CACHE_DIR mine" in log_of(tmp_path / "own")


def test_edited_flags_reach_the_script(tmp_path):
    write_jobs(tmp_path, "--tau 1 --rho 1")
    assert sweep("run", tmp_path).returncode == 0
    edit(tmp_path, "--offline-steps 1", "--offline-steps 2")
    assert states_of(tmp_path) == {0: "waiting"}
    assert sweep("run", tmp_path).returncode == 0
    assert states_of(tmp_path) == {0: "done"}
    edit(tmp_path, "--tau 1", "--tau 3")
    assert states_of(tmp_path) == {0: "waiting"}
    assert sweep("run", tmp_path).returncode == 0
    last = [line for line in log_of(tmp_path).splitlines() if line.startswith("told")][-1]
    assert "--offline-steps 2 --tau 3 --rho 1" in last
    assert f"--resume {job_folder(tmp_path, 0) / 'run'}" in last
    # What is not there any more the script would not hear of.
    edit(tmp_path, "--rho 1", "")
    done = sweep("run", tmp_path)
    assert done.returncode == 2
    assert "job 0: --rho was removed" in done.stderr


def test_a_crash_is_tried_again(tmp_path):
    """By `run`, and by the shell script of an array."""
    write_jobs(tmp_path / "a", "--dies")
    done = sweep("run", tmp_path / "a", "--retries", "0")
    assert done.returncode == 1
    assert "job 0 has failed with status 137" in done.stdout
    assert states_of(tmp_path / "a") == {0: "failed"}
    write_jobs(tmp_path / "b", "--dies")
    assert sweep("run", tmp_path / "b").returncode == 0
    write_jobs(tmp_path / "c", "--dies")
    names = {"python": sys.executable, "sweep": SWEEP, "out": tmp_path / "c"}
    for retries, code in ((0, 137), (1, 0)):
        shutil.rmtree(tmp_path / "c/runs", ignore_errors=True)
        (tmp_path / "array").write_text(tool.ARRAY.format(flags="", retries=retries, **names))
        variables = {**os.environ, "FIRST": "0", "SLURM_ARRAY_TASK_ID": "0"}
        assert subprocess.run(["bash", tmp_path / "array"], env=variables).returncode == code
    (job_folder(tmp_path / "a", 0) / "exit").write_text("")
    done = sweep("status", tmp_path / "a")
    assert "job 0 has failed with status unknown" in done.stdout


def test_gpus_are_handed_out(monkeypatch, capsys):
    monkeypatch.delenv(tool.MEMORY_FRACTION, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert tool.share_out(2) == [({"CUDA_VISIBLE_DEVICES": name}, []) for name in ("2", "3")]
    assert capsys.readouterr().out == ""
    shared = [variables for variables, _ in tool.share_out(4)]
    assert [variables["CUDA_VISIBLE_DEVICES"] for variables in shared] == ["2", "3", "2", "3"]
    assert {variables[tool.MEMORY_FRACTION] for variables in shared} == {"0.375"}
    assert "warning: 4 workers share 2 GPUs" in capsys.readouterr().out
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert all("CUDA_VISIBLE_DEVICES" not in variables for variables, _ in tool.share_out(2))


def test_without_locks_and_cores(tmp_path, monkeypatch):
    """Windows and macOS."""
    (tmp_path / "sitecustomize.py").write_text(LACKING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    write_jobs(tmp_path, "", "")
    done = sweep("run", tmp_path, "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "no file locks" in done.stdout
    assert states_of(tmp_path) == {0: "done", 1: "done"}


@pytest.mark.parametrize("launcher", [[], ["nohup"]])
def test_a_hang_up_stops_all(tmp_path, launcher):
    write_jobs(tmp_path, f"--until {tmp_path}/go", "")
    line = [*launcher, sys.executable, SWEEP, "run", tmp_path]
    # The tests may themselves run under nohup.
    heed = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, preexec_fn=heed)
    wait_until(lambda: any(map(has_checkpoint, job_folder(tmp_path, 0).glob("*/"))))
    process.send_signal(signal.SIGHUP)
    if launcher:
        (tmp_path / "go").touch()
    printed, _ = process.communicate(timeout=60)
    states = "done" if launcher else "waiting"
    assert states_of(tmp_path) == {0: states, 1: states}
    assert process.returncode == (0 if launcher else 128 + signal.SIGHUP)
    assert ("stopped and saved" in printed) == (not launcher)


def test_two_managers_share_a_sweep(tmp_path):
    write_jobs(tmp_path, f"--until {tmp_path}/go", "")
    line = [sys.executable, SWEEP, "run", tmp_path]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    wait_until(lambda: any(map(has_checkpoint, job_folder(tmp_path, 0).glob("*/"))))
    done = sweep("run", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "another process runs this sweep" in done.stdout
    assert "job 0 runs elsewhere" in done.stdout
    assert "1 of 2 jobs are done, 0 failed, 1 running elsewhere" in done.stdout
    (tmp_path / "go").touch()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "2 of 2 jobs are done, 0 failed" in printed


@pytest.mark.slow
def test_stopped_and_gone_on_with(dataset_dir, tmp_path, uninterrupted):
    """Ctrl-C, the same command again: the same run to the bit. A job that fails stops no other."""
    jobs = plan(tmp_path, dataset_dir)
    jobs[1]["command"] = jobs[1]["command"].replace("qam_offline.py", "no_such_script.py")
    with (tmp_path / "jobs.csv").open("w") as file:
        writer = csv.DictWriter(file, jobs[0])
        writer.writeheader()
        writer.writerows(jobs[::-1])
    line = [sys.executable, SWEEP, "run", tmp_path, "--workers", "1", "--retries", "1"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    wait_until(lambda: any(map(has_checkpoint, job_folder(tmp_path, 0).glob("*/"))))
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "to go on: python" in printed
    assert states_of(tmp_path)[0] == "waiting"

    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 1
    assert "job 1 has failed with status 2" in done.stdout
    assert "no_such_script" in done.stdout
    log = (tmp_path / "logs/00001.log").read_text()
    assert log.count("No such file") == 4  # tried again once, and once more
    assert states_of(tmp_path)[0] == "done"
    assert_same_states(run_of(tmp_path, 0), uninterrupted)
    assert_same_rows(run_of(tmp_path, 0), uninterrupted, "metrics.csv", "eval.csv")

    # What is done is not done again.
    before = (tmp_path / "logs/00000.log").stat().st_size
    subprocess.run([*line[:3], tmp_path], capture_output=True)
    assert (tmp_path / "logs/00000.log").stat().st_size == before


@pytest.mark.slow
def test_a_job_is_not_run_twice_and_a_silent_one_is_stale(dataset_dir, tmp_path):
    plan(tmp_path, dataset_dir, seeds=1)
    line = [sys.executable, SWEEP, "job", tmp_path, "0"]
    process = subprocess.Popen(line, start_new_session=True)
    wait_until(lambda: any(map(has_checkpoint, job_folder(tmp_path, 0).glob("*/"))))
    assert states_of(tmp_path)[0] == "running"
    done = sweep("job", tmp_path, 0)
    assert done.returncode == tool.ELSEWHERE
    assert "is running already" in done.stderr
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    long_ago = time.time() - 700
    os.utime(job_folder(tmp_path, 0) / "alive", (long_ago, long_ago))
    assert states_of(tmp_path)[0] == "stale"


@pytest.mark.slow
def test_the_time_that_a_plan_takes(dataset_dir, tmp_path):
    flags = ("--offline-steps", "1000000", "--checkpoint-minutes", "60")
    plan(tmp_path, dataset_dir, seeds=3, flags=flags)
    done = sweep("time", tmp_path, "--seconds", "2")
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    speed, each = float(words[0]), in_seconds(*words[words.index("second,") + 1 :][:2])
    assert each == pytest.approx(1e6 / speed, rel=0.02)
    total = in_seconds(*done.stdout.splitlines()[-1].split()[:2])
    assert total == pytest.approx(3 * each, rel=0.02)
    assert not (tmp_path / "timing").exists()


def in_seconds(number, unit):
    return float(number) * {"s": 1, "min": 60, "h": 3600}[unit]


def test_times_are_told_in_units_that_say_something():
    assert [tool.in_words(x) for x in (4, 200, 40000)] == ["4 s", "3.3 min", "11.1 h"]


# ------------------------------------------------------------------------------------------- Slurm


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A cluster of one node, for as long as the tests of this file take."""
    if not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch"))):
        pytest.skip("no Slurm: install slurmctld, slurmd, slurm-client and munge")
    if os.geteuid() != 0:
        pytest.skip("a cluster for the test is started as root")
    folder = tmp_path_factory.mktemp("slurm")
    tool = ROOT / ".ci/slurm"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        subprocess.run([tool, "start", folder], check=True)
        yield
        subprocess.run(["scancel", "--user=root"])
        subprocess.run([tool, "stop", folder], check=True)


def test_nothing_is_submitted_while_squeue_fails(tmp_path, monkeypatch):
    """And what Slurm reads of a folder with a space is one word."""
    write_jobs(tmp_path / "my sweep", "")
    for name, line in (("sbatch", f"touch {tmp_path}/submitted"), ("squeue", "exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = sweep("slurm", tmp_path / "my sweep")
    assert done.returncode == 1
    assert "nothing is submitted" in done.stderr
    assert not (tmp_path / "submitted").exists()
    for line in (tmp_path / "my sweep/array.sbatch").read_text().splitlines():
        if line.startswith("#SBATCH"):
            assert len(shlex.split(line.removeprefix("#SBATCH"))) == 1
    (tmp_path / "squeue").write_text("#!/bin/sh\n")
    assert sweep("slurm", tmp_path / "my sweep").returncode == 0
    assert (tmp_path / "submitted").exists()


def tasks():
    """{index in the array: state} of what is in the queue."""
    line = ["squeue", "--noheader", "--array", "--format=%K %T"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    return dict(words.split() for words in done.stdout.splitlines())


@pytest.mark.slow
def test_preempted_and_cancelled_on_slurm(slurm, dataset_dir, tmp_path, uninterrupted):
    """One job is put back, one cancelled and submitted again; the states are those of runs here."""
    tmp_path = tmp_path / "my, 100% sweep"
    plan(tmp_path, dataset_dir, seeds=4)
    words = ("--time", "00:20:00", "--max-running", "2", "--array-size", "3", "--", "--nice=0")
    done = sweep("slurm", tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --signal=B:TERM@120" in done.stdout
    assert "#SBATCH --nice=0" in done.stdout
    assert done.stdout.count("Submitted batch job") == 2  # of three jobs, and of one
    first, _ = [line.split()[-1] for line in done.stdout.splitlines() if "Submitted" in line]

    assert "nothing is left" in sweep("slurm", tmp_path).stdout  # two run, two are in the queue

    for i in (0, 1):
        wait_until(lambda i=i: any(map(has_checkpoint, job_folder(tmp_path, i).glob("*/"))))
    subprocess.run(["scontrol", "requeue", f"{first}_0"], check=True)
    subprocess.run(["scancel", f"{first}_1"], check=True)
    wait_until(lambda: (job_folder(tmp_path, 1) / "exit").exists())
    wait_until(lambda: not tasks())
    assert states_of(tmp_path) == {0: "done", 1: "waiting", 2: "done", 3: "done"}
    log = (tmp_path / "logs/00000.log").read_text()
    assert log.count("stopped and saved") == 1

    done = sweep("slurm", tmp_path)
    assert done.stdout.count("Submitted batch job") == 1
    wait_until(lambda: not tasks())
    assert set(states_of(tmp_path).values()) == {"done"}
    assert_same_states(run_of(tmp_path, 0), uninterrupted)
    assert_same_rows(run_of(tmp_path, 0), uninterrupted, "metrics.csv", "eval.csv")
    other = tmp_path / "seed_2"
    assert run("qam_offline.py", dataset_dir, other, *LONG, "--seed", "2").returncode == 0
    assert_same_states(run_of(tmp_path, 1), folder_of(other))
    assert "nothing is left" in sweep("slurm", tmp_path).stdout
