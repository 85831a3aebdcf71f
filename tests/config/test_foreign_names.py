"""Names from other trainers are answered with this project's; otherwise only similar names are suggested."""

from __future__ import annotations

import random
import re
import string
from pathlib import Path

import pytest

from genlip_megatron.config import SECTIONS, foreign_names, from_dict
from genlip_megatron.config.command_line import build_parser, parse_args
from genlip_megatron.config.suggest import plain
from tools import caption, checkpoints

FLAGS = {flag for action in build_parser()._actions for flag in action.option_strings}
TORCHRUN = {"--nnodes", "--nproc-per-node"}

# Flag -> part of the answer.
ASKED = {
    "--learning-rate": "Use --lr",
    "--batch-size": "packs",
    "--per-device-train-batch-size": "packs",
    "--bs": "packs",
    "--lr_rate": "Use --lr",
    "--gas": "--global-batch-size",
    "--n_epochs": "--train-iters",
    "--iters": "Use --train-iters",
    "--epochs": "--train-iters",
    "--num-train-epochs": "--train-iters",
    "--train-samples": "--train-iters",
    "--warmup": "Use --lr-warmup-iters",
    "--warmup-steps": "Use --lr-warmup-iters",
    "--lr-warmup-fraction": "--lr-warmup-iters",
    "--lr-decay": "cosine",
    "--lr-decay-style": "cosine",
    "--lr-scheduler-type": "cosine",
    "--resume": "Use --load",
    "--resume-from-checkpoint": "Use --load",
    "--output-dir": "Use --save",
    "--save-dir": "Use --save",
    "--logs": "Use --save",
    "--bf16": "--precision",
    "--fp16": "--precision",
    "--workers": "Use --num-workers",
    "--dataset-type": "--train-data",
    "--train-num-samples": "--train-iters",
    "--data-path": "Use --train-data",
    "--tokenizer-model": "Use --tokenizer",
    "--tokenizer-type": "--tokenizer",
    "--max-steps": "Use --train-iters",
    "--steps": "Use --train-iters",
    "--save-steps": "Use --save-interval",
    "--log-every-n-steps": "Use --log-interval",
    "--report-to": "--wandb-project",
    "--wandb": "Use --wandb-project",
    "--wandb-project-name": "Use --wandb-project",
    "--wd": "Use --weight-decay",
    "--beta1": "Use --adam-beta1",
    "--beta2": "Use --adam-beta2",
    "--eps": "Use --adam-eps",
    "--grad-clip-norm": "Use --clip-grad",
    "--max-grad-norm": "Use --clip-grad",
    "--gradient-accumulation-steps": "--global-batch-size",
    "--gradient-checkpointing": "--recompute",
    "--grad-checkpointing": "--recompute",
    "--recompute-granularity": "--recompute",
    "--use-flash-attn": "--attention-backend",
    "--use-distributed-optimizer": "leave it out",
    "--ckpt-format": "leave it out",
    "--world-size": "torchrun",
    "--tensor-parallel-size": "Use --tensor-model-parallel-size",
    "--sequence-length": "Use --seq-length",
    "--max-seq-len": "Use --seq-length",
    "--img-size": "Use --image-size",
    "--patch-size": "16 x 16",
    "--model": "--config",
    "--name": "--save",
    "--checkpoint.folder": "Use --save",
    "--training.local_batch_size": "packs",
    "--training.steps": "Use --train-iters",
    "--optimizer.lr": "Use --lr",
    "--model.flavor": "--config",
    "--parallelism.tensor_parallel_degree": "Use --tensor-model-parallel-size",
    "--activation_checkpoint.mode": "--recompute",
    # Other spellings of this project's names.
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


def test_a_switch_takes_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(capsys, "--sequence-parallel", "false")
    assert "--sequence-parallel false: a switch takes no value; write --sequence-parallel or --no-seq" in line


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


def test_tools_suggest_their_own_flags_and_values(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = ["x.jpg", "--load", "run", "--output", "x"]
    for main, words, message in (
        (caption.main, [*base, "--batchsize", "1"], "unknown flag --batchsize. Did you mean '--batch-size'?"),
        (caption.main, [*base, "--out", "1"], "unknown flag --out (see"),
        (caption.main, [*base, "--epochs", "1"], "unknown flag --epochs (see"),
        (caption.main, [*base, "--tokenizer-model", "1"], "unknown flag --tokenizer-model. Use --tokenizer"),
        (
            caption.main,
            [*base, "--dtype", "bf61"],
            "invalid choice: 'bf61': expected one of 'auto', 'fp32', 'bf16', 'fp16' (see",
        ),
        (caption.main, [*base, "--dtype", "atuo"], "'bf16', 'fp16'. Did you mean 'auto'?"),
        (checkpoints.main, ["prnue", "x"], "Did you mean 'prune'?"),
        (checkpoints.main, ["prune", "x", "--dryrun"], "unknown flag --dryrun. Did you mean '--dry-run'?"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        (line,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and message in line
