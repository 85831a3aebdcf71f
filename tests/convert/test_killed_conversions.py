"""A conversion that is killed or fails at any file operation leaves a whole output, the old or the new one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from torch import Tensor

from genlip_megatron.checkpoint import paths as checkpoints
from genlip_megatron.convert.hf_folder import hf_config
from genlip_megatron.convert.tokenizer import export_tokenizer
from genlip_megatron.testing.processes import Zygote
from tests import crash
from tests.convert.weights import differing, random_weights, read_released, small, write_released
from tools.convert_checkpoint import main

MODEL = small(1, 32, 4, 40, 32, 511)


def convert() -> int:
    """The tool with the crash plan of the environment; NO_EXCHANGE: on a file system that cannot exchange folders."""
    if os.environ.get("NO_EXCHANGE"):
        checkpoints.exchange = lambda first, second: False
    crash.install_from_environment()
    return main(sys.argv[1:])


@pytest.mark.slow
@pytest.mark.parametrize(("action", "code"), [("kill", -9), ("fail", 2)])
@pytest.mark.parametrize(
    ("direction", "exchange", "every"),
    [
        pytest.param(direction, exchange, every, id=f"{direction}-{name}", marks=[pytest.mark.long] if every else [])
        for direction, exchange, every, name in (
            ("to-hf", True, False, "exchange-some"),
            ("to-megatron", True, False, "exchange-some"),
            ("to-hf", False, False, "renames-some"),
            ("to-hf", True, True, "exchange-every"),
            ("to-megatron", True, True, "exchange-every"),
            ("to-hf", False, True, "renames-every"),
            ("to-megatron", False, True, "renames-every"),
        )
    ],
)
def test_a_crash_leaves_the_old_output_or_the_new(
    direction: str,
    exchange: bool,
    every: bool,
    action: str,
    code: int,
    zygote: Zygote,
    demo_data: Path,
    tmp_path: Path,
) -> None:
    """The old output is in bfloat16, the new one in float32."""
    weights = random_weights(MODEL)
    rounded = {name: tensor.bfloat16() for name, tensor in weights.items()}
    start, work = tmp_path / "start", tmp_path / "work"
    given = write_released(tmp_path / "given", weights)
    (given / "config.json").write_text(json.dumps(hf_config(MODEL, "float32")))
    export_tokenizer(demo_data / "tokenizer.model", given)
    assert main(["to-megatron", str(given), "--output", str(start)]) == 0
    source = str(start if direction == "to-hf" else given)
    target = work / "target"
    words = [direction, source, "--output", str(target), "--overwrite"]

    def old() -> None:
        assert main([*words, "--dtype", "bf16"]) == 0

    def held(folder: Path) -> dict[str, Tensor]:
        if direction == "to-megatron":
            back = tmp_path / "back"
            assert main(["to-hf", str(folder), "--output", str(back), "--overwrite"]) == 0
            folder = back
        return read_released(folder)

    def run(plan: crash.Plan) -> int:
        environment = plan.env() | ({} if exchange else {"NO_EXCHANGE": "1"})
        (ended,) = zygote.run(1, words, environment, target="tests.convert.test_killed_conversions:convert")
        return ended.code

    old()
    count = crash.Plan(str(work), str(tmp_path / "count"))
    assert run(count) == 0
    operations = count.operations()
    assert len(operations) > 20
    # Crash in the middle of the weights, during the swap, and while the old folder is removed.
    kinds = [operation.kind for operation in operations]
    renamed = kinds.index("exchange") + 1
    assert kinds[renamed : renamed + 2].count("rename") == (0 if exchange else 2)
    points = [renamed // 2, renamed, renamed + 1, renamed + 4] + ([] if exchange else [renamed + 2])
    for at in range(1, len(operations) + 1) if every else points:
        old()
        ended = run(crash.Plan(str(work), str(tmp_path / f"log{at}"), action, at))
        said = f"{action} at operation {at}: {operations[at - 1]}"
        hidden = sorted(path.name for path in work.glob(".*"))
        if action == "fail" and ended == 0:  # a failure to remove the old output is harmless
            assert differing(held(target), weights) == [], said
            continue
        assert ended == code, said
        # Between two renames the old folder has another name, where the next run finds it.
        assert target.exists() or not exchange, said
        found = held(target if target.exists() else work / ".target.replaced")
        assert differing(found, rounded) == [] or differing(found, weights) == [], said
        if action == "fail":
            assert hidden == [], said
        assert main(words) == 0
        assert differing(held(target), weights) == [] and not list(work.glob(".*")), said
