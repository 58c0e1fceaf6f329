"""Numbers with error bars: intervals, tests, the sentence that says what they show, a figure.

    low, high, method = interval(c, n)                 95 % interval of Pass@1, c right of n samples
    mean, low, high, p = paired_difference(d)          two models on the same problems
    summarize(rows), paired(rows, other_rows)          of graded samples
    verdict("SAE-Tuning", "base", "is it better", mean, low, high)
    figure([("base", 0.5, 0.4, 0.6), ...], title)      -> SVG text
    curves([{"step": 1, "fvu": 0.9}, ...], title)      -> SVG text, of the log of a run

Pure functions of numbers and of graded samples, the rows that eval.py writes.
Letters in shape comments: P problems, R permutations.
"""

import html
import math
from collections import Counter, defaultdict

import numpy as np

from data.files import check, printable

# ---- Intervals ---------------------------------------------------------------------------------

Z = 1.959964                         # 97.5 % quantile of the normal distribution
FEW = 6                              # five problems prove nothing: all turn one way in 1 case of 16

def pass_at_k(n, c, k):
    """Chance that k of n samples, c of them right, hold a right one (arXiv 2107.03374).
    Unbiased, unlike 1-(1-c/n)^k.  ValueError unless c and k are within n."""
    check(0 <= c <= n and 1 <= k <= n,
          f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)     # whole numbers, which do not overflow

def wilson(c, n, z=Z):
    """95 % score interval of a rate, c successes in n trials (Wilson 1927) -> (low, high)."""
    middle, half = c + z * z / 2, z * (c * (n - c) / n + z * z / 4) ** 0.5
    low, high = (middle - half) / (n + z * z), (middle + half) / (n + z * z)
    return float(max(0, low)), float(min(1, high))

