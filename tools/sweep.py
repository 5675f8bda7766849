"""Many runs: plan them, run them here or on Slurm, see how they stand.

    python tools/sweep.py plan OUT --scripts qam_offline.py baselines/fql.py --seeds 12 \\
        --tasks scene-play cube-double-play-task1 --set tau=0.005,0.02 --batch-size 128
    python tools/sweep.py time OUT
    python tools/sweep.py run OUT --workers 2
    python tools/sweep.py slurm OUT --partition P --gpus 1 --time 12:00:00
    python tools/sweep.py status OUT

plan writes OUT/jobs.csv, a row a job: id, command, run folder. It is yours to read and edit. A job
is a command of a script; its folder holds the run that the command makes, and beside it `command`,
as the script has taken it, `alive`, touched while the job works, and `exit`, its exit status when
it has ended. OUT/logs has what the jobs print, OUT/compiled what they have compiled. Nothing else
is remembered: whatever starts a job again, here or on a cluster, goes on with its run from the last
checkpoint, to the bit, and leaves out what is done.
"""

import collections
import csv
import dataclasses
import difflib
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
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

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

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
STOPPED = ("130", "138", "143")  # exit statuses after SIGINT, SIGUSR1, SIGTERM
ELSEWHERE = 75  # exit status of `job` where another process runs it
MEMORY_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
GPU_MEMORY = 0.75  # the part of it that a JAX process takes by itself
STEPS = {"--offline-steps": "offline_steps", "--online-steps": "online_steps"}  # in args.json
OutFolder = Annotated[Path, tyro.conf.Positional]


@dataclasses.dataclass
class Plan:
    """Write OUT/jobs.csv. Flags that are not listed here go to the scripts."""

    out: OutFolder
    scripts: tuple[str, ...] = ()  # one or more
    tasks: tuple[str, ...] = ()  # domains (their five tasks each), or tasks
    seeds: int = 3  # seeds 1, 2, .. of each
    num_seeds: int = 1  # seeds that a job trains side by side on its device
    set: tuple[str, ...] = ()  # NAME=VALUE,VALUE or SCRIPT:NAME=VALUE,VALUE: a job for every value
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
    """Run one job until it ends; what `run` and the array do."""

    out: OutFolder
    id: tyro.conf.Positional[int]
    cores: str | None = None  # of this machine, 0,1,2


class Row(NamedTuple):
    id: int
    command: str
    run_folder: Path


