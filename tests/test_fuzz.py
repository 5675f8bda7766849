"""Random arguments, folders and data files: each is accepted, or refused in one sentence with status 2."""

import dataclasses
import io
import json
import math
import os
import pickle
import random
import re
import subprocess
import sys
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import DOMAIN, ROOT, TINY

import qam_offline as qam

SCRIPT = "qam_offline.py"
ENV_ID = f"{DOMAIN}-task4"
TEXTS = ["", " ", ".", "-", "--seed", "~nobody-of-this-name/x", "\0", "a\nb", "%s{}", "ünï ☃", "x" * 5000, "["]
INTS = [-(10**30), -(2**31), -1, 0, 1, 2, 7, 300, 10**6, 2**31, 2**63, 10**30]
FLOATS = [-math.inf, -1e300, -1.0, -0.0, 0.0, 5e-324, 1e-9, 0.3, 1.0, 2.0, 1e9, 1e300, math.inf, math.nan]
WIDTHS = [(), (0,), (-1, 16), (16, 0), (16,), (16, 16)]
JSON = [None, True, False, [], {}, "", "x", "16", [1, [2]], [math.inf], [math.nan], ["16"], {"0": 1}, *INTS, *FLOATS]


def refusal(call, capsys):
    """(what `call` returned, None), or (None, its sentence); anything else than one sentence and status 2 raises."""
    try:
        return call(), None
    except SystemExit as stopped:
        printed = capsys.readouterr().err
        assert stopped.code == 2, f"status {stopped.code}"
        assert re.fullmatch("error: .{10,}\n", printed), f"not one sentence: {printed[:200]}"
        return None, printed


def run_all(cases, call, is_sound, capsys):
    """Counts (accepted, refused) of all cases; what is accepted must be sound, too."""
    accepted, failures = 0, []
    for number, (words, case) in enumerate(cases):
        try:
            result, sentence = refusal(lambda case=case: call(case), capsys)
            accepted += sentence is None
            assert sentence or is_sound(result), "accepted"
        except Exception as error:
            failures.append(f"{number} {words[:200]}: {type(error).__name__} {str(error)[:200]}")
    assert not failures, f"{len(failures)} of {len(cases)}\n" + "\n".join(failures)
    return accepted, len(cases) - accepted


def has_type(value, kind):
    """The value's own type is one of those that the annotation allows; True is no int."""
    return any(type(value) is allowed for allowed in getattr(kind, "__args__", (kind,)))


def arguments_are_sound(resolved):
    """What the program relies on after resolve_args, told again from the documentation of the flags."""
    args, saved = resolved
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if field.name == "hidden_dims":
            assert value and all(type(width) is int and width >= 1 for width in value), value
        else:
            assert has_type(value, field.type), f"{field.name} {value!r}"
        if type(value) is int:
            assert value >= (field.name not in ("seed", "capture_video")), f"{field.name} {value}"
        if type(value) is float:
            assert 0 <= value < math.inf, f"{field.name} {value}"
    assert args.discount <= 1 and 0 < args.tau <= 1 and args.learning_rate > 0 and args.flow_steps >= 2
    assert None not in (args.horizon, args.discount, args.rho, args.inv_temp, args.sparse)
    assert not saved or (saved["data"]["sha256"] and isinstance(saved["data"]["path"][0], str))
    return True


def random_env_id(rng):
    """A valid name after a few random edits, or none."""
    name = list(rng.choice([ENV_ID, "cube-double-play", "scene-play-singletask-task2-v0", "antmaze-giant-navigate"]))
    for _ in range(rng.randrange(3)):
        i, letter = rng.randrange(len(name)), rng.choice("-019aktv☃\n")
        name[i : i + rng.randrange(2)] = rng.choice([[letter], []])
    return rng.choice([*TEXTS, "None", "antmaze", "visual-cube-single-play", *["".join(name)] * 15])


def random_args(rng):
    changes = {}
    for field in rng.sample(dataclasses.fields(qam.Args), rng.choice([1, 1, 2, 3])):
        kinds = [kind for kind in getattr(field.type, "__args__", (field.type,)) if kind is not types.NoneType]
        pool = {int: INTS, float: FLOATS, str: TEXTS, bool: [True, False]}[kinds[0]]
        changes[field.name] = WIDTHS[rng.randrange(6)] if field.name == "hidden_dims" else rng.choice(pool)
        if field.name == "env_id":
            changes["env_id"] = random_env_id(rng)
    return changes


