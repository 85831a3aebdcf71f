#!/usr/bin/env python3
"""What each patch of an image reads as: the likeliest tokens of the LM head on its features.

    tools/patch_readout.py cat.jpg --load runs/so16 --output readout
    tools/patch_readout.py data/val-00000.tar --limit 8 --load exported --top 3 --output readout

For every image a picture NAME.png with the tokens written over the patches, the likeliest on top in yellow, and
NAME.json with {"path" or "key", "grid", "patches": [{"row", "column", "tokens": [{"id", "text", "probability"}]}]}.
Text written in letters that Pillow's font lacks needs --font. index.json lists the files. The folder appears when
it is complete; an image that cannot be used is told and passed over.

Exit status: 0 done, also with some bad images; 1 not one image could be used; 2 a setting or a file is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from genlip_megatron.command import command
from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.optional import need_transformers
from genlip_megatron.outputs import first_other

# By which --overwrite knows a folder of readouts.
INDEX, KIND = "index.json", "genlip patch readouts"


def build_parser() -> StrictParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = StrictParser(
        prog="patch_readout.py",
        description=summary,
        epilog=rest,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="images, indexed .tar shards, folders, or globs")
    parser.add_argument("--load", required=True, help="folder of a run, of one checkpoint, or an exported folder")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace readouts that are there")
    parser.add_argument("--limit", type=int, default=0, help="only the first so many images; 0: all")
    parser.add_argument("--top", type=int, default=5, help="tokens of each patch, 1 to 5 (default: 5)")
    parser.add_argument("--font", default="", help="TrueType or OpenType file for scripts other than Latin")
    parser.add_argument("--image-mode", choices=("fixed", "native"), help="default: as the model was trained")
    parser.add_argument("--image-size", type=int, help="side in pixels, a multiple of 16, of fixed images")
    parser.add_argument("--max-pixels", type=int, help="largest area of native images")
    parser.add_argument("--device", default="auto", help="cpu or cuda[:N] (default: auto, the GPU if there is one)")
    text = "auto (default), as the weights are stored, or fp32, bf16, fp16"
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help=text)
    parser.add_argument("--tokenizer", default="", help="the model's tokenizer, if it is not where the run had it")
    return parser


def foreign(folder: Path) -> str:
    """What a folder holds that is no readout, as its index names them; "" when there is nothing such."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        names = set(index["files"]) if index["kind"] == KIND else None
    except (OSError, ValueError, TypeError, KeyError):
        names = None
    if names is None:
        return f"no {INDEX} of readouts"
    return first_other(folder, lambda path: path in (INDEX, *names))


def file_name(name: str, number: int) -> str:
    """Of an image's files: its place among the inputs, which tells images of one name apart, and its name.

    >>> file_name("photos/my cat.jpg", 3)
    '00003-my_cat'
    """
    return f"{number:05}-{re.sub('[^A-Za-z0-9._-]', '_', Path(name).stem)[:100]}"


def write_readouts(options: argparse.Namespace) -> int:
    """Read out everything; returns the exit status.

    Raises:
        ValueError: a user's mistake.
    """
    need_transformers()
    from tqdm import tqdm

    from genlip_megatron.convert.staging import check_target, new_folder
    from genlip_megatron.infer.features import NOT_FINITE
    from genlip_megatron.infer.inputs import Inputs
    from genlip_megatron.infer.load import load, override_images, pick_device
    from genlip_megatron.infer.prepare import prepared
    from genlip_megatron.infer.readout import as_json, check_font, picture, readout

    if not 1 <= options.top <= 5:
        raise ValueError(f"--top {options.top}: must be from 1 to 5, which is what fits a patch")
    check_font(options.font)
    check_target(options.output, options.overwrite, foreign)
    images = Inputs(options.inputs, options.limit)
    device = pick_device(options.device)
    loaded = load(
        options.load,
        lambda text: print(text, file=sys.stderr),
        device=device,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
    )
    processor = override_images(
        loaded.image_processor, options.image_mode, options.image_size, max_pixels=options.max_pixels
    )
    failed = 0
    files: list[str] = []
    with (
        new_folder(options.output, 0, options.overwrite, foreign) as partial,
        tqdm(total=len(images), desc="readout", unit="image", file=sys.stderr) as bar,
    ):
        for image in prepared(images, processor):
            bar.update()
            (name,) = image.name.values()
            tokens = [] if image.error else readout(loaded, image, options.top)
            if not tokens:
                failed += 1
                print(f"{name}: {image.error or NOT_FINITE}", file=sys.stderr)
                continue
            target = partial / file_name(name, image.number)
            picture(image, tokens, options.font).save(f"{target}.png")
            text = json.dumps(as_json(image, tokens), ensure_ascii=False, allow_nan=False)
            Path(f"{target}.json").write_text(text + "\n", encoding="utf-8")
            files += [f"{target.name}.png", f"{target.name}.json"]
        index = json.dumps({"kind": KIND, "files": files}, indent=1)
        (partial / INDEX).write_text(index + "\n", encoding="utf-8")
    print(f"readouts of {len(images) - failed} images in {options.output}")
    return 1 if failed == len(images) else 0


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run; user errors end with status 2 and one line."""
    parser = build_parser()
    options = parser.parse_strict(sys.argv[1:] if argv is None else argv)
    return write_readouts(options)


if __name__ == "__main__":
    sys.exit(main())
