#!/usr/bin/env python3
"""Caption the images of a .tar shard with an exported folder, by plain transformers: nothing of this project is used.

    python -I tools/caption_exported.py exported val-00000.tar --limit 16 --output captions.jsonl

One line {"key", "caption", "token_ids"} for each image, in the order of the shard. It is how ``make demo`` shows that
an exported folder stands alone, and an example of how one is used: copy it anywhere.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import signal
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What is not there cannot be used by mistake: importing it fails from here on.
sys.modules["genlip_megatron"] = None  # type: ignore[assignment]
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C has nothing to clean up

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoModelForCausalLM, AutoProcessor  # noqa: E402

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"}


def images_of(shard: str) -> Iterator[tuple[str, Image.Image]]:
    """(key, image) of each sample."""
    with tarfile.open(shard) as members:
        for member in members:
            content = members.extractfile(member)
            if content is not None and Path(member.name).suffix.lower() in SUFFIXES:
                yield str(Path(member.name).with_suffix("")), Image.open(io.BytesIO(content.read()))


def is_own(file: Path) -> bool:
    """Whether a file holds captions as this command writes them."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return all(row.keys() == {"key", "caption", "token_ids"} for row in rows)
    except (OSError, ValueError, AttributeError):
        return False


@torch.inference_mode()
def main() -> None:
    """Caption and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="exported by tools/convert_checkpoint.py to-hf, or its name on the Hub")
    parser.add_argument("shard", help=".tar with images")
    parser.add_argument("--output", required=True, type=Path, help="JSONL file to write")
    parser.add_argument("--limit", type=int, default=16, help="only the first so many images (default: 16)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest caption (default: 256)")
    options = parser.parse_args()
    if options.limit < 1:
        parser.error(f"--limit {options.limit}: must be at least 1")
    if options.output.exists() and not is_own(options.output):
        parser.error(f"--output {options.output}: it exists, and this command did not write it; name another file")
    try:
        found_images = list(itertools.islice(images_of(options.shard), options.limit))
    except (OSError, tarfile.TarError) as error:
        parser.error(f"{options.shard}: cannot be read: {' '.join(str(error).split())}")
    if not found_images:
        parser.error(f"{options.shard}: no image there; expected {', '.join(sorted(SUFFIXES))}")
    try:
        # In float32 on the CPU, where captions can be compared with another program's token by token.
        model: Any = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32, trust_remote_code=True)
        processor: Any = AutoProcessor.from_pretrained(options.folder, trust_remote_code=True)
    except (OSError, ValueError) as error:
        parser.error(f"{options.folder}: no model can be loaded from it: {' '.join(str(error).split())}")
    model.eval()
    keys, images = zip(*found_images, strict=True)
    inputs = processor(images=list(images)).to(model.device, model.dtype)
    tokens = model.generate(**inputs, max_new_tokens=options.max_new_tokens)
    found, end = tokens[:, inputs["input_ids"].shape[1] :].tolist(), processor.tokenizer.eos_token_id
    rows = (
        {"key": key, "caption": text.strip(), "token_ids": ids[: ids.index(end)] if end in ids else ids}
        for key, text, ids in zip(keys, processor.batch_decode(found), found, strict=True)
    )
    options.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(keys)} captions by plain transformers in {options.output}")


if __name__ == "__main__":
    main()
