"""The prefixes that a job reads and the one that it writes.

Enters: URIs, as the spec has them. Leaves: buckets and keys for a cloud's policies.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from schemas.errors import UsageError
from schemas.spec_problems import show


@dataclass(frozen=True)
class Prefix:
    """A bucket and the start of keys in it, without slashes at the ends; "" is the whole bucket."""

    bucket: str
    key: str

    @classmethod
    def parse(cls, uri: str, scheme: str) -> "Prefix":
        """Of `s3://bucket/some/prefix`.

        Raises:
            UsageError: another scheme, no bucket, or a character that means something else in a policy.
        """
        match = re.fullmatch(rf"{scheme}://([a-z0-9][a-z0-9._-]+)(?:/([^*?$\s]*))?", uri)
        if match is None:
            raise UsageError(
                f"{show(uri)} is no prefix for a policy, wanted {scheme}://bucket/prefix without *, ?, $ and "
                "blanks"
            )
        return cls(match[1], (match[2] or "").strip("/"))


@dataclass(frozen=True)
class JobPrefixes:
    """What a job works on.

    Attributes:
        read: sources, checkpoints, annotations.
        write: the lake, and what a training run keeps.
    """

    read: Sequence[Prefix]
    write: Sequence[Prefix]

    @classmethod
    def parse(cls, read: Sequence[str], write: Sequence[str], scheme: str) -> "JobPrefixes":
        """Of URIs.

        Raises:
            UsageError: as Prefix.parse, or nothing to write.
        """
        if not write:
            raise UsageError("a job has to write somewhere: name the lake's prefix")
        return cls([Prefix.parse(uri, scheme) for uri in read], [Prefix.parse(uri, scheme) for uri in write])
