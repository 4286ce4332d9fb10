"""A telling part of the tests against other versions than the pinned ones: `make test-versions`.

Enters: pyproject.toml, constraints.txt, the Python interpreters of this machine, pip's index; names of rows,
else all. Leaves: a table on stdout, and exit status 1 where a row failed. A row's environment is
build/versions/ROW; it is deleted when the row has passed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / "build" / "versions"
_NEEDED_BYTES = 14 << 30  # an environment with PyTorch's GPU libraries is 7 GB, and pip unpacks beside it

# Each library that a job stands on does in here what it does in a job.
SELECTION = (
    "tests/schemas",
    "tests/maskrcnn_core/test_exactness.py",  # torch and torchvision: the same detections and losses
    "tests/maskrcnn_core/test_torchvision_format.py",
    "tests/maskrcnn_core/test_model.py",
    "tests/maskrcnn_core/test_boxes.py",  # numba, and torchvision
    "tests/maskrcnn_core/test_masks.py",  # numba, pycocotools
    "tests/maskrcnn_core/test_images.py",  # pillow
    "tests/maskrcnn_core/test_checkpoint.py",  # safetensors
    "tests/lake/test_labels_table.py",  # pyarrow, deltalake, duckdb, and the golden table
    "tests/lake/test_commit.py",
    "tests/lake/test_views.py",
    "tests/lake/test_storage.py",  # fsspec, s3fs over the wire
    "tests/lake/test_gcs_store.py",  # gcsfs
    "tests/train/test_coco_json.py",  # ijson
    "tests/train/test_curves.py",  # matplotlib
    "tests/train/test_trackers.py",  # tensorboard
    "tests/cluster/test_schedule_cron.py",  # cronsim
    "tests/care/test_lake_commands.py",  # typer, rich
    "tests/integration/test_infer.py::test_a_job_over_the_wire_finds_and_leaves_everything_in_the_bucket",
    "tests/integration/test_train.py::test_a_model_is_trained_registered_and_not_trained_again",
)
# What these tests need beside the package: [dev] does not fit around the lowest versions. DuckDB before
# 2.0 hands out times with pytz.
TOOLS = ("boto3", "flask", "flask-cors", "hypothesis", "moto[s3]", "pytest", "pytest-timeout", "pytz")


@dataclass(frozen=True)
class Row:
    """versions: lowest, newest (what pip takes by itself), or pinned (constraints.txt); python: 3.12, say."""

    versions: str
    python: str
    left_out: tuple[str, ...] = ()  # tests that cannot pass there; docs/versions.md says why

    @property
    def name(self) -> str:
        return f"{self.versions}-{self.python}"


# torchvision resizes by torch, which before 2.15 rounds positions otherwise: its detections move, not ours.
OTHER_RESIZE = "tests/maskrcnn_core/test_exactness.py::test_the_predictor_finds_what_torchvision_finds"
# The pinned versions on Python 3.11 are what `make test` runs.
ROWS = (
    Row("lowest", "3.11", left_out=(OTHER_RESIZE,)),
    Row("newest", "3.11"),
    Row("pinned", "3.12"),
    Row("pinned", "3.13"),
)
SHOWN = ("ray", "torch", "torchvision", "numpy", "pyarrow", "deltalake", "duckdb", "s3fs")


class RowFailedError(Exception):
    """One line: what failed, and where to look."""


def main(names: list[str]) -> int:
    known = {row.name: row for row in ROWS}
    if unknown := [name for name in names if name not in known]:
        print(f"no row {unknown[0]}, wanted of: {' '.join(known)}", file=sys.stderr)
        return 2
    lines = []
    failed = False
    for row in [known[name] for name in names] or ROWS:
        print(f"== {row.name}", flush=True)
        started = time.monotonic()
        versions: Mapping[str, str] = {}
        try:
            if interpreter := find_interpreter(row.python):
                versions = make_environment(row, interpreter)
                result = run_selection(row)
                shutil.rmtree(ENVIRONMENTS / row.name)
            else:
                result = f"not run: no Python {row.python} on this machine"
        except RowFailedError as error:
            failed = True
            result = f"FAILED: {error}"
        minutes = (time.monotonic() - started) / 60
        shown = [versions.get(name, "") for name in SHOWN]
        today = f"{datetime.now(UTC):%Y-%m-%d}"
        lines.append(
            [row.versions, versions.get("python", row.python), *shown, today, f"{result}, {minutes:.0f} min"]
        )
    header = ["row", "Python", *SHOWN, "date", "result"]
    for cells in [header, ["---"] * len(header), *lines]:
        print("| " + " | ".join(cells) + " |")
    return int(failed)


def lower_bounds(requirements: list[str]) -> list[str]:
    """Constraints that pin each requirement to its lower bound: `ray[data]>=2.60,<2.61` gives `ray==2.60`.

    Raises:
        ValueError: a requirement has none.
    """
    pins = []
    for text in requirements:
        requirement = Requirement(text)
        bounds = [one.version for one in requirement.specifier if one.operator == ">="]
        if len(bounds) != 1:
            raise ValueError(f"pyproject.toml: {text!r} has {len(bounds)} lower bounds, wanted one")
        pins.append(f"{canonicalize_name(requirement.name)}=={bounds[0]}")
    return pins


def user_requirements(project: Mapping[str, Any]) -> list[str]:
    """What users install: the dependencies, and those of the extras whose clients the tests use."""
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras["gcs"], *extras["onnx"]]


def find_interpreter(version: str) -> str | None:
    """python3.12 on PATH, else that of pyenv, whose shims answer only for the versions it has switched on."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = shutil.which(f"python{version}")
    candidates = [found] if found else []
    candidates += [str(path) for path in sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)]
    for candidate in candidates:
        asked = subprocess.run([candidate, "-m", "venv", "--help"], capture_output=True, check=False)
        if asked.returncode == 0:
            return candidate
    return None


