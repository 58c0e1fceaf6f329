"""Intervals and verdicts: what they must say, and how often they are right in simulations.

    python -m tests.test_stats                the whole table of level and coverage, some 10 minutes
"""

import sys

import numpy as np
import pytest

from data import stats


# ------------------------------------------------------------------------------------------------
# Simulated evaluations: true rates of the problems, answers, what the intervals say
# ------------------------------------------------------------------------------------------------

def beta(rng, rate, unlike, P):
    """P true rates of mean `rate`.  unlike: a + b of their Beta: 0.5 all or nothing, 1e4 equal."""
    return rng.beta(rate * unlike, (1 - rate) * unlike, P)


def two_models(rng, kind, P, first, second, unlike):
    """True rates of two models, (P,) each, of means first and second.
    apart    drawn apart
    shifted  the same problems are hard: each has the same quantile of either Beta
    turned   the second is the first, but some problems turn to always right
    spread   drawn apart, the second's problems nearly alike: under the null d is not symmetric"""
    if kind == "shifted":
        at = rng.integers(20_000, size=P)
        return [np.sort(beta(rng, rate, unlike, 20_000))[at] for rate in (first, second)]
    p = beta(rng, first, unlike, P)
    if kind == "turned":
        return p, np.where(rng.random(P) < (second - first) / (1 - first), 1.0, p)
    return p, beta(rng, second, 30 if kind == "spread" else unlike, P)


def one_coverage(P, k, rate, unlike, trials, seed=0):
    """-> share of intervals of one model that hold its true rate, mean width."""
    rng, hits, width = np.random.default_rng(seed), 0, 0
    for _ in range(trials):
        c = rng.binomial(k, beta(rng, rate, unlike, P))
        low, high, _ = stats.interval(c, np.full(P, k))
        hits, width = hits + (low <= rate <= high), width + high - low
    return hits / trials, width / trials


def pair_coverage(P, k, kind, first, second, unlike, trials, seed=0, flips=1000):
    """-> shares: verdicts better or worse; withheld; intervals that hold the true difference, of
    all and where a verdict is given (1 if it never is)."""
    rng, counts = np.random.default_rng(seed), np.zeros(4)
    for _ in range(trials):
        p, q = two_models(rng, kind, P, first, second, unlike)
        d = (rng.binomial(k, q) - rng.binomial(k, p)) / k
        mean, low, high, p = stats.paired_difference(d, flips)
        assert (low > 0 or high < 0) == (p < 0.05) and low <= mean <= high
        given, held = np.count_nonzero(d) >= stats.FEW, low <= second - first <= high
        counts += [p < 0.05, not given, held, held and given]
    level, withheld, held, held_given = counts / trials
    return level, withheld, held, held_given / (1 - withheld) if withheld < 1 else 1.0


RATES = ((.05, .05), (.2, .2), (.5, .5), (.95, .95), (.05, .15), (.05, .3), (.2, .3), (.4, .6),
         (.5, .95), (.85, .95))


def main(trials, sizes):
    for P in sizes:
        for k, unlike in ((1, 1), (16, 0.5), (16, 4), (16, 1e4)):
            for rate in (.05, .1, .2, .35, .5, .65, .8, .9, .95):
                found = one_coverage(P, k, rate, unlike, trials)
                print(f"one  | {P} x {k} | {rate} | {unlike:g} | {found[0]:.1%} | {found[1]:.3f}")
            for kind in ("apart", "shifted", "turned", "spread"):
                for first, second in RATES:
                    if kind == "shifted" and first == second and unlike == 1e4:
                        continue                         # is "apart"
                    level, held, *all_given = pair_coverage(P, k, kind, first, second, unlike,
                                                            trials)
                    print(f"pair | {P} x {k} | {kind} | {first} {second} | {unlike:g} | {level:.1%}"
                          " | {:.1%} | {:.1%} | {:.1%}".format(held, *all_given), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(word) for word in sys.argv[2:]])
