"""Many runs: plan them, run them here or on Slurm, see how they stand.

    python tools/sweep.py plan OUT --scripts qam_offline.py baselines/fql.py --seeds 12 \\
        --tasks scene-play cube-double-play-task1 --set tau=0.005,0.02 --batch-size 128
    python tools/sweep.py time OUT
    python tools/sweep.py run OUT --workers 2
    python tools/sweep.py slurm OUT --partition P --gpus 1 --time 12:00:00
    python tools/sweep.py status OUT

plan writes OUT/jobs.csv, a row a job: id, command, run folder. It is yours to read and edit. A job
is a command of a script; its folder holds the run that the command makes, and beside it `alive`,
touched while the job works, and `exit`, its exit status when it has ended. OUT/logs has what the
jobs print. Nothing else is remembered: whatever starts a job again, here or on a cluster, goes on
with its run from the last checkpoint, to the bit, and leaves out what is done.
"""

import csv
import dataclasses
import fcntl
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
MAKE_ONLINE = ROOT / "tools/make_online.py"
# The methods of the paper's table, and what it trains them on. RLPD is made for the online phase.
PAPER_SCRIPTS = (
    "qam_offline.py",
    "variants/qam_edit.py",
    "variants/qam_fql.py",
    "baselines/fql.py",
    "baselines/dsrl.py",
    "baselines/fbrac.py",
    "baselines/bam.py",
    "baselines/fedit.py",
    "baselines/ifql.py",
    "baselines/fawac.py",
    "baselines/rebrac.py",
    "baselines/cgql.py",
    "baselines/cgql.py --mode mse",
    "baselines/cgql.py --mode linex",
    "baselines/qsm.py",
    "baselines/dac.py",
)
PAPER_ONLINE = "baselines/rlpd.py --offline-steps 0 --balanced-sampling"
PAPER_DOMAINS = (
    "cube-double-play",
    "cube-triple-play",
    "cube-quadruple-play",
    "scene-play",
    "puzzle-3x3-play",
    "puzzle-4x4-play",
    "antmaze-large-navigate",
    "antmaze-giant-navigate",
    "humanoidmaze-medium-navigate",
    "humanoidmaze-large-navigate",
)
PAPER_SEEDS = 12
TASKS_OF_A_DOMAIN = 5
STALE_AFTER = 600  # seconds without a sign of life
TOUCH_EVERY = 30  # seconds
STOPPED = tuple(128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
OutFolder = Annotated[Path, tyro.conf.Positional]


@dataclasses.dataclass
class Plan:
    """Write OUT/jobs.csv. Flags that are not listed here go to the scripts."""

    out: OutFolder
    scripts: tuple[str, ...] = ()  # one or more, each with flags of its own if in quotes
    tasks: tuple[str, ...] = ()  # domains (their five tasks each), or tasks
    seeds: int = 3  # seeds 1, 2, .. of each
    num_seeds: int = 1  # seeds that a job trains side by side on its device
    set: tuple[str, ...] = ()  # NAME=VALUE,VALUE: a job for every value; several are crossed
    online: bool = False  # the offline-to-online version of each script
    preset: Literal["none", "paper"] = "none"  # paper: its methods, tasks and number of seeds


@dataclasses.dataclass
class Time:
    """Measure the speed of each kind of job for some seconds, and say how long all will take."""

    out: OutFolder
    seconds: float = 30.0  # after the compilation, of each kind


@dataclasses.dataclass
class Run:
    """Run what is not done, here. Ctrl-C saves everything; the same command goes on."""

    out: OutFolder
    workers: int = 1  # jobs at a time: one on each GPU, or sharing out the cores
    retries: int = 1  # how often a job that fails is tried again from its checkpoint


@dataclasses.dataclass
class Slurm:
    """Write OUT/array.sbatch and submit what is not done. What follows -- goes to sbatch."""

    out: OutFolder
    partition: str | None = None
    gpus: int = 0  # for each job
    time: str = "12:00:00"  # for each job; what is not done by then is requeued and goes on
    max_running: int = 50  # jobs at a time
    array_size: int = 800  # jobs of one array, below the cluster's MaxArraySize
    retries: int = 1  # how often a job that fails is tried again from its checkpoint


@dataclasses.dataclass
class Status:
    """How every job stands."""

    out: OutFolder


@dataclasses.dataclass
class Job:
    """Run one job to its end; what `run` and the array do."""

    out: OutFolder
    id: tyro.conf.Positional[int]
    retries: int = 1
    cores: str | None = None  # of this machine, 0,1,2
    gpu: str | None = None  # CUDA_VISIBLE_DEVICES


class Row(NamedTuple):
    id: int
    command: str
    run_folder: Path


def fail(message, status=2):
    """Print one sentence and exit: status 2 for what the user can put right, else 1."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def read_jobs(out):
    """{id: Row} of OUT/jobs.csv."""
    path = out / "jobs.csv"
    jobs = {}
    try:
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                job = Row(int(line["id"]), line["command"], Path(line["run_folder"]))
                jobs[job.id] = job
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{path} can't be read ({error!r}): make it with `sweep.py plan`")
    if not jobs:
        fail(f"{path} has no job")
    return jobs


# -------------------------------------------------------------------------------------------- plan


def plan(args, flags):
    """Every combination of script, task, value and seeds, checked."""
    scripts = args.scripts
    tasks = args.tasks
    seeds = args.seeds
    if args.preset == "paper":
        methods = (*PAPER_SCRIPTS, PAPER_ONLINE) if args.online else PAPER_SCRIPTS
        scripts = scripts or [f"{ROOT}/{method}" for method in methods]
        tasks = tasks or PAPER_DOMAINS
        seeds = PAPER_SEEDS
    if not scripts or not tasks:
        fail("name --scripts and --tasks, or --preset paper")
    if seeds % args.num_seeds:
        fail(f"--seeds {seeds} can't be packed by --num-seeds {args.num_seeds}: it must divide it")
    if (args.out / "jobs.csv").exists():
        fail(f"{args.out} has a plan: edit its jobs.csv, or name another folder")

    scripts = [find_script(name, args.online) for name in scripts]
    tasks = [task for name in tasks for task in tasks_of(name)]
    first_seeds = range(1, seeds + 1, args.num_seeds)
    out = args.out.resolve()
    jobs = []
    for method, task, own in itertools.product(scripts, tasks, combinations(args.set)):
        script, own_flags = method
        kind = ["--env-id", task, *own_flags, *own, *flags]
        if "--seed" in kind or "--run-dir" in kind:
            fail("plan sets --seed and --run-dir: seeds 1, 2, .. (for others edit jobs.csv)")
        check_flags(script, kind)
        for seed in first_seeds:
            line = ["python", str(script), *kind, "--seed", str(seed)]
            if args.num_seeds > 1:
                line += ["--num-seeds", str(args.num_seeds)]
            folder = out / "runs" / f"{len(jobs):05d}"
            line += ["--run-dir", str(folder)]
            jobs.append(Row(len(jobs), shlex.join(line), folder))
    out.mkdir(parents=True, exist_ok=True)
    with (out / "jobs.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(jobs)
    print(f"{out / 'jobs.csv'}: {len(jobs)} jobs, {len(jobs) * args.num_seeds} runs")


def find_script(words, online):
    """(path of a script, its flags); its online version is made if that is wanted."""
    name, *flags = shlex.split(words)
    script = Path(name).expanduser().resolve()
    if not script.exists():
        fail(f"there is no script {name}")
    if not online:
        return script, flags
    if script.name == "qam_offline.py":
        return script.with_name("qam_offline_to_online.py"), flags
    done = subprocess.run([sys.executable, MAKE_ONLINE, script])
    if done.returncode:
        sys.exit(done.returncode)
    return script.with_name(f"{script.stem}_offline_to_online.py"), flags


def tasks_of(name):
    """A task, an environment's id, or the five tasks of a domain."""
    if "-task" in name or re.search(r"-v\d+$", name):
        return [name]
    return [f"{name}-task{number}" for number in range(1, TASKS_OF_A_DOMAIN + 1)]


def combinations(settings):
    """The flags of every combination of NAME=VALUE,VALUE settings."""
    choices = []
    for setting in settings:
        name, _, values = setting.partition("=")
        if not values:
            fail(f"--set {setting}: it should be NAME=VALUE,VALUE")
        flag = f"--{name.replace('_', '-')}"
        choices.append([[flag, value] for value in values.split(",")])
    return [sum(chosen, []) for chosen in itertools.product(*choices)]


def check_flags(script, flags):
    """Let the script read its command line; it says itself what is wrong with it."""
    name = f"checked_{script.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, script)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    module = sys.modules[name]
    try:
        args = tyro.cli(module.Args, args=flags)
        domain, _, _ = module.parse_env_id(args.env_id)
        if not domain:  # OGBench does not know it: does anybody?
            module.make_env(args).close()
    except SystemExit:
        fail(f"{script.name} does not take {shlex.join(flags)}")


# -------------------------------------------------------------------------------- how a job stands


def find_run(job):
    """The run that a job has made: the newest with a checkpoint, or else the newest, or None."""
    runs = sorted(path.parent for path in job.run_folder.glob("*/args.json"))
    saved = [run for run in runs if (run / "checkpoint.msgpack").exists()]
    found = saved or runs
    return found[-1] if found else None


def read_csv(path):
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


class Progress(NamedTuple):
    step: int
    last_step: int
    success: float | None  # of the last evaluation, mean over its seeds
    done: bool


def progress_of(job):
    """What the files of its run say."""
    run = find_run(job)
    if run is None:
        return Progress(0, 0, None, False)
    record = json.loads((run / "args.json").read_text())
    last_step = record["offline_steps"] + record.get("online_steps", 0)
    scores = read_csv(run / "eval.csv")
    steps = [int(row["step"]) for row in scores + read_csv(run / "metrics.csv")]
    step = max(steps, default=0)
    newest = [row for row in scores if row["step"] == scores[-1]["step"]]
    success = None
    if newest:
        success = sum(float(row["success_rate"]) for row in newest) / len(newest)
    # The evaluation at the last step is the last thing that a run does.
    done = bool(newest) and int(newest[0]["step"]) >= last_step
    return Progress(step, last_step, success, done)


def state_of(job, progress):
    """waiting, running, done, failed or stale."""
    alive = job.run_folder / "alive"
    ended = job.run_folder / "exit"
    if progress.done:
        return "done"
    if alive.exists():
        silent = time.time() - alive.stat().st_mtime
        return "running" if silent < STALE_AFTER else "stale"
    if ended.exists() and int(ended.read_text()) not in STOPPED:
        return "failed"
    return "waiting"


def last_line(out, job):
    """Of what a job has printed."""
    path = log_path(out, job)
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    written = [line.strip() for line in lines if line.strip()]
    return written[-1] if written else "nothing printed"


def log_path(out, job):
    return out / "logs" / f"{job.id:05d}.log"


def status(args):
    """A line a job, and the totals."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for status OUT | head
    counts = {}
    for job in read_jobs(args.out).values():
        progress = progress_of(job)
        state = state_of(job, progress)
        counts[state] = counts.get(state, 0) + 1
        success = "" if progress.success is None else f"success {progress.success:.2f}"
        step = f"{progress.step}/{progress.last_step}" if progress.last_step else ""
        print(f"{job.id:5}  {state:8} {step:18} {success:14} {describe(job)}")
        if state == "failed":
            print(f"       {last_line(args.out, job)}")
    print(", ".join(f"{count} {state}" for state, count in sorted(counts.items())))


def describe(job):
    """Its command without python, the folders and the run folder."""
    words = shlex.split(job.command)
    end = words.index("--run-dir") if "--run-dir" in words else len(words)
    return shlex.join([Path(words[1]).name, *words[2:end]])


# --------------------------------------------------------------------------------------- one job


def run_job(args):
    """Run a job to its end, or until a signal stops it. The exit status is that of its script."""
    jobs = read_jobs(args.out)
    if args.id not in jobs:
        fail(f"{args.out / 'jobs.csv'} has no job {args.id}")
    job = jobs[args.id]
    if progress_of(job).done:
        return 0
    lock = hold(job)
    if args.cores:
        os.sched_setaffinity(0, map(int, args.cores.split(",")))
    if args.gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = args.gpu

    children = []
    stops = []

    def stop(number, _):
        stops.append(number)
        for child in children:
            child.terminate()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, stop)
    (job.run_folder / "exit").unlink(missing_ok=True)
    code = 1
    for _ in range(args.retries + 1):
        code = run_once(args.out, job, lock, children, stops)
        if code == 0 or stops:
            break
    (job.run_folder / "exit").write_text(str(code))
    (job.run_folder / "alive").unlink(missing_ok=True)
    return code


def hold(job):
    """The lock of the job's folder, for as long as this process or its script lives."""
    job.run_folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(job.run_folder / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"job {job.id} is running already", status=1)
    return lock


def run_once(out, job, lock, children, stops):
    """Start the script, or go on with its run, and wait for it: its exit status."""
    words = shlex.split(job.command)
    if words[0] == "python":
        words[0] = sys.executable
    run = find_run(job)
    if run is not None and (run / "checkpoint.msgpack").exists():
        words = [*words[:2], "--resume", str(run)]
    log_path(out, job).parent.mkdir(parents=True, exist_ok=True)
    with log_path(out, job).open("ab") as log:
        child = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[lock],
        )
    children[:] = [child]
    if stops:  # the signal came before there was a child
        child.terminate()
    while True:
        (job.run_folder / "alive").touch()
        try:
            code = child.wait(timeout=TOUCH_EVERY)
        except subprocess.TimeoutExpired:
            continue
        # Killed by a signal, a process has its negative number; a shell says 128 + number.
        return 128 - code if code < 0 else code