def test_random_arguments(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [SCRIPT])
    rng = random.Random(1)
    cases = [(str(changes), qam.Args(**changes)) for changes in (random_args(rng) for _ in range(200))]
    accepted, refused = run_all(cases, qam.resolve_args, arguments_are_sound, capsys)
    assert accepted > 20 and refused > 20 and not any(tmp_path.iterdir())


def test_random_run_folders(tmp_path, monkeypatch, capsys):
    """args.json with other values, without some, torn or foreign; also a file, or nothing, in a folder's place."""
    monkeypatch.setattr(sys, "argv", [SCRIPT])
    rng = random.Random(2)
    whole = vars(qam.resolve_args(qam.Args(env_id=ENV_ID, dataset_dir="."))[0])
    whole |= {"script": "qam_offline", "observation_dim": 2, "action_dim": 2}
    whole |= {"data": {"path": ["a.npz"], "sha256": ["0" * 64], "transitions": 3000, "of_paper": "official"}}
    cases = []
    for number in range(150):
        saved, kind = json.loads(json.dumps(whole)), rng.choice(["value"] * 5 + ["missing", "torn", "flipped", "other"])
        words, key = kind, rng.choice(list(whole))
        if kind == "value":
            saved[key] = rng.choice(JSON)
            words = f"{key} = {saved[key]!r}"
        if kind == "missing":
            del saved[key]
            words += f" {key}"
        content = bytearray(json.dumps(saved).encode())
        if kind == "torn":
            del content[rng.randrange(len(content)) :]
        if kind == "flipped":
            for _ in range(rng.randint(1, 5)):
                content[rng.randrange(len(content))] = rng.randrange(256)
        if kind == "other":
            content = rng.choice(
                [b"", b"null", b"[]", b'"script"', b"\xff\xfe\0", b"[" * 10**5, b"9" * 10**4, b"PK\3\4"]
            )
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "args.json").write_bytes(content)
        cases.append((words, qam.Args(**{rng.choice(["resume", "eval_only"]): str(folder)})))
    (tmp_path / "0" / "folder" / "args.json").mkdir(parents=True)
    for name in (*filter(None, TEXTS), str(tmp_path), str(tmp_path / "0/args.json"), str(tmp_path / "0/folder")):
        cases.append((f"--resume {name}", qam.Args(resume=name)))
    (tmp_path / "0/args.json").write_text(json.dumps(whole))
    cases[0] = ("as it was written", cases[0][1])
    accepted, refused = run_all(cases, qam.resolve_args, arguments_are_sound, capsys)
    assert accepted > 5 and refused > 60
    assert refusal(lambda: qam.resolve_args(cases[0][1]), capsys)[1] is None
    (tmp_path / "0/args.json").write_text(json.dumps(whole | {"script": "fql"}))
    assert "another script" in refusal(lambda: qam.resolve_args(cases[0][1]), capsys)[1]


def test_random_dataset_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / f"{DOMAIN}-v0.npz").mkdir(parents=True)
    names = [*TEXTS, "file", "folder", "nowhere", "file/below"]
    cases = [(repr(name), qam.Args(env_id=ENV_ID, dataset_dir=name)) for name in names]
    assert run_all(cases, qam.find_dataset, lambda found: False, capsys) == (0, len(names))


class Payload:
    """Pickled, it creates a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def header_of(shape, dtype="<f4", padding=0):
    """An npy file without its numbers."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117 + padding) + "\n"
    return b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text.encode()


def reshaped(rng, values):
    way = rng.choice(
        ["row less", "row more", "axis", "axis before", "flat", "scalar", "turned", "column", "none", "wide"]
    )
    return way, {
        "row less": lambda: values[1:],
        "row more": lambda: np.concatenate([values, values[:1]]),
        "axis": lambda: values[..., None],
        "axis before": lambda: values[:, None],
        "flat": lambda: values.ravel(),
        "scalar": lambda: values.ravel()[0],
        "turned": lambda: values.T[::-1],
        "column": lambda: values.reshape(len(values), -1)[:, :1],
        "none": lambda: values[:0],
        "wide": lambda: np.repeat(values.reshape(len(values), -1), 3, axis=1),
    }[way]()


