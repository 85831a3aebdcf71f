"""The parts of ``tools/report.py``'s page. A part that cannot be shown says what is missing and what would make it."""

from __future__ import annotations

import io
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from genlip_megatron import storage
from genlip_megatron.config import RunConfig
from genlip_megatron.data import patterns
from genlip_megatron.data.index import read_index
from genlip_megatron.data.manifest import Totals
from genlip_megatron.evaluate import report_plots
from genlip_megatron.evaluate.report_page import Block, Part, Picture, Table
from genlip_megatron.evaluate.run_log import RunLog

RESULTS, ATTENTION = "results.json", "attention.json"
_ATTENTION_KIND = "genlip attention"
_SHOWN_STEPS = 8  # validations whose captions are shown
_READ_SHARDS = 16  # of each source of training data, for the histograms
_SIDES = (0, 64, 128, 256, 384, 512, 768, 1024, 2048)  # pixels
_TOKENS = (0, 16, 32, 64, 128, 256, 512, 1024)
# Of results: what is shown above their table, and what of a row is no score.
_FACTS = (
    *("task", "protocol", "measure", "normalise", "prior", "llm", "visual_tokens"),
    *("classes", "images", "captions", "samples", "chance"),
)
_NOT_SCORES = {
    *("settings", "per_class", "seconds", "steps", "tokens"),
    *("train_images", "held_out_images", "val_images"),
}
# What measures an encoder, and its picture in the report: tool -> rest of an example of its command line.
_TOOLS = {
    "probe.py": "classify --encoder {load} --train imagenet/train --val imagenet/val --output {run}/probe",
    "zeroshot.py": "classify imagenet/val --load {load} --class-names names.json --output {run}/zeroshot",
    "perplexity.py": "--encoder {load} --llm LLM --data captions.json --image-folder images --output {run}/perplexity",
    "sweep.py": "--output {run}/sweep -- tools/probe.py classify --encoder {load} --train imagenet/train "
    "--val imagenet/val",
}


def training(log: RunLog, folder: Path, run: Path, command: str) -> Part:
    """Loss, throughput and other curves of the event files in ``folder``."""
    pictures = [Picture(panel.title, png) for panel in report_plots.PANELS if (png := report_plots.curves(log, panel))]
    if not pictures:
        made = f"torchrun pretrain_genlip.py --config RECIPE --save {quoted(run)}"
        block = Block(missing=f"{folder} holds no TensorBoard events of a training.", commands=[made])
        return Part("Training", [block])
    kinds = [mark.kind for mark in log.marks]
    steps = max((step for curve in log.curves.values() for step, _ in curve.kept), default=0)
    facts = {"last logged step": f"{steps:,}"}
    facts |= {f"times {kind}": str(kinds.count(kind)) for kind in ("resumed", "rolled back") if kind in kinds}
    names = {
        "lm loss": "loss",
        "lm loss validation": "validation loss",
        "tokens-per-second": "tokens/s",
        "consumed-samples": "samples",
        "mem-allocated-gib": "memory, GiB",
        "quarantined-samples": "bad samples",
        "skipped-steps": "skipped steps",
        "spikes": "loss spikes",
    }
    facts |= {name: _number(value) for tag, name in names.items() if (value := log.last(tag)) is not None}
    shown = f"tensorboard --logdir {quoted(folder)}"
    return Part("Training", [Block(facts=facts, pictures=pictures, commands=[command, shown])])


def captions(log: RunLog, folder: Path, run: Path, command: str) -> Part:
    """What the run wrote for its first validation images, over time."""
    title = "Captions of the validation"
    if not log.captions:
        found, ranks = newest(run), 1
        if found is not None:
            sizes = found[1].parallel
            ranks = math.prod(
                (sizes.tensor_model_parallel_size, sizes.pipeline_model_parallel_size, sizes.context_parallel_size)
            )
        place = found[0] if found else run
        validate = (
            f"torchrun --nproc-per-node {ranks} pretrain_genlip.py --config {quoted(place / 'config.yaml')} "
            f"--load {quoted(run)} --eval-only --caption-samples 4 --tensorboard-dir {quoted(folder)}"
        )
        reason = "the run wrote no captions: it had no validation data, or --caption-samples 0."
        return Part(title, [Block(missing=reason, commands=[validate])])
    blocks = []
    for number, (tag, texts) in enumerate(sorted(log.captions.items(), key=lambda item: _order(item[0]))):
        parsed = [(step, *_parse(text)) for step, text in texts]
        last = len(parsed) - 1
        chosen = sorted({round(i * last / (_SHOWN_STEPS - 1)) for i in range(_SHOWN_STEPS)})
        rows = [(f"{parsed[i][0]:,}", parsed[i][1]) for i in chosen]
        pictures = [Picture(f"Validation image {number}", log.images[tag])] if tag in log.images else []
        facts = {"true caption": parsed[-1][2]}
        blocks.append(Block(facts=facts, pictures=pictures, table=Table(("step", "generated caption"), rows)))
    return Part(title, [*blocks[:-1], replace(blocks[-1], commands=[command])])