# -------------------------------------------------------------------------------------------- here


def count_gpus():
    if not shutil.which("nvidia-smi"):
        return 0
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return done.stdout.count("\nGPU ") + done.stdout.startswith("GPU ")


def place_of(worker, num_workers):
    """Flags of `job` that give a worker its GPU, or its share of the cores."""
    num_gpus = count_gpus()
    if num_gpus:
        return ["--gpu", str(worker % num_gpus)]
    cores = sorted(os.sched_getaffinity(0))
    share = cores[worker::num_workers] or [cores[worker % len(cores)]]
    return ["--cores", ",".join(map(str, share))]


def run_here(args):
    """Keep the workers busy until nothing is left, or a signal comes."""
    if args.workers < 1:
        fail("--workers must be at least 1")
    jobs = read_jobs(args.out)
    waiting = [job for job in jobs.values() if not progress_of(job).done]
    num_done = len(jobs) - len(waiting)
    places = [place_of(worker, args.workers) for worker in range(args.workers)]
    working = {}  # {worker: (job, process)}
    num_failed = 0
    stops = []

    def stop(number, _):
        stops.append(number)
        for _, process in working.values():
            process.terminate()

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    total = tqdm(total=len(jobs), unit=" jobs", disable=None)
    bars = [tqdm(position=1 + i, bar_format="{desc}", disable=None) for i in range(args.workers)]
    while working or (waiting and not stops):
        for worker in range(args.workers):
            if worker not in working and waiting and not stops:
                job = waiting.pop(0)
                tqdm.write(f"job {job.id} starts: {describe(job)}")
                working[worker] = (job, start(args, job, places[worker]))
        time.sleep(1)
        ended = [worker for worker in working if working[worker][1].poll() is not None]
        total.n = round(num_done + show_progress(working, bars), 2)
        total.refresh()
        for worker in ended:
            job, _ = working.pop(worker)
            done = report_end(args.out, job, stops)
            num_done += done
            num_failed += not done and not stops
    for bar in (*bars, total):
        bar.close()
    print(f"{num_done} of {len(jobs)} jobs are done, {num_failed} failed: see {args.out}/logs")
    if stops:
        print("stopped and saved; to go on: " + shlex.join(["python", *sys.argv]))
        return 128 + stops[0]
    return 1 if num_failed else 0


