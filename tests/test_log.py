"""A terminal shows the progress of the current step in its last line; a file gets only whole lines."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

from genlip_megatron.testing import CHECKOUT

PROGRAM = """
from genlip_megatron.log import live, log, warn
live("step 1"); live("step 2"); log("report"); log("next"); live("step 3 " + 200 * "x"); warn("careful"); log("end")
"""


def test_a_terminal_shows_a_live_line_that_output_replaces() -> None:
    parent, child = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=CHECKOUT, stdout=child, stderr=child):
        os.close(child)
        shown = b""
        while True:
            try:
                shown += os.read(parent, 4096)
            except OSError:  # the other end is closed
                break
    os.close(parent)
    clear = "\r\x1b[K"
    lines = shown.decode().replace("\r\n", "\n")
    head, _, rest = lines.partition("step 3")
    assert head == f"{clear}step 1{clear}step 2{clear}report\nnext\n{clear}"
    assert rest.endswith(f"x{clear}genlip: careful\nend\n") and len(rest) < 110, "the live line has one line"


def test_a_file_gets_only_whole_lines(tmp_path: Path) -> None:
    with open(tmp_path / "log", "wb") as file:
        subprocess.run([sys.executable, "-c", PROGRAM], cwd=CHECKOUT, stdout=file, stderr=file, check=True)
    assert (tmp_path / "log").read_text() == "report\nnext\ngenlip: careful\nend\n"
