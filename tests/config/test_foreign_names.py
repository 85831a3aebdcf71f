"""Names from other trainers are answered with this project's; otherwise only similar names are suggested."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable

import pytest

from genlip_megatron.config import SECTIONS, foreign_names, from_dict
from genlip_megatron.config.command_line import build_parser, parse_args
from genlip_megatron.config.suggest import for_flag, plain
from tools import caption, checkpoints

FLAGS = {flag for action in build_parser()._actions for flag in action.option_strings}
TORCHRUN = {"--nnodes", "--nproc-per-node"}

# Flag -> part of the answer: some names of each trainer, and other spellings of this project's.
ASKED = {
    "--learning-rate": "Use --lr",
    "--per-device-train-batch-size": "packs",
    "--training.local_batch_size": "packs",
    "--gradient-accumulation-steps": "--global-batch-size",
    "--n_epochs": "--train-iters",
    "--train-samples": "--train-iters",
    "--training.steps": "Use --train-iters",
    "--warmup": "Use --lr-warmup-iters",
    "--lr-scheduler-type": "cosine",
    "--resume-from-checkpoint": "Use --load",
    "--output-dir": "Use --save",
    "--checkpoint.folder": "Use --save",
    "--fp16": "--precision",
    "--data-path": "Use --train-data",
    "--tokenizer-type": "--tokenizer",
    "--report-to": "--wandb-project",
    "--max-grad-norm": "Use --clip-grad",
    "--activation_checkpoint.mode": "--recompute",
    "--use-distributed-optimizer": "leave it out",
    "--world-size": "torchrun",
    "--parallelism.tensor_parallel_degree": "Use --tensor-model-parallel-size",
    "--patch-size": "16 x 16",
    "--model.flavor": "--config",
    "--Learning_Rate=1": "Use --lr",
    "--train_data": "Did you mean '--train-data'",
    "--trainiters": "Did you mean '--train-iters'",
    "--train-itres": "Did you mean '--train-iters'",
    "--train.lr=1": "Did you mean '--lr'",
    "train.lr=1": "Did you mean '--lr'",
    "--recompute-mod": "Did you mean '--recompute-modules'",
    "--eval": "Did you mean '--eval-interval' or '--eval-iters' or '--eval-only'",
    "-tp": "Did you mean '--tp'",
    "-hidden-size": "Did you mean '--hidden-size'",
    "--no-lr": "--lr takes a value and cannot be turned off",
    "--fsdp=true": "write --fsdp or --no-fsdp",
    "--no-fsdp=1": "write --fsdp or --no-fsdp",
}


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parse_args(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    return line


@pytest.mark.parametrize("word", ASKED)
def test_names_of_other_trainers_are_answered(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(capsys, word, *([] if "=" in word else ["1"]))
    assert ASKED[word] in line and (word.split("=")[0] in line)
    assert "change-data" not in line


def test_every_listed_name_gets_its_answer() -> None:
    for name, target in foreign_names.EQUAL.items():
        if target not in SECTIONS:
            assert for_flag(f"--{name}", FLAGS) == f". Use --{target.replace('_', '-')}."
    for name, text in foreign_names.INSTEAD.items():
        assert for_flag(f"--{name}", FLAGS) == f": {text}."


def test_advice_names_known_flags_and_foreign_names_are_not_flags() -> None:
    for name, target in foreign_names.EQUAL.items():
        assert f"--{target.replace('_', '-')}" in FLAGS or target in SECTIONS, (name, target)
    for name, text in foreign_names.INSTEAD.items():
        assert set(re.findall(r"(?<!\S)--[a-z0-9-]+", text)) <= FLAGS | TORCHRUN, (name, text)
    both = set(foreign_names.EQUAL) | set(foreign_names.INSTEAD)
    assert len(both) == len(foreign_names.EQUAL) + len(foreign_names.INSTEAD), "a name has two answers"
    assert all(name == plain(name) for name in both)
    assert not {f"--{name}" for name in both} & FLAGS
    texts = (*foreign_names._EQUAL.values(), *(line for line in foreign_names._INSTEAD.splitlines() if line[:1] == " "))
    assert sum(len(text.split()) for text in texts) == len(both), "a name is listed twice"


def test_a_word_similar_to_no_flag_gets_no_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    parts = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 8))) for _ in range(400)]
    words = ["-".join(draw.choices(parts, k=draw.randint(1, 3))) for _ in range(200)]
    # Similar letters, other meaning.
    words += ["test-interval", "load-interval", "keep-first", "adam-beta3", "fp4", "tq", "lr-decayed", "train-delta"]
    for word in words:
        assert error_of(capsys, f"--{word}", "1").endswith(f"unknown flag --{word} (see --help)"), word


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"train": {"learning_rate": 1}}, "unknown key train.learning_rate. Use train.lr."),
        ({"model": {"lr": 1}}, "unknown key model.lr. Use train.lr."),
        ({"train": {"hidden-size": 1}}, "unknown key train.hidden-size. Use model.hidden_size."),
        ({"train": {"num_train_epochs": 1}}, "unknown key train.num_train_epochs: a run has --train-iters steps of"),
        ({"checkpoint": {"folder": "x"}}, "unknown key checkpoint.folder. Use checkpoint.save."),
        ({"model": {"flavor": "x"}}, "unknown key model.flavor: a model is a recipe or a YAML file"),
        ({"model": {"name": "x"}}, "unknown key model.name: a model is a recipe or a YAML file"),
        ({"train": {"train_itres": 1}}, "unknown key train.train_itres. Did you mean 'train_iters'?"),
        ({"train": {"change": 1}}, "unknown key train.change."),
        ({"training": {}}, "unknown section 'training'. Use section 'train'. Sections: "),
        ({"lr": 1}, "unknown section 'lr'. Use train.lr. Sections: "),
        ({"learning_rate": 1}, "unknown section 'learning_rate'. Use train.lr. Sections: "),
        ({"zebra": 1}, "unknown section 'zebra'. Sections: "),
    ],
)
def test_keys_in_yaml_get_the_same_answers(tree: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        from_dict(tree, "run.yaml")
    assert str(error.value).startswith(f"run.yaml: {message}")


CAPTION = (caption.main, "x.jpg --load run --output x ")


@pytest.mark.parametrize(
    ("tool", "words", "message"),
    [
        (CAPTION, "--batchsize 1", "unknown flag --batchsize. Did you mean '--batch-size'?"),
        (CAPTION, "--out 1", "unknown flag --out (see"),
        (CAPTION, "--epochs 1", "unknown flag --epochs (see"),
        (CAPTION, "--tokenizer-model 1", "unknown flag --tokenizer-model. Use --tokenizer"),
        (CAPTION, "--dtype bf61", "invalid choice: 'bf61': expected one of 'auto', 'fp32', 'bf16', 'fp16' (see"),
        (CAPTION, "--dtype atuo", "'bf16', 'fp16'. Did you mean 'auto'?"),
        ((checkpoints.main, ""), "prnue x", "Did you mean 'prune'?"),
        ((checkpoints.main, ""), "prune x --dryrun", "unknown flag --dryrun. Did you mean '--dry-run'?"),
    ],
)
def test_tools_suggest_their_own_flags_and_values(
    tool: tuple[Callable, str], words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main, before = tool
    with pytest.raises(SystemExit) as ended:
        main((before + words).split())
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and message in line
