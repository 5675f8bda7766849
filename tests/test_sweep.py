"""tools/sweep.py: plans, jobs run here, and jobs on a real Slurm of one node."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import DOMAIN, ROOT, command, folder_of, run
from stopping import assert_same_rows, assert_same_states, has_checkpoint

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


@pytest.mark.parametrize(
    "words, says",
    [
        ("--tasks scene-play-task1 --hidden-dim 8", "does not take"),
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
    assert "job 1 has failed" in done.stdout
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
    assert done.returncode == 1
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
    speed, hours = float(words[0]), float(words[words.index("job,") - 3])
    assert hours == pytest.approx(1e6 / speed / 3600, abs=0.01)
    total = float(done.stdout.splitlines()[-1].split()[0])
    assert total == pytest.approx(3 * hours, abs=0.1)
    assert not (tmp_path / "timing").exists()


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


def tasks():
    """{index in the array: state} of what is in the queue."""
    line = ["squeue", "--noheader", "--array", "--format=%K %T"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    return dict(words.split() for words in done.stdout.splitlines())


@pytest.mark.slow
def test_preempted_and_cancelled_on_slurm(slurm, dataset_dir, tmp_path, uninterrupted):
    """One job is put back, one cancelled and submitted again; the states are those of runs here."""
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
