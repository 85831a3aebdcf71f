"""Errors of remote stores come quickly, as one line that names the address."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from genlip_megatron import storage
from genlip_megatron.data.patterns import expand_shards
from genlip_megatron.testing.processes import free_port
from tests.data.conftest import Web


def expand(url: str) -> Any:
    return expand_shards([url], "PATH")


READERS: tuple[Callable[[str], Any], ...] = (expand, storage.read_bytes, storage.state)


@pytest.mark.parametrize("read", READERS)
def test_a_store_that_does_not_answer_is_an_error_within_seconds(read: Callable[[str], Any]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    begin = time.monotonic()
    with pytest.raises(storage.StoreError) as error:
        read(f"{url}/x.tar")
    assert str(error.value).startswith(f"{url}: the store does not answer (Cannot connect to host")
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_not_retried(
    status: int, read: Callable[[str], Any], web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, pauses = f"{web.url}/{status}.tar", list[float]()
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    with pytest.raises(PermissionError, match=rf"^{url}: access denied \({status} .*check the store's credentials"):
        read(url)
    assert not pauses


def test_a_missing_file_is_not_retried(web: Web) -> None:
    for read in (storage.read_bytes, storage.state):
        with pytest.raises(FileNotFoundError, match=f"^{web.url}/404.tar: no such file, folder or bucket$"):
            read(f"{web.url}/404.tar")
    with pytest.raises(ValueError, match=r"matches no \.tar file"):
        expand(f"{web.url}/404.tar")


def test_a_failing_store_is_retried(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(storage.StoreError, match=rf"^{web.url}/500.tar: the store does not answer \(500 "):
        storage.read_bytes(f"{web.url}/500.tar")
    assert len(pauses) == storage.RETRIES


def test_a_hanging_store_fails_at_first_contact(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_FIRST_TIMEOUT_SECONDS", 0.2)
    begin = time.monotonic()
    with pytest.raises(storage.StoreError, match=f"^{web.url}/hang.tar: the store does not answer"):
        expand(f"{web.url}/hang.tar")
    assert time.monotonic() - begin < 10


def test_missing_credentials_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    s3fs = pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    storage._filesystem.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(PermissionError, match=r"^s3://nobodys: access denied \(Unable to locate credentials\)"):
        expand("s3://nobodys/x.tar")
    storage._filesystem.cache_clear()


def test_a_missing_bucket_is_reported(bucket: str) -> None:
    with pytest.raises(ValueError, match=r"matches no \.tar file"):
        expand("s3://another/x.tar")
    with pytest.raises(FileNotFoundError, match="^s3://another/x.tar: no such file, folder or bucket$"):
        storage.read_bytes("s3://another/x.tar")


def test_an_invalid_bucket_name_is_a_user_error_and_not_retried(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    with pytest.raises(ValueError, match=r"^s3://a b/x\.tar: .*Invalid bucket name"):
        storage.read_bytes("s3://a b/x.tar")
    assert not pauses
