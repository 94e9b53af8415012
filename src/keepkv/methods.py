"""The method table. A method is one row; what its functions do is said where they are: score, allot, choose, merge and so on.

Adding one: a function for what is new, and a row here; or, from outside, `register`, or --method FILE.py:NAME.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache, partial
from pathlib import Path
from types import ModuleType

from keepkv import allot, choose, cluster, merge, reference, score, sets
from keepkv.errors import MethodError, nearest
from keepkv.method import Method, by_cosine, by_sets, by_similarity, closed_up, fitted, followers
from keepkv.pairs import Pairs
from keepkv.recall import Repeat

WHOLE = Repeat(chunk=2048, draft=1, alone=True, queries=True, needed=True)  # as in KVzip: every piece over the full cache

METHODS = {
    method.name: method
    for method in (
        Method(
            "full", "every token, whatever the budget: the yardstick", "", score.recency, keeps_all=True,
            cost="nothing", good="what every other method is compared with", bad="saves nothing",
        ),
        Method(
            "random", "random tokens, the first 4 and the last 32: the control", "", score.chance,
            cost="nothing", good="what every method must beat", bad="everything else",
        ),
        Method(
            "streaming", "the first 4 and the newest tokens, at their own positions", "StreamingLLM, arXiv 2309.17453",
            score.recency, recent=0, cost="nothing",
            good="endless text of which only the newest part matters", bad="facts in the middle: they are gone by design",
        ),
        Method(
            "streaming-shifted", "the first 4 and the newest tokens, positions re-assigned without gaps",
            "StreamingLLM, arXiv 2309.17453", score.recency, recent=0, merge=closed_up, cost="one rotation of the kept keys",
            good="text longer than the model was trained for", bad="facts in the middle: they are gone by design",
        ),
        Method(
            "tova", "what the newest query attends to, the same tokens in all heads", "TOVA, arXiv 2401.06104",
            score.last_query, allot.together(allot.uniform), sinks=0, recent=1, cost="one query's attention",
            good="decoding (period=1), where every step corrects the last", bad="one query says little about the next question",
        ),
        Method(
            "h2o", "half newest tokens, half those with most accumulated attention", "H2O, arXiv 2306.14048",
            score.accumulated, sinks=0, recent=0.5, column_mass=True, cost="all attention summed once more while reading",
            good="what was said often", bad="sums favour early tokens, which more queries have seen",
        ),
        Method(
            "snapkv", "what the last 32 queries attend to, pooled over neighbours", "SnapKV, arXiv 2404.14469",
            score.pooled_window, sinks=0, cost="32 queries' attention",
            good="a question that stands at the end of the prompt", bad="questions that come after the compression",
        ),
        Method(
            "pyramidkv", "SnapKV's tokens, fewer of them the higher the layer", "PyramidKV, arXiv 2406.02069",
            score.pooled_window, allot.pyramid, sinks=0, cost="32 queries' attention",
            good="models whose upper layers attend to few tokens", bad="models whose upper layers need more",
        ),
        Method(
            "pyramidinfer", "what the newest fifth of queries attends to, layers on a cosine", "PyramidInfer, arXiv 2405.12532",
            score.newest_fifth, allot.together(allot.cosine_layers), recent=0, cost="a fifth of the queries' attention again",
            good="its schedule of layers, which KeepKV borrows", bad="one set of tokens for all heads; computes no less here",
        ),
        Method(
            "expected", "expected attention of Gaussian future queries × value norm", "Expected Attention, arXiv 2510.00636",
            score.expected_attention, recent=0, cost="a d × d form per token and query head",
            good="questions that come after the compression, at moderate budgets", bad="heads whose queries are not Gaussian",
        ),
        Method(
            "keydiff", "the keys most unlike the mean key", "KeyDiff, arXiv 2504.15364",
            score.distinct_keys, sinks=0, recent=0, cost="one pass over the keys",
            good="reading in chunks under a fixed limit, without any query", bad="what is asked for but not unusual",
        ),
        Method(
            "knorm", "the keys of smallest norm", "L2 norm, arXiv 2406.11430",
            score.small_keys, sinks=0, recent=0, cost="one pass over the keys",
            good="the cheapest score there is, at half the cache", bad="small budgets; models with norms on the keys",
        ),
        Method(
            "adakv", "SnapKV's tokens, a layer's slots shared among its heads by score", "AdaKV, arXiv 2407.11550",
            score.pooled_window, allot.within_layers, sinks=0, cost="32 queries' attention",
            good="heads that differ: the ragged slots are stored as such", bad="questions that come after the compression",
        ),
        Method(
            "criticalkv", "half by SnapKV's score, half by what leaving a token out may change", "CriticalKV, arXiv 2502.03805",
            score.pooled_window, sinks=0, choose=choose.two_stages, cost="every value through the output projection",
            good="SnapKV's cases, a little better", bad="questions that come after the compression",
        ),
        Method(
            "kvzip", "what a repetition of the text asks for, over all layers and heads", "KVzip, arXiv 2505.23416",
            score.asked_again, partial(allot.everywhere, floor=0.0), recent=0, repeat=WHOLE,
            cost="reading the text again over its full cache: two to three times the reading",
            good="verbatim details, whatever is asked later", bad="aggregates (counting, summing up): no mass is kept",
        ),
        Method(
            "r-kv", "important and not redundant tokens, and the last 8", "R-KV, arXiv 2505.24133",
            score.joint, sinks=0, recent=8, cost="the cosines of all pairs of keys",
            good="long reasoning that repeats itself (period=128)", bad="prompts: 8 queries decide what is important",
        ),
        Method(
            "keepkv-paper", "votes and ZIP merging as in the paper, with its pole guarded", "KeepKV, arXiv 2504.09936",
            score.moving_average, allot.cosine_layers, recent=0.8, merge=by_similarity(sets.zip_merge, score.moving_average),
            cost="32 queries' attention and one cosine of every pair of a dropped and a kept key",
            good="lossless for the query that it was computed for", bad="every other query: kept keys move",
        ),
        Method(
            "keepkv-code", "votes and weighted-mean keys, as the authors' code does", "KeepKV, code of the authors",
            score.weighted_window, allot.cosine_layers, recent=0.2, merge=by_similarity(sets.mean_merge, score.window_mean),
            cost="as keepkv-paper", good="comparing with the published code", bad="attends e^KL too loudly to what it merged",
        ),
        Method(
            "keepkv-exact", "as keepkv-paper, with convex-exact keys: lossless for its query without a pole",
            "KeepKV, arXiv 2504.09936; SYSTEMS 4.3", score.moving_average, allot.cosine_layers, recent=0.8,
            merge=by_similarity(sets.convex_exact_merge, score.moving_average),
            cost="as keepkv-paper", good="the paper's guarantee, with an error bound",
            bad="other queries: kept keys move",
        ),
        Method(
            "kvmerger", "runs of neighbours with similar keys, merged around a pivot", "KVMerger, arXiv 2407.08454",
            score.accumulated, recent=0.25, choose=cluster.consecutive, merge=by_sets(sets.gaussian), column_mass=True,
            cost="all attention summed once more while reading", good="moderate budgets: neighbours' phases hardly differ",
            bad="small budgets: without votes the merged sets lose their mass",
        ),
        Method(
            "chelsea", "neighbours clustered chunk by chunk, means with their number as vote", "Chelsea, arXiv 2506.11418",
            score.recency, recent=64, choose=cluster.bipartite, merge=by_sets(sets.centroid),
            cost="cosines within chunks of 64, once per halving", good="text of even importance; needs no query at all",
            bad="small budgets: means of unlike keys answer nobody",
        ),
        Method(
            "cam", "StreamingLLM's tokens, dropped values spread at random over the 32 that follow", "CaM, ICML 2024",
            score.recency, recent=0, merge=followers, column_mass=True, cost="a loop over the dropped tokens",
            good="a little more of what just left the window", bad="what left it long ago; it depends on chance (seed)",
        ),
        Method(
            "d2o", "H2O's tokens by layer dispersion, similar dropped ones merged in", "D2O, arXiv 2406.13035",
            score.accumulated, allot.steady_layers, recent=0.25, merge=by_cosine, column_mass=True,
            cost="all attention summed once more while reading, and the cosines of dropped with kept keys",
            good="moderate budgets", bad="merged entries have no votes, so their mass is lost",
        ),
        Method(
            "minicache", "SnapKV's tokens, neighbouring layers of the upper half sharing their directions",
            "MiniCache, arXiv 2405.14366", score.pooled_window, allot.alike, sinks=0, share=Pairs(),
            cost="one pass over the kept keys and values; they are restored at every step",
            good="about a third more tokens for the same bytes", bad="layers that do not resemble each other",
        ),
        Method(
            "attention-matching", "highest attention keys, votes and values fitted to a repetition's queries",
            "Attention Matching, arXiv 2602.16284 (fast variant)", score.answered_most, partial(allot.everywhere, floor=0.3),
            recent=0, merge=fitted(merge.match), reference=reference.repeated, repeat=WHOLE,
            cost="reading the text again over its full cache, and two least-squares problems per head",
            good="understanding at small budgets", bad="verbatim details; queries unlike the repetition's",
        ),
        Method(
            "keepkv", "keys in place, votes and values fitted on future queries, global budgets (default)",
            "KeepKV, arXiv 2504.09936; Attention Matching, arXiv 2602.16284",
            score.output_change, allot.everywhere, recent=0, choose=choose.eliminate, merge=fitted(merge.fit),
            midway=fitted(partial(merge.fit, trust=0.1)), reference=reference.context, repeat=Repeat(), judged=True, trial=32,
            cost="about one reading at 10%, one more for the repetition",
            good="the closest to the full cache at any budget", bad="time on a CPU; random strings at very small budgets",
        ),
    )
}  # fmt: skip


def register(method: Method) -> Method:
    """Adds a row to the table of this process, and returns it. Raises MethodError if there is one of that name."""
    if method.name in METHODS:
        raise MethodError(f"there is a method {method.name!r} already: give yours another name")
    METHODS[method.name] = method
    return method


def get(name: str | Method) -> Method:
    """The row called `name`, or NAME of FILE.py:NAME or package.module:NAME; a Method passes through. Raises MethodError."""
    if isinstance(name, Method):
        return name
    if ":" in name:
        return _elsewhere(*name.rsplit(":", 1))
    if name not in METHODS:
        raise MethodError(f"unknown method {name!r}: {nearest(name, METHODS)} `keepkv methods` explains each")
    return METHODS[name]


def _elsewhere(place: str, name: str) -> Method:
    try:
        module = _file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (ImportError, OSError, ValueError) as error:
        raise MethodError(f"the method {place}:{name} cannot be loaded: {error}") from error
    method = getattr(module, name, None)
    if not isinstance(method, Method):
        raise MethodError(f"{name} in {place} is not a keepkv.Method: expected FILE.py:NAME or package.module:NAME")
    return method


@cache
def _file(path: Path) -> ModuleType:
    """A file run as a module, once: it may register what it defines."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