def fail(message, status=2):
    """Print one sentence and exit: status 2 for what the user can put right, else 1."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def read_jobs(out):
    """{id: Row} of OUT/jobs.csv. It is edited by hand, so each row is looked at."""
    path = out / "jobs.csv"
    try:
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        fail(f"{path} can't be read ({error!r}): make it with `sweep.py plan`")
    jobs = {}
    folders = set()
    for line in lines:
        where = f"{path}, the row with id {line.get('id')}"
        try:
            job = Row(int(line["id"]), line["command"], Path(line["run_folder"]))
            flags = flags_of(job.command)
            for name in STEPS:
                int(flags.get(name, "0"))
        except (KeyError, TypeError, ValueError) as error:
            fail(f"{where} can't be read: {error!r}")
        if flags.get("--run-dir") != str(job.run_folder):
            fail(f"{where}: its command needs --run-dir {job.run_folder}, its run_folder")
        if job.id in jobs:
            fail(f"{where}: another row has that id")
        if job.run_folder in folders:
            fail(f"{where}: another row has its run_folder")
        folders.add(job.run_folder)
        jobs[job.id] = job
    if not jobs:
        fail(f"{path} has no job")
    return jobs


def flags_of(command):
    """{"--hidden-dims": "128 128"} of a command; of a flag given twice the last holds."""
    flags = {}
    name = ""
    for word in shlex.split(command):
        if word.startswith("--"):
            name, _, value = word.partition("=")
            name = name.replace("_", "-")
            flags[name] = value
        elif name:
            flags[name] = f"{flags[name]} {word}".strip()
    return flags


# -------------------------------------------------------------------------------------------- plan


def plan(args, flags):
    """Every combination of script, task, value and seeds, checked."""
    scripts = args.scripts
    tasks = args.tasks
    seeds = args.seeds
    if args.preset == "paper":
        methods = (*PAPER_SCRIPTS, PAPER_ONLINE) if args.online else PAPER_SCRIPTS
        scripts = scripts or [f"{shlex.quote(str(ROOT))}/{method}" for method in methods]
        tasks = tasks or PAPER_DOMAINS
        seeds = PAPER_SEEDS
    if not scripts or not tasks:
        fail("name --scripts and --tasks, or --preset paper")
    if seeds % args.num_seeds:
        fail(f"--seeds {seeds} can't be packed by --num-seeds {args.num_seeds}: it must divide it")
    if (args.out / "jobs.csv").exists():
        fail(f"{args.out} has a plan: edit its jobs.csv, or name another folder")

    methods = [find_method(words, args.online) for words in scripts]
    tasks = [task for name in tasks for task in tasks_of(name)]
    settings = [parse_setting(text, methods) for text in args.set]
    kinds = []
    for method, task in itertools.product(methods, tasks):
        for own in combinations(settings, method):
            words = ["--env-id", task, *method.flags, *own, *flags]
            kinds.append((method.script, check_flags(method.script, words)))
    out = args.out.resolve()
    jobs = []
    for script, words in kinds:
        for seed in range(1, seeds + 1, args.num_seeds):
            line = ["python", str(script), *words, "--seed", str(seed)]
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


class Method(NamedTuple):
    name: str  # of the script that was named
    script: Path  # its online version, if that is wanted
    flags: list


def find_method(words, online):
    """A script, which in quotes may have flags. Its online version is made if that is wanted."""
    name, *flags = [words] if Path(words).exists() else shlex.split(words)
    script = Path(name).expanduser().resolve()
    if not script.exists():
        fail(f"there is no script {name}")
    if not online:
        return Method(script.name, script, flags)
    if script.name == "qam_offline.py":
        return Method(script.name, script.with_name("qam_offline_to_online.py"), flags)
    done = subprocess.run([sys.executable, MAKE_ONLINE, script])
    if done.returncode:
        sys.exit(done.returncode)
    return Method(script.name, script.with_name(f"{script.stem}_offline_to_online.py"), flags)


def tasks_of(name):
    """A task, an environment's id, or the five tasks of a domain."""
    if "-task" in name or re.search(r"-v\d+$", name):
        return [name]
    return [f"{name}-task{number}" for number in range(1, TASKS_OF_A_DOMAIN + 1)]


class Setting(NamedTuple):
    owner: str  # the script that it is for; "" for all
    flag: str
    values: list


def parse_setting(text, methods):
    """SCRIPT:NAME=VALUE,VALUE, or without the script."""
    name, _, values = text.partition("=")
    owner, _, name = name.rpartition(":")
    owner = Path(owner).name
    if not name or not values:
        fail(f"--set {text}: it should be NAME=VALUE,VALUE or SCRIPT:NAME=VALUE,VALUE")
    scripts = [method.name for method in methods]
    if owner and owner not in scripts:
        fail(f"--set {text}: {owner} is none of the scripts, {', '.join(scripts)}")
    return Setting(owner, f"--{name.replace('_', '-')}", values.split(","))


def combinations(settings, method):
    """The flags of every combination of the settings that are for the method."""
    choices = []
    for setting in settings:
        if setting.owner in ("", method.name):
            choices.append([[setting.flag, value] for value in setting.values])
    return [sum(chosen, []) for chosen in itertools.product(*choices)]


def check_flags(script, words):
    """Let the script read its flags. They come back with absolute paths: jobs run anywhere."""
    module = load(script)
    checked = []
    for word in words:
        checked += word.split("=", 1) if word.startswith("--") else [word]
    for word in checked:
        if word.startswith("--"):
            check_name(script, word, dataclasses.fields(module.Args))
    try:
        args = tyro.cli(module.Args, args=checked)
        domain, _, _ = module.parse_env_id(args.env_id)
        if not domain:  # OGBench does not know it: does anybody?
            module.make_env(args).close()
    except SystemExit:
        fail(f"{script.name} does not take these flags, as it says above")
    for i, word in enumerate(checked[:-1]):
        value = getattr(args, word.removeprefix("--").replace("-", "_"), None)
        if word.startswith("--") and isinstance(value, str) and os.path.isabs(value):
            checked[i + 1] = value
    return checked


