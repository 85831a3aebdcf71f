"""Whether a run validates on images that it trains on; looked for once at the start.

A shard of both splits is found by its index's digest. Images are compared by the checksum and size that their indexes
hold, so no image is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from genlip_megatron import storage
from genlip_megatron.data.dataset import Dataset
from genlip_megatron.data.index import read_index
from genlip_megatron.data.manifest import Shard

# Samples of a split whose images are compared. In a larger split evenly spaced shards are read.
_COMPARED = 1_000_000


def shared_images(train: Sequence[Dataset], valid: Sequence[Dataset]) -> str:
    """One line about validation images that are also in the training data; "" if none is found.

    Remote indexes are not read: of remote shards only those of both splits are found.
    """
    train_shards = [shard for dataset in train for shard in dataset.shards]
    valid_shards = [shard for dataset in valid for shard in dataset.shards]
    digests = {shard.digest for shard in train_shards}
    known = [shard for shard in valid_shards if shard.digest in digests]
    shared = sum(shard.samples for shard in known)
    where = known[0].path if shared else ""
    rest = [shard for shard in valid_shards if shard.digest not in digests]
    if rest:
        trained = np.concatenate([np.empty(0, np.uint64), *(images for _, images in _images(train_shards))])
        for shard, images in _images(rest):
            if count := int(np.isin(images, trained).sum()):
                shared, where = shared + count, where or shard.path
    if not shared:
        return ""
    return (
        f"{shared:,} of {sum(shard.samples for shard in valid_shards):,} validation images are also training images "
        f"(the first in {where}), so the validation loss does not measure unseen images. Split the data by "
        "tools/make_shards.py --val-fraction"
    )


def _images(shards: Sequence[Shard]) -> Iterator[tuple[Shard, np.ndarray]]:
    """(shard, uint64 [samples] of checksum and size of each image), of at most about _COMPARED samples."""
    local = [shard for shard in shards if shard.samples and not storage.is_remote(shard.path)]
    step = -(-sum(shard.samples for shard in local) // _COMPARED)
    for shard in local[:: max(step, 1)]:
        try:
            rows = read_index(shard.path).rows
        except (ValueError, OSError):
            continue  # in training its samples are bad ones, and are reported
        yield shard, rows["image_crc"].astype(np.uint64) << np.uint64(32) | rows["image_size"]
