#!/usr/bin/env python3
"""Caption images with a checkpoint of any layout or an exported Hugging Face folder; one JSON line per image.

    tools/caption.py photos/ --load runs/demo --output captions.jsonl
    tools/caption.py 'photos/**/*.jpg' cat.png --load exported --prompt 'Describe the image.' --output captions.jsonl
    tools/caption.py demo/val-00000.tar --load runs/demo --limit 200 --output captions.jsonl

Rows keep the order of the inputs: {"path", "caption"} for files, {"key", "caption", "truth"} for samples of shards.
An image that cannot be used gets a row with "error" instead of "caption"; the others are still captioned.
Images are resized as in training, unless --image-mode, --image-size, --min-pixels or --max-pixels say otherwise.
By default decoding follows the paper: greedy, at most 256 tokens, up to the end token.
The output file appears when it is complete. It replaces earlier captions, but no other file.

Exit status: 0 done, even with some bad images; 1 no image could be used; 2 a setting or a file is wrong.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from genlip_megatron.command import command
from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.infer import command_line
from genlip_megatron.log import to_stderr


def build_parser() -> StrictParser:
    """The command line."""
    parser = command_line.build_parser("caption.py", __doc__ or "")
    command_line.add_tokenizer(parser)
    parser.add_argument("--batch-size", type=int, default=50, help="images per batch (default: 50)")
    parser.add_argument("--prompt", help="text before each caption (default: the prompt of the training)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="most tokens of a caption (default: 256)")
    text = "1e-6 (default) or less: greedy decoding; above: sampling"
    parser.add_argument("--temperature", type=float, default=1e-6, help=text)
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default: 1.0, off)")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the K likeliest tokens (default: 0, all)")
    parser.add_argument("--num-beams", type=int, default=1, help="beams (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    parser.add_argument("--token-ids", action="store_true", help="add each caption's token ids to its row")
    text = "use the Megatron model without a key-value cache: slow, for comparison"
    parser.add_argument("--recompute", action="store_true", help=text)
    return parser


def _captioner(options: argparse.Namespace) -> tuple[Any, Any, str]:
    """(captioner, image processor, prompt)."""
    from genlip_megatron.infer.caption import Captioner, Decoding

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "num_beams", "seed")
    decoding = Decoding(**{name: getattr(options, name) for name in names})
    if options.recompute:
        from genlip_megatron.infer.load import override_images
        from genlip_megatron.testing.recompute_caption import RecomputingCaptioner

        plain = RecomputingCaptioner(
            options.load, to_stderr, options.prompt, decoding, options.dtype, options.device, options.tokenizer
        )
        processor = override_images(plain.image_processor, command_line.image_flags(options))
        return plain, processor, plain.prompt
    loaded, processor = command_line.load_model(options)
    prompt = loaded.prompt if options.prompt is None else options.prompt
    return Captioner(loaded, prompt, decoding), processor, prompt


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Caption everything; user errors end with status 2 and one line."""
    options = build_parser().parse_args(argv)
    if options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size}: must be at least 1")
    images = command_line.open_images(options)
    from genlip_megatron.convert.staging import new_file
    from genlip_megatron.infer.inputs import check_not_input
    from genlip_megatron.infer.prepare import batches, computed, prepared
    from genlip_megatron.outputs import captions, check_file

    check_not_input(options.output, options.inputs)
    check_file(options.output, captions)
    captioner, processor, prompt = _captioner(options)
    failed = 0
    with new_file(options.output, captions) as out, command_line.progress_bar(images, "caption") as bar:
        ready = batches(prepared(images, processor, prompt), size=options.batch_size)
        for image, ids in computed(ready, captioner.tokens):
            row: dict[str, Any] = dict(image.name)
            if ids is None:
                row["error"] = image.error
                failed += 1
            else:
                row["caption"] = captioner.text(ids)
                if image.truth is not None:
                    row["truth"] = image.truth
                if options.token_ids:
                    row["token_ids"] = ids
            print(json.dumps(row, ensure_ascii=False), file=out)
            bar.update()
    captioner.close()
    bad = f', {failed} images could not be used (see "error" in their rows)' if failed else ""
    print(f"{len(images) - failed} captions in {options.output}{bad}")
    return 1 if failed == len(images) else 0


if __name__ == "__main__":
    raise SystemExit(main())
