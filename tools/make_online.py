"""Write the offline-to-online version of a script: python tools/make_online.py baselines/fql.py

It serves every script of the project and your own, if that began as a copy of one. What your file
changes in qam_offline.py and what qam_offline_to_online.py changes in it go into one new file, by
default beside yours, as NAME_offline_to_online.py. (git does the work: a three-way merge.) That
file runs alone, too. Make it anew when yours has changed; don't edit it. Only under that name it
takes a run of NAME.py for --offline-checkpoint.

Where both change the same lines, nothing is written: you are shown what each of them has there. A
flag of yours does not collide beside --inv-temp.
"""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from dev import sync_shared  # noqa: E402

OFFLINE = ROOT / "qam_offline.py"
ONLINE = ROOT / "qam_offline_to_online.py"
MARK = "# Made by tools/make_online.py"


@dataclasses.dataclass
class Args:
    script: Annotated[Path, tyro.conf.Positional]
    """the offline script"""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """the file to write (None: NAME_offline_to_online.py beside it)"""


def fail(message, status=2):
    """Print what is wrong and exit: status 2 for what the user can put right, else 1."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def read_script(path):
    """The text of a script that Python can read."""
    try:
        text = path.read_bytes().decode()
        compile(text, path, "exec")
    except (OSError, ValueError, SyntaxError) as error:
        fail(f"{path} can't be read: {error}")
    if text.startswith(MARK) or path.resolve() == ONLINE:
        fail(f"{path} is an online version already: name the file that it was made from")
    if "\r\n" in text:
        fail(f"{path} has the line ends of Windows, which differ in every line: convert it first")
    return text


def check_base():
    """qam_offline.py as it was when the online phase was written: else its edits would get lost."""
    scripts = {path.name: path.read_text() for path in (OFFLINE, ONLINE)}
    repairs, _ = sync_shared.compare(scripts)
    if repairs:
        names = ", ".join(name for _, name, _ in repairs)
        fail(
            f"{OFFLINE.name} itself was edited ({names}), and what is merged is what other files"
            " change in it: copy it under another name, and undo the edit here (git checkout)"
        )


def merge(script):
    """(the merged text, number of conflicts in it); a conflict has all three sides."""
    line = ["git", "merge-file", "-p", "--diff3", ONLINE, OFFLINE, script.resolve()]
    try:
        done = subprocess.run(line, capture_output=True, text=True)
    except FileNotFoundError:
        fail("git is not installed, and it does the merging")
    if done.returncode > 127:  # below, it is the number of conflicts
        fail(f"git merge-file: {done.stderr.strip()}")
    return done.stdout, done.returncode


def find_conflicts(text):
    """[(what the online phase, qam_offline.py and the script have there), ..]"""
    side = r"([\s\S]*?)"
    marks = (r"^<<<<<<< .*\n", r"^\|\|\|\|\|\|\| .*\n", r"^=======\n", r"^>>>>>>> .*\n")
    pattern = side.join(marks)
    return re.findall(pattern, text, re.M)


def describe_conflicts(conflicts, script):
    """All sides of each, for a reader."""
    parts = []
    for online, before, own in conflicts:
        parts.append(f"\n---- {OFFLINE.name} has\n{before}")
        parts.append(f"---- the online phase needs\n{online}")
        parts.append(f"---- {script} has\n{own}")
    return "".join(parts)


def write_file(path, text):
    """All of it or nothing. What this tool has not made is not replaced."""
    part = Path(f"{path}.part")
    if not path.parent.is_dir():
        fail(f"{path} can't be written: there is no folder {path.parent}")
    try:
        if path.exists() and not path.read_text().startswith(MARK):
            fail(f"{path} is there, and not made by this tool: name another file with -o")
        part.write_text(text)
        os.replace(part, path)
    except (OSError, ValueError) as error:
        part.unlink(missing_ok=True)
        fail(f"{path} can't be written: {error}", status=1)


def main(args):
    script = args.script.expanduser()
    read_script(script)
    check_base()
    text, num_conflicts = merge(script)
    if num_conflicts:
        conflicts = find_conflicts(text)
        before = "".join(before for _, before, _ in conflicts)
        if len(before) > len(OFFLINE.read_text()) / 2:
            fail(f"{script} did not begin as a copy of {OFFLINE.name}: there is little to merge")
        print(describe_conflicts(conflicts, script))
        fail(
            f"{script} and the online phase change the same lines, in {num_conflicts} place(s), as"
            " shown; nothing is written. Leave these lines as they were and make the change on"
            " lines of its own, away from them. If the file began as a copy of an earlier"
            f" {OFFLINE.name}, use this tool as it was then."
        )
    try:
        compile(text, script, "exec")
    except SyntaxError as error:
        fail(f"{script} and the online phase together are no Python: {error}; nothing is written")

    output = args.output or script.with_name(f"{script.stem}_offline_to_online.py")
    write_file(output.expanduser(), f"{MARK} from {script.name}: edit that file, not this.\n{text}")
    print(f"wrote {output}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
