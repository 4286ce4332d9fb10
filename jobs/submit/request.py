"""What is sent to a cluster: the command, the checked spec, a few variables. Nothing is sent here.

Enters: a job's name, a spec file with its overrides, NAME=VALUE pairs. Leaves: a JobRequest, or a
UsageError. The spec travels in the variable MASKLAKE_SPEC; credentials do not travel at all.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import yaml

from cluster.jobs_api import checked_id
from cluster.reachable import check_reachable
from schemas.errors import UsageError
from schemas.spec_loader import SPECS, load_spec
from schemas.spec_problems import nearest, show

SPEC_VARIABLE = "MASKLAKE_SPEC"
JOB_KEY = "masklake"  # in the metadata: the job's name
# Linux starts no process with an argument or a variable longer than 131,072 bytes. Ray passes the spec on as
# JSON inside of such a one, beside its own settings.
MAX_SPEC_BYTES = 120_000

_SECRET = re.compile(
    r"SECRET|TOKEN(?!IZER)|PASSW|PASSPHRASE|CREDENTIAL|PRIVATE|CONNECTION_STRING|(ACCESS|API|ACCOUNT)_?KEY"
    r"|PASS(_|$)|_KEY$|(^|_)(SAS|PAT|PWD|AUTH)(_|$)"
)
_OPERATORS = re.compile(r"MASKLAKE_.*|RAY_.*|AWS_ENDPOINT_URL.*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class JobRequest:
    """One submission. env_vars: of the driver and of the job's workers; it has the spec."""

    submission_id: str
    entrypoint: str
    env_vars: Mapping[str, str]
    metadata: Mapping[str, str]

    def to_dict(self, address: str) -> dict[str, Any]:
        """As it is sent to the address."""
        return {
            "address": address,
            "submission_id": self.submission_id,
            "entrypoint": self.entrypoint,
            "runtime_env": {"env_vars": dict(self.env_vars)},
            "metadata": dict(self.metadata),
        }


def make_request(
    job: str, spec: Mapping[str, Any], variables: Mapping[str, str], submission_id: str | None = None
) -> JobRequest:
    """Args: spec: as checked_spec gave it.

    Raises:
        UsageError: the spec is too large for a variable, or the id is none.
    """
    text = yaml.safe_dump(dict(spec), sort_keys=False, allow_unicode=True, width=1000)
    size = len(json.dumps(text))
    if size > MAX_SPEC_BYTES:
        raise UsageError(
            f"the spec is {size:,} bytes long as it is sent, and an environment variable holds "
            f"{MAX_SPEC_BYTES:,}: name a list in object storage, or globs, instead of writing it out"
        )
    return JobRequest(
        checked_id(submission_id or new_id(job)),
        f"masklake {job} env:{SPEC_VARIABLE} --json",
        {**variables, SPEC_VARIABLE: text},
        {JOB_KEY: job},
    )


def checked_spec(job: str, spec_file: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What the file and the overrides set, checked as on this machine and for what a cluster can reach.

    Raises:
        UsageError: no such job, a wrong spec, or a path of this machine.
    """
    if job not in SPECS:
        raise UsageError(
            f"there is no job {show(job)}{nearest(job, SPECS)}; the jobs are: {', '.join(SPECS)}"
        )
    loaded = load_spec(SPECS[job], spec_file, overrides).model_dump(mode="json", exclude_unset=True)
    spec = {name: section for name, section in loaded.items() if section != {}}
    check_reachable(spec, "no node of a cluster", shared_disks=True)
    return spec


def parse_variables(pairs: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` pairs.

    Raises:
        UsageError: not of that form, a name of a secret, or of what only whoever runs the cluster may set.
            No value is repeated.
    """
    variables: dict[str, str] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not _NAME.fullmatch(name):
            raise UsageError("--env is not of the form NAME=VALUE, such as AWS_REGION=eu-central-1")
        if _SECRET.search(name.upper()) or re.search(r"://[^/]*@", value):
            raise UsageError(
                f"--env {name} looks like a secret, and whoever reads the cluster's dashboard reads a job's "
                "variables: give the nodes a role, or set it in the cluster's own environment"
            )
        if _OPERATORS.fullmatch(name.upper()):
            raise UsageError(
                f"--env {name} is for whoever runs the cluster to set, in the cluster's own environment"
            )
        variables[name] = value
    return variables


def new_id(job: str) -> str:
    """A submission id that is nobody else's: `infer-20261123-101500-3f2a9c`."""
    return f"{job}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