def start(args, job, place):
    """A process that runs the job, in a session of its own: Ctrl-C stops it by way of this one."""
    line = [sys.executable, __file__, "job", str(args.out), str(job.id), *place]
    line += ["--retries", str(args.retries)]
    return subprocess.Popen(line, start_new_session=True)


def show_progress(working, bars):
    """A line for each job that is running; the sum of the parts of them that are done."""
    fractions = 0.0
    for worker, (job, _) in working.items():
        progress = progress_of(job)
        fractions += progress.step / max(progress.last_step, 1)
        success = "" if progress.success is None else f", success {progress.success:.2f}"
        words = f"job {job.id}: step {progress.step}/{progress.last_step}{success}"
        bars[worker].set_description_str(words)
    return fractions


def report_end(out, job, stops):
    """Say how a job has ended: True if it is done."""
    progress = progress_of(job)
    if progress.done:
        tqdm.write(f"job {job.id} is done, success {progress.success:.2f}")
    elif not stops:
        tqdm.write(f"job {job.id} has failed: {last_line(out, job)}")
    return progress.done


def time_jobs(args):
    """Updates a second of each script on each domain, and the hours of all jobs by them."""
    kinds = {}  # {what decides the speed: jobs}
    for job in read_jobs(args.out).values():
        kinds.setdefault(kind_of(job), []).append(job)
    hours = 0.0
    for kind, jobs in kinds.items():
        speed, num_steps = measure_speed(args, jobs[0])
        hours_each = num_steps / speed / 3600
        hours += hours_each * len(jobs)
        print(f"{speed:8.1f} updates a second, {hours_each:6.2f} h a job, {len(jobs)} jobs: {kind}")
    print(f"{hours:.1f} device hours for all, evaluations apart")


