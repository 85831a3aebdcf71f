"""Check before a run that all shards and indexes exist: one stat per local file, one listing per remote folder.

A shard of a manifest may have been deleted, truncated or replaced since; in training that would cost all its samples.
Only sizes are compared, so a copy with another time stamp passes: each sample's checksum is compared when it is read.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence

from genlip_megatron import storage
from genlip_megatron.data.index import index_path
from genlip_megatron.data.manifest import Shard

_NAMED = 5
# A listing may be incomplete, so this many missing names are asked for one by one before any counts as missing.
_ASKED = 16


def absent(shards: Sequence[Shard], setting: str, remote: bool) -> str:
    """One line about shards that are missing, have no index or changed size since indexing; "" if there are none.

    Args:
        setting: name of the setting, for the message.
        remote: check remote shards too. A store that cannot list its folders is skipped.
    """
    local = [shard for shard in shards if not storage.is_remote(shard.path)]
    faults = list(_local_faults(local))
    if remote:
        faults += _remote_faults([shard for shard in shards if storage.is_remote(shard.path)])
    if not faults:
        return ""
    more = f"; and {len(faults) - _NAMED:,} more" if len(faults) > _NAMED else ""
    return (
        f"{setting}: {len(faults):,} of {len(shards):,} shards cannot be used (seen from {socket.gethostname()}): "
        f"{'; '.join(faults[:_NAMED])}{more}. Restore them, or index the shards to use: python "
        "tools/prepare_data.py SHARDS --tokenizer TOKENIZER"
    )


def _local_faults(shards: Sequence[Shard]) -> Iterator[str]:
    here = storage.states([shard.path for shard in shards])
    indexes = storage.states([index_path(shard.path) for shard in shards])
    for shard, status, index in zip(shards, here, indexes, strict=True):
        yield from _fault(shard, status is not None, status.st_size if status else None, index is not None)


def _remote_faults(shards: Sequence[Shard]) -> Iterator[str]:
    folders: dict[str, list[Shard]] = {}
    for shard in shards:
        folders.setdefault(storage.parent(shard.path), []).append(shard)
    for folder, within in folders.items():
        sizes = storage.sizes_in(folder)
        if sizes is None:
            continue
        names = [(storage.name_in_store(shard.path), storage.name_in_store(index_path(shard.path))) for shard in within]
        missing = [
            path
            for shard, pair in zip(within, names, strict=True)
            for path, name in zip((shard.path, index_path(shard.path)), pair, strict=True)
            if name not in sizes
        ]
        if missing and any(_is_there(path) for path in missing[:_ASKED]):
            continue
        for shard, (name, index) in zip(within, names, strict=True):
            yield from _fault(shard, name in sizes, sizes.get(name), index in sizes)


def _is_there(path: str) -> bool:
    """Whether a remote file exists; True also if the store does not answer."""
    try:
        return storage.exists(path)
    except (OSError, ValueError):
        return True


def _fault(shard: Shard, exists: bool, size: int | None, has_index: bool) -> Iterator[str]:
    if not exists:
        yield f"{shard.path} is missing"
    elif shard.size is not None and size is not None and size != shard.size:
        yield f"{shard.path} has {size:,} bytes, {shard.size:,} when it was indexed"
    elif not has_index:
        yield f"{index_path(shard.path)} is missing"
