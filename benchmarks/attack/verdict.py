"""Turn the samples of a row into figures next to their reference, and judge whether the goals are met."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from benchmarks.attack.victim import OPERATIONS, Samples
from benchmarks.report import median, percentile

P50_GOAL: Final = 2.0
P99_GOAL: Final = 5.0
# With few samples the highest of them stands for p99, and one burst of a neighbour on the machine makes it.
SHORT_P50_GOAL: Final = 4.0
# Less than a scheduler's tick is no time: a ratio of two such times says nothing.
LEAST_SECONDS: Final = 0.004
LEAST_SAMPLES: Final = 5
WIDTH: Final = 96


@dataclass(frozen=True, slots=True)
class Fact:
    """A fact that was looked at during the attack; `held`: whether it is as it should be."""

    what: str
    found: str
    held: bool


@dataclass(frozen=True, slots=True)
class Goals:
    """The highest ratios; None: no goal."""

    p50: float | None
    p99: float | None

    def __str__(self) -> str:
        if self.p50 is None:
            return "deadlines and facts alone"
        return f"p50 at most {self.p50:g} x" + ("" if self.p99 is None else f", p99 at most {self.p99:g} x")


FULL: Final = Goals(P50_GOAL, P99_GOAL)
SHORT: Final = Goals(SHORT_P50_GOAL, None)
DEADLINES: Final = Goals(None, None)


@dataclass(slots=True)
class Result:
    """All results of one row."""

    name: str
    entry: str
    what: str
    # empty, or the only version of cgroups on which it can be judged, and why
    only: str
    quiet: Samples = field(default_factory=Samples)
    beside: Samples = field(default_factory=Samples)
    attack: Samples = field(default_factory=Samples)
    facts: list[Fact] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def misses(self, goals: Goals) -> list[str]:
        """Return each fault in words."""
        found = [*dict.fromkeys(self.attack.failures), *self.failures]
        found += [f"beside the loop: {failure}" for failure in dict.fromkeys(self.beside.failures)]
        found += [f"{fact.what}: {fact.found}" for fact in self.facts if not fact.held]
        for operation in OPERATIONS:
            for share, goal in ((0.5, goals.p50), (0.99, goals.p99)):
                ratio = self.ratio(operation, share)
                if goal is not None and ratio is not None and ratio > goal:
                    found.append(f"{operation} p{share * 100:.0f} is {ratio:.1f} x")
        return found

    def ratio(self, operation: str, share: float) -> float | None:
        """The victim's time during the attack, divided by its time during a busy loop of the same client."""
        mine, other = self.attack.seconds[operation], self.beside.seconds[operation]
        if min(len(mine), len(other)) < LEAST_SAMPLES:
            return None
        return _at(mine, share) / max(_at(other, share), LEAST_SECONDS if share > 0.5 else 0.0)

    def lines(self, goals: Goals) -> list[str]:
        """Return lines for a terminal: one for the row, one for each operation and fact, and the verdict."""
        lines = [f"{self.name} ({self.entry}): {self.what}"]
        for operation in OPERATIONS:
            if not self.attack.seconds[operation] and not self.beside.seconds[operation]:
                continue
            cells = [_pair(samples.seconds[operation]) for samples in (self.quiet, self.beside, self.attack)]
            ratios = [self.ratio(operation, share) for share in (0.5, 0.99)]
            told = " / ".join("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
            lines.append(f"  {operation:<6}" + "".join(f"{cell:>20}" for cell in cells) + f"{told:>18}")
        lines += [f"  {fact.what}: {fact.found}" for fact in self.facts]
        misses = self.misses(goals)
        verdict = "held" if not misses else "MISSED: " + "; ".join(misses)
        if misses and self.only:
            verdict = f"held on {self.only}; here {'; '.join(misses)}"
        return [*lines, f"  {verdict}"]

    def data(self, goals: Goals) -> dict[str, Any]:
        """Return the results for a file."""
        operations = {}
        for operation in OPERATIONS:
            states = {"quiet": self.quiet, "beside": self.beside, "attack": self.attack}
            operations[operation] = {
                name: _summary(samples.seconds[operation]) for name, samples in states.items()
            }
            operations[operation]["ratio"] = {
                "p50": self.ratio(operation, 0.5),
                "p99": self.ratio(operation, 0.99),
            }
        return {
            "name": self.name,
            "entry": self.entry,
            "what": self.what,
            "only": self.only,
            "operations": operations,
            "facts": [{"what": fact.what, "found": fact.found, "held": fact.held} for fact in self.facts],
            "misses": self.misses(goals),
        }


HEADINGS: Final = f"{'ms, p50 / p99':<8}{'quiet':>15}{'beside a busy loop':>20}{'attacked':>20}{'ratios':>18}"


def _pair(seconds: Sequence[float]) -> str:
    if not seconds:
        return "-"
    return f"{median(seconds) * 1e3:.1f} / {percentile(seconds, 0.99) * 1e3:.1f}"


def _at(seconds: Sequence[float], share: float) -> float:
    return median(seconds) if share == 0.5 else percentile(seconds, share)


def _summary(seconds: Sequence[float]) -> dict[str, Any]:
    if not seconds:
        return {"count": 0}
    return {"count": len(seconds), "p50_seconds": median(seconds), "p99_seconds": percentile(seconds, 0.99)}
