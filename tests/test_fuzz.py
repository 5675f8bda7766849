"""Random flags, folders and data files: each is accepted, or refused by one sentence."""

import dataclasses
import json
import math
import pickle
import random
import re
import types

import numpy as np
import pytest
from conftest import DOMAIN

import qam_offline as qam

TASK = f"{DOMAIN}-task4"
TEXTS = ["", " ", ".", "-", "~nobody/x", "\0", "a\nb", "%s{}", "ünï ☃", "x" * 5000, "["]
VALUES = {
    int: [-(10**30), -1, 0, 1, 2, 7, 300, 2**31, 2**63],
    float: [-math.inf, -1.0, -0.0, 0.0, 5e-324, 0.3, 1.0, 2.0, 1e300, math.inf, math.nan],
    bool: [True, False],
    str: TEXTS,
    tuple: [(), (0,), (-1, 16), (16,), (16, 16)],
}
ANY_JSON = [None, [], {}, "x", [1, [2]], ["16"], {"0": 1}]
for of_type in (int, float, bool, str):
    ANY_JSON += VALUES[of_type]


def outcome(call, given, capsys):
    """What `call` returns, or None if it refuses by one sentence, with status 2 or a ValueError."""
    try:
        return call(given)
    except ValueError as error:
        assert len(str(error)) > 10
    except SystemExit as stopped:
        printed = capsys.readouterr().err
        assert stopped.code == 2
        assert re.fullmatch("error: .{10,}\n", printed, re.DOTALL)
        assert "Traceback" not in printed
    return None


# ------------------------------------------------------------------------------------------ flags


def random_env_id(rng):
    """A name with a few random letters changed, left out or put in."""
    known = [TASK, "cube-double-play", "scene-play-singletask-task2-v0", "antmaze-giant-navigate"]
    name = list(rng.choice(known))
    for _ in range(rng.randrange(3)):
        i = rng.randrange(len(name))
        new = rng.choice(["-", "0", "1", "a", "k", "t", "v", ":", "☃", "\n", ""])
        name[i : i + rng.randrange(2)] = new
    return rng.choice(["".join(name), rng.choice(TEXTS)])


def random_value(rng, field):
    if field.name == "env_id":
        return random_env_id(rng)
    kinds = getattr(field.type, "__args__", (field.type,))  # of `int | None` both
    kind = kinds[0]
    if isinstance(field.type, types.GenericAlias):
        kind = tuple
    return rng.choice(VALUES[kind])


def test_random_flags(capsys):
    rng = random.Random(1)
    fields = dataclasses.fields(qam.Args)
    accepted = 0
    for _ in range(300):
        chosen = rng.sample(fields, rng.randint(1, 3))
        flags = {field.name: random_value(rng, field) for field in chosen}
        args = outcome(lambda flags: qam.Args(**flags), flags, capsys)
        if args is not None:
            accepted += 1
            assert None not in (args.horizon, args.discount, args.rho, args.sparse, args.inv_temp)
            assert 0 <= args.discount <= 1
            counts = (args.batch_size, args.horizon, args.num_seeds, *args.hidden_dims)
            assert min(counts) >= 1
    assert 50 < accepted < 250


# ------------------------------------------------------------------------------------ run folders


def damaged_record(rng, record):
    """The bytes of an args.json with another value, without one, torn, or with other bytes."""
    record = dict(record)
    name = rng.choice(list(record))
    kind = rng.choice(["value", "value", "value", "missing", "torn", "flipped"])
    if kind == "value":
        record[name] = rng.choice(ANY_JSON)
    if kind == "missing":
        del record[name]
    content = bytearray(json.dumps(record).encode())
    if kind == "torn":
        del content[rng.randrange(len(content)) :]
    if kind == "flipped":
        content[rng.randrange(len(content))] = rng.randrange(256)
    return content


def test_random_run_folders(finished_run, tmp_path, capsys):
    rng = random.Random(2)
    record = json.loads((finished_run / "args.json").read_text())
    accepted = 0
    for _ in range(200):
        (tmp_path / "args.json").write_bytes(damaged_record(rng, record))
        accepted += outcome(qam.read_run, tmp_path, capsys) is not None
    assert 20 < accepted < 180


def test_random_places_of_a_run(tmp_path, capsys):
    (tmp_path / "args.json").mkdir()
    for place in (*TEXTS, "/dev/null", tmp_path):
        assert outcome(qam.read_run, place, capsys) is None


