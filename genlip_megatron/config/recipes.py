"""Named recipes and YAML files, which may build on one another with ``base:``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from genlip_megatron.config.suggest import nearest
from genlip_megatron.config.values import from_dict

_FOLDER = Path(__file__).parent.parent / "recipes"


def recipe_names() -> list[str]:
    """Names that ``--config`` and ``base:`` accept besides a path."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_yaml(name_or_path: str) -> dict[str, Any]:
    """The settings of a recipe or YAML file by section, on top of those of its ``base``.

    ``base: NAME`` at the top of a file names a recipe, or a YAML file relative to this one.

    Raises:
        ValueError: no such recipe or file, not YAML, a key given twice, not a mapping, or files that are each other's
            base.
    """
    setting = f"--config {name_or_path}"
    path = _find(name_or_path, Path(), setting)
    files: list[Path] = []
    trees: list[dict[str, Any]] = []
    while True:
        files.append(path.resolve())
        tree = _read(path, setting)
        base = tree.pop("base", None)
        if trees:
            from_dict(tree, str(path))  # an error in a base names the base
        trees.append(tree)
        if base is None:
            break
        setting = f"{path}: base = {base}"
        if not isinstance(base, str):
            raise ValueError(f"{setting}: expected the name of a recipe or the path of a YAML file.")
        path = _find(base, path.parent, setting)
        if path.resolve() in files:
            chain = " -> ".join(file.name for file in [*files, path.resolve()])
            raise ValueError(f"{setting}: the files are each other's base ({chain}). Remove one base.")
    merged: dict[str, Any] = {}
    for tree in reversed(trees):
        for section, values in tree.items():
            both = isinstance(values, dict) and isinstance(merged.get(section), dict)
            merged[section] = {**merged[section], **values} if both else values
    return merged


def _find(name: str, folder: Path, setting: str) -> Path:
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{setting}: no such file")
        return path
    names = recipe_names()
    if name not in names:
        raise ValueError(
            f"{setting}: no such recipe{nearest(name, names)} Recipes: {', '.join(names)}; or give the path of a YAML "
            "file."
        )
    return _FOLDER / f"{name}.yaml"


def _read(path: Path, setting: str) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(), _UniqueKeyLoader) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{setting}: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{setting}: expected a mapping of sections")
    return tree


class _UniqueKeyLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice; YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key_node.value!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)
