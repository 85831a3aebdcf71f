#!/usr/bin/env python3
"""Score texts by a GenLIP's likelihood, without training: classify, retrieve, select, or measure the caption loss.

    python tools/zeroshot.py classify imagenet/val --load runs/so16 random:runs/so16 --class-names names.json \\
        --template 'a photo of a {}.' --output zeroshot
    python tools/zeroshot.py classify 'val-*.tar' --load exported --class-names names.json --template templates.json \\
        --normalise none --prior no-image --output zeroshot
    python tools/zeroshot.py retrieve demo/val-00000.tar --load runs/demo --output retrieval
    python tools/zeroshot.py select candidates.jsonl --load runs/so16 --output selection
    python tools/zeroshot.py captions 'data/val-*.tar' --load runs/so16 --output captions
    python tools/zeroshot.py captions demo/val-00000.tar --load runs/demo random:runs/demo --attributes \\
        --output captions

classify  top-1 accuracy. DATA: a folder with one subfolder for each class, .tar shards with .cls members, or a table.
retrieve  R@1 from image to caption and from caption to image. INPUT: indexed .tar shards, as for tools/caption.py.
select    the best text for each image. FILE: JSON Lines {"path": image file, "candidates": [texts]}.
captions  loss per token of the true captions, as in training. INPUT: indexed .tar shards, tables or LLaVA's json.

score = mean over templates of (log p(text | image, prompt) - log prior(text)) / length(text)

results.json has the scores for every normalisation and prior; --normalise and --prior choose the main one. The folder
--output also has pictures (not for select), one MODEL.jsonl for each model (select), and saved scores in scores/. To
continue a killed command, run it again. docs/evaluation.md has the protocol.

Exit status: 0 done; 1 an error of the machine; 2 a setting or a file is wrong.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genlip_megatron.command import command
from genlip_megatron.config.command_line import StrictParser, check_least
from genlip_megatron.encoders.flags import check_names, file_name
from genlip_megatron.infer import command_line
from genlip_megatron.optional import need
from genlip_megatron.outputs import check_file, check_folder, json_object

if TYPE_CHECKING:
    from torch import Tensor

    from genlip_megatron.evaluate.image_scores import Image
    from genlip_megatron.evaluate.scoring_model import ScoringModel
    from genlip_megatron.evaluate.zero_shot import Texts

_NORMALISATIONS, _PRIORS = ("tokens", "none", "bytes"), ("none", "no-image", "shuffled")


def build_parser() -> StrictParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = StrictParser(prog="zeroshot.py", description=summary, epilog=rest, allow_abbrev=False, formatter_class=raw)
    commands = parser.add_subparsers(dest="task", required=True, parser_class=StrictParser)
    classify = commands.add_parser("classify", help="top-1 accuracy", allow_abbrev=False)
    classify.add_argument("data", nargs="+", metavar="DATA", help="a folder of classes, .tar shards or a table")
    text = "JSON: a list of texts in the order of the classes, or {class: text} (default: the names of the classes)"
    classify.add_argument("--class-names", type=Path, metavar="FILE.json", help=text)
    text = "text with {} for the class name, or a JSON list of them; several are averaged (default: {})"
    classify.add_argument("--template", nargs="+", default=["{}"], metavar="TEXT|FILE.json", help=text)
    classify.add_argument("--image-column", default="image", help="column of a table (default: image)")
    classify.add_argument("--label-column", default="label", help="column of the classes (default: label)")
    text = "use at most N random images of each class (default: 0, all)"
    classify.add_argument("--per-class", type=int, default=0, metavar="N", help=text)
    classify.add_argument("--seed", type=int, default=0, help="of --per-class (default: 0)")
    retrieve = commands.add_parser("retrieve", help="R@1 of images and captions", allow_abbrev=False)
    retrieve.add_argument("inputs", nargs="+", metavar="INPUT", help="indexed .tar shards, folders of them, or globs")
    retrieve.add_argument("--limit", type=int, default=0, help="use only the first N images (default: 0, all)")
    select = commands.add_parser("select", help="the best of several texts for each image", allow_abbrev=False)
    select.add_argument("file", type=Path, metavar="FILE", help='JSON Lines {"path": ..., "candidates": [...]}')
    text = "loss per token of the true captions, and bits per byte"
    captions = commands.add_parser("captions", help=text, allow_abbrev=False)
    text = "indexed .tar shards, tables of images and captions, or LLaVA's json"
    captions.add_argument("inputs", nargs="+", metavar="INPUT", help=text)
    text = "folder of a table's image paths (default: that of the table)"
    captions.add_argument("--image-folder", default="", metavar="FOLDER", help=text)
    captions.add_argument("--image-column", default="image", help="column of a table (default: image)")
    captions.add_argument("--caption-column", default="caption", help="column of a table (default: caption)")
    captions.add_argument("--limit", type=int, default=0, help="use only the first N images (default: 0, all)")
    text = "for rendered scenes: caption them, and compare colour, shape, count, position and word with the true ones"
    captions.add_argument("--attributes", action="store_true", help=text)
    text = "most tokens of a caption of --attributes (default: 256)"
    captions.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help=text)
    for sub in (classify, retrieve, select):
        _add_scores(sub, _PRIORS[:2] if sub is select else _PRIORS)
    for sub in (classify, retrieve, select, captions):
        _add_shared(sub)
    return parser


def _add_scores(parser: argparse.ArgumentParser, priors: Sequence[str]) -> None:
    text = "length that divides log-likelihoods: tokens (default), UTF-8 bytes, or none"
    parser.add_argument("--normalise", choices=_NORMALISATIONS, default="tokens", help=text)
    text = "log-prior to subtract: none (default); no-image: after the prompt only" + (
        "; shuffled: mean probability over all images" if "shuffled" in priors else ""
    )
    parser.add_argument("--prior", choices=priors, default="none", help=text)
    parser.add_argument("--end-token", action="store_true", help="score also the token that ends a caption")


def _add_shared(parser: argparse.ArgumentParser) -> None:
    text = "a run, a checkpoint iter_NNNNNNN, or an exported folder; random: keeps only the shape, with random weights"
    parser.add_argument("--load", required=True, nargs="+", metavar="[random:]FOLDER", help=text)
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="folder of the results")
    parser.add_argument("--prompt", help="text between image and texts (default: the prompt of the training)")
    parser.add_argument("--tokenizer", default="", help="the models' tokenizer file, if it was moved")
    parser.add_argument("--batch-size", type=int, default=16, help="images per batch (default: 16)")
    parser.add_argument("--device", default="auto", help="cpu or cuda[:N] (default: auto, a GPU if there is one)")
    text = "dtype to compute in (default: auto, the dtype of the stored weights)"
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help=text)
    command_line.add_image_flags(parser)


def zeroshot(options: argparse.Namespace) -> int:
    """Score everything; returns the exit status.

    Raises:
        ValueError: a setting or a file is wrong.
    """
    _check_flags(options)
    need("transformers")
    if options.task != "select":
        need("matplotlib")
    if options.output.is_dir():
        own = "attributes" if options.task == "captions" else "normalise"
        check_file(options.output / "results.json", json_object("command", "task", own))
    tasks = {"classify": _classify, "retrieve": _retrieve, "select": _select, "captions": _captions}
    tasks[options.task](options)
    return 0


def _check_flags(options: argparse.Namespace) -> None:
    """Raise ValueError for a wrong flag; needs no torch."""
    check_least(options, batch_size=1, per_class=0, seed=0, limit=0, max_new_tokens=1)
    check_names(options.load, "--load")
    check_folder(options.output)


def _models(options: argparse.Namespace) -> list[ScoringModel]:
    from genlip_megatron.evaluate.scoring_model import open_scoring_model
    from genlip_megatron.infer.load import pick_device
    from genlip_megatron.log import to_stderr

    return [
        open_scoring_model(
            name,
            device=pick_device(options.device),
            log=to_stderr,
            prompt=options.prompt,
            dtype=options.dtype,
            tokenizer=options.tokenizer,
            images=command_line.image_flags(options),
        )
        for name in options.load
    ]


def _scores_folder(options: argparse.Namespace) -> Path:
    folder: Path = options.output / "scores"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _score(
    options: argparse.Namespace, model: ScoringModel, images: Sequence[Image], texts: Texts
) -> tuple[Tensor, Tensor]:
    """(float32 [images, texts] log-likelihoods, float32 [texts] those after the prompt only)."""
    from genlip_megatron.evaluate.image_scores import score_images
    from genlip_megatron.evaluate.likelihood import LikelihoodScorer

    scorer = LikelihoodScorer(model.loaded.model, model.prompt_ids, texts.token_ids)
    likelihoods = score_images(
        images,
        lambda batch, _: scorer(batch),
        len(texts.texts),
        processor=model.processor,
        key=(model.fingerprint, model.prompt_ids, texts.token_ids),
        folder=_scores_folder(options),
        batch_size=options.batch_size,
        what=model.name,
    )
    return likelihoods, scorer.without_image()


def _classify(options: argparse.Namespace) -> None:
    import torch

    from genlip_megatron import atomic_write
    from genlip_megatron.evaluate import labelled
    from genlip_megatron.evaluate.confusion import confusion_picture
    from genlip_megatron.evaluate.image_scores import SourceImage
    from genlip_megatron.evaluate.zero_shot import (
        Texts,
        encode_texts,
        fill_templates,
        read_names,
        read_templates,
    )

    templates = read_templates(options.template)
    samples, classes = labelled.read_classes(options.data, "DATA", options.image_column, options.label_column)
    names = read_names(options.class_names, classes)
    samples = labelled.per_class(samples, options.per_class, options.seed)
    filled = fill_templates(names, templates)
    models = _models(options)
    jobs = [
        (model, Texts(filled, encode_texts(filled, model.loaded.tokenizer, "text", options.end_token), len(templates)))
        for model in models
    ]
    images = [SourceImage(sample.image) for sample in samples]
    labels = torch.tensor([sample.label for sample in samples])
    measured = [_classified(options, *job, images, labels, names) for job in jobs]
    rows, counts = [row for row, _ in measured], measured[0][1]
    facts = {"data": options.data, "images": len(images), "classes": len(names), "templates": templates, "names": names}
    title = f"zero-shot top-1 accuracy, % ({len(names)} classes)"
    _report(options, {**facts, "chance": 1 / len(names)}, rows, "accuracy", title)
    title = f"{options.load[0]}: {rows[0]['accuracy']:.1%} right"
    atomic_write.write(options.output / "confusion.png", confusion_picture(counts, names, title))


def _classified(
    options: argparse.Namespace,
    model: ScoringModel,
    texts: Texts,
    images: Sequence[Image],
    labels: Tensor,
    names: Sequence[str],
) -> tuple[dict[str, Any], Tensor]:
    """(row of one model, its confusion matrix)."""
    from genlip_megatron.evaluate.confusion import confusion
    from genlip_megatron.evaluate.zero_shot import class_scores, every_choice

    likelihoods, blind = _score(options, model, images, texts)

    def predicted(normalise: str, prior: str) -> Tensor:
        return class_scores(likelihoods, blind, texts, normalise, prior).argmax(dim=1)

    accuracies = every_choice(lambda *choice: (predicted(*choice) == labels).double().mean().item())
    counts = confusion(labels, predicted(options.normalise, options.prior), len(names))
    totals = counts.sum(dim=1)
    recalls = {name: (counts[i, i] / totals[i]).item() for i, name in enumerate(names) if totals[i]}
    chosen = accuracies[options.normalise][options.prior]
    row = {"accuracy": chosen, "accuracies": accuracies, "per_class": recalls, "settings": model.settings()}
    return row, counts


def _retrieve(options: argparse.Namespace) -> None:
    import torch

    from genlip_megatron.evaluate.image_scores import ShardSample
    from genlip_megatron.evaluate.zero_shot import Texts, encode_texts
    from genlip_megatron.infer.inputs import Inputs, ShardImage

    images, captions = [], []
    for image in Inputs(options.inputs, options.limit):
        (name,) = image.name.values()
        if not isinstance(image, ShardImage):
            raise ValueError(f"INPUT {name}: an image file has no caption. Retrieval reads indexed .tar shards.")
        try:
            captions.append(image.truth(""))
        except ValueError as error:
            raise ValueError(f"INPUT {image.index.shard}: {name}: {error}") from None
        images.append(ShardSample(image))
    distinct = list(dict.fromkeys(captions))
    if len(distinct) < 2:
        raise ValueError(f"INPUT {options.inputs[0]}: only one caption. Retrieval needs two or more.")
    places = {caption: number for number, caption in enumerate(distinct)}
    text_of = torch.tensor([places[caption] for caption in captions])
    models = _models(options)
    jobs = [
        (model, Texts(distinct, encode_texts(distinct, model.loaded.tokenizer, "caption", options.end_token), 1))
        for model in models
    ]
    rows = [_retrieved(options, *job, images, text_of) for job in jobs]
    facts = {"inputs": options.inputs, "images": len(images), "captions": len(distinct)}
    title = f"mean R@1 of both directions, % ({len(images)} images, {len(distinct)} captions)"
    _report(options, facts, rows, "recall_at_1", title)


def _retrieved(
    options: argparse.Namespace, model: ScoringModel, texts: Texts, images: Sequence[Image], text_of: Tensor
) -> dict[str, Any]:
    """The row of one model."""
    from genlip_megatron.evaluate.zero_shot import class_scores, every_choice, recall_at_1

    likelihoods, blind = _score(options, model, images, texts)
    recalls = every_choice(
        lambda *choice: recall_at_1(class_scores(likelihoods, blind, texts, *choice), text_of)  # normalise, prior
    )
    chosen = recalls[options.normalise][options.prior]
    mean = sum(chosen.values()) / len(chosen)
    return {"recall_at_1": mean, **chosen, "recalls": recalls, "settings": model.settings()}


def _select(options: argparse.Namespace) -> None:
    from genlip_megatron import atomic_write
    from genlip_megatron.evaluate.probe_results import provenance
    from genlip_megatron.evaluate.zero_shot import encode_texts, read_candidates

    lines = read_candidates(options.file)
    models = _models(options)
    jobs = [
        (model, [encode_texts(texts, model.loaded.tokenizer, "candidate", options.end_token) for _, texts in lines])
        for model in models
    ]
    rows = []
    for model, ids in jobs:
        name = f"{file_name(model.name)}.jsonl"
        selected = _selected(options, model, lines, ids)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in selected)
        atomic_write.write(options.output / name, text)
        rows.append({"file": name, "settings": model.settings()})
        print(f"model {model.name} | best texts of {len(lines)} images in {options.output / name}")
    facts = {"task": "select", "file": str(options.file), "images": len(lines), **_choices(options)}
    content = json.dumps({**provenance(), **facts, "encoders": rows}, indent=1)
    atomic_write.write(options.output / "results.json", content)


def _selected(
    options: argparse.Namespace,
    model: ScoringModel,
    lines: Sequence[tuple[str, list[str]]],
    ids: Sequence[list[list[int]]],
) -> list[dict[str, Any]]:
    """The row of each image; ``ids`` are the tokens of its candidates."""
    import torch

    from genlip_megatron.evaluate.image_scores import SourceImage, score_images
    from genlip_megatron.evaluate.labelled import Source
    from genlip_megatron.evaluate.likelihood import LikelihoodScorer
    from genlip_megatron.evaluate.zero_shot import Texts, class_scores

    most = max(len(candidates) for _, candidates in lines)

    def score(batch: Sequence[Any], images: Sequence[Any]) -> Tensor:
        """float32 [B, 2 * most]: log-likelihoods with and without the image, padded with NaN."""
        scores = torch.full((len(batch), 2, most), torch.nan)
        for number, (prepared, image) in enumerate(zip(batch, images, strict=True)):
            scorer = LikelihoodScorer(model.loaded.model, model.prompt_ids, image.texts)
            scores[number, 0, : len(image.texts)] = scorer([prepared])[0]
            scores[number, 1, : len(image.texts)] = scorer.without_image()
        return scores.flatten(1)

    images = [
        SourceImage(Source(path, path), tuple(map(tuple, own))) for (path, _), own in zip(lines, ids, strict=True)
    ]
    scores = score_images(
        images,
        score,
        2 * most,
        processor=model.processor,
        key=(model.fingerprint, model.prompt_ids),
        folder=_scores_folder(options),
        batch_size=options.batch_size,
        what=model.name,
    ).unflatten(1, (2, most))
    rows = []
    for (path, candidates), own, both in zip(lines, ids, scores, strict=True):
        likelihoods, blind = both[:, : len(candidates)]
        texts = Texts(candidates, own, 1)
        final = class_scores(likelihoods[None], blind, texts, options.normalise, options.prior)[0]
        row = {
            "path": path,
            "best": candidates[int(final.argmax())],
            "candidates": candidates,
            "scores": final.tolist(),
            "log_likelihoods": likelihoods.tolist(),
            "log_likelihoods_without_image": blind.tolist(),
        }
        rows.append(row)
    return rows


def _captions(options: argparse.Namespace) -> None:
    from genlip_megatron.evaluate import caption_loss, probe_results
    from genlip_megatron.evaluate.dialogues import read_dialogues

    columns = (options.image_folder, options.image_column, options.caption_column)
    dialogues, without = read_dialogues(options.inputs, "INPUT", *columns)
    dialogues = dialogues[: options.limit or None]
    if options.attributes:
        caption_loss.check_scenes(dialogues)
    jobs = [(model, caption_loss.encode(dialogues, model)) for model in _models(options)]
    rows = [
        caption_loss.measure(
            *job,
            attributes=options.attributes,
            max_new_tokens=options.max_new_tokens,
            folder=_scores_folder(options),
            batch_size=options.batch_size,
        )
        for job in jobs
    ]
    facts = {
        "task": "captions",
        "protocol": "teacher forced",
        "inputs": options.inputs,
        "samples": len(dialogues),
        "samples_without_image": without,
        "attributes": options.attributes,
        "max_new_tokens": options.max_new_tokens,
    }
    title = f"loss per token of {len(dialogues)} captions (lower is better)"
    probe_results.write(options.output, facts, rows, "loss", title, percent=False)
    for row in rows:
        named = [f"{name} {share:.1%}" for name, share in row.get("attributes", {}).items()]
        loss = (f"loss {row['loss']:.4f}", f"bits/byte {row['bits_per_byte']:.4f}")
        print(" | ".join((f"model {row['settings']['encoder']}", *loss, *named)))
    print(f"results in {options.output}/results.json and results.png")


def _choices(options: argparse.Namespace) -> dict[str, Any]:
    return {"normalise": options.normalise, "prior": options.prior, "end_token": options.end_token}


def _report(
    options: argparse.Namespace, facts: dict[str, Any], rows: Sequence[dict[str, Any]], measure: str, title: str
) -> None:
    from genlip_megatron.evaluate import probe_results

    facts = {"task": options.task, "protocol": "likelihood", **_choices(options), **facts}
    probe_results.write(options.output, facts, rows, measure, title)
    for row in rows:
        parts = [f"{name} {row[name]:.1%}" for name in (measure, "image_to_text", "text_to_image") if name in row]
        print(" | ".join((f"model {row['settings']['encoder']}", *parts)))
    print(f"results in {options.output}/results.json and results.png")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run; user errors end with status 2 and one line."""
    return zeroshot(build_parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