def check_name(script, flag, fields):
    """Refuse a flag that the script does not have, and name the nearest one."""
    known = [field.name.replace("_", "-") for field in fields]
    name = flag.removeprefix("--").removeprefix("no-").replace("_", "-")
    if name in ("seed", "run-dir"):
        fail("plan sets --seed and --run-dir: seeds 1, 2, .. (for others edit jobs.csv)")
    if name not in known:
        hint = f"a flag of one script is given as --set SCRIPT:{name}=VALUE"
        for nearest in difflib.get_close_matches(name, known, n=1):
            hint = f"the nearest that it has is --{nearest}"
        fail(f"{script.name} has no {flag}; {hint}")


def load(script):
    """The script as a module."""
    name = f"checked_{script.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, script)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


# -------------------------------------------------------------------------------- how a job stands


def find_run(job):
    """The run that a job has made: the newest with a checkpoint, or else the newest, or None."""
    runs = sorted(path.parent for path in job.run_folder.glob("*/args.json"))
    saved = [run for run in runs if (run / "checkpoint.msgpack").exists()]
    found = saved or runs
    return found[-1] if found else None


def find_saved_run(job):
    """The run that its script can go on with, or None."""
    run = find_run(job)
    return run if run is not None and (run / "checkpoint.msgpack").exists() else None


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
    flags = flags_of(job.command)
    last_step = 0
    for flag, name in STEPS.items():
        last_step += int(flags.get(flag, record.get(name, 0)))
    scores = read_csv(run / "eval.csv")
    steps = [int(row["step"]) for row in scores + read_csv(run / "metrics.csv")]
    step = max(steps, default=0)
    newest = [row for row in scores if row["step"] == scores[-1]["step"]]
    success = None
    if newest:
        success = sum(float(row["success_rate"]) for row in newest) / len(newest)
    # The evaluation at the last step is the last thing that a run does. Flags that were edited
    # afterwards are for the script to judge, so the job is not done.
    at_end = bool(newest) and int(newest[0]["step"]) >= last_step
    return Progress(step, last_step, success, at_end and not edited_flags(job))


def edited_flags(job):
    """{flag: its value before, or None} of the flags that its script has not seen so."""
    taken = job.run_folder / "command"
    if find_saved_run(job) is None or not taken.exists():
        return {}
    before = flags_of(taken.read_text())
    now = flags_of(job.command)
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return {name: before.get(name) for name in names if name != "--run-dir"}


def refuse_removed_flags(jobs):
    """A script with --resume hears of flags that were changed or added, not of these."""
    for job in jobs:
        now = flags_of(job.command)
        for name, before in edited_flags(job).items():
            if name not in now:
                words = f"was removed from its command after it began: put {name} {before} back"
                fail(f"job {job.id}: {name} {words}, or delete {job.run_folder}")


def state_of(job, progress):
    """waiting, running, done, failed or stale."""
    alive = job.run_folder / "alive"
    ended = job.run_folder / "exit"
    if progress.done:
        return "done"
    if alive.exists():
        silent = time.time() - alive.stat().st_mtime
        return "running" if silent < STALE_AFTER else "stale"
    code = ended.read_text() if ended.exists() else STOPPED[0]
    if code in STOPPED or code == "0" and edited_flags(job):  # edited after its end
        return "waiting"
    return "failed"


def why_failed(out, job, code):
    return f"job {job.id} has failed with status {code}: {last_line(out, job)}"


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
    if hasattr(signal, "SIGPIPE"):  # not on Windows
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
            code = (job.run_folder / "exit").read_text() or "unknown (its file `exit` is empty)"
            print(f"       {why_failed(args.out, job, code)}")
    print(", ".join(f"{count} {state}" for state, count in sorted(counts.items())))


