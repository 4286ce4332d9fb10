"""Listing a prefix of a million keys: request by request, and by many requests at once into a listing.

Run:  python benchmarks/listing.py [--keys 1000000] [--delay-ms 50] [--out benchmarks/results]

The server is a stand-in in a process of its own: it answers ListObjectsV2 from names it makes up, each
request after a pause as long as S3's. Real servers differ; what is measured is our side of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from benchmarks.common.report import arguments, peak_memory_mb, write_report
from jobs.lake.listing import Listing
from jobs.lake.s3_store import S3Store
from jobs.lake.storage import Storage
from schemas.specs import SourceSpec, StorageSpec

BUCKET = "photographs"
NAMES = ("counter", "hash", "date")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--delay-ms", type=float, default=50.0)
    parser.add_argument("--serve", type=int, help="used by the script itself: port")
    parser.add_argument("--measure", nargs=3, help="used by the script itself: endpoint, names, way")
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.serve, args.keys, args.delay_ms / 1000)
        return
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    table = [
        [
            "names",
            "keys",
            "one request at a time",
            "listing, many at once",
            "ratio",
            "peak memory",
            "must reach",
        ]
    ]
    with server(args.keys, args.delay_ms) as endpoint:
        for names in NAMES:
            in_turn, at_once = (apart(endpoint, names, way) for way in ("in turn", "at once"))
            assert in_turn["keys"] == at_once["keys"] == args.keys
            table.append(
                [
                    f"{names}: {next(iter(keys_of(names, args.keys)))}",
                    f"{args.keys:,}",
                    f"{in_turn['seconds']:.1f} s",
                    f"{at_once['seconds']:.1f} s",
                    f"{in_turn['seconds'] / at_once['seconds']:.1f}x",
                    f"{at_once['peak_mb']:.0f} MB",
                    "once, in parallel",
                ]
            )
            print(table[-1], flush=True)
    facts = [f"each request is answered after {args.delay_ms:g} ms; 1000 keys a page"]
    write_report(
        "listing", "Listing a million keys", ["s3fs", "aiobotocore", "pyarrow"], facts, table, args.out
    )


def apart(endpoint: str, names: str, way: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.listing", "--measure", endpoint, names, way]
    told: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return told


def measure(endpoint: str, names: str, way: str) -> dict[str, float]:
    os.environ.update(AWS_ACCESS_KEY_ID="benchmark", AWS_SECRET_ACCESS_KEY="not-a-secret")
    started = time.perf_counter()
    if way == "in turn":
        store = S3Store(endpoint, "us-east-1", False)
        num_keys = sum(map(len, store._pages_in_turn(BUCKET, f"{names}/", lambda action: action())))
    else:
        storage = Storage(StorageSpec(endpoint_url=endpoint))
        with Listing.of(SourceSpec(uri=f"s3://{BUCKET}/{names}"), storage, "unused") as listing:
            num_keys = listing.num_objects
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "keys": num_keys, "peak_mb": peak_memory_mb()}


@cache
def keys_of(names: str, num_keys: int) -> list[str]:
    if names == "counter":
        return [f"counter/{number:012d}.jpg" for number in range(num_keys)]
    if names == "hash":
        return sorted(f"hash/{number * 2654435761 % 2**32:08x}.jpg" for number in range(num_keys))
    days = [f"date/2026/{month:02d}/{day:02d}" for month in range(1, 13) for day in range(1, 29)]
    return sorted(f"{days[number % len(days)]}/{number:09d}.jpg" for number in range(num_keys))


@contextmanager
def server(num_keys: int, delay_ms: float) -> Iterator[str]:
    command = [sys.executable, "-m", "benchmarks.listing", "--serve", "0", "--keys", str(num_keys)]
    process = subprocess.Popen([*command, "--delay-ms", str(delay_ms)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


def serve(port: int, num_keys: int, delay_s: float) -> None:
    for names in NAMES:
        keys_of(names, num_keys)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            started = time.monotonic()
            query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
            body = page(query, num_keys)
            time.sleep(max(0.0, delay_s - (time.monotonic() - started)))
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    print(f"http://127.0.0.1:{http.server_port}", flush=True)
    http.serve_forever()


def page(query: dict[str, str], num_keys: int) -> bytes:
    """The answer to a ListObjectsV2 request."""
    prefix = query.get("prefix", "")
    keys = keys_of(prefix.partition("/")[0], num_keys)
    after = query.get("continuation-token") or query.get("start-after") or ""
    start = max(bisect_right(keys, after), bisect_right(keys, prefix))
    size = int(query.get("max-keys", 1000))
    found = [key for key in keys[start : start + size + 1] if key.startswith(prefix)]
    shown = found[:size]
    items = "".join(
        f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f'<ETag>"{abs(hash(key)):032x}"</ETag><Size>150000</Size><StorageClass>STANDARD</StorageClass></Contents>'
        for key in shown
    )
    more = len(found) > size
    token = f"<NextContinuationToken>{shown[-1]}</NextContinuationToken>" if more else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{BUCKET}</Name><Prefix>{prefix}</Prefix><KeyCount>{len(shown)}</KeyCount><MaxKeys>{size}</MaxKeys>"
        f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{items}</ListBucketResult>"
    ).encode()


if __name__ == "__main__":
    main()
