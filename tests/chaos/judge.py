"""Judges a lake by reading it back, with nothing of the product's but its paths and its column names.

Enters: a lake's URI and the images that its table has to have. Leaves: what is wrong, in words; an empty list
is the verdict that every image is there once. Delta's log is read as the JSON it is, files by pyarrow.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import pyarrow.parquet as pq
from PIL import Image
from pycocotools import mask as coco_mask

from jobs.lake.storage import Storage

Row = dict[str, Any]


@dataclass
class Table:
    """What the log and its files say. rows: of all live files, with model_id."""

    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    num_versions: int = 0
    orphans: list[str] = field(default_factory=list)  # paths of files that no version ever named
    orphan_rows: list[Row] = field(default_factory=list)  # what these hold

    def labels(self) -> dict[bytes, tuple[Any, ...]]:
        """content_hash -> the labels, whatever the image is called and whenever it was labelled."""
        return {
            row["content_hash"]: (row["status"], row["width"], row["height"], row["detections"])
            for row in self.rows
        }

    def ids(self) -> list[str]:
        return [row["image_id"] for row in self.rows]


def read_table(lake: str, storage: Storage) -> Table:
    """Replay the log version by version, and open every file it names."""
    filesystem, root = storage.filesystem(f"{lake}/labels")
    table = Table()
    live: dict[str, dict[str, Any]] = {}
    named: set[str] = set()
    for version, actions in _log(filesystem, root, table.problems):
        table.num_versions = version + 1
        adds = [action["add"] for action in actions if "add" in action]
        for add in adds:
            if unquote(add["path"]) in named:
                table.problems.append(f"version {version} adds {add['path']} a second time")
            live[unquote(add["path"])] = add
            named.add(unquote(add["path"]))
        for action in actions:
            if "remove" in action:
                live.pop(unquote(action["remove"]["path"]), None)
            told = action.get("commitInfo", {}).get("num_images")
            num_rows = sum(json.loads(add["stats"])["numRecords"] for add in adds)
            if told is not None and int(told) != num_rows:
                table.problems.append(f"version {version} says {told} images and adds {num_rows}")
    for path, add in live.items():
        table.rows += _read_file(filesystem, root, path, add, table.problems)
    for path in _files(filesystem, root):
        if path not in named and path.endswith(".parquet") and "_delta_log" not in path:
            table.orphans.append(path)
            table.orphan_rows += _read_file(filesystem, root, path, None, table.problems)
    return table


def judge(table: Table, images: Sequence[bytes], num_models: int = 1) -> list[str]:
    """What is wrong with a table that has to hold each image once per model, all of them ok.

    Args:
        images: encoded, all different.
    """
    problems = list(table.problems)
    keys = Counter((row["image_id"], row["model_id"]) for row in table.rows)
    problems += [f"{key} has {count} rows" for key, count in keys.items() if count > 1]
    by_model: dict[str, list[Row]] = {}
    for row in table.rows:
        by_model.setdefault(row["model_id"], []).append(row)
    if len(by_model) != num_models:
        problems.append(f"rows of {sorted(by_model)}, wanted {num_models} models")
    wanted = {hashlib.blake2b(data, digest_size=16).digest(): data for data in images}
    for model_id, rows in by_model.items():
        missing = set(wanted) - {row["content_hash"] for row in rows}
        if len(rows) != len(wanted) or missing:
            problems.append(f"{model_id}: {len(rows)} rows for {len(wanted)} images, {len(missing)} missing")
        for row in rows:
            problems += _wrong_in(row, wanted)
    return problems


def _wrong_in(row: Row, wanted: Mapping[bytes, bytes]) -> Iterator[str]:
    name = row["image_id"]
    if row["status"] != "ok":
        yield f"{name} is {row['status']}: {row['error_kind']}: {row['error']}"
        return
    if row["content_hash"] not in wanted:
        yield f"{name}: its content_hash is of no image of the source"
        return
    size = Image.open(io.BytesIO(wanted[row["content_hash"]])).size
    if (row["width"], row["height"]) != size:
        yield f"{name} is {row['width']}x{row['height']}, the image is {size[0]}x{size[1]}"
    if len(row["detections"]) != row["num_detections"]:
        yield f"{name}: {len(row['detections'])} detections, num_detections {row['num_detections']}"
    for detection in row["detections"]:
        mask = coco_mask.decode({"size": [size[1], size[0]], "counts": detection["rle"]})
        if mask.shape != (size[1], size[0]) or int(mask.sum()) != detection["area"]:
            yield f"{name}: a mask of {mask.shape}, area {mask.sum()}, says area {detection['area']}"


def _log(filesystem: Any, root: str, problems: list[str]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Versions in order, each with its actions; a table that is not there has none."""
    if not filesystem.exists(f"{root}/_delta_log"):
        return
    filesystem.invalidate_cache()
    names = (path.rpartition("/")[2] for path in filesystem.ls(f"{root}/_delta_log", detail=False))
    versions = sorted(int(name[:20]) for name in names if re.fullmatch(r"\d{20}\.json", name))
    if versions != list(range(len(versions))):
        problems.append(f"the log has versions {versions}")
    for version in versions:
        lines = filesystem.cat_file(f"{root}/_delta_log/{version:020}.json").splitlines()
        yield version, [json.loads(line) for line in lines]


def _files(filesystem: Any, root: str) -> list[str]:
    """Every file below the table, relative to it."""
    if not filesystem.exists(root):
        return []
    place = root.lstrip("/")
    return [path.lstrip("/").removeprefix(f"{place}/") for path in filesystem.find(root)]


def _read_file(
    filesystem: Any, root: str, path: str, add: dict[str, Any] | None, problems: list[str]
) -> list[Row]:
    """Rows of one file, compared with its Add action where it has one."""
    try:
        data = filesystem.cat_file(f"{root}/{path}")
    except FileNotFoundError:
        problems.append(f"{path} is named by the log and is not there")
        return []
    rows: list[Row] = pq.read_table(io.BytesIO(data), page_checksum_verification=True).to_pylist()
    if add is not None and len(data) != add["size"]:
        problems.append(f"{path} has {len(data)} bytes, its Add action says {add['size']}")
    if add is not None and len(rows) != json.loads(add["stats"])["numRecords"]:
        problems.append(f"{path} has {len(rows)} rows, its Add action says {add['stats']}")
    model_id = unquote(path.split("/")[0].removeprefix("model_id="))
    return [{**row, "model_id": model_id} for row in rows]
