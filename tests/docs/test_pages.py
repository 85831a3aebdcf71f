"""The README and the pages name files that exist, and show commands that the entry point accepts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from genlip_megatron.config.command_line import parse_args

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Made up by the worked examples of extending.md.
EXAMPLES = {"NAME.py", "neighbours.py", "sdpa.py"}
# What a page takes from an older commit (``git show COMMIT:PATH > NAME``).
OLD = {"infer.py"}


def commands(text: str) -> list[str]:
    """The command lines of a page that start a training, with continued lines joined."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [line.strip() for line in lines if re.match(r"    .*pretrain_genlip\.py --", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    names = set(re.findall(r"(?<![\w/.:-])(?:[\w-]+/)*[\w-]+\.(?:py|sh|sbatch)(?![\w/])", page.read_text()))
    roots = (ROOT, ROOT / "genlip_megatron")
    missing = [
        name
        for name in sorted(names)
        if name.rsplit("/", 1)[-1] not in EXAMPLES | OLD
        and not any((root / name).exists() for root in roots)
        and ("/" in name or not any(ROOT.glob(f"[!.]*/**/{name}")))
    ]
    assert not missing, f"{page.name} names files that do not exist: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_accepted(page: Path) -> None:
    """Checks a command up to its first ``...``, where the page leaves arguments out."""
    for line in commands(page.read_text()):
        words = shlex.split(line.split("pretrain_genlip.py", 1)[1], comments=True)
        words = words[: words.index("...")] if "..." in words else words
        if "so16_long" not in words:  # the example recipe of extending.md
            parse_args(words)


def test_commands_are_found() -> None:
    assert sum(len(commands(page.read_text())) for page in PAGES) > 5
