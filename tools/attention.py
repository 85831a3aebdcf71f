#!/usr/bin/env python3
"""Show where a model's attention goes, layer by layer, and compare models in one picture.

    tools/attention.py photos/ --load runs/so16 --output attention
    tools/attention.py data/val-00000.tar --limit 100 --load runs/so16 runs/no-gate random:runs/so16 --output attention
    tools/attention.py photos/ --load exported hf:openai/clip-vit-large-patch14 \\
        --image-mode fixed --image-size 224 --output attention

Each image is captioned greedily with the cache; then one pass over image, prompt and caption is measured, one block of
queries at a time. Encoders without a text decoder get the patch measures only. The folder holds:

    mass.png        attention mass: image -> first token, generated -> first token, generated -> image (paper, Fig. 3)
    allocation.png  generated -> image, sink, prompt, generated; as mass and as density, mass / tokens (Fig. 10)
    maps-NN.png     head-averaged maps of the first image, for each model with text (Fig. 11)
    extras.png      output gate, largest activations, cosine between patches, norms of patches
    attention.json  all numbers, the settings, and what was not applicable

A text token's own key counts to its own group. The sink is the first two tokens of the prompt. Dotted lines show
chance: a query that sees N keys gives each of them 1/N. Models must see equally many patches: give them images of one
size, or --allow-unequal. The folder appears when it is complete; an image that cannot be used is reported on standard
error and listed under "failed".

Exit status: 0 done, even with some bad images; 1 no image could be used; 2 a setting or a file is wrong.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from genlip_megatron.command import command
from genlip_megatron.config.command_line import StrictParser, check_least
from genlip_megatron.infer import command_line
from genlip_megatron.log import to_stderr
from genlip_megatron.optional import need
from genlip_megatron.outputs import first_unlisted

# --overwrite recognises a folder by these.
INDEX, KIND = "attention.json", "genlip attention"
foreign = partial(first_unlisted, index=INDEX, kind=KIND)


def build_parser() -> StrictParser:
    """The command line."""
    text = (
        "models to compare: a run, a checkpoint, an exported folder, or another encoder as [KIND:]WHERE, for example "
        "hf:FOLDER. A leading random: keeps only the shape, with random weights"
    )
    parser = command_line.build_parser("attention.py", __doc__ or "", output="results", load=text)
    command_line.add_tokenizer(parser)
    parser.add_argument("--prompt", help="text before the generated tokens (default: the prompt of the training)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="most generated tokens (default: 256)")
    parser.add_argument("--batch-size", type=int, default=16, help="images per generation batch (default: 16)")
    text = "image -> first token: leave out the first token's attention to itself"
    parser.add_argument("--exclude-self", action="store_true", help=text)
    text = "numbers of layers, from 1, to draw maps of (default: 2, 3, 15 and the last); without a number: none"
    parser.add_argument("--maps", type=int, nargs="*", metavar="LAYER", help=text)
    text = "side of the maps' image in pixels, a multiple of 16 (default: 128, which is 64 patches)"
    parser.add_argument("--map-size", type=int, default=128, help=text)
    text = "compare models that see different numbers of patches"
    parser.add_argument("--allow-unequal", action="store_true", help=text)
    text = "queries that are processed at once; memory grows with it, results do not depend on it (default: 256)"
    parser.add_argument("--block-size", type=int, default=256, help=text)
    return parser


def _check(options: argparse.Namespace) -> None:
    check_least(options, max_new_tokens=1, batch_size=1, block_size=1)
    if options.map_size < 16 or options.map_size % 16:
        raise ValueError(f"--map-size {options.map_size}: must be a multiple of 16. Choose 128, for example.")
    if len(set(options.load)) < len(options.load):
        raise ValueError(f"--load {' '.join(options.load)}: a model is named twice. Name each model once.")


def analyse(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Analyse all models; returns the exit status.

    Raises:
        ValueError: a setting or a file is wrong.
    """
    _check(options)
    images = command_line.open_images(options)
    from genlip_megatron.convert.staging import check_target, new_folder
    from genlip_megatron.evaluate import attention_plots as plots
    from genlip_megatron.evaluate.attention_models import (
        Settings,
        check_grids,
        map_image,
        map_layers,
        measure,
        open_subject,
        summarise,
        unify_dtypes,
    )
    from genlip_megatron.infer.load import pick_device

    need("matplotlib")
    check_target(options.output, options.overwrite, foreign)
    subjects = [
        open_subject(
            name,
            device=pick_device(options.device),
            dtype=options.dtype,
            tokenizer=options.tokenizer,
            prompt=options.prompt,
            images=command_line.image_flags(options),
        )
        for name in options.load
    ]
    unify_dtypes(subjects)
    for subject in subjects:
        if subject.loaded is not None:
            map_layers(len(subject.blocks()), options.maps)
    check_grids(subjects, images, options.allow_unequal)
    settings = Settings(options.max_new_tokens, options.exclude_self, options.block_size)
    results: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    with (
        new_folder(options.output, 0, options.overwrite, foreign) as partial,
        command_line.progress_bar(range(len(images) * len(subjects)), "attention") as bar,
    ):
        for number, subject in enumerate(subjects, 1):
            recorders = []
            for image, recorder in measure(subject, images, settings, options.batch_size):
                bar.update()
                if recorder is not None:
                    recorders.append(recorder)
                elif image.name not in failed:
                    failed[image.name] = image.error
                    to_stderr(f"{image.name}: {image.error}")
            if not recorders:
                continue
            results.append(summarise(subject, recorders))
            layers = map_layers(results[-1]["layers"], options.maps)
            recorder = map_image(subject, images, layers, options.map_size) if layers else None
            if recorder is not None and recorder.tokens is not None:
                maps = {layer: values for layer in layers if (values := recorder.layers[layer - 1].map) is not None}
                plots.draw_maps(subject.name, maps, recorder.tokens, partial / f"maps-{number:02}.png")
        if results:
            plots.draw_mass(results, partial / "mass.png")
            plots.draw_allocation(results, partial / "allocation.png")
            plots.draw_extras(results, partial / "extras.png")
        facts = {
            "kind": KIND,
            "files": sorted(path.name for path in partial.iterdir()),
            "command": shlex.join(["tools/attention.py", *words]),
            "versions": _versions(),
            "settings": {name: value for name, value in vars(options).items() if name not in ("output", "overwrite")},
            "failed": failed,
            "models": results,
        }
        text = json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False)
        (partial / INDEX).write_text(text + "\n", encoding="utf-8")
    for result in results:
        print(_line(result))
    print(f"attention of {len(results)} models on {len(images) - len(failed)} images in {options.output}")
    return 0 if results else 1


def _line(result: dict[str, Any]) -> str:
    """Means over layers, as ``key value | key value``."""
    parts = [f"model {result['name']}", f"images {result['images']}"]
    for query, key in (("image", "first"), ("generated", "first"), ("generated", "image"), ("generated", "sink")):
        values = [value for value in result.get("mass", {}).get(query, {}).get(key, []) if value is not None]
        if values:
            parts.append(f"{query}->{key} {sum(values) / len(values):.4f}")
    return " | ".join(parts)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("genlip-megatron", "torch", "transformers", "matplotlib")}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run; user errors end with status 2 and one line."""
    return analyse(build_parser().parse_args(argv), sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    raise SystemExit(main())