def random_file(rng, path, arrays):
    """Write a data file that is unfit in a random way, or fit; returns words for it."""
    arrays, field = dict(arrays), rng.choice(["observations", "actions", "terminals", "qpos"])
    kinds = [
        "torn",
        "flipped",
        "missing",
        "shape",
        "shape",
        "dtype",
        "values",
        "terminals",
        "short",
        "foreign",
        "header",
    ]
    kind = rng.choice(kinds)
    if kind == "missing":
        del arrays[field]
    if kind == "shape":
        way, arrays[field] = reshaped(rng, arrays[field])
        kind += f" {way}"
    if kind == "dtype":
        dtype = rng.choice("float64 float16 int8 uint64 complex64 U9 S9 object bool datetime64[s] V8".split())
        arrays[field] = arrays[field].astype(dtype if dtype != "V8" else [("a", "f4"), ("b", "f4")])
        kind += f" {dtype}"
    if kind == "values":
        values = arrays[field].astype(np.float64)
        bad = rng.choice([math.nan, math.inf, -math.inf, 1e300, -3.0, 0.5])
        values[rng.randrange(len(values)) :] = bad
        arrays[field] = values
        kind += f" {bad}"
    if kind == "terminals":
        value = rng.choice([0, 1, -1, 2, 0.5])
        arrays["terminals"], field = np.full(len(arrays["actions"]), value), "all"
        kind += f" {value}"
    if kind == "short":
        rows = rng.randrange(8)
        arrays, field = {name: values[len(values) - rows :] for name, values in arrays.items()}, rows
    np.savez(path, **arrays)
    content = bytearray(path.read_bytes())
    if kind == "torn":
        del content[rng.randrange(len(content)) :]
    if kind == "flipped":
        for _ in range(rng.randint(1, 20)):
            content[rng.choice([rng.randrange(len(content)), -rng.randint(1, 400)])] = rng.randrange(256)
    if kind == "foreign":
        buffer = io.BytesIO()
        np.save(buffer, arrays["qpos"])
        junk = [b"", b"text", rng.randbytes(999), buffer.getvalue(), pickle.dumps(arrays), b"PK\5\6" + bytes(18)]
        content = rng.choice(junk)
    if kind == "header":
        head = [
            header_of((10**15, 2)),
            header_of((-1, 2)),
            header_of((4, 2), "|O"),
            header_of((4, 2), padding=10**5),
            b"",
        ]
        with zipfile.ZipFile(path, "w") as archive:
            for name in arrays:
                archive.writestr(f"{name}.npy", rng.choice(head) if name == field else header_of((4, 2)) + bytes(32))
        content = path.read_bytes()
    path.write_bytes(content)
    return f"{kind}: {field}"


def dataset_is_sound(dataset):
    """What training relies on."""
    rows = len(dataset.rewards)
    shapes = [(rows, 2), (rows, 2), (rows,), (rows,), (rows,), (rows, 2)]
    assert [values.shape for values in dataset] == shapes, [values.shape for values in dataset]
    assert all(values.dtype == np.float32 and np.isfinite(values).all() for values in dataset)
    return rows >= 4 and np.abs(dataset.actions).max() < 1 and dataset.terminals[-1] == 1


@pytest.fixture(scope="module")
def environment():
    return qam.ChunkedEpisode(qam.split_env_id(ENV_ID)[1], 4)


@pytest.fixture(scope="module")
def episode(dataset_dir):
    """The first episode of the real data, by field."""
    return {field: values[:1001] for field, values in np.load(dataset_dir / f"{DOMAIN}-v0.npz").items()}


@pytest.mark.filterwarnings("ignore")  # numpy's, about casts
def test_random_data_files(episode, environment, tmp_path, capsys):
    rng, args, cases = random.Random(3), qam.Args(env_id=ENV_ID, horizon=4), []
    for number in range(150):
        path = tmp_path / f"{number}.npz"
        cases.append((random_file(rng, path, episode), path))
    cases.append(("not there", tmp_path / "nowhere.npz"))
    call = lambda path: qam.load_dataset(args, path, environment)
    accepted, refused = run_all(cases, call, dataset_is_sound, capsys)
    assert accepted > 5 and refused > 60


