"""A cron expression in a time zone: when it fires, and what a change of the clocks does to it.

Enters: five fields and an IANA time zone. Leaves: a CronSchedule in the part of the syntax that Kubernetes,
cron, Airflow and Dagster read alike, its next runs, and the changes of the clocks that it meets.

cronsim finds the times: it follows Debian's cron, typed, 400 lines, no dependencies. (croniter also takes
fields of its own, such as seconds and hashes, and guesses at what is ambiguous.)
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from cronsim import CronSim, CronSimError

from schemas.errors import UsageError
from schemas.spec_problems import nearest, show

_MONTH_NAMES = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_MONTHS = {name: number for number, name in enumerate(_MONTH_NAMES, start=1)}
_WEEKDAYS = {"SUN": 0, "MON": 1, "TUE": 2, "WED": 3, "THU": 4, "FRI": 5, "SAT": 6}
# Kubernetes takes no 7 for Sunday.
_FIELDS: tuple[tuple[str, int, int, dict[str, int]], ...] = (
    ("minute", 0, 59, {}),
    ("hour", 0, 23, {}),
    ("day of month", 1, 31, {}),
    ("month", 1, 12, _MONTHS),
    ("day of week", 0, 6, _WEEKDAYS),
)
_ITEM = re.compile(r"(\*|(?P<first>\w+)(?:-(?P<last>\w+))?)(?:/(?P<step>[0-9]+))?")
_DAY = timedelta(days=1)
_QUARTER = timedelta(minutes=15)


@dataclass(frozen=True)
class ClockChange:
    """A time of the schedule that the clocks leave out, or show twice.

    Attributes:
        wall: the first such time, as the clock on the wall shows it (naive).
        is_missing: the clocks go forward over it; else they go back, and it comes twice.
    """

    wall: datetime
    is_missing: bool


@dataclass(frozen=True)
class CronSchedule:
    """Five fields, digits only, and the time zone they are read in. Made by parse()."""

    expression: str
    timezone: str

    @classmethod
    def parse(cls, expression: str, timezone: str) -> "CronSchedule":
        """Check both; names of months and days become numbers, because some crons take no lists of names.

        Raises:
            UsageError: not five fields, a field that is out of range or that schedulers read differently,
                a day that never comes, or no such time zone.
        """
        _check_timezone(timezone)
        fields = expression.split()
        if len(fields) != len(_FIELDS):
            raise UsageError(
                f"--cron {show(expression)} has {len(fields)} fields, wanted 5: minute, hour, day of month, "
                f"month, day of week, such as '0 2 * * *' for 02:00 each night"
            )
        digits = [_plain_field(text, *field) for text, field in zip(fields, _FIELDS, strict=True)]
        _, _, days, _, weekdays = digits
        if "*" not in (days, weekdays) and "*" in days[0] + weekdays[0]:
            raise UsageError(
                f"--cron {show(expression)} restricts the day of month and the day of week, one by a step of "
                "*: Debian's cron runs it where both match, Kubernetes where one does. Write the days out"
            )
        plain = " ".join(digits)
        try:
            # A leap year and the century's end are within its fifty years.
            next(CronSim(plain, datetime(2000, 1, 1)))
        except (CronSimError, StopIteration):
            raise UsageError(
                f"--cron {show(expression)} never fires: no month of {show(fields[3])} has a day {days}"
            ) from None
        return cls(plain, timezone)

    @property
    def zone(self) -> ZoneInfo:
        return ZoneInfo(self.timezone)

    def next_runs(self, after: datetime, count: int, *, as_cron: bool) -> list[datetime]:
        """The next times it fires, in the schedule's zone.

        Args:
            after: an aware time; a run at it is not counted.
            as_cron: as cron and cronie, which make up for a time that is left out and run once at one that
                comes twice. Else as Kubernetes: whenever the clock on the wall shows a time of the schedule.
        """
        if as_cron:
            return list(islice(CronSim(self.expression, after.astimezone(self.zone)), count))
        found: list[datetime] = []
        # Where the clocks go back, times on the wall are not in the order of time: look a day further.
        for wall in CronSim(self.expression, _wall(after, self.zone) - _DAY):
            if len(found) >= count and wall > _wall(sorted(found)[count - 1], self.zone) + _DAY:
                break
            found += [moment for moment in _moments(wall, self.zone) if moment > after]
        return [moment.astimezone(self.zone) for moment in sorted(found)[:count]]

    def clock_changes(self, after: datetime, days: int = 366) -> list[ClockChange]:
        """Changes of the clocks in the next days that leave out or repeat a time of the schedule.

        One that fires in every hour is not disturbed by them: it has none.
        """
        if self.expression.split()[1] in ("*", "0-23"):
            return []
        changes = []
        for first, end, is_missing in _transitions(after, days, self.zone):
            wall = next(CronSim(self.expression, first - timedelta(seconds=1)))
            if wall < end:
                changes.append(ClockChange(wall, is_missing))
        return changes


def _check_timezone(timezone: str) -> None:
    try:
        ZoneInfo(timezone)
        known = not re.match(r"(posix|right)/|localtime$|Factory$", timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError):  # a folder of the database is an OSError
        known = False
    if not known:
        names = sorted(available_timezones())
        hint = nearest(timezone, names) if names else " (this machine has no time zones: install tzdata)"
        raise UsageError(
            f"--timezone {show(timezone)} is no IANA time zone{hint}; wanted a name such as UTC or "
            "Europe/Berlin"
        )


def _plain_field(text: str, name: str, low: int, high: int, names: dict[str, int]) -> str:
    def number(value: str) -> int:
        found = names.get(value.upper(), int(value) if value.isascii() and value.isdigit() else -1)
        if not low <= found <= high:
            hint = "; Sunday is 0" if (name, value) == ("day of week", "7") else ""
            raise UsageError(
                f"--cron: {name} {show(text)} is out of range, wanted {low} to {high}"
                f"{f' or {next(iter(names))} to {list(names)[-1]}' if names else ''}{hint}"
            )
        return found

    items = []
    for item in text.split(","):
        match = _ITEM.fullmatch(item)
        if match is None:
            raise UsageError(
                f"--cron: {name} {show(text)} is not of the form *, 5, 1-5, */10, 1-30/10 or a list of these"
            )
        first, last, step = match["first"], match["last"], match["step"]
        if first is not None and last is None and step is not None:
            raise UsageError(
                f"--cron: {name} {show(text)} is read differently by schedulers: write {first}-{high}/{step}"
            )
        span = "*" if first is None else str(number(first))
        if first is not None and last is not None:
            span = f"{number(first)}-{number(last)}"
            if number(last) < number(first):
                raise UsageError(f"--cron: {name} {show(text)} goes backwards: write it as two ranges")
        if step is not None and not 1 <= int(step) <= high:
            raise UsageError(f"--cron: {name} {show(text)} has a step of {step}, wanted 1 to {high}")
        items.append(span if step is None or int(step) == 1 else f"{span}/{int(step)}")
    # Beside a star, others say nothing, and schedulers differ in whether the list counts as one.
    return "*" if "*" in items else ",".join(items)


def _wall(moment: datetime, zone: ZoneInfo) -> datetime:
    return moment.astimezone(zone).replace(tzinfo=None)


def _moments(wall: datetime, zone: ZoneInfo) -> set[datetime]:
    """When the clock on the wall shows this time: once, twice, or never."""
    both = (wall.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
    return {moment for moment in both if _wall(moment, zone) == wall}


def _transitions(after: datetime, days: int, zone: ZoneInfo) -> Iterator[tuple[datetime, datetime, bool]]:
    """First and end (not included) of the times on the wall that are left out or come twice, and which."""
    start = after.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    for day in (start + _DAY * number for number in range(days + 1)):
        if _offset(day, zone) == _offset(day + _DAY, zone):
            continue
        # Clocks change on a quarter of an hour.
        for earlier in (day + _QUARTER * number for number in range(_DAY // _QUARTER)):
            moment = earlier + _QUARTER
            old, new = _offset(earlier, zone), _offset(moment, zone)
            if old != new:
                first, end = sorted((moment + old, moment + new))
                yield first.replace(tzinfo=None), end.replace(tzinfo=None), new > old


def _offset(moment: datetime, zone: ZoneInfo) -> timedelta:
    offset = moment.astimezone(zone).utcoffset()
    assert offset is not None
    return offset
