"""Intervals and verdicts: what they must say, and how often they are right in simulations.

    python -m tests.test_stats                the whole table of level and coverage, 200 trials a cell
    python -m tests.test_stats 500 30         500 trials, at 30 problems
"""

import math
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

import eval
from data import stats
from tests.claims import arms


# ------------------------------------------------------------------------------------------------
# Simulated evaluations: true rates of the problems, answers, what the intervals say
# ------------------------------------------------------------------------------------------------

def beta(rng, rate, unlike, P):
    """P true rates of mean `rate`.  unlike: a + b of their Beta: 0.5 all or nothing, 1e4 equal."""
    return rng.beta(rate * unlike, (1 - rate) * unlike, P)


def two_models(rng, kind, P, first, second, unlike):
    """True rates of two models, (P,) each, of means first and second.
    apart    drawn apart
    shifted  the same problems are hard, and none is harder for the second
    turned   the second is the first, but some problems turn to always right
    spread   drawn apart, the second's problems nearly alike: under the null d is not symmetric"""
    if kind == "shifted":
        parts = np.diff([0, first, second, 1])[:, None] * unlike     # a Dirichlet, cut twice
        gamma = rng.standard_gamma(np.broadcast_to(parts, (3, P)))
        return (gamma.cumsum(0) / gamma.sum(0))[:2]
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
        a, b = rng.binomial(k, q) / k, rng.binomial(k, p) / k
        mean, low, high, p = stats.paired_difference(a - b, flips)
        assert (low > 0 or high < 0) == (p < 0.05) and low <= mean <= high
        given, held = stats.no_verdict(a, b) is None, low <= second - first <= high
        counts += [given and p < 0.05, not given, held, held and given]
    level, withheld, held, held_given = counts / trials
    return level, withheld, held, held_given / (1 - withheld) if withheld < 1 else 1.0


RATES = ((.05, .05), (.2, .2), (.5, .5), (.95, .95), (.05, .15), (.05, .3), (.2, .3), (.4, .6),
         (.5, .95), (.85, .95))


# (P, k, unlike, rate): the weak corners of one model's interval, and the middle
ONE = [(30, 16, unlike, rate) for unlike in (0.5, 4, 1e4) for rate in (.05, .95)]
ONE += [(30, 16, 1, .3), (30, 4, 1, .1), (100, 16, 0.5, .05), (500, 16, 0.5, .95), (100, 2, 4, .5)]


@pytest.mark.parametrize("P, k, unlike, rate", ONE)
def test_the_interval_of_one_model_covers_its_rate(P, k, unlike, rate):
    coverage, width = one_coverage(P, k, rate, unlike, 500)
    assert 0.93 <= coverage <= 0.995 and width < 0.3


def test_with_one_sample_each_the_coverage_is_exact():
    """Summed over all counts.  Wilson's interval dips below 93 % at 1 rate in 30 (30 problems)."""
    for P, least in ((30, 0.924), (100, 0.927), (500, 0.942)):
        ends = [stats.interval([1] * c + [0] * (P - c), [1] * P)[:2] for c in range(P + 1)]
        coverage = []
        for rate in np.arange(0.05, 0.951, 0.01):
            hits = [c for c, (low, high) in enumerate(ends) if low <= rate <= high]
            coverage.append(sum(math.comb(P, c) * rate**c * (1 - rate)**(P - c) for c in hits))
        assert least <= min(coverage) and max(coverage) < 0.98
        assert np.mean(np.array(coverage) < 0.93) < 0.05


