"""The breaker's score, on a clock of the test's own."""

from __future__ import annotations

from metier.runtime.remote.circuit_breaker import CircuitBreaker


def test_it_opens_after_failures_in_a_row_and_closes_after_a_trial_that_succeeds() -> None:
    now = [0.0]
    breaker = CircuitBreaker(failures=2, open_s=10.0, clock=lambda: now[0])
    assert not breaker.failed() and not breaker.succeeded()
    assert not breaker.failed() and breaker.closed
    assert breaker.failed() and not breaker.closed and not breaker.trial_due
    now[0] = 9.0
    assert not breaker.trial_due
    now[0] = 10.0
    assert breaker.trial_due
    assert not breaker.failed()  # it was open already, and stays so for as long again
    now[0] = 19.0
    assert not breaker.trial_due
    now[0] = 20.0
    assert breaker.trial_due and breaker.succeeded() and breaker.closed
    assert not breaker.failed() and breaker.closed