def kind_of(job):
    """The command without seed and run folder, and with the domain in place of the task."""
    words = describe(job).split()
    seed = words.index("--seed")
    del words[seed : seed + 2]
    return " ".join(word.partition("-task")[0] for word in words)


def measure_speed(args, job):
    """(updates a second, updates of the whole job), by the job itself in a folder of its own."""
    folder = args.out / "timing"
    words = shlex.split(job.command)
    words[0] = sys.executable
    words[words.index("--run-dir") + 1] = str(folder)
    line = [*words, "--log-every", "10"]
    log_path = args.out / "timing.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log)
    started = None
    while process.poll() is None and (not started or time.time() - started < args.seconds):
        time.sleep(0.2)
        if started is None and any(folder.glob("*/metrics.csv")):
            started = time.time()
    process.terminate()
    process.wait()
    found = list(folder.glob("*/metrics.csv"))
    if not found:
        fail(f"{describe(job)} has not come to train: see {log_path}", status=1)
    record = json.loads((found[0].parent / "args.json").read_text())
    rows = read_csv(found[0])
    steps = [int(row["step"]) for row in rows]
    seconds = sum(10 / float(row["updates_per_second"]) for row in rows[:: record["num_seeds"]])
    shutil.rmtree(folder)
    num_steps = record["offline_steps"] + record.get("online_steps", 0)
    return steps[-1] / seconds, num_steps