# (P, k, how the two differ, rates, unlike)
PAIRS = [(30, 16, "spread", .2, .2, 4), (30, 1, "apart", .5, .5, 1),
         (30, 1, "shifted", .2, .2, 1), (100, 1, "apart", .05, .05, 1),
         (30, 16, "apart", .05, .05, 0.5), (30, 16, "shifted", .5, .5, 4),
         (30, 16, "apart", .95, .95, 4), (100, 16, "apart", .2, .2, 0.5),
         (500, 1, "apart", .5, .5, 1),
         (30, 1, "apart", .05, .3, 1), (30, 1, "turned", .4, .6, 1), (30, 16, "shifted", .2, .3, 4),
         (30, 16, "turned", .05, .15, 1e4), (30, 16, "turned", .2, .3, 0.5),
         (100, 1, "shifted", .85, .95, 1), (100, 16, "apart", .4, .6, 0.5),
         (100, 16, "turned", .05, .15, 4)]


@pytest.mark.parametrize("P, k, kind, first, second, unlike", PAIRS)
def test_verdicts_hold_their_level_and_intervals_cover(P, k, kind, first, second, unlike):
    """The full table is `python -m tests.test_stats`: some 15 min."""
    level, withheld, held, held_given = pair_coverage(P, k, kind, first, second, unlike, 400)
    assert held >= 0.93 and (held_given >= 0.93 or withheld > 0.8)
    assert first != second or level <= 0.06
    assert withheld < 0.7 or max(first, second) < 0.3


# ------------------------------------------------------------------------------------------------
# One comparison
# ------------------------------------------------------------------------------------------------

def test_the_interval_excludes_0_exactly_where_p_is_below_5_percent():
    rng, seen = np.random.default_rng(0), 0
    for trial in range(600):
        P, k = rng.integers(1, 60), rng.choice([1, 2, 3, 16])
        d = (rng.binomial(k, rng.random(), P) - rng.binomial(k, rng.random(), P)) / k
        d[rng.random(P) < rng.random()] = 0              # ties
        mean, low, high, p = stats.paired_difference(d, flips=1000)
        assert (low > 0 or high < 0) == (p < 0.05) and -1 <= low <= mean <= high <= 1
        assert low < high and (p >= 0.05 or np.count_nonzero(d) >= stats.FEW)
        seen += p < 0.05
    assert 100 < seen < 500


def test_a_model_that_rests_on_two_problems_has_no_verdict_unless_it_is_clear():
    """16 samples a problem.  One model always right on 2 of 30; the other a little on all."""
    def said(mine, control):
        rows = [[{"id": str(i), "correct": j < c} for i, c in enumerate(right) for j in range(16)]
                for right in (mine, control)]
        return stats.paired(*rows)
    few, little, much = [16, 16] + [0] * 28, [2] * 30, [5] * 30
    for a, b in ((few, little), (little, few), ([0] * 30, little), ([16] * 30, [14] * 30)):
        assert said(a, b)["withheld"].startswith("one model is right, or wrong, on so few")
    for a, b in (([0] * 30, much), ([16] * 30, [11] * 30), ([2] * 30, much)):
        found = said(a, b)
        assert found["withheld"] is None and found["p"] < 0.05


def test_six_problems_that_differ_can_show_something_and_five_cannot():
    def said(d):
        rows = [[{"id": str(i), "correct": bool(right)} for i, right in enumerate(one)]
                for one in (np.array(d) > 0, np.array(d) < 0)]
        return stats.paired(*rows)
    found = said([1] * 6 + [0] * 24)
    assert found["withheld"] is None and found["p"] < 0.05 and found["interval"][0] > 0
    for d in ([-1] * 5 + [0] * 495, [1] * 5, [1, -1, 1] + [0] * 30, [0] * 50):
        found, moved = said(d), np.count_nonzero(d)
        assert found["p"] > 0.05 and found["interval"][0] < 0 < found["interval"][1]
        assert found["withheld"] == (f"only {moved} of {len(d)} problems differ, and 6 are needed "
                                     "for p < 0.05")


@pytest.mark.parametrize("d", [
    [0] * 30, [1] * 30, [.5] * 30, [1] + [0] * 29, [-.25] * 8 + [0] * 92])