def _number(value: float) -> str:
    """Four digits; a whole number has all of its digits."""
    return f"{value:,.0f}" if value == round(value, 0) else f"{value:,.4g}"


def _order(tag: str) -> tuple[int, str]:
    last = tag.rsplit("/", 1)[-1]
    return (int(last) if last.isdigit() else 0, tag)


def _parse(text: str) -> tuple[str, str]:
    """(generated, true caption) of a text that ``train/caption_samples.py`` wrote.

    >>> _parse("caption: a cat\\n\\ntruth: a dog")
    ('a cat', 'a dog')
    """
    caption, _, truth = text.removeprefix("caption: ").rpartition("\n\ntruth: ")
    return caption, truth


def checkpoint(run: Path, inputs: Sequence[str], limit: int, device: str, dtype: str, tokenizer: str) -> Part:
    """Captions and patch readouts of the newest good checkpoint.

    Args:
        run: folder of the run.
        inputs: images, as ``tools/caption.py`` takes them; empty: the part is missing.
        limit: number of images.
        device, dtype, tokenizer: as ``infer/load.py`` takes them.

    Raises:
        ValueError: no image, or no checkpoint that can be loaded.
    """
    title = "Newest checkpoint"
    own = f"tools/report.py {quoted(run)} --images {_given(inputs, 'photos/')}"
    if not inputs:
        return Part(title, [Block(missing="no images were given.", commands=[own])])
    from genlip_megatron.infer.caption import Captioner, Decoding
    from genlip_megatron.infer.inputs import Inputs
    from genlip_megatron.infer.load import load, pick_device
    from genlip_megatron.infer.prepare import prepared
    from genlip_megatron.infer.readout import load_fonts, picture, readout
    from genlip_megatron.log import to_stderr

    images = Inputs(inputs, limit)
    loaded = load(run, to_stderr, device=pick_device(device), dtype=dtype, tokenizer=tokenizer)
    captioner, fonts = Captioner(loaded, loaded.prompt, Decoding()), load_fonts("")
    rows, pictures, bad = [], [], []
    for image in prepared(images, loaded.image_processor, loaded.prompt):
        (name,) = image.name.values()
        tokens = [] if image.error else readout(loaded, image)
        if not tokens:
            bad.append((name, image.error or "its probabilities are not all finite numbers"))
            continue
        rows.append((name, captioner.text(captioner.tokens([image])[0]), image.truth or ""))
        content = io.BytesIO()
        picture(image, tokens, fonts).save(content, "PNG", optimize=True)
        pictures.append(Picture(f"{name}: likeliest tokens of each patch", content.getvalue()))
    place = quoted(loaded.place)
    flags = f"{_given(inputs)} --limit {len(images)} --load {place}"
    columns = ("image", "caption", "true caption") if any(truth for *_, truth in rows) else ("image", "caption")
    table = Table(columns, [row[: len(columns)] for row in rows])
    blocks = [
        Block("Captions", f"Step {loaded.step}, prompt: {loaded.prompt}", table=table)
        if rows
        else Block("Captions", missing="no image could be used."),
        Block("Patch readouts", "The LM head on the features of each patch, likeliest token on top.", pictures=pictures)
        if rows
        else Block("Patch readouts", missing="no image could be used."),
    ]
    commands = (f"tools/caption.py {flags} --output captions.jsonl", f"tools/patch_readout.py {flags} --output readout")
    blocks = [replace(block, commands=[made]) for block, made in zip(blocks, commands, strict=True)]
    if bad:
        blocks.append(Block("Images that could not be used", table=Table(("image", "reason"), bad)))
    return Part(title, blocks)


def check_attention(folders: Sequence[Path]) -> None:
    """Raise ValueError unless each folder holds results of ``tools/attention.py``."""
    for folder in folders:
        if _read(folder / ATTENTION, "--attention").get("kind") != _ATTENTION_KIND:
            raise ValueError(f"--attention {folder}: its {ATTENTION} is not of tools/attention.py. Name its folder.")


