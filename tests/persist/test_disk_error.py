from __future__ import annotations

import errno

import pytest

from backtest_kit.errors import Outcome, OutOfSpace, RetryLater
from backtest_kit.persist.files import disk_error


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("outcome", Outcome)
def test_the_words_of_an_error_are_those_of_its_outcome(number: int, outcome: Outcome) -> None:
    error = disk_error(OSError(number, "reason"), "write", "/a/path", outcome)
    assert isinstance(error, RetryLater if number == errno.EIO else OutOfSpace)
    assert error.outcome is outcome
    assert "cannot write /a/path: reason" in str(error)
    assert ("may have been written" in str(error)) is (outcome is Outcome.UNKNOWN)
    assert ("nothing was changed" in str(error)) is (outcome is Outcome.NOT_DONE and number == errno.EIO)
    assert ("free some space" in str(error)) is (number != errno.EIO)
