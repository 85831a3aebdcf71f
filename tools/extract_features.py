#!/usr/bin/env python3
"""Features of images (the output of the final LayerNorm), of every patch or their mean, into a folder of arrays.

    tools/extract_features.py photos/ --load runs/so16 --output features
    tools/extract_features.py 'photos/*.jpg' --load exported --pool mean --format npy --output features
    tools/extract_features.py data/val-*.tar --load runs/so16 --image-mode native --max-pixels 262144 --output features

Images are resized as the model was trained to see them, or as --image-mode, --image-size, --min-pixels and
--max-pixels say. Images of different sizes are packed end to end, up to --max-patches at a time, and nothing is padded.

The folder has an index.json: settings, and for each image, in the order of the inputs, its path or key, the file that
it is in, its first row there, its shape and its grid (rows and columns of patches). Every file holds one array
"features" [rows, hidden size]. With  e  an entry of the index:

    safetensors:  safe_open(e["file"], "pt").get_slice("features")[e["start"] : e["start"] + e["shape"][0]]
    npy:          np.load(e["file"], mmap_mode="r")[e["start"] : e["start"] + e["shape"][0]]

An image that cannot be used is listed under "failed" and does not end the run. The folder appears when it is complete.

Exit status: 0 done, also with some bad images; 1 not one image could be used; 2 a setting or a file is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from genlip_megatron.command import command
from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.optional import need_transformers


def build_parser() -> StrictParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = StrictParser(
        prog="extract_features.py",
        description=summary,
        epilog=rest,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="images, indexed .tar shards, folders, or globs")
    parser.add_argument("--load", required=True, help="folder of a run, of one checkpoint, or an exported folder")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace features that are there")
    parser.add_argument("--limit", type=int, default=0, help="only the first so many images; 0: all")
    text = "none (default): of every patch; mean: over each image's patches"
    parser.add_argument("--pool", choices=("none", "mean"), default="none", help=text)
    parser.add_argument("--format", choices=("safetensors", "npy"), default="safetensors", help="default: safetensors")
    text = "of the files: fp32, fp16, or in safetensors bf16 (default: that of the model, in npy fp32 for bf16)"
    parser.add_argument("--feature-dtype", choices=("fp32", "bf16", "fp16"), help=text)
    parser.add_argument("--max-patches", type=int, default=16384, help="patches at a time (default: 16384)")
    parser.add_argument("--max-file-size", type=float, default=1.0, metavar="GB", help="of one file (default: 1)")
    parser.add_argument("--image-mode", choices=("fixed", "native"), help="default: as the model was trained")
    parser.add_argument("--image-size", type=int, help="side in pixels, a multiple of 16, of fixed images")
    parser.add_argument("--min-pixels", type=int, help="smallest area of native images")
    parser.add_argument("--max-pixels", type=int, help="largest area of native images")
    parser.add_argument("--device", default="auto", help="cpu or cuda[:N] (default: auto, the GPU if there is one)")
    text = "of the computation: auto (default), as the weights are stored, or fp32, bf16, fp16"
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help=text)
    return parser


def extract(options: argparse.Namespace) -> int:
    """Extract everything; returns the exit status.

    Raises:
        ValueError: a user's mistake.
    """
    need_transformers()
    import torch
    from tqdm import tqdm

    from genlip_megatron.convert.source import DTYPES
    from genlip_megatron.convert.staging import check_target, new_folder
    from genlip_megatron.infer.features import FeatureWriter, foreign
    from genlip_megatron.infer.features import extract as run
    from genlip_megatron.infer.inputs import Inputs
    from genlip_megatron.infer.load import load, override_images, pick_device
    from genlip_megatron.infer.prepare import batches, prepared

    for flag, value in (("max-patches", options.max_patches), ("max-file-size", options.max_file_size)):
        if not 0 < value < float("inf"):
            raise ValueError(f"--{flag} {value}: must be above 0 and finite")
    if options.format == "npy" and options.feature_dtype == "bf16":
        raise ValueError("--feature-dtype bf16: NumPy has no such type; use fp32 or fp16, or --format safetensors")
    check_target(options.output, options.overwrite, foreign)
    images = Inputs(options.inputs, options.limit)
    device = pick_device(options.device)
    loaded = load(
        options.load, lambda text: print(text, file=sys.stderr), encoder_only=True, device=device, dtype=options.dtype
    )
    processor = override_images(
        loaded.image_processor, options.image_mode, options.image_size, options.min_pixels, options.max_pixels
    )
    stored = DTYPES[options.feature_dtype] if options.feature_dtype else loaded.model.dtype
    if options.format == "npy" and stored == torch.bfloat16:
        stored = torch.float32
    with (
        new_folder(options.output, 0, options.overwrite, foreign) as partial,
        tqdm(total=len(images), desc="features", unit="image", file=sys.stderr) as bar,
    ):
        writer = FeatureWriter(partial, options.format, stored, int(options.max_file_size * 1e9))
        ready = batches(prepared(images, processor), max_patches=options.max_patches)
        for done in run(loaded, ready, writer, options.pool == "mean"):
            bar.update(done)
        facts = {
            "model": str(loaded.place),
            "step": loaded.step,
            "pool": options.pool,
            "dtype": str(stored).removeprefix("torch."),
            "hidden_size": loaded.model.config.hidden_size,
            "images_resized": {
                "image_mode": processor.image_mode,
                **(
                    {"size": processor.size, "fixed_resize": processor.fixed_resize}
                    if processor.image_mode == "fixed"
                    else {"min_pixels": processor.min_pixels, "max_pixels": processor.max_pixels}
                ),
            },
        }
        writer.close(facts)
    failed = len(writer.failed)
    bad = f', {failed} could not be used (see "failed" in its index.json)' if failed else ""
    print(f"features of {len(writer.entries)} images in {options.output}{bad}")
    return 0 if writer.entries else 1


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run; user errors end with status 2 and one line."""
    parser = build_parser()
    options = parser.parse_strict(sys.argv[1:] if argv is None else argv)
    return extract(options)


if __name__ == "__main__":
    sys.exit(main())