# ------------------------------------------------------------------------------------------- Slurm

# FIRST + SLURM_ARRAY_TASK_ID is the id of a job. A signal reaches this shell two minutes before the
# time is up: the script saves, and the task is put back into the queue. So does whoever preempts a
# task; and when it is cancelled, it is not running any more and stays away.
ARRAY = """\
#!/bin/bash
{flags}
{python} {sweep} job {out} $((FIRST + SLURM_ARRAY_TASK_ID)) --retries {retries} &
job=$!
trap 'kill -TERM $job' TERM
code=0
while kill -0 $job 2> /dev/null; do wait $job; code=$?; done
if [ $code = 143 ] && scontrol show job $SLURM_JOB_ID | grep -q JobState=RUNNING; then
  scontrol requeue $SLURM_JOB_ID
fi
exit $code
"""


def slurm(args, more):
    """Write the array's script, show it, and submit it for what is not done."""
    if not shutil.which("sbatch"):
        fail("sbatch is not installed: this is no machine of a Slurm cluster")
    jobs = read_jobs(args.out)
    out = args.out.resolve()
    (out / "logs").mkdir(exist_ok=True)
    flags = {
        "job-name": out.name,
        "partition": args.partition,
        "gpus": args.gpus or None,
        "time": args.time,
        "signal": "B:TERM@120",
        "open-mode": "append",
        "output": out / "logs/slurm-%A_%a.log",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in flags.items() if value is not None]
    lines += ["#SBATCH --requeue", *[f"#SBATCH {flag}" for flag in more]]
    text = ARRAY.format(
        flags="\n".join(lines),
        python=shlex.quote(sys.executable),
        sweep=shlex.quote(str(Path(__file__).resolve())),
        out=shlex.quote(str(out)),
        retries=args.retries,
    )
    path = out / "array.sbatch"
    path.write_text(text)
    print(text)
    states = {id: state_of(job, progress_of(job)) for id, job in jobs.items()}
    taken = {id for id, state in states.items() if state in ("done", "running")}
    ids = sorted(jobs.keys() - taken - find_queued(out))
    if not ids:
        print("nothing is left to submit: all jobs are done, running or in the queue")
    for first in range(0, max(ids, default=-1) + 1, args.array_size):
        tasks = [str(id - first) for id in ids if first <= id < first + args.array_size]
        if not tasks:
            continue
        line = ["sbatch", f"--array={','.join(tasks)}%{args.max_running}"]
        line += [f"--export=ALL,FIRST={first}", f"--comment={first} {out}"]
        done = subprocess.run([*line, path])
        if done.returncode:
            fail("sbatch has refused the array, and says above why", status=1)