def describe(job):
    """Its command from the script to the run folder."""
    words = shlex.split(job.command)
    scripts = [word for word in words if word.endswith(".py")]
    if scripts:
        words = words[words.index(scripts[0]) :]
    end = words.index("--run-dir") if "--run-dir" in words else len(words)
    return shlex.join([Path(words[0]).name, *words[1:end]])


# --------------------------------------------------------------------------------------- one job


def run_job(args):
    """Run a job until it ends or a signal stops it. The exit status is that of its script."""
    jobs = read_jobs(args.out)
    if args.id not in jobs:
        fail(f"{args.out / 'jobs.csv'} has no job {args.id}")
    job = jobs[args.id]
    refuse_removed_flags([job])
    if progress_of(job).done:
        return 0
    job.run_folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = take_lock(job.run_folder / ".lock")
    except BlockingIOError:
        fail(f"job {job.id} is running already, elsewhere", status=ELSEWHERE)
    if args.cores:
        os.sched_setaffinity(0, map(int, args.cores.split(",")))
    share_compiled(args.out)
    (job.run_folder / "exit").unlink(missing_ok=True)
    code = run_script(args.out, job, lock)
    if code == 0:
        (job.run_folder / "command").write_text(job.command)
    (job.run_folder / "exit").write_text(str(code))
    (job.run_folder / "alive").unlink(missing_ok=True)
    return code


def take_lock(path):
    """Of a file, for as long as this process and those that it is passed to live.

    None where there are no locks: on Windows, and on some file systems of a network. Raises
    BlockingIOError if another process has it.
    """
    if fcntl is None:
        return None
    lock = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return None
    return lock


def share_compiled(out):
    """What a job has compiled, the next one on such a machine reads. The user's settings stay."""
    folder = out.resolve() / "compiled" / kind_of_machine()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def kind_of_machine():
    """A name for its processor and GPUs: what is compiled for others may not run on them."""
    words = {platform.machine(), platform.processor()}
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        for line in cpus.read_text().splitlines():
            if line.startswith(("model name", "flags", "CPU part", "Features")):
                words.add(line)
    if shutil.which("nvidia-smi"):
        line = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        words.add(subprocess.run(line, capture_output=True, text=True).stdout)
    return hashlib.sha256("\n".join(sorted(words)).encode()).hexdigest()[:12]


def run_script(out, job, lock):
    """Start the script, or go on with its run, and wait for it: its exit status."""
    words = words_to_run(job)
    run = find_saved_run(job)
    if run is None:
        (job.run_folder / "command").write_text(job.command)
    else:
        words += ["--resume", str(run)]
    children = []
    stops = []

    def stop(number, _):
        stops.append(number)
        for child in children:
            child.terminate()

    on_stop_signals(stop)
    with open_log(out, job) as log:
        passed = [] if lock is None else [lock]
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=passed
        )
    children.append(child)
    if stops:  # the signal came before there was a child
        child.terminate()
    while True:
        (job.run_folder / "alive").touch()
        try:
            code = child.wait(timeout=TOUCH_EVERY)
        except subprocess.TimeoutExpired:
            continue
        return shell_status(code)


def shell_status(code):
    """Killed by a signal, a process has its negative number; a shell says 128 + number."""
    return 128 - code if code < 0 else code


def words_to_run(job):
    words = shlex.split(job.command)
    return [sys.executable, *words[1:]] if words[0] == "python" else words


def open_log(out, job):
    path = log_path(out, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("ab")


def on_stop_signals(stop):
    """Call stop(number, _) at each of them; a hang-up is none if nohup has said so."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows lacks two
        if number is None or name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
            continue
        signal.signal(number, stop)


# -------------------------------------------------------------------------------------------- here


def visible_gpus():
    """Names of the GPUs to hand out: those of CUDA_VISIBLE_DEVICES where it is set, else all."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        names = [name.strip() for name in given.split(",") if name.strip()]
        return names[: names.index("-1")] if "-1" in names else names  # CUDA ends there, too
    if not shutil.which("nvidia-smi"):
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("GPU ")]
    return [str(i) for i in range(len(lines))]


