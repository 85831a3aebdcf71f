"""A comma-separated list of paths keeps commas that belong to a path."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from genlip_megatron.config import RunConfig, from_dict, override
from genlip_megatron.config.command_line import parse_args

LISTS = {
    "a.tar,b.tar": ["a.tar", "b.tar"],
    "a,b.tar": ["a,b.tar"],
    "a,b.tar,c.tar": ["a,b.tar", "c.tar"],
    "c.tar,a,b.tar": ["c.tar", "a,b.tar"],
    "d,e,f/0.tar,c.tar": ["d,e,f/0.tar", "c.tar"],
    "d,e,f,c.tar": ["d,e,f", "c.tar"],
    "d,e,f/*.tar,[c].tar": ["d,e,f/*.tar", "[c].tar"],
    "d,e,f/**/*.tar": ["d,e,f/**/*.tar"],
    "x-{000,007}.tar,c.tar": ["x-{000,007}.tar", "c.tar"],
    "x-{0{1,2},{3,4}}.tar,c.tar": ["x-{0{1,2},{3,4}}.tar", "c.tar"],
    "d,e,f/{0,1}.tar,c.tar": ["d,e,f/{0,1}.tar", "c.tar"],
    "x-{000..099}.tar": ["x-{000..099}.tar"],
    "open{,b.tar,c.tar": ["open{,b.tar", "c.tar"],
    "missing,c.tar,gone.tar": ["missing", "c.tar", "gone.tar"],
    "s3://x/{a,b}.tar,c.tar": ["s3://x/{a,b}.tar", "c.tar"],
    "s3://x/a,b/t.dataset.json,c.tar": ["s3://x/a,b/t.dataset.json", "c.tar"],
    "s3://x/t.dataset.json,gone.dataset.json": ["s3://x/t.dataset.json", "gone.dataset.json"],
    "s3://x/a,b": ["s3://x/a,b"],
    "s3://x/t,s3://x/u,/v": ["s3://x/t", "s3://x/u", "/v"],
    "c.tar,": ["c.tar"],
    ",,c.tar,,": ["c.tar"],
    "": [],
}


@pytest.mark.parametrize("text", LISTS)
def test_commas_in_paths_are_kept(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.tar", "b.tar", "c.tar", "d,e,f/0.tar", "open{,b.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    config, _ = parse_args(["--config", "demo", "--train-data", text, "--valid-data", text])
    assert list(config.data.train_data) == list(config.data.valid_data) == LISTS[text]
    # YAML lists are not split.
    assert from_dict(yaml.safe_load(config.to_yaml()), "again") == config
    assert override(config, {"data.train_data": [text]}).data.train_data == (text,)


def test_long_lists_are_split_quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"/some/where/not/here/{i:05d}.dataset.json" for i in range(1000)]
    began = time.monotonic()
    assert override(RunConfig(), {"data.train_data": ",".join(names)}).data.train_data == tuple(names)
    assert time.monotonic() - began < 20
