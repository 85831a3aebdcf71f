"""Index: a small table beside each shard, ``SHARD.index.safetensors``, with every sample's place and lengths.

With it packing knows every length before any image is read. ``scan.py`` builds it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from genlip_megatron import storage

# Increased when the layout of the table or the rules for good samples change. Training accepts an index of older rules;
# tools/prepare_data.py replaces it.
FORMAT_VERSION, READABLE_FORMATS = 3, (2, 3)
ROW = np.dtype(
    [
        ("image_offset", "<i8"),
        ("caption_offset", "<i8"),
        ("image_size", "<u4"),
        ("caption_size", "<u4"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("text_tokens", "<u2"),
        ("loss_tokens", "<u2"),
        ("image_crc", "<u4"),
        ("caption_crc", "<u4"),
        ("caption_is_json", "?"),
        ("plain_jpeg", "?"),
    ]
)
# What planning needs to know about a sample: 8 bytes.
PLAN_COLUMNS = ["height", "width", "text_tokens", "loss_tokens"]
PLAN_ROW = np.dtype([(name, "<u2") for name in PLAN_COLUMNS])


@dataclass(frozen=True)
class Header:
    """What an index was made from."""

    format: int
    shard_size: int
    shard_stamp: str  # modification time or entity tag
    shard_checksum: str  # 128-bit XXH3
    tokenizer: str  # fingerprint
    prompt: str
    digest: str = ""  # of the table


class Keys(Sequence[str]):
    """Keys of samples in one block of bytes: as Python strings they would need more memory than the table."""

    def __init__(self, block: bytes, ends: np.ndarray) -> None:
        self._block, self._ends = block, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        return self._block[self._ends[i - 1] if i else 0 : self._ends[i]].decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class ShardIndex:
    """One shard's good samples in order, and its refused ones with the reasons."""

    shard: str
    rows: np.ndarray  # ROW [samples]
    keys: Sequence[str]
    refused: dict[str, str]  # key -> reason
    header: Header
    ignored: dict[str, int] = field(default_factory=dict)  # kind of member that is not a sample -> count

    def plan_rows(self) -> np.ndarray:
        """PLAN_ROW [samples]."""
        plan = np.empty(len(self.rows), PLAN_ROW)
        for name in PLAN_COLUMNS:
            plan[name] = self.rows[name]
        return plan


def index_path(shard: str) -> str:
    """Path of a shard's index."""
    return f"{shard}.index.safetensors"


def write_index(index: ShardIndex) -> ShardIndex:
    """Write an index beside its shard; returns it with its digest."""
    keys = [key.encode("utf-8", "surrogateescape") for key in index.keys]
    parts = {
        "rows": index.rows.tobytes(),
        "keys": b"".join(keys),
        "key_ends": np.cumsum([len(key) for key in keys], dtype=np.int64).tobytes(),
        "refused": json.dumps(index.refused).encode(),
        "ignored": json.dumps(index.ignored).encode(),
    }
    header = dataclasses.replace(index.header, digest=_digest(parts))
    tensors = {name: np.frombuffer(part, np.uint8) for name, part in parts.items()}
    fields = json.dumps(dataclasses.asdict(header))
    # The digest covers only the table: a copy of a shard with another time stamp is still the same data.
    text = json.dumps({"fields": fields, "sha256": hashlib.sha256(fields.encode()).hexdigest()})
    storage.write_bytes(index_path(index.shard), save(tensors, {"header": text}))
    return dataclasses.replace(index, header=header)


def _digest(parts: dict[str, bytes]) -> str:
    return hashlib.sha256(b"".join(parts[name] for name in ("rows", "keys", "key_ends", "refused"))).hexdigest()


def read_index(shard: str) -> ShardIndex:
    """The index beside a shard, of any tokenizer and prompt.

    Raises:
        ValueError: it is missing, damaged, or of another format.
    """
    path = index_path(shard)
    remedy = f"run: python tools/prepare_data.py {shard} --tokenizer TOKENIZER"
    try:
        content = storage.read_bytes(path)
    except FileNotFoundError:
        raise ValueError(f"{shard} has no index; {remedy}") from None
    try:
        length = int.from_bytes(content[:8], "little")
        text = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["header"])
        header = Header(**json.loads(text["fields"]))
        parts = {name: tensor.tobytes() for name, tensor in load(content).items()}
        same = hashlib.sha256(text["fields"].encode()).hexdigest() == text["sha256"]
        if _digest(parts) != header.digest or not same:
            raise ValueError("its checksum is wrong")
        refused = json.loads(parts["refused"])
        ignored = json.loads(parts.get("ignored", b"{}"))
    except Exception as error:  # the remedy is always the same
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
    if header.format not in READABLE_FORMATS:
        raise ValueError(f"{path} has format {header.format}, this version reads {READABLE_FORMATS}; {remedy}")
    keys = Keys(parts["keys"], np.frombuffer(parts["key_ends"], np.int64))
    return ShardIndex(shard, np.frombuffer(parts["rows"], ROW), keys, refused, header, ignored)


# Earlier versions indexed a file that is not a tar as a shard without samples, with this refusal or none.
_OLD_REFUSALS = {"(byte 0)"}


def load_index(shard: str, fingerprint: str, prompt: str) -> ShardIndex:
    """The index of a shard, for a tokenizer's fingerprint and a prompt.

    Raises:
        ValueError: it is missing, damaged, or does not fit the shard's size, the tokenizer or the prompt.
    """
    index = read_index(shard)
    header, path = index.header, index_path(shard)
    remedy = f"run: python tools/prepare_data.py {shard} --tokenizer TOKENIZER"
    if not storage.is_remote(shard) and header.shard_size != storage.state(shard)[0]:
        raise ValueError(f"{path} is older than its shard, whose size changed; {remedy}")
    if header.tokenizer != fingerprint:
        raise ValueError(f"{path} was made with another tokenizer; {remedy}")
    if header.prompt != prompt:
        raise ValueError(f"{path} was made with another prompt than data.prompt = {prompt!r}; {remedy}")
    if header.shard_size and not len(index.rows) and not index.refused.keys() - _OLD_REFUSALS:
        raise ValueError(f"{shard} may not be a tar file: an older version indexed it without samples; {remedy}")
    return index
