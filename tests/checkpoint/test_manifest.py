"""The manifest covers every file of a checkpoint and itself, so any damage is found and named."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from genlip_megatron.checkpoint import manifest
from genlip_megatron.checkpoint.manifest import Manifest

NAMES = ("a.bin", "b.distcp", "c.bin", "empty")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for i, name in enumerate(NAMES[:3]):
        (tmp_path / name).write_bytes(bytes(range(256)) * (i + 1))
    (tmp_path / "empty").write_bytes(b"")
    files = {name: manifest.facts_of(tmp_path / name) for name in NAMES}
    (tmp_path / manifest.MANIFEST).write_bytes(Manifest(7, "dp_reshardable", {"fsdp": False}, files=files).to_bytes())
    return tmp_path


def test_a_written_manifest_is_read_back_and_good(place: Path) -> None:
    found = manifest.read(place)
    assert (found.iteration, found.kind, found.layout, found.size) == (7, "dp_reshardable", {"fsdp": False}, 6 * 256)
    assert found.files["a.bin"].sha256 == hashlib.sha256((place / "a.bin").read_bytes()).hexdigest()
    assert manifest.problems(place, found) == []


def test_every_flipped_bit_of_the_manifest_is_found(place: Path) -> None:
    file = place / manifest.MANIFEST
    whole = file.read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        file.write_bytes(flipped)
        with pytest.raises(manifest.Damaged, match=r"manifest\.json"):
            manifest.read(place)
    for end in range(0, len(whole), 7):
        file.write_bytes(whole[:end])
        with pytest.raises(manifest.Damaged, match=r"manifest\.json"):
            manifest.read(place)


def test_damage_is_named_with_its_file(place: Path) -> None:
    found = manifest.read(place)
    content = bytearray((place / "b.distcp").read_bytes())
    content[100] ^= 4
    (place / "b.distcp").write_bytes(content)
    (place / "c.bin").unlink()
    (place / "empty").write_bytes(b"!")
    assert sorted(manifest.problems(place, found)) == [
        f"{place}/b.distcp: damaged, its SHA-256 does not match the manifest's",
        f"{place}/c.bin: missing",
        f"{place}/empty: 1 bytes, 0 were written",
    ]
    # A flipped bit does not change the size.
    assert [problem.split(":")[0] for problem in manifest.problems(place, found, checksums=False)] == [
        f"{place}/c.bin",
        f"{place}/empty",
    ]


def test_all_parts_together_check_every_file_once(place: Path) -> None:
    found = manifest.read(place)
    for name in NAMES:
        (place / name).unlink()
    for count in (1, 2, 3, 7):
        seen = [problem for i in range(count) for problem in manifest.problems(place, found, part=(i, count))]
        assert sorted(seen) == [f"{place}/{name}: missing" for name in sorted(NAMES)]


def test_another_format_says_what_to_do(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_FORMAT", 9)
    content = Manifest(7, "dp_reshardable", {}).to_bytes()
    monkeypatch.undo()
    (place / manifest.MANIFEST).write_bytes(content)
    with pytest.raises(manifest.Damaged, match="its format is not 1. Load it with the version that wrote it"):
        manifest.read(place)


def test_a_copy_of_the_tree_knows_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(manifest.revision().removesuffix("+changes")) in (0, 40)
    monkeypatch.setattr(manifest, "__file__", str(tmp_path / "genlip_megatron" / "checkpoint" / "manifest.py"))
    (tmp_path / "REVISION").write_text("0123+changes\n")
    assert manifest.revision() == "0123+changes"
