"""Locks, and how commands end."""

from __future__ import annotations

import subprocess
import sys

import pytest

from diffussm.errors import UserError
from diffussm.files import hold_lock

pytestmark = pytest.mark.unit


def test_a_lock_is_held_until_its_process_gives_way(tmp_path):
    held = hold_lock(tmp_path / "lock", "job 7, attempt 1")
    with pytest.raises(UserError, match=r"in use by process \d+ on .* \(job 7, attempt 1\): wait until it ends"):
        hold_lock(tmp_path / "lock")
    asked = []
    taken = hold_lock(tmp_path / "lock", "job 7, attempt 2", lambda holder: not asked.append(holder))
    assert len(asked) == 1 and asked[0].endswith("(job 7, attempt 1)")
    held.close()  # its end frees nothing
    with pytest.raises(UserError, match="attempt 2"):
        hold_lock(tmp_path / "lock")
    taken.close()
    hold_lock(tmp_path / "lock").close()


ENDS = {
    "bad": ("raise UserError('no such thing')", 2, "error: no such thing"),
    "stopped": ("raise Stopped('stopped at 5 images')", 75, "stopped at 5 images"),
    "broken": ("raise ZeroDivisionError", 1, "Traceback"),
    "done": ("pass", 0, ""),
}


@pytest.mark.parametrize("how", ENDS)
def test_an_exit_code_that_was_chosen_is_left_in_a_file(tmp_path, monkeypatch, how):
    """Launchers return those that they have made of other ranks."""
    body, code, told = ENDS[how]
    place = tmp_path / "code"
    monkeypatch.setenv("DIFFUSSM_EXIT_FILE", str(place))
    text = f"from diffussm.errors import *\ndef main():\n    {body}\nrun_command(main)"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.returncode == code and done.stderr.startswith(told)
    assert (place.read_text() if place.exists() else "") == (f"{code}\n" if code > 1 else "")


def test_of_many_tasks_that_understand_nothing_the_first_says_so(monkeypatch):
    """Before anybody has asked the launcher who is who."""
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    text = "from diffussm import errors\nerrors.WAIT_FOR_RANK_0 = 0.2\n"
    text += "def main():\n    raise errors.UserError('no')\nerrors.run_command(main)"
    told = []
    for rank in ("0", "3"):
        monkeypatch.setenv("SLURM_PROCID", rank)
        told.append(subprocess.run([sys.executable, "-c", text], capture_output=True, text=True).stderr)
    assert told == ["error: no\n", "error: rank 3: no\n"]
