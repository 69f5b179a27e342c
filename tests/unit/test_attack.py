"""What an attack comes to: what is slow, hangs or is not so is a miss, and noise is none."""

import grpc

from benchmarks.attack.verdict import DEADLINES, FULL, SHORT, Fact, Goals, Result
from benchmarks.attack.victim import OPERATIONS, Samples, why_not_stopped


def samples(milliseconds: float, slowest: float | None = None) -> Samples:
    """A hundred of each operation, and perhaps two that were slower."""
    some = [milliseconds / 1e3] * 98 + [(slowest or milliseconds) / 1e3] * 2
    return Samples({name: list(some) for name in OPERATIONS})


def misses(attack: Samples, goals: Goals = FULL, fact: Fact | None = None) -> list[str]:
    """Of a row whose reference took 10 ms each time."""
    result = Result("row", "S0", "what", "", beside=samples(10), attack=attack)
    result.facts += [fact] if fact else []
    return result.misses(goals)


def test_what_is_no_slower_is_held() -> None:
    """Up to the goals."""
    assert misses(samples(19, 49)) == []


def test_ratios_are_missed() -> None:
    """The median and the slowest each have a goal; the short form knows no slowest."""
    assert misses(samples(21)) == [f"{name} p50 is 2.1 x" for name in OPERATIONS]
    assert misses(samples(10, 60)) == [f"{name} p99 is 6.0 x" for name in OPERATIONS]
    assert misses(samples(21, 60), SHORT) == []
    assert misses(samples(41), SHORT) == [f"{name} p50 is 4.1 x" for name in OPERATIONS]
    assert misses(samples(410), DEADLINES) == []


def test_a_hang_and_a_wrong_fact_are_missed_in_each_form() -> None:
    """However few samples there are."""
    hung = Samples(failures=["read hangs", "read hangs"])
    for goals in (FULL, SHORT, DEADLINES):
        assert misses(hung, goals) == ["read hangs"]
        assert misses(samples(10), goals, Fact("the job hears", "yes", held=False)) == ["the job hears: yes"]
        assert misses(samples(10), goals, Fact("the job hears", "no", held=True)) == []


def test_times_of_no_size_are_not_compared_at_their_slowest() -> None:
    """A tick of the scheduler is many times a short call."""
    result = Result("row", "S0", "what", "", beside=samples(0.5), attack=samples(0.5, 15))
    assert result.misses(FULL) == []


class Refusal(grpc.RpcError):
    """What a call ends with."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        """Which."""
        return self._code

    def details(self) -> str:
        """Why."""
        return "the words"


def test_a_start_that_was_taken_back_is_no_job_that_cannot_be_stopped() -> None:
    """Its caller had gone: the list had the job, and the stop does not find it any more."""
    assert why_not_stopped(None) == ""
    assert why_not_stopped(Refusal(grpc.StatusCode.NOT_FOUND)) == ""
    assert why_not_stopped(Refusal(grpc.StatusCode.DEADLINE_EXCEEDED)) == "hangs"
    assert why_not_stopped(Refusal(grpc.StatusCode.INTERNAL)) == "fails: INTERNAL the words"
