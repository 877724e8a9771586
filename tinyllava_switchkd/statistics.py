"""Standard errors of scores, and tests of whether one checkpoint is better than another.

Questions about the same picture form a cluster. Every headline score is a function of sums over its units
(`Benchmark.units`, `Benchmark.headline`): a mean for most benchmarks, F1 for POPE, sums of ratios for MME. Its standard
error is linearised over clusters. For a mean this is the usual cluster-robust standard error (Miller, "Adding Error
Bars to Evals", arXiv 2411.00640, equation 4, with a factor G / (G - 1) for G clusters). Two checkpoints are compared on
the same questions. The interval comes from a paired bootstrap over clusters; the p-value comes from McNemar's test if
answers are right or wrong, otherwise from the bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    Figure = float | np.ndarray
    Sums = Mapping[str, Figure]
    Headline = Callable[[Sums], Figure]

Unit = tuple[Hashable, Hashable, Mapping[str, float]]
"""Cluster, unit, and what the unit adds to each sum."""

RESAMPLES = 10_000
LEVEL = 0.95


def cluster_sums(units: Iterable[Unit]) -> dict[Hashable, dict[str, float]]:
    """Cluster -> what it adds to each sum; 0 where it has no such part."""
    units = list(units)
    names = dict.fromkeys(name for _, _, parts in units for name in parts)
    sums: dict[Hashable, dict[str, float]] = {}
    for cluster, _, parts in units:
        of_cluster = sums.setdefault(cluster, dict.fromkeys(names, 0.0))
        for name, value in parts.items():
            of_cluster[name] += value
    return sums


def total(sums: Mapping[Hashable, Mapping[str, float]]) -> dict[str, float]:
    """Sums over all clusters."""
    names = next(iter(sums.values()), {})
    return {name: math.fsum(of_cluster[name] for of_cluster in sums.values()) for name in names}


def standard_error(units: Iterable[Unit], headline: Headline) -> float | None:
    """Standard error of a score, on its scale; None with fewer than two clusters."""
    sums = cluster_sums(units)
    count = len(sums)
    if count < 2:
        return None
    whole = total(sums)
    gradient = {}
    for name, value in whole.items():
        step = 1e-4 * max(1.0, abs(value))
        high, low = (float(headline({**whole, name: value + shift})) for shift in (step, -step))
        gradient[name] = (high - low) / (2 * step)
    # How far each cluster moves the score: the gradient times the cluster's deviation from the mean cluster.
    moves = [
        sum(slope * (of_cluster[name] - whole[name] / count) for name, slope in gradient.items())
        for of_cluster in sums.values()
    ]
    return math.sqrt(math.fsum(move**2 for move in moves) * count / (count - 1))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of independent values, such as paired differences between runs, and its 95 % interval by Student's t.

    Returns:
        mean, lower and upper end; for a single value, whose spread is unknown, the ends are infinite.
    """
    from scipy.stats import t

    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    reach = float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * spread / math.sqrt(len(values))
    return mean, mean - reach, mean + reach


@dataclass(frozen=True)
class Comparison:
    """Second score minus first, on the same questions.

    Attributes:
        first: score of the first checkpoint.
        second: score of the second.
        low: lower end of the 95 % interval of the difference.
        high: its upper end.
        p: p-value of the hypothesis that there is no difference.
        test: the test that gave p.
        questions: number of units compared.
        clusters: number of pictures they are about.
        gained: units that the second answered better.
        lost: units that the first answered better.
    """

    first: float
    second: float
    low: float
    high: float
    p: float
    test: str
    questions: int
    clusters: int
    gained: int
    lost: int

    @property
    def difference(self) -> float:
        return self.second - self.first


