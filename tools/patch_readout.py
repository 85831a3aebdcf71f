#!/usr/bin/env python3
"""Show what each patch of an image reads as: the likeliest tokens of the LM head on the patch's features.

    tools/patch_readout.py cat.jpg --load runs/so16 --output readout
    tools/patch_readout.py data/val-00000.tar --limit 8 --load exported --top 3 --output readout

For every image the folder gets a picture NAME.png with the tokens written over the patches, the likeliest on top in
yellow, and NAME.json with {"path" or "key", "grid", "patches": [{"row", "column", "tokens": [{"id", "text",
"probability"}]}]}. index.json lists the files. Scripts that Pillow's font lacks need --font. The folder appears when
it is complete; an image that cannot be used is reported on standard error and skipped.

Exit status: 0 done, even with some bad images; 1 no image could be used; 2 a setting or a file is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from genlip_megatron.command import command
from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.infer import command_line
from genlip_megatron.log import to_stderr
from genlip_megatron.outputs import first_unlisted

# --overwrite recognises a folder of readouts by these.
INDEX, KIND = "index.json", "genlip patch readouts"
foreign = partial(first_unlisted, index=INDEX, kind=KIND)


def build_parser() -> StrictParser:
    """The command line."""
    parser = command_line.build_parser("patch_readout.py", __doc__ or "", output="readouts")
    command_line.add_tokenizer(parser)
    parser.add_argument("--top", type=int, default=5, help="tokens per patch, 1 to 5 (default: 5)")
    parser.add_argument("--font", default="", help="TrueType or OpenType file for scripts other than Latin")
    return parser


def file_name(name: str, number: int) -> str:
    """Stem of an image's files: its number among the inputs, which keeps equal names apart, and its name.

    >>> file_name("photos/my cat.jpg", 3)
    '00003-my_cat'
    """
    return f"{number:05}-{re.sub('[^A-Za-z0-9._-]', '_', Path(name).stem)[:100]}"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write all readouts; user errors end with status 2 and one line."""
    options = build_parser().parse_args(argv)
    if not 1 <= options.top <= 5:
        raise ValueError(f"--top {options.top}: must be from 1 to 5, which is what fits a patch")
    images = command_line.open_images(options)
    from genlip_megatron.convert.staging import check_target, new_folder
    from genlip_megatron.infer.features import NOT_FINITE
    from genlip_megatron.infer.prepare import prepared
    from genlip_megatron.infer.readout import as_json, load_fonts, picture, readout

    fonts = load_fonts(options.font)
    check_target(options.output, options.overwrite, foreign)
    loaded, processor = command_line.load_model(options)
    failed = 0
    files: list[str] = []
    with (
        new_folder(options.output, 0, options.overwrite, foreign) as partial,
        command_line.progress_bar(images, "readout") as bar,
    ):
        for image in prepared(images, processor):
            bar.update()
            (name,) = image.name.values()
            tokens = [] if image.error else readout(loaded, image, options.top)
            if not tokens:
                failed += 1
                to_stderr(f"{name}: {image.error or NOT_FINITE}")
                continue
            target = partial / file_name(name, image.number)
            picture(image, tokens, fonts).save(f"{target}.png")
            text = json.dumps(as_json(image, tokens), ensure_ascii=False, allow_nan=False)
            Path(f"{target}.json").write_text(text + "\n", encoding="utf-8")
            files += [f"{target.name}.png", f"{target.name}.json"]
        index = json.dumps({"kind": KIND, "files": files}, indent=1)
        (partial / INDEX).write_text(index + "\n", encoding="utf-8")
    print(f"readouts of {len(images) - failed} images in {options.output}")
    return 1 if failed == len(images) else 0


if __name__ == "__main__":
    raise SystemExit(main())