def test_object_arrays_are_never_unpickled(episode, environment, tmp_path, capsys):
    mark, args = tmp_path / "mark", qam.Args(env_id=ENV_ID, horizon=4)
    payload = np.array([Payload(mark)] * 1001, dtype=object)
    pickle.loads(pickle.dumps(payload))  # the payload works ..
    mark.unlink()
    for field in ("observations", "actions", "terminals", "qpos", "extra"):
        np.savez(tmp_path / f"{field}.npz", **episode | {field: payload})
    (tmp_path / "whole.npz").write_bytes(pickle.dumps(payload))
    for path in tmp_path.glob("*.npz"):
        _, sentence = refusal(lambda path=path: qam.load_dataset(args, path, environment), capsys)
        assert (sentence is None) == (path.stem == "extra"), path  # a field that nobody reads does no harm
    assert not mark.exists()  # .. and was never loaded


def test_real_commands(dataset_dir, tmp_path):
    """What a shell would see. Flags after the dash are those of a tiny run, given after its own."""
    folders = {name: tmp_path / name for name in ("empty", "text", "torn", "pickle", "json", "bare", "bad")}
    for folder in folders.values():
        folder.mkdir()
    content = (dataset_dir / f"{DOMAIN}-v0.npz").read_bytes()
    (folders["text"] / "a.npz").write_text("no archive")
    (folders["torn"] / "a.npz").write_bytes(content[:-1000])
    (folders["pickle"] / "a.npz").write_bytes(pickle.dumps(Payload(tmp_path / "mark")))
    (folders["json"] / "args.json").write_text('{"script": "qam_offline", "seed": ')
    args = vars(qam.resolve_args(qam.Args(env_id=ENV_ID, dataset_dir=str(dataset_dir), hidden_dims=(8,)))[0])
    saved = args | {"script": "qam_offline", "data": {"path": ["a.npz"], "sha256": ["0"]}}
    for name in ("bare", "bad"):
        (folders[name] / "args.json").write_text(json.dumps(saved))
    (folders["bad"] / "checkpoint.msgpack").write_bytes(bytes(100))
    (tmp_path / "file").write_text("")
    commands = {  # flags: what the sentence must name
        "--env-id cube-duble-play": "cube-double-play",
        "--env-id scene-play-task77": "task1 to task5",
        "--no-such-flag 3": "no-such-flag",
        "--seed one": "seed",
        "--offline-steps 1.5": "offline-steps",
        "--hidden-dims": "hidden-dims",
        "--hidden-dims 16 0": "--hidden-dims",
        "--num-seeds 0": "--num-seeds",
        "--horizon=-3": "--horizon",
        "--learning-rate nan": "--learning-rate",
        "--discount inf": "--discount",
        "--checkpoint-every 0": "--checkpoint-every",
        f"--resume {tmp_path}/nowhere": "nowhere",
        f"--eval-only {tmp_path}/file": "file",
        f"--resume {folders['json']}": "damaged",
        f"--resume {folders['bare']}": "no whole checkpoint",
        f"--eval-only {folders['bad']}": "no whole checkpoint",
        f"--dataset-dir {folders['empty']}": "--dataset-dir",
        "--dataset-dir ~nobody-of-this-name": "--dataset-dir",
        f"--dataset-dir {folders['text']}": "a.npz",
        f"--dataset-dir {folders['torn']}": "a.npz",
        f"--dataset-dir {folders['pickle']}": "a.npz",
        f"--run-dir {tmp_path}/file/below": "--run-dir",
    }

    def check(flags):
        given = flags.split()
        base = [] if given[0] in ("--resume", "--eval-only") else ["--env-id", ENV_ID, *TINY]
        if not base or given[0] == "--dataset-dir":
            line = [sys.executable, ROOT / SCRIPT, *base, *given]
        else:
            line = [sys.executable, ROOT / SCRIPT, *base, "--dataset-dir", dataset_dir, *given]
        done = subprocess.run(list(map(str, line)), capture_output=True, text=True, cwd=tmp_path, timeout=120)
        assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout, (flags, done.stderr)
        assert commands[flags] in done.stderr, (flags, done.stderr)
        if "╭" not in done.stderr:  # the box of the parser's own errors
            *notes, sentence = done.stderr.splitlines()
            assert sentence.startswith("error: "), (flags, done.stderr)
            assert all("checkpoint" in note for note in notes), (flags, done.stderr)

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        list(pool.map(check, commands))
    assert not (tmp_path / "runs").exists() and not (tmp_path / "mark").exists()
    assert not Path(folders["bare"] / "videos").exists()
