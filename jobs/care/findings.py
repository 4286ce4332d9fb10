"""What is wrong with a table, counted by kind: a million bad rows are one line."""

from dataclasses import dataclass, field


@dataclass
class _Finding:
    count: int
    example: str


@dataclass
class Findings:
    """Kinds of problems in the order they were found, each with how often and one example."""

    _found: dict[str, _Finding] = field(default_factory=dict)

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Count a problem. A count of 0 adds nothing."""
        if count:
            self._found.setdefault(kind, _Finding(0, example)).count += count

    def merge(self, other: "Findings") -> None:
        for kind, finding in other._found.items():
            self.add(kind, finding.example, finding.count)

    def to_list(self) -> list[str]:
        """One line a kind."""
        return [
            f"{kind}: {finding.example}"
            if finding.count == 1
            else f"{kind}: {finding.count:,}, first {finding.example}"
            for kind, finding in self._found.items()
        ]
