"""The way to run a tool is that of the inference tools' tests."""

from tests.infer.conftest import tool as tool