def make_environment(row: Row, interpreter: str) -> dict[str, str]:
    """Installs as a user does, then the tests' tools around that. The versions that are in it, by name."""
    folder = ENVIRONMENTS / row.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free
    if free < _NEEDED_BYTES:
        raise RowFailedError(f"{free >> 30} GiB free for {folder}, wanted {_NEEDED_BYTES >> 30}")
    constraints, frozen = folder / "constraints.txt", folder / "frozen.txt"
    if row.versions == "pinned":
        shutil.copy(ROOT / "constraints.txt", constraints)
    else:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        lowest = lower_bounds(user_requirements(project)) if row.versions == "lowest" else []
        constraints.write_text("".join(f"{pin}\n" for pin in lowest))
    subprocess.run([interpreter, "-m", "venv", folder], check=True)
    python = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    install = [*python, "install", "-qq", "--no-compile", "-c", str(constraints)]
    run_logged([*install, "-e", ".[gcs,onnx]"], folder / "install.log", "pip, masklake")
    freeze = [*python, "freeze", "--exclude-editable"]
    installed = subprocess.run(freeze, check=True, capture_output=True, text=True).stdout
    pins = dict(line.split("==") for line in installed.splitlines() if line.count("==") == 1)
    # boto3, of the tests, takes the botocore of its own number; pip would try hundreds of others first.
    frozen.write_text(f"{installed}boto3=={pins['botocore']}\n")
    run_logged([*install, "-c", str(frozen), *TOOLS], folder / "install-tools.log", "pip, the tests' tools")
    version = subprocess.run([*python[:1], "-V"], check=True, capture_output=True, text=True).stdout
    return {canonicalize_name(name): pin for name, pin in pins.items()} | {"python": version.split()[1]}


def run_selection(row: Row) -> str:
    """How many passed and were skipped, as pytest says it."""
    folder = ENVIRONMENTS / row.name
    log = folder / "pytest.log"
    python = str(folder / "bin" / "python")
    # Among old and new libraries one warns of another; nobody who runs a job sees that.
    options = ["-q", "-p", "no:cacheprovider", "-W", "default::DeprecationWarning"]
    options += [f"--deselect={test}" for test in row.left_out]
    # Rows and the checkout's own tests, by other versions of numba, must not take each other's machine code.
    run_logged(
        [python, "-m", "pytest", *options, *SELECTION], log, "pytest", NUMBA_CACHE_DIR=str(folder / "numba")
    )
    counts = re.findall(r"^\d+ passed(?:, \d+ skipped)?", log.read_text(), re.MULTILINE)
    if not counts:
        raise RowFailedError(f"pytest says no counts, see {log.relative_to(ROOT)}")
    return str(counts[-1])


def run_logged(command: list[str], log: Path, what: str, **variables: str) -> None:
    """Beside other work, and without what would lead it to another masklake."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= variables
    with log.open("w") as out:
        nice = ["nice", "-n", "10", *command]
        ended = subprocess.run(nice, cwd=ROOT, env=environment, stdout=out, stderr=out, check=False)
    if ended.returncode:
        print("\n".join(log.read_text().splitlines()[-30:]), flush=True)
        raise RowFailedError(f"{what}, status {ended.returncode}, see {log.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
