"""What the job relies on in an S3 server, shown for each of the servers that the tests use."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import pytest
from botocore.exceptions import ClientError

if TYPE_CHECKING:
    from tests.integration.conftest import S3Bucket, S3Server


def test_an_object_comes_back_with_its_md5_as_etag(s3_bucket: S3Bucket, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "photo.jpg").write_bytes(b"not really")
    s3_bucket.upload(tmp_path, prefix="images/")
    assert s3_bucket.list_keys() == ["images/a/b/photo.jpg"]
    reply = s3_bucket.client.get_object(Bucket=s3_bucket.name, Key="images/a/b/photo.jpg")
    assert reply["Body"].read() == b"not really"
    assert reply["ETag"] == f'"{hashlib.md5(b"not really").hexdigest()}"'


def test_of_racing_conditional_puts_exactly_one_wins(s3_bucket: S3Bucket) -> None:
    def put(writer: int) -> bool:
        try:
            s3_bucket.client.put_object(
                Bucket=s3_bucket.name, Key="lease", Body=b"%d" % writer, IfNoneMatch="*"
            )
        except ClientError as refusal:
            if refusal.response["Error"]["Code"] not in ("PreconditionFailed", "ConditionalRequestConflict"):
                raise
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(put, range(8))) == 1


def test_each_test_gets_an_empty_bucket(s3_bucket: S3Bucket) -> None:
    assert s3_bucket.list_keys() == []


@pytest.mark.s3
def test_rgw_refuses_wrong_keys(rgw_server: S3Server) -> None:
    stranger = boto3.client("s3", endpoint_url=rgw_server.endpoint_url, aws_secret_access_key="another",
                            aws_access_key_id="masklake-tests")  # fmt: skip
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        stranger.list_buckets()
