#!/usr/bin/env python3
"""Caption images with a checkpoint of any layout or an exported Hugging Face folder; one JSON line each.

    tools/caption.py photos/ --load runs/demo --output captions.jsonl
    tools/caption.py 'photos/**/*.jpg' cat.png --load exported --prompt 'Describe the image.' --output captions.jsonl
    tools/caption.py demo/val-00000.tar --load runs/demo --limit 200 --output captions.jsonl

Rows come in the order of the inputs: of files {"path", "caption"}, of samples of shards {"key", "caption", "truth"}.
An image that cannot be used gets a row with "error" instead of "caption" and does not end the run.
Decoding is the paper's unless told otherwise: the likeliest token each time, at most 256 of them, up to the end token.
The output appears when it is complete. It takes the place of earlier captions, but of no other file.

Exit status: 0 done, also with some bad images; 1 not one image could be used; 2 a setting or a file is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genlip_megatron.command import command
from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.optional import need_transformers


def build_parser() -> StrictParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = StrictParser(
        prog="caption.py",
        description=summary,
        epilog=rest,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="images, indexed .tar shards, folders, or globs")
    parser.add_argument("--load", required=True, help="folder of a run, of one checkpoint, or an exported folder")
    parser.add_argument("--output", required=True, type=Path, help="JSONL file to write")
    parser.add_argument("--limit", type=int, default=0, help="caption only the first so many images; 0: all")
    parser.add_argument("--batch-size", type=int, default=50, help="images at a time (default: 50)")
    parser.add_argument("--prompt", help="what captions go on from (default: what the model was trained with)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest caption (default: 256)")
    text = "up to 1e-6 the likeliest token each time (default), above it tokens are drawn"
    parser.add_argument("--temperature", type=float, default=1e-6, help=text)
    text = "draw among the likeliest tokens of this share of the probability (default: 1.0)"
    parser.add_argument("--top-p", type=float, default=1.0, help=text)
    parser.add_argument("--top-k", type=int, default=0, help="draw among so many likeliest tokens (default: 0, all)")
    parser.add_argument("--num-beams", type=int, default=1, help="texts followed at the same time (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--device", default="auto", help="cpu or cuda[:N] (default: auto, the GPU if there is one)")
    text = "auto (default), as the weights are stored, or fp32, bf16, fp16"
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help=text)
    parser.add_argument("--tokenizer", default="", help="the model's tokenizer, if it is not where the run had it")
    parser.add_argument("--token-ids", action="store_true", help="tokens of each caption in its row as well")
    text = "by the Megatron model, without a cache: slow, for comparison"
    parser.add_argument("--recompute", action="store_true", help=text)
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _captioner(options: argparse.Namespace) -> tuple[Any, Any, str]:
    """(captioner, image processor, prompt)."""
    from genlip_megatron.infer.caption import Captioner, Decoding
    from genlip_megatron.infer.load import load, pick_device

    decoding = Decoding(
        options.max_new_tokens,
        options.temperature,
        options.top_p,
        options.top_k,
        options.num_beams,
        options.seed,
    )
    if options.recompute:
        from genlip_megatron.testing.recompute_caption import RecomputingCaptioner

        plain = RecomputingCaptioner(
            options.load, _say, options.prompt, decoding, options.dtype, options.device, options.tokenizer
        )
        return plain, plain.image_processor, plain.prompt
    device = pick_device(options.device)
    loaded = load(options.load, _say, device=device, dtype=options.dtype, tokenizer=options.tokenizer)
    prompt = loaded.prompt if options.prompt is None else options.prompt
    return Captioner(loaded, prompt, decoding), loaded.image_processor, prompt


def caption(options: argparse.Namespace) -> int:
    """Caption everything; returns the exit status.

    Raises:
        ValueError: a user's mistake.
    """
    need_transformers()
    from tqdm import tqdm

    from genlip_megatron.convert.staging import new_file
    from genlip_megatron.infer.inputs import Inputs, check_not_input
    from genlip_megatron.infer.prepare import batches, prepared
    from genlip_megatron.outputs import captions, check_file

    if options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size}: must be at least 1")
    check_not_input(options.output, options.inputs)
    check_file(options.output, captions)
    images = Inputs(options.inputs, options.limit)
    captioner, processor, prompt = _captioner(options)
    failed = 0
    with (
        new_file(options.output, captions) as out,
        tqdm(total=len(images), desc="caption", unit="image", file=sys.stderr) as bar,
    ):
        for batch in batches(prepared(images, processor, prompt), size=options.batch_size):
            good = [image for image in batch if not image.error]
            found = iter(captioner.tokens(good) if good else [])
            for image in batch:
                row: dict[str, Any] = dict(image.name)
                if image.error:
                    row["error"] = image.error
                else:
                    ids = next(found)
                    row["caption"] = captioner.text(ids)
                    if image.truth is not None:
                        row["truth"] = image.truth
                    if options.token_ids:
                        row["token_ids"] = ids
                print(json.dumps(row, ensure_ascii=False), file=out)
            failed += len(batch) - len(good)
            bar.update(len(batch))
    captioner.close()
    bad = f', {failed} images could not be used (see "error" in their rows)' if failed else ""
    print(f"{len(images) - failed} captions in {options.output}{bad}")
    return 1 if failed == len(images) else 0


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run; user errors end with status 2 and one line."""
    parser = build_parser()
    options = parser.parse_strict(sys.argv[1:] if argv is None else argv)
    return caption(options)


if __name__ == "__main__":
    sys.exit(main())