def share_out(num_workers):
    """What each worker's jobs have of this machine: (environment variables, flags of `job`)."""
    gpus = visible_gpus()
    places = []
    if gpus:
        memory = {}
        sharing = math.ceil(num_workers / len(gpus))
        if sharing > 1:
            fraction = os.environ.get(MEMORY_FRACTION, f"{GPU_MEMORY / sharing:.3f}")
            memory = {MEMORY_FRACTION: fraction}
            words = f"{num_workers} workers share {len(gpus)} GPUs: a process takes {fraction} of"
            tqdm.write(f"warning: {words} the memory ({MEMORY_FRACTION})")
        for worker in range(num_workers):
            gpu = gpus[worker % len(gpus)]
            places.append(({"CUDA_VISIBLE_DEVICES": gpu, **memory}, []))
        return places
    if not hasattr(os, "sched_setaffinity"):  # macOS
        if num_workers > 1:
            tqdm.write("warning: this system binds no process to cores: all jobs use all of them")
        return [({}, [])] * num_workers
    cores = sorted(os.sched_getaffinity(0))
    for worker in range(num_workers):
        share = cores[worker::num_workers] or [cores[worker % len(cores)]]
        places.append(({}, ["--cores", ",".join(map(str, share))]))
    return places


def tell_of_others(out):
    """Say whether another process runs this sweep, or that nobody can know."""
    try:
        if take_lock(out / ".lock") is None:
            print(f"warning: {out} has no file locks: a second `run` would run its jobs twice")
    except BlockingIOError:
        print("another process runs this sweep: its jobs are left to it")


def run_here(args):
    """Keep the workers busy until nothing is left, or a signal comes."""
    if args.workers < 1:
        fail("--workers must be at least 1")
    jobs = read_jobs(args.out)
    refuse_removed_flags(jobs.values())
    tell_of_others(args.out)
    fates = {job.id: "done" for job in jobs.values() if progress_of(job).done}
    waiting = [job for job in jobs.values() if job.id not in fates]
    places = share_out(args.workers)
    working = {}  # {worker: (job, process)}
    tries = collections.Counter()
    stops = []

    def stop(number, _):
        stops.append(number)
        for _, process in working.values():
            process.terminate()

    on_stop_signals(stop)
    bar = tqdm(total=len(jobs), unit=" jobs", disable=None, leave=False)
    while working or (waiting and not stops):
        for worker in range(args.workers):
            if worker not in working and waiting and not stops:
                job = waiting.pop(0)
                tries[job.id] += 1
                tqdm.write(f"job {job.id} starts: {describe(job)}")
                working[worker] = (job, start(args.out, job, places[worker]))
        time.sleep(1)
        ended = [worker for worker in working if working[worker][1].poll() is not None]
        for worker in ended:
            job, process = working.pop(worker)
            fate = tell_end(args.out, job, process.returncode, stops)
            if fate == "failed" and tries[job.id] <= args.retries:
                waiting.insert(0, job)
            else:
                fates[job.id] = fate
        show_progress(bar, len(fates), [job for job, _ in working.values()])
    bar.close()
    return tell_all(args, jobs, fates, stops)


def tell_end(out, job, code, stops):
    """How a job has ended, in a word, and in a line on the screen."""
    progress = progress_of(job)
    if progress.done:
        tqdm.write(f"job {job.id} is done, success {progress.success:.2f}")
        return "done"
    if code == ELSEWHERE:
        tqdm.write(f"job {job.id} runs elsewhere, and is left to whoever runs it")
        return "elsewhere"
    if stops:
        return "stopped"
    tqdm.write(why_failed(out, job, shell_status(code)))
    return "failed"


def tell_all(args, jobs, fates, stops):
    """The totals, and how to go on. Returns the exit status."""
    elsewhere = [id for id, fate in fates.items() if fate == "elsewhere"]
    for id in elsewhere:
        if progress_of(jobs[id]).done:  # by now
            fates[id] = "done"
    counts = collections.Counter(fates.values())
    words = f"{counts['done']} of {len(jobs)} jobs are done, {counts['failed']} failed"
    if counts["elsewhere"]:
        words += f", {counts['elsewhere']} running elsewhere"
    print(f"{words}: see {args.out}/logs")
    if stops:
        print("stopped and saved; to go on: " + shlex.join(["python", *sys.argv]))
        return 128 + stops[0]
    return 1 if counts["failed"] else 0


