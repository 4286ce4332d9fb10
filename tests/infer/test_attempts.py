"""Which images are suspected and blamed after processes died. How an actor acts on it is in test_label.py."""

from jobs.infer.attempts import AttemptLog, Past


def test_a_first_attempt_suspects_nobody() -> None:
    assert AttemptLog().begin("unit") == Past(0, {})


def test_attempts_are_counted_though_a_note_was_lost() -> None:
    log = AttemptLog()
    log.begin("unit")
    assert log.begin("unit") == Past(1, {})
    assert log.begin("unit") == Past(2, {})
    log.finish("unit")
    assert log.begin("unit") == Past(0, {})


def test_who_was_in_the_network_when_a_process_died_is_a_suspect() -> None:
    log = AttemptLog()
    log.begin("unit")
    log.note("unit", ["a", "b"])
    log.note("unit", ["c", "d"])
    assert log.begin("unit").deaths == {"c": 1, "d": 1}


def test_a_second_death_on_one_of_them_counts_for_that_one() -> None:
    log = AttemptLog()
    for images in (["c", "d"], ["d"]):
        log.begin("unit")
        log.note("unit", images)
    assert log.begin("unit").deaths == {"c": 1, "d": 2}


def test_a_process_that_died_between_two_units_leaves_no_suspect() -> None:
    log = AttemptLog()
    log.begin("unit")
    log.note("unit", ["a"])
    log.finish("unit")
    assert log.begin("unit").deaths == {}


def test_a_process_that_died_before_the_network_leaves_no_new_suspect() -> None:
    log = AttemptLog()
    log.begin("unit")
    log.note("unit", ["a"])
    log.begin("unit")
    assert log.begin("unit").deaths == {"a": 1}


def test_deaths_are_remembered_where_a_finished_unit_begins_again() -> None:
    log = AttemptLog()
    for _ in range(2):
        log.begin("unit")
        log.note("unit", ["a"])
    log.begin("unit")
    log.finish("unit")
    assert log.begin("unit").deaths == {"a": 2}


def test_units_do_not_mix() -> None:
    log = AttemptLog()
    log.begin("one")
    log.begin("two")
    log.note("one", ["a"])
    log.note("two", ["b"])
    assert log.begin("one").deaths == {"a": 1}
    assert log.begin("two").deaths == {"b": 1}
