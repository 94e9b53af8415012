"""How often the evaluation's intervals hold the truth, in simulations where it is known.

    python benchmarks/coverage.py --json benchmarks/results/coverage.json

Kept right: texts differ in how likely their answers stay right (a beta distribution), and five questions are asked of each. A
ratio of means: the KL of one method is log-normal over texts, and that of the other is half of it, times log-normal noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from keepkv.eval.bootstrap import Interval, combined, ratio_of_means
from keepkv.eval.provenance import commit, versions

BETA = {0.9: (9, 1), 0.98: (49, 1)}  # the mean, and the distribution over texts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--simulations", type=int, default=300)
    parser.add_argument("--json", type=Path, help="where to write the record")
    args = parser.parse_args()
    rng = np.random.default_rng(5)
    rows = [
        {
            "statistic": "kept right",
            "truth": truth,
            "texts": texts,
            **covered([kept(rng, texts, *BETA[truth]) for _ in range(args.simulations)], truth),
        }
        for texts in (5, 8, 20)
        for truth in BETA
    ]
    rows += [
        {
            "statistic": "ratio of means",
            "truth": 0.5,
            "texts": texts,
            **covered([ratio(rng, texts) for _ in range(args.simulations)], 0.5),
        }
        for texts in (4, 8, 12, 20)
    ]
    for row in rows:
        print(f"{row['statistic']}, {row['texts']} texts, {row['truth']}: {row['covered']:.0%}, width {row['width']:.3f}")
    if args.json:
        record = {"command": " ".join(["python", *sys.argv]), "commit": commit(), "versions": versions(), "rows": rows}
        args.json.write_text(json.dumps({**record, "simulations": args.simulations}, indent=1) + "\n", encoding="utf-8")


def kept(rng: np.random.Generator, texts: int, a: float, b: float) -> Interval | None:
    """The interval of one simulated task."""
    return combined([[[(float(rng.random() < p), 1.0) for _ in range(5)] for p in rng.beta(a, b, texts)]])


def ratio(rng: np.random.Generator, texts: int) -> Interval | None:
    """The interval of one simulated ratio, whose truth is 1/2."""
    return ratio_of_means([[[(0.5 * x * rng.lognormal(-0.045, 0.3), x)] for x in rng.lognormal(-3, 0.7, texts)]])


def covered(intervals: list[Interval | None], truth: float) -> dict[str, float]:
    """How many intervals hold the truth, and their mean width."""
    found = [interval for interval in intervals if interval is not None]
    hits = sum(interval.low <= truth <= interval.high for interval in found)
    return {"covered": hits / len(found), "width": round(float(np.mean([i.high - i.low for i in found])), 4)}


if __name__ == "__main__":
    main()