def start(out, job, place):
    """A process that runs the job, in a session of its own: Ctrl-C stops it by way of this one."""
    variables, flags = place
    line = [sys.executable, __file__, "job", str(out), str(job.id), *flags]
    variables = {**os.environ, **variables}
    with open_log(out, job) as log:
        return subprocess.Popen(line, env=variables, stdout=log, stderr=log, start_new_session=True)


def show_progress(bar, num_ended, running):
    """What has ended, the parts of what is running that are done, and its steps."""
    bar.n = num_ended
    parts = []
    for job in running:
        progress = progress_of(job)
        bar.n += progress.step / max(progress.last_step, 1)
        success = "" if progress.success is None else f" success {progress.success:.2f}"
        parts.append(f"job {job.id} {progress.step}/{progress.last_step}{success}")
    bar.n = round(bar.n, 2)
    bar.set_postfix_str(", ".join(parts))


def time_jobs(args):
    """Updates a second of each script on each domain, and the time of all jobs by them."""
    kinds = {}  # {what decides the speed: jobs}
    for job in read_jobs(args.out).values():
        kinds.setdefault(kind_of(job), []).append(job)
    share_compiled(args.out)
    total = 0.0
    for kind, jobs in kinds.items():
        speed, num_steps = measure_speed(args, jobs[0])
        seconds = num_steps / speed
        total += seconds * len(jobs)
        each = in_words(seconds)
        print(f"{speed:8.1f} updates a second, {each} a job, {len(jobs)} jobs: {kind}")
    print(f"{in_words(total)} for all, one after the other, evaluations apart")


def in_words(seconds):
    """Of the size that says something: 45 s, 12.5 min, 30.2 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def kind_of(job):
    """The command without seed and run folder, and with the domain in place of the task."""
    words = shlex.split(describe(job))
    if "--seed" in words:
        seed = words.index("--seed")
        del words[seed : seed + 2]
    return " ".join(word.partition("-task")[0] for word in words)


def measure_speed(args, job):
    """(updates a second, updates of the whole job), by the job itself in a folder of its own."""
    folder = args.out / "timing"
    shutil.rmtree(folder, ignore_errors=True)  # of a measurement that was cut short
    line = [*words_to_run(job), "--run-dir", str(folder), "--log-every", "10"]
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
code=143
trap 'stopped=1; kill -TERM $job' TERM
for attempt in $(seq 0 {retries}); do
  if [ $code = 0 ] || [ "$stopped" ]; then break; fi
  {python} {sweep} job {out} $((FIRST + SLURM_ARRAY_TASK_ID)) &
  job=$!
  while kill -0 $job 2> /dev/null; do wait $job; code=$?; done
done
if [ $code != 0 ] && [ "$stopped" ]; then
  scontrol show job $SLURM_JOB_ID | grep -q JobState=RUNNING && scontrol requeue $SLURM_JOB_ID
fi
exit $code
"""


def slurm(args, more):
    """Write the array's script, show it, and submit it for what is not done."""
    if not shutil.which("sbatch"):
        fail("sbatch is not installed: this is no machine of a Slurm cluster")
    jobs = read_jobs(args.out)
    refuse_removed_flags(jobs.values())
    out = args.out.resolve()
    (out / "logs").mkdir(exist_ok=True)
    flags = {
        "job-name": out.name,
        "partition": args.partition,
        "gpus": args.gpus or None,
        "time": args.time,
        "signal": "B:TERM@120",
        "open-mode": "append",
        "output": str(out).replace("%", "%%") + "/logs/slurm-%A_%a.log",
    }
    given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    lines = ["#SBATCH " + shlex.quote(flag) for flag in [*given, "--requeue", *more]]
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
    if done.returncode:
        words = done.stderr.strip()
        fail(f"squeue does not say what is in the queue ({words}): nothing is submitted", status=1)
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