def attention(folders: Sequence[Path], run: Path, config: RunConfig | None) -> Part:
    """The pictures of ``tools/attention.py``."""
    title = "Attention"
    if not folders:
        data = _given(config.data.valid_data if config else (), "photos/")
        target = quoted(run / "attention")
        commands = [
            f"tools/attention.py {data} --limit 100 --load {quoted(run)} random:{quoted(run)} --output {target}",
            f"tools/report.py {quoted(run)} --attention {target}",
        ]
        return Part(title, [Block(missing="no results of tools/attention.py were given.", commands=commands)])
    blocks = []
    for folder in folders:
        facts = _read(folder / ATTENTION, "--attention")
        models = ", ".join(model["name"] for model in facts["models"])
        blocks.append(Block(models, pictures=_pictures(folder), commands=[str(facts["command"])]))
    return Part(title, blocks)


def check_results(folders: Sequence[Path]) -> None:
    """Raise ValueError unless each folder holds a ``results.json``."""
    for folder in folders:
        _read(folder / RESULTS, "--results")


def results(folders: Sequence[Path], run: Path) -> Part:
    """Probes, zero-shot, perplexity, sweeps: folders with a ``results.json`` and pictures."""
    found = [(folder, _read(folder / RESULTS, "--results")) for folder in folders]
    blocks = [_result(folder, facts) for folder, facts in found]
    made = [_command(facts.get("command", "")) for _, facts in found]
    for tool, rest in _TOOLS.items():
        # A sweep names the tool that it ran after its own name.
        if not any(words.split(" -- ")[0].find(tool) >= 0 for words in made):
            line = f"tools/{tool} {rest.format(load=quoted(run), run=quoted(run))}"
            again = f"tools/report.py {quoted(run)} --results {quoted(run)}/{tool.removesuffix('.py')}"
            blocks.append(Block(missing=f"no results of tools/{tool} were given.", commands=[line, again]))
    return Part("Probes, zero-shot, perplexity, sweeps", blocks)


def _result(folder: Path, facts: Mapping[str, Any]) -> Block:
    scores = {str(row["settings"]["encoder"]): _scores(row) for row in facts.get("encoders", [])}
    columns = list(dict.fromkeys(name for found in scores.values() for name in found))
    rows = [
        [encoder, *(f"{found[name]:.4g}" if name in found else "-" for name in columns)]
        for encoder, found in scores.items()
    ]
    known = {name.replace("_", " "): facts[name] for name in _FACTS if isinstance(facts.get(name), (str, int, float))}
    shown = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in known.items()}
    table = Table(["encoder", *columns], rows) if rows else None
    command = _command(facts.get("command", ""))
    return Block(folder.name, facts=shown, pictures=_pictures(folder), table=table, commands=[command])


