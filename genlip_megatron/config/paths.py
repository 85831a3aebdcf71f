"""Comma-separated lists of paths, whose entries may contain commas."""

from __future__ import annotations

import glob
import itertools
import os
import re

from braceexpand import braceexpand

_URL = re.compile(r"[a-z0-9+.-]+://")
_LONGEST_PATH = 4096


def split_paths(text: str) -> list[str]:
    """The entries of a comma-separated list of paths, URLs, globs and brace lists.

    A comma belongs to an entry inside braces, and where the joined path exists or the joined glob matches. In a URL it
    belongs to the entry unless the next piece looks like a path or exists. A missing file with a comma in its name
    counts as two entries.

    >>> split_paths("a.tar,x-{000,007}.tar,s3://bucket/b.tar")
    ['a.tar', 'x-{000,007}.tar', 's3://bucket/b.tar']
    """
    entries, pieces = [], text.split(",")
    while pieces:
        count = _pieces_of_first(pieces)
        entries.append(",".join(pieces[:count]))
        del pieces[:count]
    return [entry for entry in entries if entry]


def _pieces_of_first(pieces: list[str]) -> int:
    """Number of pieces, split at commas, that form the first entry."""
    depth = itertools.accumulate(piece.count("{") - piece.count("}") for piece in pieces)
    shortest = next((count for count, braces in enumerate(depth, 1) if not braces), 1)
    joined = {shortest: ",".join(pieces[:shortest])}
    for count in range(shortest + 1, len(pieces) + 1):
        if len(joined[count - 1]) > _LONGEST_PATH:
            break
        joined[count] = f"{joined[count - 1]},{pieces[count - 1]}"
    if _URL.match(pieces[0]):
        for count in list(joined)[:-1]:
            following = pieces[count]
            complete = joined[count].endswith((".tar", ".json")) or following.startswith("/") or _URL.match(following)
            if complete or not following or _matches(following):
                return count
        return max(joined)
    exists = (count for count in sorted(joined, reverse=True) if os.path.lexists(joined[count]))
    matches = (count for count, path in joined.items() if len(joined) > 1 and _matches(path))
    return next(itertools.chain(exists, matches), shortest)


def _matches(path: str) -> bool:
    """Whether a path exists, or a glob or brace list matches something."""
    try:
        parts = list(braceexpand(path)) if "{" in path else [path]
    except ValueError:
        parts = [path]
    return any(os.path.lexists(part) or next(glob.iglob(part, recursive=True), None) for part in parts)
