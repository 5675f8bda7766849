"""How a script tells a user what can't be done, called without a process of its own."""

import re
import sys

import pytest


def parse(script, *flags):
    """The arguments of a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, *flags])
        return script.parse_args()


def refusal(capsys, call, *given):
    """What is printed when call(*given) ends the program with status 2, on one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call(*given)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    if printed.startswith("error: "):
        assert printed.count("\n") == 1
        return printed
    # An error of tyro's, which comes in a box.
    assert "Traceback" not in printed
    return re.sub(r"[\s│╭╮╰╯─]+", " ", printed)
