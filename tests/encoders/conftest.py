"""The checkpoints and images of the tests of inference."""

from tests.infer.conftest import checkpoints, exported, photos

__all__ = ["checkpoints", "exported", "photos"]
