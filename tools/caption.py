#!/usr/bin/env python3
"""Caption the samples of shards with a checkpoint of any layout; one JSON line each.

tools/caption.py demo/val-00000.tar --load runs/demo --limit 200 --output captions.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path


def main() -> int:
    """Load the checkpoint on this process and caption."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", nargs="+", help="indexed .tar shards, folders of them, or globs")
    parser.add_argument("--load", required=True, help="checkpoint folder of a run, or one step's folder in it")
    parser.add_argument("--output", required=True, help="JSONL file to write")
    parser.add_argument("--limit", type=int, default=0, help="caption only the first so many samples; 0: all")
    parser.add_argument("--batch-size", type=int, default=50, help="samples a forward pass (default: 50)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest caption (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token each time (default)")
    options = parser.parse_args()

    from genlip_megatron import host

    host.install()
    from tqdm import tqdm

    from genlip_megatron.checkpoint import loading
    from genlip_megatron.config import ONE_RANK, override
    from genlip_megatron.data.loader import Loader
    from genlip_megatron.infer.generate import generate
    from genlip_megatron.model.genlip import build_model
    from genlip_megatron.model.specs import transformer_config
    from genlip_megatron.parallel import groups

    try:
        found = loading.find(options.load, True, lambda text: print(text, file=sys.stderr))
        if found is None:
            raise ValueError(f"--load {options.load}: no checkpoint there (no folder iter_NNNNNNN)")
        config = override(
            loading.read_config(found[0]),
            {"data.valid_data": options.shards, **ONE_RANK},
        )
        os.environ.setdefault("MASTER_PORT", "29511")
        groups.initialize(config)
        loader = Loader(config, "valid")
        model = build_model(config, transformer_config(config))
        loading.load_weights(found[0], list(model))
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    count = min(options.limit or len(loader), len(loader))
    target = Path(options.output)
    partial = target.with_name(f".{target.name}.partial")
    with open(partial, "w") as out:
        for first in tqdm(range(0, count, options.batch_size), desc="caption", unit="batch", file=sys.stderr):
            samples = range(first, min(first + options.batch_size, count))
            requests, truths = loader.requests(samples)
            tokens = generate(
                list(model), requests, loader.tokenizer.closing_ids[:1], options.max_new_tokens, options.temperature
            )
            for sample, truth, ids in zip(samples, truths, tokens, strict=True):
                row = {
                    "key": loader.samples.key(sample),
                    "caption": loader.tokenizer.decode(ids).strip(),
                    "truth": truth,
                }
                print(json.dumps(row, ensure_ascii=False), file=out)
    os.replace(partial, target)
    print(f"{count} captions in {target}")
    loader.close()
    groups.finalize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
