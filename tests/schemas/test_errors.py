import pickle

import pytest

from schemas import errors


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (errors.MasklakeError, 1),
        (errors.UsageError, 2),
        (errors.StorageError, 1),
        (errors.FailureBudgetExceeded, 3),
        (errors.GateRefused, 4),
        (errors.LeaseHeldError, 5),
        (errors.CommitConflictError, 1),
        (errors.CommitStateUnknownError, 1),
        (errors.SchemaMismatchError, 1),
    ],
)
def test_every_error_is_a_masklake_error_with_the_documented_exit_code(
    error: type[errors.MasklakeError], exit_code: int
) -> None:
    assert issubclass(error, errors.MasklakeError)
    assert error.exit_code == exit_code


def test_a_message_is_one_line_whatever_a_library_said() -> None:
    assert str(errors.StorageError("no such bucket\n  at line 3\r\n")) == "no such bucket at line 3"


def test_a_hostile_name_cannot_send_escapes_to_the_terminal() -> None:
    assert str(errors.UsageError("cannot read \x1b[31mphoto\x07.jpg")) == "cannot read �[31mphoto�.jpg"


def test_an_error_survives_the_way_from_a_worker_to_the_driver() -> None:
    copy = pickle.loads(pickle.dumps(errors.LeaseHeldError("held by run 7 on host a")))
    assert type(copy) is errors.LeaseHeldError
    assert str(copy) == "held by run 7 on host a"
