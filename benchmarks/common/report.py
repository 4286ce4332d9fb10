"""What every benchmark prints: where and with what it was measured, then a table; and a dated copy."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the option that all benchmarks have."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for a dated copy of the table")
    return parser


def write_report(
    name: str,
    title: str,
    packages: Sequence[str],
    facts: Sequence[str],
    table: Sequence[Sequence[str]],
    out: Path | None,
) -> None:
    """Print, and write `<out>/<date>-<name>.md` where a folder is given.

    Args:
        facts: lines of the list above the table.
        table: its head, then its rows.
    """
    today = datetime.date.today().isoformat()
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    rows = [f"| {' | '.join(row)} |" for row in table]
    lines = [
        f"# {title}",
        "",
        f"- date: {today}",
        f"- hardware: {hardware()}",
        f"- versions: Python {platform.python_version()}, {versions}",
        f"- command: `python {shlex.join(sys.argv)}`",
        *[f"- {fact}" for fact in facts],
        "",
        rows[0],
        f"| {' | '.join('---' for _ in table[0])} |",
        *rows[1:],
    ]
    print("\n".join(lines))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{today}-{name}.md"
        path.write_text("\n".join(lines) + "\n")
        print(f"\nwritten to {path}")


def hardware() -> str:
    """The processor's model where Linux tells it, its cores, and how busy they were with other work."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    name = models[0] if models else platform.machine()
    return f"{name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end"


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def side_by_side(*sides: Callable[[], object], rounds: int) -> list[float]:
    """Median seconds of each side; rounds go around the sides, so that other work slows all of them alike."""
    for work in sides:
        work()
    taken: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for work, times in zip(sides, taken, strict=True):
            time.sleep(0.02)  # torch's threads spin for a while after their work, and would be in the way
            times.append(seconds(work))
    return [statistics.median(times) for times in taken]


def peak_memory_mb() -> float:
    """Of this process, MiB. Not ru_maxrss, which begins with what the process that started this one had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024