def compare(first: Sequence[Unit], second: Sequence[Unit], headline: Headline, seed: int = 0) -> Comparison:
    """Compare two checkpoints' answers to the same questions.

    Args:
        first, second: units of the two checkpoints, in any order.
        headline: computes the score from the sums.
        seed: of the resampling.

    Raises:
        ValueError: the two have different questions.
    """
    a = {unit: (cluster, parts) for cluster, unit, parts in first}
    b = {unit: (cluster, parts) for cluster, unit, parts in second}
    if a.keys() != b.keys():
        odd = sorted(map(str, a.keys() ^ b.keys()))
        raise ValueError(f"the questions are not the same: {len(odd)} are in only one of the two ({odd[0]}, ...)")
    sums_a, sums_b = cluster_sums(first), cluster_sums(second)
    clusters = list(sums_a)
    scores = float(headline(total(sums_a))), float(headline(total(sums_b)))
    low, high, p = _bootstrap(sums_a, sums_b, headline, seed)
    test = "bootstrap over pictures"
    changes = {unit: _value(b[unit][1]) - _value(a[unit][1]) for unit in a}
    if all(parts.keys() == {"value", "count"} and parts["value"] in (0, 1) for _, parts in [*a.values(), *b.values()]):
        by_cluster: dict[Hashable, float] = dict.fromkeys(clusters, 0.0)
        for unit, change in changes.items():
            by_cluster[a[unit][0]] += change
        alone = len(clusters) == len(a)
        p = mcnemar_exact(changes.values()) if alone else mcnemar_clustered(by_cluster.values())
        test = "McNemar, exact" if alone else "McNemar, by picture"
    gained = sum(change > 0 for change in changes.values())
    lost = sum(change < 0 for change in changes.values())
    return Comparison(*scores, low, high, p, test, len(a), len(clusters), gained, lost)


def _value(parts: Mapping[str, float]) -> float:
    """How right a unit is; for F1 and MME, whose parts are confusion-matrix cells and counts, the correct ones."""
    if "value" in parts:
        return parts["value"]
    return sum(value for name, value in parts.items() if name.rsplit(":", 1)[-1] in ("TP", "TN", "right"))


def _bootstrap(
    a: Mapping[Hashable, Mapping[str, float]], b: Mapping[Hashable, Mapping[str, float]], headline: Headline, seed: int
) -> tuple[float, float, float]:
    """Percentile interval and two-sided p of the difference, by resampling clusters, the same for both checkpoints."""
    import numpy as np

    def scores(sums: Mapping[Hashable, Mapping[str, float]], weights: np.ndarray) -> np.ndarray:
        values = np.array([list(sums[cluster].values()) for cluster in a])  # [G, P]
        return np.asarray(headline(dict(zip(next(iter(sums.values())), (weights @ values).T, strict=True))))  # [R]

    generator = np.random.default_rng(seed)
    count = len(a)
    at_once = max(1, 20_000_000 // count)  # weights in memory
    differences = []
    for start in range(0, RESAMPLES, at_once):
        size = min(at_once, RESAMPLES - start)
        weights = generator.multinomial(count, np.full(count, 1 / count), size=size)  # [R, G]
        differences.append(scores(b, weights) - scores(a, weights))
    sample = np.concatenate(differences)
    low, high = np.quantile(sample, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    beyond = min((sample <= 0).sum(), (sample >= 0).sum())
    return float(low), float(high), float(min(1.0, 2 * (beyond + 1) / (RESAMPLES + 1)))


def mcnemar_exact(changes: Iterable[float]) -> float:
    """Exact two-sided p of McNemar's test: under the null hypothesis a change in either direction is equally likely.

    Args:
        changes: +1, 0 or -1 for each question.
    """
    changes = list(changes)
    gained, lost = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    count, fewer = gained + lost, min(gained, lost)
    logs = [math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(fewer + 1)]
    tail = sum(math.exp(log - count * math.log(2)) for log in logs)
    return min(1.0, 2 * tail)


def mcnemar_clustered(changes: Iterable[float]) -> float:
    """Two-sided p of McNemar's test with clusters, by normal approximation.

    The statistic is (sum of d)^2 / (sum of d^2), where d is a cluster's gains minus its losses. With one question per
    cluster it is McNemar's own, (b - c)^2 / (b + c).

    Args:
        changes: d of each cluster.
    """
    changes = list(changes)
    spread = sum(change**2 for change in changes)
    return math.erfc(abs(sum(changes)) / math.sqrt(2 * spread)) if spread else 1.0


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """The p-values of a family of tests, adjusted by Holm's step-down method."""
    ordered = sorted(p_values, key=p_values.__getitem__)
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = highest
    return adjusted