def test_no_interval_is_a_point_however_equal_the_differences(d):
    mean, low, high, _ = stats.paired_difference(d)
    assert (high - mean > 0.015 or mean == 1) and mean - low > 0.015


def test_the_p_is_that_of_all_sign_flips():
    """The second and third have equal sums that differ by rounding."""
    for d in ([.75, .75, .75, -.25], [1 / 3] * 7 + [-2 / 3], [.1] * 9):
        signs = np.array(np.meshgrid(*[[-1, 1]] * len(d))).reshape(len(d), -1)
        exact = np.mean(np.abs(signs.T @ d) >= abs(sum(d)) - 1e-9)
        assert stats.paired_difference(d)[3] == pytest.approx(exact, abs=0.015)


def test_large_comparisons_are_fast():
    rng = np.random.default_rng(0)
    began = time.process_time()
    for P in (500, 2000):
        stats.paired_difference(rng.integers(-16, 17, P) / 16)
    assert time.process_time() - began < 2


# ------------------------------------------------------------------------------------------------
# Over seeds
# ------------------------------------------------------------------------------------------------

def runs(*right, n=100):
    """A run of n samples for each number of right ones."""
    row = {"sample": 0, "tokens": 1, "finish": "stop", "extracted": "1", "seed": [0, 0, 0], "settings": {}}
    return [[row | {"id": str(i), "correct": i < c} for i in range(n)] for c in right]


@pytest.mark.parametrize("mine, base, mean, reason", [
    ((57, 57), (50, 50), 0.07, "2 of the 3 seeds that an interval needs"),
    # 0.57 - 0.5 and 0.64 - 0.57 differ in the last bit
    ((57, 64), (50, 57), 0.07, "2 of the 3 seeds that an interval needs"),
    ((57,), (50,), 0.07, "1 of the 3 seeds that an interval needs"),
    ((57, 64, 71), (50, 57, 64), 0.07, "all 3 seeds are equal, which leaves no spread"),
    ((50,) * 5, None, 0.5, "all 5 seeds are equal, which leaves no spread")])
def test_too_few_seeds_or_equal_ones_have_no_interval(mine, base, mean, reason):
    found = arms.over_seeds(runs(*mine), base and runs(*base))
    assert found[0] == pytest.approx(mean) and found[1:3] == (None, None)
    assert found[3].startswith(reason)
    said = eval.verdict("a", "b", "is it so", *found)
    assert said.startswith(f"Is it so? a against b: {mean:+.3f}, no interval, no verdict: {reason}")
    assert "better" not in said and "[" not in said


def test_seeds_that_differ_have_the_interval_of_student():
    mean, low, high, withheld = arms.over_seeds(runs(57, 60, 66), runs(50, 51, 52))
    assert withheld is None and mean == pytest.approx(0.1)
    half = 4.302653 * np.std([.07, .09, .14], ddof=1) / 3 ** 0.5
    assert (low, high) == pytest.approx((0.1 - half, 0.1 + half), rel=1e-4)
    assert arms.over_seeds(runs(99, 100, 99))[2] == 1, "a rate ends at 1"


def test_a_table_over_seeds_has_one_method():
    """One arm with equal seeds beside others: no interval over questions under that caption."""
    a, b, _ = arms.SECTIONS["layers"][1]
    rows = {"base": runs(50, 51, 52), a: runs(60, 60, 60), b: runs(57, 58, 59),
            "a higher layer": runs(40, 50, 45)}
    text = arms.describe(SimpleNamespace(seeds=3, low=0, layer=1, high=2), "layers", rows)
    cells = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert [cell[0][2:] for cell in cells] == list(rows)
    assert cells[1][1] == "0.600, no interval" and cells[1][2].startswith("+0.090 [+0.06")
    assert cells[2][1].startswith("0.580 [0.55") and cells[2][2] == "+0.070, no interval |"


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
    trials, *sizes = map(int, sys.argv[1:] or (200, 30, 100, 500))
    main(trials, sizes)
