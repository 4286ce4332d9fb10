"""When a cron expression fires, cluster/schedule/cron.py."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from cluster.schedule.cron import ClockChange, CronSchedule
from schemas.errors import UsageError

BERLIN = "Europe/Berlin"
NOVEMBER = datetime(2026, 11, 23, 12, tzinfo=UTC)


def runs(
    expression: str, after: datetime, count: int, as_cron: bool = False, zone: str = BERLIN
) -> list[str]:
    schedule = CronSchedule.parse(expression, zone)
    return [f"{run:%m-%d %H:%M %Z}" for run in schedule.next_runs(after, count, as_cron=as_cron)]


@pytest.mark.parametrize("as_cron", [True, False])
def test_a_night_in_berlin_is_read_on_the_wall_there(as_cron: bool) -> None:
    assert runs("0 2 * * *", NOVEMBER, 2, as_cron) == ["11-24 02:00 CET", "11-25 02:00 CET"]
    (run,) = CronSchedule.parse("0 2 * * *", BERLIN).next_runs(NOVEMBER, 1, as_cron=as_cron)
    assert run.astimezone(UTC) == datetime(2026, 11, 24, 1, tzinfo=UTC)


@pytest.mark.parametrize("as_cron", [True, False])
def test_a_run_at_this_very_minute_is_not_one_of_the_next(as_cron: bool) -> None:
    at = datetime(2026, 11, 24, 1, tzinfo=UTC)
    assert runs("0 2 * * *", at, 1, as_cron) == ["11-25 02:00 CET"]


def test_names_of_months_and_days_become_numbers() -> None:
    assert CronSchedule.parse("0  2 * jan,Mar mon-FRI", "UTC").expression == "0 2 * 1,3 1-5"
    assert CronSchedule.parse("*/1 *,5 01 * *", "UTC").expression == "* * 1 * *"


def test_the_29th_of_february_fires_every_fourth_year() -> None:
    found = CronSchedule.parse("0 0 29 2 *", "UTC").next_runs(NOVEMBER, 2, as_cron=False)
    assert [run.year for run in found] == [2028, 2032]


def test_day_of_month_or_day_of_week_is_enough_where_both_are_given() -> None:
    # 2026-12-01 is a Tuesday, 2026-12-07 a Monday.
    wanted = ["11-30 00:00 UTC", "12-01 00:00 UTC", "12-07 00:00 UTC"]
    assert runs("0 0 1 * 1", NOVEMBER, 3, zone="UTC") == wanted
    assert runs("0 0 1 * 1", NOVEMBER, 3, as_cron=True, zone="UTC") == wanted


def test_a_time_that_the_clocks_leave_out_is_skipped_by_kubernetes_and_made_up_for_by_cron() -> None:
    march = datetime(2027, 3, 27, 12, tzinfo=UTC)
    assert runs("30 2 * * *", march, 2) == ["03-29 02:30 CEST", "03-30 02:30 CEST"]
    assert runs("30 2 * * *", march, 2, as_cron=True) == ["03-28 03:00 CEST", "03-29 02:30 CEST"]


def test_a_time_that_comes_twice_fires_twice_in_kubernetes_and_once_with_cron() -> None:
    october = datetime(2027, 10, 30, 12, tzinfo=UTC)
    assert runs("30 2 * * *", october, 3) == ["10-31 02:30 CEST", "10-31 02:30 CET", "11-01 02:30 CET"]
    assert runs("30 2 * * *", october, 2, as_cron=True) == ["10-31 02:30 CEST", "11-01 02:30 CET"]


def test_runs_stay_in_the_order_of_time_where_the_clocks_go_back() -> None:
    before = datetime(2027, 10, 31, 0, 10, tzinfo=UTC)
    wanted = ["10-31 02:20 CEST", "10-31 02:40 CEST", "10-31 02:00 CET", "10-31 02:20 CET", "10-31 02:40 CET"]
    assert runs("*/20 2 * * *", before, 5) == wanted
    assert runs("*/20 * * * *", before, 5) == wanted


def test_runs_are_the_minutes_whose_wall_time_matches() -> None:
    """Against each minute of the days around both changes of the clocks, one by one."""
    schedule = CronSchedule.parse("*/30 1-3 * * *", "America/New_York")
    for start in (datetime(2027, 3, 13, tzinfo=UTC), datetime(2027, 11, 6, tzinfo=UTC)):
        minutes = (start + timedelta(minutes=minute) for minute in range(1, 3 * 24 * 60))
        walls = [(minute, minute.astimezone(schedule.zone)) for minute in minutes]
        wanted = [minute for minute, wall in walls if wall.hour in (1, 2, 3) and wall.minute in (0, 30)]
        found = schedule.next_runs(start, len(wanted), as_cron=False)
        assert [run.astimezone(UTC) for run in found] == wanted


def test_changes_of_the_clocks_within_a_year_that_meet_the_schedule() -> None:
    night = CronSchedule.parse("30 2 * * *", BERLIN)
    assert night.clock_changes(NOVEMBER) == [
        ClockChange(datetime(2027, 3, 28, 2, 30), is_missing=True),
        ClockChange(datetime(2027, 10, 31, 2, 30), is_missing=False),
    ]
    assert CronSchedule.parse("0 4 * * *", BERLIN).clock_changes(NOVEMBER) == []
    assert CronSchedule.parse("30 2 * * 1-5", BERLIN).clock_changes(NOVEMBER) == []  # they change on a Sunday
    assert CronSchedule.parse("30 * * * *", BERLIN).clock_changes(NOVEMBER) == []
    assert CronSchedule.parse("30 2 * * *", "UTC").clock_changes(NOVEMBER) == []


def test_half_an_hour_is_left_out_on_lord_howe() -> None:
    island = "Australia/Lord_Howe"
    assert CronSchedule.parse("15 2 * * *", island).clock_changes(NOVEMBER) == [
        ClockChange(datetime(2027, 10, 3, 2, 15), is_missing=True)
    ]
    assert CronSchedule.parse("30 2 * * *", island).clock_changes(NOVEMBER) == []


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("0 0 31 2 *", "never fires: no month of '2' has a day 31"),
        ("0 0 30,31 feb *", "never fires"),
        ("0 0 31 4,6,9,11 *", "never fires"),
        ("@daily", "has 1 fields, wanted 5"),
        ("", "has 0 fields, wanted 5"),
        ("0 0 2 * * *", "has 6 fields, wanted 5"),
        ("60 * * * *", "minute '60' is out of range, wanted 0 to 59"),
        ("0 24 * * *", "hour '24' is out of range, wanted 0 to 23"),
        ("0 0 0 * *", "day of month '0' is out of range, wanted 1 to 31"),
        ("0 0 * 13 *", "month '13' is out of range, wanted 1 to 12 or JAN to DEC"),
        ("0 0 * * 7", "wanted 0 to 6 or SUN to SAT; Sunday is 0"),
        ("0 0 * * FRI-MON", "goes backwards: write it as two ranges"),
        ("*/0 * * * *", "has a step of 0"),
        ("5/10 * * * *", "write 5-59/10"),
        ("0 0 L * *", "day of month 'L' is out of range"),
        ("0 0 * * 1#2", "is not of the form"),
        ("0,, * * * *", "is not of the form"),
        ("² * * * *", "minute '²' is out of range"),
        ("0 0 */2 * 1", "Debian's cron runs it where both match, Kubernetes where one does"),
        ("0 0 1 * */2", "Debian's cron runs it where both match, Kubernetes where one does"),
    ],
)
def test_what_never_fires_or_is_read_in_two_ways_is_refused(expression: str, wanted: str) -> None:
    with pytest.raises(UsageError) as refused:
        CronSchedule.parse(expression, "UTC")
    assert wanted in str(refused.value)


@pytest.mark.parametrize("zone", ["Europe", "", "../etc/passwd", "localtime"])
def test_what_is_no_iana_time_zone_is_refused(zone: str) -> None:
    with pytest.raises(UsageError, match="is no IANA time zone"):
        CronSchedule.parse("0 2 * * *", zone)


def test_a_time_zone_with_a_slip_of_the_pen_gets_a_hint() -> None:
    with pytest.raises(UsageError, match="did you mean Europe/Berlin"):
        CronSchedule.parse("0 2 * * *", "Europe/Berln")