def _scores(row: Mapping[str, Any]) -> dict[str, float]:
    """The scores of a sweep, or else all numbers of a row, also those one level below, without its counts.

    >>> _scores({"accuracy": 0.5, "attributes": {"word": 0.25}, "steps": 3})
    {'accuracy': 0.5, 'attributes word': 0.25}
    >>> _scores({"scores": {"224": 0.5, "384": 0.75}})
    {'224 px': 0.5, '384 px': 0.75}
    """
    if row.get("scores"):
        return {f"{size} px": score for size, score in row["scores"].items()}
    found: dict[str, Any] = {}
    for name, value in row.items():
        if name not in _NOT_SCORES:
            found |= {f"{name} {key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return {name.replace("_", " "): value for name, value in found.items() if isinstance(value, (int, float))}


def _command(words: str | Sequence[str]) -> str:
    """A recorded command: a line, or the words of ``sys.argv``."""
    if isinstance(words, str) or not words:
        return str(words)
    program = Path(words[0])
    return shlex.join([f"tools/{program.name}" if program.parent.name == "tools" else words[0], *words[1:]])


def _read(path: Path, flag: str) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(facts, dict):
            return facts
        reason = "not an object"
    except OSError as error:
        reason = str(error.strerror)
    except ValueError as error:
        reason = str(error)
    raise ValueError(f"{flag} {path.parent}: {path.name} cannot be read ({reason}). Name a folder that a tool wrote.")


def _pictures(folder: Path) -> list[Picture]:
    files = sorted(folder.glob("*.png"))
    return [Picture(file.stem.replace("-", " ").replace("_", " "), file.read_bytes()) for file in files]


def data(config: RunConfig | None, command: str) -> Part:
    """Sizes of the training data, from manifests and indexes; histograms of up to 16 shards of each source."""
    title = "Training data"
    if config is None or not config.data.train_data:
        made = "tools/prepare_data.py 'data/*.tar' --tokenizer tokenizer.json"
        return Part(title, [Block(missing="no checkpoint says what the run trained on.", commands=[made])])
    totals, rows, problems = Totals(), [], []
    for entry in config.data.train_data:
        if storage.is_remote(entry):
            problems.append(f"{entry}: remote data are not read.")
            continue
        try:
            facts, shards = _source(entry)
            for shard in shards[:: -(-len(shards) // _READ_SHARDS)]:
                totals.add(read_index(shard))
        except (ValueError, KeyError, TypeError, OSError) as error:
            problems.append(f"{entry}: {' '.join(str(error).split())}")
            continue
        rows.append((entry, *facts))
    blocks = []
    if rows:
        names = ("source", "shards", "samples", "text tokens per sample", "with loss", "refused samples")
        histograms = (
            ("Image heights", totals.histograms["height"], _SIDES, "pixels"),
            ("Image widths", totals.histograms["width"], _SIDES, "pixels"),
            ("Lengths of texts", totals.histograms["text_tokens"], _TOKENS, "tokens"),
        )
        pictures = [
            Picture(name, report_plots.histogram(counts, bins, label)) for name, counts, bins, label in histograms
        ]
        text = f"Histograms of {totals.samples:,} samples, from up to {_READ_SHARDS} shards of each source."
        commands = [command, f"{_inspect(config)} --output page.html"]
        blocks.append(Block(text=text, pictures=pictures, table=Table(names, rows), commands=commands))
    for problem in problems:
        blocks.append(Block(missing=problem, commands=[f"{_inspect(config)} --output page.html"]))
    return Part(title, blocks)


def _inspect(config: RunConfig) -> str:
    return f"tools/inspect_data.py {_given(config.data.train_data)} --tokenizer {quoted(config.data.tokenizer)}"


def _source(entry: str) -> tuple[tuple[str, ...], list[str]]:
    """(facts in words, shards) of a manifest, or of what ``data.train_data`` names else.

    Raises:
        ValueError, KeyError, TypeError, OSError: it cannot be read.
    """
    if entry.endswith(".json"):
        tree = json.loads(storage.read_bytes(entry))
        shards = [storage.join(storage.parent(entry), shard["path"]) for shard in tree["shards"]]
        samples, text, loss = (int(tree[name]) for name in ("samples", "text_tokens", "loss_tokens"))
        refused = sum(tree["refused"].values())
    else:
        shards = patterns.expand_shards([entry], "data.train_data")
        totals = Totals()
        for shard in shards[:_READ_SHARDS]:
            totals.add(read_index(shard))
        samples, text, loss = totals.samples, totals.text_tokens, totals.loss_tokens
        refused = sum(totals.refused.values())
    more = "" if entry.endswith(".json") or len(shards) <= _READ_SHARDS else f" in the first {_READ_SHARDS} shards"
    good = max(samples, 1)
    facts = (f"{len(shards):,}", f"{samples:,}{more}", f"{text / good:.1f}", f"{loss / good:.1f}", f"{refused:,}")
    return facts, shards


def newest(run: Path) -> tuple[Path, RunConfig] | None:
    """(folder, configuration) of a run's newest checkpoint whose configuration can be read."""
    from genlip_megatron.checkpoint import loading, paths

    for step in paths.steps(run):
        place = paths.step_folder(run, step)
        try:
            return place, loading.read_config(place)
        except ValueError:
            continue
    return None


def heading(run: Path, found: tuple[Path, RunConfig] | None, versions: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Names and values for the top of the page; ``found`` is the result of ``newest``."""
    yield "run", str(run)
    if found is not None:
        place, config = found
        yield "newest checkpoint", place.name
        model, train = config.model, config.train
        yield "model", f"{model.num_layers} layers of {model.hidden_size}, {model.num_attention_heads} heads"
        yield "images", config.data.image_mode
        yield "steps", f"{train.train_iters:,}"
        yield "global batch", f"{train.global_batch_size:,} packs of {config.data.seq_length:,} tokens"
        yield "precision", train.precision
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def quoted(path: str | Path) -> str:
    """A path as a word of a shell's command line."""
    return shlex.quote(str(path))


def _given(words: Sequence[str], otherwise: str = "") -> str:
    return shlex.join(words) or otherwise