def student(df, z=Z):
    """97.5 % quantile of Student's t, expanded about the normal one (Fisher and Cornish 1960)."""
    assert df >= 2, df
    p = math.erf(z / 2**0.5)
    if df == 2:                                          # closed form, where it is too far off
        return p * (2 / (1 - p * p)) ** 0.5
    terms = [(z**3 + z) / 4,
             (5 * z**5 + 16 * z**3 + 3 * z) / 96,
             (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
             (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160]
    return z + sum(term / df**i for i, term in enumerate(terms, start=1))

def variance_parts(c, n):
    """c right of n samples, both (P,) -> (within, between), parts of the variance of c/n.
    within   mean variance that sampling adds, E[p(1-p)/n]; None if no problem has two samples
    between  variance of the true rates p, which is left with samples without end"""
    p, several = c / n, n > 1                                    # (P,), (P,)
    if not several.any():
        return None, None
    within = (p * (1 - p) / np.maximum(n - 1, 1))[several].mean()
    return float(within), float(max(p.var(ddof=min(1, len(p) - 1)) - within, 0))

def carriers(x):
    """On how many problems the sum of x >= 0, (P,), rests: on all that are > 0 if these are equal.
    Kish's effective sample size."""
    return float(x.sum() ** 2 / max((x * x).sum(), 1e-12))

def interval(c, n):
    """95 % interval of Pass@1 over new problems and new samples -> (low, high, method).
    c right of n samples, both (P,).  Simulated coverage: tests/test_stats.py."""
    c, n = np.asarray(c), np.asarray(n)
    p, P = c / n, len(n)                                         # (P,)
    mean = p.mean()
    # One sample each: an answer is a Bernoulli trial of rate E[p], however the rates vary.
    if n.max() == 1:
        return *wilson(c.sum(), P), "Wilson"
    # How unlike problems are cannot be told from few.  At worst each is all right or all wrong.
    if min(carriers(p), carriers(1 - p)) < FEW:
        return *wilson(p.sum(), P), "Wilson, one trial per problem: conservative"
    # As many trials as have the variance seen, and t for the normal quantile.
    within, between = variance_parts(c, n)
    trials = mean * (1 - mean) / max((within + between) / P, mean * (1 - mean) / n.sum())
    return *wilson(mean * trials, trials, student(P - 1)), "Wilson, effective trials"

# ---- Tests -------------------------------------------------------------------------------------

def permutation_p(observed, draws, tolerance=1e-9):
    """Share of statistics, `draws` (R,) under the null and the observed one, at least as large.
    observed may be an array: a p for each.  tolerance: rounding apart of equal statistics."""
    draws = np.asarray(draws)
    as_large = draws >= np.asarray(observed)[..., None] - tolerance
    return (1 + as_large.sum(-1)) / (1 + len(draws))

def flip_test(d, flips, seed):
    """Differences per problem d, (P,) -> p, and the critical value of |sum d|, inf if it has none.
    Under the null the two models can be swapped problem by problem: each d takes either sign."""
    moved, rng = d[d != 0], np.random.default_rng(seed)          # a tie has no sign to flip
    sums = [np.abs(moved.sum(keepdims=True))]                    # what was seen comes first
    for _ in range(10):                                          # in pieces, to save memory
        signs = rng.integers(2, size=(flips // 10, len(moved))) * 2 - 1    # (R/10,P)
        sums.append(np.abs(signs @ moved))
    sums = np.concatenate(sums).round(9)                 # (1+R,); now equal ones compare as equal
    p = float(permutation_p(sums[0], sums[1:], tolerance=0))
    # Between the largest sum that has p >= 0.05 and the next one: far apart if d has few values.
    largest = np.sort(sums)[-math.ceil(0.05 * len(sums))]
    return p, float(largest + sums[sums > largest].min(initial=np.inf)) / 2

def paired_difference(d, flips=10_000, seed=0):
    """Differences per problem d, (P,) -> (mean, low, high, p), where low > 0 or high < 0 exactly
    if p < 0.05.  p: sign-flip test.  low, high: ends of the true means that it does not reject.
    Simulated level and coverage: tests/test_stats.py."""
    d = np.asarray(d, dtype=float)
    P, mean, squares = len(d), float(d.mean()), (d * d).sum()
    p, critical = flip_test(d, flips, seed)
    # In multiples of |d|.  Of fewer than FEW, the sum of all has no p < 0.05.
    critical = critical / squares ** 0.5 if critical < np.inf else FEW ** 0.5
    # How large is a d that is rare?  As the large ones seen; where few tell, as large as can be.
    size = most = max(1, np.abs(d).max())
    if min(carriers(np.abs(d)), carriers(np.abs(d - mean))) >= 10:
        size = (np.abs(d) ** 3).sum() / squares

    def rejected(delta):
        """At 0 the test itself.  Elsewhere |d| is the spread about delta; at least that of a d
        that is 0 or `size`, as what is rare may not have been seen."""
        spread = max(((d - delta) ** 2).sum(), P * abs(delta) * (size - abs(delta)))
        return abs(d.sum() - P * delta) > critical * spread ** 0.5

    ends = []
    for far in (-most, most):
        if p < 0.05 and mean * far < 0:
            far = 0
        near = mean
        for _ in range(60):                              # bisection
            middle = (near + far) / 2
            near, far = (near, middle) if rejected(middle) else (middle, far)
        ends.append(float(near))
    return mean, *ends, p

# ---- From graded samples to numbers ------------------------------------------------------------

def rates(rows):
    """Samples -> {problem id: (right, samples)}, in order of appearance."""
    counts = {}
    for row in rows:
        right, n = counts.get(row["id"], (0, 0))
        counts[row["id"]] = right + row["correct"], n + 1
    return counts

def majority(rows):
    """majority@k: share of problems whose most frequent answer is right; a tie counts in part.
    Right answers count as one, however they are written; a sample without an answer has no vote."""
    votes, scores = defaultdict(Counter), []            # {id: {answer: votes}}
    for row in rows:
        answer = "".join((row["extracted"] or "").split())
        votes[row["id"]][True if row["correct"] else answer] += row["extracted"] is not None
    for count in votes.values():
        top = max(count.values())                       # 0 if nobody has an answer
        tied = [answer for answer, n in count.items() if n == top > 0]
        scores.append(tied.count(True) / max(len(tied), 1))
    return float(np.mean(scores))

def summarize(rows):
    """A model's samples -> its entry in summary.json: Pass@1, interval, lengths, failures."""
    c, n = np.array(list(rates(rows).values())).T                # (P,), (P,)
    low, high, method = interval(c, n)
    (within, between), P = variance_parts(c, n), len(n)
    k, each = int(n.min()), len(rows) / P                # not whole only in an interrupted file
    several = {}
    if k > 1:
        several = {f"pass@{k}": float(np.mean([pass_at_k(*pair, k) for pair in zip(n, c)])),
                   f"majority@{k}": majority(rows)}
    return {"problems": P, "samples": int(each) if each == int(each) else each,
            "pass@1": float(np.mean(c / n)), "interval": [low, high], "method": method,
            "error": {"samples": within and (within / P) ** 0.5,
                      "problems": between and (between / P) ** 0.5},
            **several,                                  # only there with several samples each
            "tokens": float(np.mean([row["tokens"] for row in rows])),
            "truncated": float(np.mean([row["finish"] == "length" for row in rows])),
            "no_answer": float(np.mean([row["extracted"] is None for row in rows])),
            "settings": rows[0]["settings"] | {"seed": rows[0]["seed"][0]}}

def no_verdict(a, b):
    """Rates of right answers of two models, (P,) each -> why the test gives no verdict, or None.
    It takes differences as symmetric.  Few problems always right against many seldom right are
    not (0.05 of 30: p < 0.05 in 16 % of nulls).  There a difference must show as 0s and 1s too."""
    d, thin = a - b, min(map(carriers, [a, 1 - a, b, 1 - b]))
    moved = np.count_nonzero(d)                                  # d (P,)
    if moved < FEW:
        return f"only {moved} of {len(d)} problems differ, and {FEW} are needed for p < 0.05"
    if thin < 3 and d.sum() ** 2 < Z * Z * np.abs(d).sum():
        return "one model is right, or wrong, on so few problems that the interval may mislead"
    return None

def paired(rows, first):
    """Two models on the same problems -> {"difference": rows - first, "interval", "p",
    "withheld": why there is no verdict, or None}.  ValueError: their problems are not the same."""
    ours, theirs = rates(rows), rates(first)
    odd = ", ".join(map(repr, sorted(ours.keys() ^ theirs.keys())))
    check(not odd, f"models are compared on the same problems; of one model only: {odd}")
    a, b = (np.array([of[key][0] / of[key][1] for key in ours]) for of in (ours, theirs))
    mean, low, high, p = paired_difference(a - b)
    return {"difference": mean, "interval": [low, high], "p": p, "withheld": no_verdict(a, b)}

# ---- What they show ----------------------------------------------------------------------------

def verdict(name, against, why, mean, low, high, withheld=None):
    """One comparison as a sentence; no difference is seen where the interval holds 0.
    withheld  why there is no verdict; low and high may then be None"""
    found = f"no verdict: {withheld}"
    if not withheld:
        found = "better" if low > 0 else "no difference is seen"
        found = "worse" if high < 0 else found
    question = why[0].upper() + why[1:]
    return f"{question}? {name} against {against}: {bracketed(mean, low, high, '+')}, {found}."

def bracketed(value, low, high, sign=""):
    """0.500 [0.400, 0.600]; sign "+" for differences.  low None: there is no interval."""
    if low is None:
        return f"{value:{sign}.3f}, no interval"
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"

STYLE = """<style>
text { font: 14px system-ui, sans-serif; fill: #22252a } rect { fill: #fdfcf9 }
path, circle { stroke: #b8650a; fill: #b8650a; stroke-width: 2 } .end { text-anchor: end }
.grid, .base { stroke: #8885; stroke-width: 1 } .base { stroke: #888; stroke-dasharray: 6 4 }
@media (prefers-color-scheme: dark) { text { fill: #e4e3df } rect { fill: #16171a } }
</style>"""

def figure(points, title):
    """Arms [(name, value, low, high)], top to bottom -> SVG text, 800 px wide, light and dark.
    A dashed line stands at the value of the first."""
    first = math.floor(min(low for _, _, low, _ in points) * 10)         # the axis, in tenths
    last = max(math.ceil(max(high for *_, high in points) * 10), first + 1)
    bottom = 50 + 28 * len(points)

    def x(value):
        return round(250 + 370 * (10 * value - first) / (last - first), 1)

    parts = []
    for tick in [i / 10 for i in range(first, last + 1)]:
        parts.append(f'<path class="grid" d="M{x(tick)} 44V{bottom}"/>')
        parts.append(words(x(tick), bottom + 22, f"{tick:.1f}", ' text-anchor="middle"'))
    parts.append(f'<path class="base" d="M{x(points[0][1])} 44V{bottom}"/>')
    for y, (name, value, low, high) in zip(range(64, bottom, 28), points):
        parts.append(words(16, y + 5, name if len(name) < 30 else f"{name[:28]}…"))
        parts.append(f'<circle cx="{x(value)}" cy="{y}" r="4"/>')
        parts.append(f'<path d="M{x(low)} {y}H{x(high)}"/>')
        parts.append(words(640, y + 5, bracketed(value, low, high)))
    return canvas(title, parts, bottom + 36)

def words(left, y, text, more=""):
    return f'<text x="{left}" y="{y}"{more}>{html.escape(printable(text))}</text>'

def canvas(title, parts, height):
    """Elements of a picture 800 px wide -> SVG text."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="800" height="{height}">\n{STYLE}'
    title = words(16, 28, title, ' style="font-weight: bold"')
    return "\n".join([head, '<rect width="100%" height="100%"/>', title, *parts, "</svg>\n"])

def curves(rows, title):
    """The log of a run, rows {"step": 1, "fvu": 0.9, ..} -> SVG text: over the steps, a panel for
    each value; those of several layers, "fvu.4" and "fvu.8", share one.  Draws only numbers."""
    panels, parts, top = defaultdict(lambda: defaultdict(list)), [], 60
    for row in rows:
        for name, number in row.items():
            point, (value, _, layer) = (row.get("step"), number), name.partition(".")
            drawn = all(type(x) in (int, float) and abs(x) < 1e300 for x in point)
            if drawn and name not in ("step", "seconds", "tok/s", "mfu", "gb"):
                panels[value][layer].append(point)       # {value: {layer: [(step, number)]}}
    count = sum(map(len, panels.values()))
    for value, layers in panels.items():
        height = max(96, 17 * len(layers))
        parts += panel(value, layers, top, height, max(4, 1200 // count))
        top += height + 42
    return canvas(title, parts, top)

def panel(value, layers, top, height, buckets):
    """One value, {layer: [(step, number)]}, below `top` -> elements: axes, curves, last numbers."""
    points, bottom, right = np.array(sum(layers.values(), []), float), top + height, ' class="end"'
    (first, low), (last, high) = points.min(0), points.max(0)
    parts = [f'<path class="grid" style="fill: none" d="M180 {top}V{bottom}H620"/>',
             words(16, top + 14, value[:14]), words(172, top + 8, f"{high:.4g}", right),
             words(172, bottom, f"{low:.4g}", right), words(180, bottom + 18, f"{first:,.0f}"),
             words(620, bottom + 18, f"step {last:,.0f}", right)]
    for i, (layer, points) in enumerate(sorted(layers.items(), key=lambda item: item[0].zfill(9))):
        x, y = np.array(points, float).T
        kept, name = thin(y, buckets), f"layer {layer}: " if layer else "last "
        across = 180 + 440 * (x[kept] - first) / (last - first or 1)
        up = bottom - height * (y[kept] - low) / (high - low or 1)
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(across, up))
        colour = f"hsl({(30 + 137 * i) % 360} 65% 50%)"
        parts.append(f'<path style="fill: none; stroke: {colour}" d="M{path}h.1"/>')
        place = 632, top + 8 + 17 * i
        parts.append(words(*place, f"{name}{y[-1]:.4g}", f' style="fill: {colour}"'))
    return parts

def thin(y, buckets):
    """y (n,) -> indices of the lowest and the highest of each of so many stretches: peaks stay."""
    parts = np.array_split(np.arange(len(y)), min(buckets, len(y)))
    low, high = ([part[pick(y[part])] for part in parts] for pick in (np.argmin, np.argmax))
    return sorted({*low, *high})