def test_random_checkpoints(finished_run, tmp_path, capsys):
    rng = random.Random(3)
    content = (finished_run / "checkpoint.msgpack").read_bytes()
    for _ in range(50):
        torn = content[: rng.randrange(len(content))]
        (tmp_path / "checkpoint.msgpack").write_bytes(torn)
        assert outcome(qam.load_checkpoint, tmp_path, capsys) is None
    for _ in range(50):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (tmp_path / "checkpoint.msgpack").write_bytes(damaged)
        outcome(qam.load_checkpoint, tmp_path, capsys)


# ------------------------------------------------------------------------------------- data files


@pytest.fixture(scope="module")
def episode(dataset_dir):
    """The first episode of the real data, by field."""
    with np.load(dataset_dir / f"{DOMAIN}-v0.npz") as data:
        return {field: array[:1001] for field, array in data.items()}


def loader():
    """load(path) -> Dataset"""
    args = qam.Args(env_id=TASK, horizon=4)
    env = qam.make_env(args)

    def load(path):
        return qam.load_dataset(args, path, env)

    return load


RESHAPED = {
    "row less": lambda array: array[1:],
    "row more": lambda array: np.concatenate([array, array[:1]]),
    "axis": lambda array: array[..., None],
    "flat": lambda array: array.ravel(),
    "number": lambda array: array.ravel()[0],
    "turned": lambda array: array.T,
    "no rows": lambda array: array[:0],
    "wide": lambda array: np.repeat(array.reshape(len(array), -1), 3, axis=1),
}
DTYPES = ["float64", "float16", "int8", "uint64", "bool", "object"]
NUMBERS = [math.nan, math.inf, -math.inf, 1e300, -3.0, 0.5]


def damaged_arrays(rng, arrays):
    """Something else in one of its fields, or nothing."""
    arrays = dict(arrays)
    name = rng.choice(["observations", "actions", "terminals", "qpos"])
    kind = rng.choice(["missing", "shape", "dtype", "number"])
    if kind == "missing":
        del arrays[name]
    if kind == "shape":
        reshape = RESHAPED[rng.choice(list(RESHAPED))]
        arrays[name] = reshape(arrays[name])
    if kind == "dtype":
        arrays[name] = arrays[name].astype(rng.choice(DTYPES))
    if kind == "number":
        arrays[name] = arrays[name].astype(float)
        arrays[name][rng.randrange(1001) :] = rng.choice(NUMBERS)
    return arrays


def damage_bytes(rng, path):
    """Torn, with other bytes, or something else."""
    content = bytearray(path.read_bytes())
    kind = rng.choice(["torn", "flipped", "flipped at the end", "foreign"])
    if kind == "torn":
        del content[rng.randrange(len(content)) :]
    if kind == "flipped":
        content[rng.randrange(len(content))] ^= 255
    if kind == "flipped at the end":
        content[-rng.randint(1, 400)] ^= 255
    if kind == "foreign":
        content = rng.choice([b"", b"text", rng.randbytes(999), b"PK\5\6" + bytes(18)])
    path.write_bytes(content)


def check_dataset(dataset):
    """What training relies on."""
    size = len(dataset.rewards)
    assert size >= 4
    shapes = [array.shape for array in dataset]
    assert shapes == [(size, 2), (size, 2), (size,), (size,), (size,), (size, 2)]
    for array in dataset:
        assert array.dtype == np.float32
        assert np.isfinite(array).all()
    assert np.abs(dataset.actions).max() < 1
    assert dataset.terminals[-1] == 1


@pytest.mark.filterwarnings("ignore")  # numpy's, about casts
def test_random_data_files(episode, tmp_path, capsys):
    rng = random.Random(4)
    load = loader()
    path = tmp_path / "data.npz"
    accepted = 0
    for _ in range(120):
        if rng.random() < 0.7:
            np.savez(path, **damaged_arrays(rng, episode))
        else:
            np.savez(path, **episode)
            damage_bytes(rng, path)
        dataset = outcome(load, path, capsys)
        if dataset is not None:
            accepted += 1
            check_dataset(dataset)
    assert 5 < accepted < 80


class Payload:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_is_ever_unpickled(episode, tmp_path, capsys):
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()
    mark.unlink()
    load = loader()
    path = tmp_path / "data.npz"
    for name in ("observations", "actions", "terminals", "qpos"):
        arrays = {**episode, name: np.array([Payload(mark)] * 1001)}
        np.savez(path, **arrays)
        assert outcome(load, path, capsys) is None
    path.write_bytes(pickle.dumps(Payload(mark)))
    assert outcome(load, path, capsys) is None
    assert not mark.exists()