def find_queued(out):
    """Ids of the jobs that Slurm has; each array's comment is its first id and the folder."""
    line = ["squeue", "--noheader", "--array", "--format=%K %k"]
    done = subprocess.run(line, capture_output=True, text=True)
    queued = set()
    for line in done.stdout.splitlines():
        index, _, comment = line.partition(" ")
        first, _, folder = comment.partition(" ")
        if folder.strip() == str(out):
            queued.add(int(first) + int(index))
    return queued


def main():
    given = sys.argv[1:]
    more = []
    if "--" in given:
        mark = given.index("--")
        given, more = given[:mark], given[mark + 1 :]
    commands = Plan | Time | Run | Slurm | Status | Job
    args, unknown = tyro.cli(commands, args=given, return_unknown_args=True, description=__doc__)
    if unknown and not isinstance(args, Plan):
        fail(f"unknown: {shlex.join(unknown)}")
    if more and not isinstance(args, Slurm):
        fail("-- is for flags of sbatch, after `slurm`")
    if isinstance(args, Plan):
        return plan(args, unknown)
    if isinstance(args, Slurm):
        return slurm(args, more)
    functions = {Time: time_jobs, Run: run_here, Status: status, Job: run_job}
    return functions[type(args)](args)


if __name__ == "__main__":
    sys.exit(main())
