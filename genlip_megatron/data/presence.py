"""Check before a run that all shards and indexes exist: one stat per local file, one listing per remote folder.

A shard of a manifest may have been deleted, truncated or replaced since; in training that would cost all its samples.
Only sizes are compared, so a copy with another time stamp passes: each sample's checksum is compared when it is read.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

from genlip_megatron import storage
from genlip_megatron.data.index import index_path
from genlip_megatron.data.manifest import Shard

Sizes = dict[str, int | None]  # path -> bytes, None if the store does not tell, or _MISSING
_MISSING = -1
_NAMED = 5
# A listing may be incomplete, so this many missing names are asked for one by one before any counts as missing.
_ASKED = 16


def absent(shards: Sequence[Shard], setting: str, remote: bool) -> str:
    """One line about shards that are missing, have no index or changed size since indexing; "" if there are none.

    Args:
        setting: name of the setting, for the message.
        remote: check remote shards too. A store that cannot list its folders is skipped.
    """
    sizes = _local_sizes([shard for shard in shards if not storage.is_remote(shard.path)])
    if remote:
        sizes |= _remote_sizes([shard for shard in shards if storage.is_remote(shard.path)])
    faults = [fault for shard in shards if shard.path in sizes and (fault := _fault(shard, sizes))]
    if not faults:
        return ""
    more = f"; and {len(faults) - _NAMED:,} more" if len(faults) > _NAMED else ""
    return (
        f"{setting}: {len(faults):,} of {len(shards):,} shards cannot be used (seen from {socket.gethostname()}): "
        f"{'; '.join(faults[:_NAMED])}{more}. Restore them, or index the shards to use: python "
        "tools/prepare_data.py SHARDS --tokenizer TOKENIZER"
    )


def _local_sizes(shards: Sequence[Shard]) -> Sizes:
    paths = [path for shard in shards for path in (shard.path, index_path(shard.path))]
    states = zip(paths, storage.states(paths), strict=True)
    return {path: _MISSING if status is None else status.st_size for path, status in states}


def _remote_sizes(shards: Sequence[Shard]) -> Sizes:
    folders: dict[str, list[str]] = {}
    for shard in shards:
        folders.setdefault(storage.parent(shard.path), []).extend((shard.path, index_path(shard.path)))
    found: Sizes = {}
    for folder, paths in folders.items():
        listed = storage.sizes_in(folder)
        if listed is None:
            continue
        sizes = {path: listed.get(storage.name_in_store(path), _MISSING) for path in paths}
        missing = [path for path in paths if sizes[path] == _MISSING]
        if not any(_is_there(path) for path in missing[:_ASKED]):
            found |= sizes
    return found


def _is_there(path: str) -> bool:
    """Whether a remote file exists; True also if the store does not answer."""
    try:
        return storage.exists(path)
    except (OSError, ValueError):
        return True


def _fault(shard: Shard, sizes: Sizes) -> str:
    size = sizes[shard.path]
    if size == _MISSING:
        return f"{shard.path} is missing"
    if shard.size is not None and size is not None and size != shard.size:
        return f"{shard.path} has {size:,} bytes, {shard.size:,} when it was indexed"
    return f"{index_path(shard.path)} is missing" if sizes[index_path(shard.path)] == _MISSING else ""
