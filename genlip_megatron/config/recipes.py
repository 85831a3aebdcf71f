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
    return _load(name_or_path, Path(), f"--config {name_or_path}", ())


def _load(name: str, folder: Path, setting: str, above: tuple[Path, ...]) -> dict[str, Any]:
    """The settings of a file; ``above`` are the files that build on it, ``setting`` is how they name it."""
    path = _find(name, folder, setting)
    if path in above:
        chain = " -> ".join(file.name for file in (*above, path))
        raise ValueError(f"{setting}: the files are each other's base ({chain}). Remove one base.")
    tree = _read(path, setting)
    base = tree.pop("base", None)
    if above:
        from_dict(tree, str(path))  # an error in a base names the base
    if base is None:
        return tree
    setting = f"{path}: base = {base}"
    if not isinstance(base, str):
        raise ValueError(f"{setting}: expected the name of a recipe or the path of a YAML file.")
    merged = _load(base, path.parent, setting, (*above, path))
    for section, values in tree.items():
        merged[section] = {**merged.get(section, {}), **values} if isinstance(values, dict) else values
    return merged


def _find(name: str, folder: Path, setting: str) -> Path:
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = folder / name
        try:
            path.stat()
        except FileNotFoundError:
            raise ValueError(f"{setting}: no such file. Check the path; a recipe has no .yaml in its name.") from None
        except OSError as error:
            raise ValueError(f"{setting}: {error.strerror}. Check the path.") from None
        return path.resolve()
    names = recipe_names()
    if name not in names:
        raise ValueError(
            f"{setting}: no such recipe{nearest(name, names)} Recipes: {', '.join(names)}; or give the path of a YAML "
            "file."
        )
    return (_FOLDER / f"{name}.yaml").resolve()


def _read(path: Path, setting: str) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{setting}: {error.strerror}. Check the path.") from None
    except ValueError as error:
        raise ValueError(f"{setting}: not UTF-8 text: {error}. Save it as UTF-8.") from None
    try:
        tree = yaml.load(text, _UniqueKeyLoader) or {}
    except RecursionError:
        raise ValueError(f"{setting}: its lists or mappings are nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:  # PyYAML raises ValueError for an impossible date
        raise ValueError(f"{setting}: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{setting}: expected a mapping of sections")
    return tree


class _UniqueKeyLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice; YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(problem="a key is not a word", problem_mark=key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key_node.value!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)
