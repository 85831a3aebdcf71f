#!/usr/bin/env python3
"""Extract image features (the output of the final LayerNorm), per patch or averaged, into a folder of arrays.

    tools/extract_features.py photos/ --load runs/so16 --output features
    tools/extract_features.py 'photos/*.jpg' --load exported --pool mean --format npy --output features
    tools/extract_features.py data/val-*.tar --load runs/so16 --image-mode native --max-pixels 262144 --output features

Images are resized as in training, unless --image-mode, --image-size, --min-pixels or --max-pixels say otherwise.
Images of different sizes are packed end to end without padding, up to --max-patches at a time.

The folder's index.json holds the settings and, for each image in the order of the inputs, its path or key, its file,
its first row in that file, its shape, and its grid (rows and columns of patches). Every file holds one array "features"
[rows, hidden size]. For an entry e of the index:

    safetensors:  safe_open(e["file"], "pt").get_slice("features")[e["start"] : e["start"] + e["shape"][0]]
    npy:          np.load(e["file"], mmap_mode="r")[e["start"] : e["start"] + e["shape"][0]]

Images that cannot be used are listed under "failed"; the others are still processed. The folder appears when it is
complete.

Exit status: 0 done, even with some bad images; 1 no image could be used; 2 a setting or a file is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

from genlip_megatron.command import command
from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.infer import command_line


def build_parser() -> StrictParser:
    """The command line."""
    parser = command_line.build_parser("extract_features.py", __doc__ or "", output="features")
    text = "none (default): one vector per patch; mean: one per image"
    parser.add_argument("--pool", choices=("none", "mean"), default="none", help=text)
    parser.add_argument("--format", choices=("safetensors", "npy"), default="safetensors", help="default: safetensors")
    text = "dtype of the files: fp32, fp16, or (safetensors) bf16; default: the model's, in npy fp32 instead of bf16"
    parser.add_argument("--feature-dtype", choices=("fp32", "bf16", "fp16"), help=text)
    parser.add_argument("--max-patches", type=int, default=16384, help="patches per batch (default: 16384)")
    parser.add_argument("--max-file-size", type=float, default=1.0, metavar="GB", help="size of a file (default: 1)")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Extract everything; user errors end with status 2 and one line."""
    options = build_parser().parse_args(argv)
    for flag, value in (("max-patches", options.max_patches), ("max-file-size", options.max_file_size)):
        if not 0 < value < float("inf"):
            raise ValueError(f"--{flag} {value}: must be above 0 and finite")
    if options.format == "npy" and options.feature_dtype == "bf16":
        raise ValueError("--feature-dtype bf16: NumPy has no such type. Use fp32 or fp16, or --format safetensors.")
    images = command_line.open_images(options)
    import torch

    from genlip_megatron.convert.source import DTYPES
    from genlip_megatron.convert.staging import check_target, new_folder
    from genlip_megatron.infer.features import FeatureWriter, features, foreign
    from genlip_megatron.infer.prepare import batches, computed, prepared

    check_target(options.output, options.overwrite, foreign)
    loaded, processor = command_line.load_model(options, encoder_only=True)
    stored = DTYPES[options.feature_dtype] if options.feature_dtype else loaded.model.dtype
    if options.format == "npy" and stored == torch.bfloat16:
        stored = torch.float32
    with (
        new_folder(options.output, 0, options.overwrite, foreign) as partial,
        command_line.progress_bar(images, "features") as bar,
    ):
        writer = FeatureWriter(partial, options.format, stored, int(options.max_file_size * 1e9))
        ready = batches(prepared(images, processor), max_patches=options.max_patches)
        for image, rows in computed(ready, lambda good: features(loaded, good, options.pool == "mean")):
            writer.add(image, rows)
            bar.update()
        sizes = ("size", "fixed_resize") if processor.image_mode == "fixed" else ("min_pixels", "max_pixels")
        facts = {
            "model": str(loaded.place),
            "step": loaded.step,
            "pool": options.pool,
            "dtype": str(stored).removeprefix("torch."),
            "hidden_size": loaded.model.config.hidden_size,
            "images_resized": {name: getattr(processor, name) for name in ("image_mode", *sizes)},
        }
        writer.close(facts)
    failed = len(writer.failed)
    bad = f', {failed} could not be used (see "failed" in its index.json)' if failed else ""
    print(f"features of {len(writer.entries)} images in {options.output}{bad}")
    return 0 if writer.entries else 1


if __name__ == "__main__":
    raise SystemExit(main())
