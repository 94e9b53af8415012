"""One vLLM engine, stepped by hand, in a process of its own: what it answers, which pages it holds, how long it takes.

    python benchmarks/vllm_engine.py OUT.json <<< '{"model": DIR, "engine": {...}, "requests": [{"ids": [...], "tokens": 9}]}'

engine: arguments of vllm.LLM; keepkv's settings are its additional_config. A request may name the step it arrives at (arrive)
and how many tokens it gets before it is cancelled (cancel). OUT: per request its tokens, their log-probabilities, the most
pages it held, seconds to its first token and to its end, preemptions; per step the requests running and waiting, and pages in
use; at the end the pages free and in all. Used by tests_vllm and benchmarks/vllm_capacity.py; needs vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler in this process, so that its pages can be looked at


def run(spec: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    if "backend" in spec:  # another class in the place of the CPU's attention
        from vllm.plugins import load_general_plugins
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        load_general_plugins()
        register_backend(AttentionBackendEnum.CPU_ATTN, spec["backend"])
    llm = LLM(model=spec["model"], **spec["engine"])
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    manager = scheduler.kv_cache_manager
    results = [{"tokens": [], "logprobs": [], "pages": 0, "first": None, "end": None, "preempted": 0} for _ in spec["requests"]]
    waiting = sorted(range(len(results)), key=lambda i: spec["requests"][i].get("arrive", 0))
    total, free = manager.block_pool.num_gpu_blocks, manager.block_pool.get_num_free_blocks()
    steps, started, born = [], time.perf_counter(), {}
    while waiting or engine.has_unfinished_requests():
        while waiting and (spec["requests"][waiting[0]].get("arrive", 0) <= len(steps) or not engine.has_unfinished_requests()):
            index = waiting.pop(0)
            request = spec["requests"][index]
            sampling = SamplingParams(max_tokens=request["tokens"], temperature=0, ignore_eos=True, logprobs=0)
            engine.add_request(str(index), {"prompt_token_ids": request["ids"]}, sampling)
            born[index] = time.perf_counter()
        outputs = engine.step()
        pages_of = {}
        for one in manager.coordinator.single_type_managers:
            for name, blocks in one.req_to_blocks.items():
                pages_of[name] = pages_of.get(name, 0) + sum(not block.is_null for block in blocks)
        used = free - manager.block_pool.get_num_free_blocks()
        steps.append({"running": len(scheduler.running), "pages": used, "waiting": len(scheduler.waiting)})
        for request in scheduler.running:
            result = results[int(request.request_id.split("-")[0])]
            result["pages"] = max(result["pages"], pages_of.get(request.request_id, 0))
            result["preempted"] = getattr(request, "num_preemptions", 0)
        for output in outputs:
            index, completion = int(output.request_id), output.outputs[0]
            result, request = results[index], spec["requests"][index]
            result["tokens"] = list(completion.token_ids)
            result["logprobs"] = [next(iter(of_token.values())).logprob for of_token in completion.logprobs]
            result["first"] = result["first"] or time.perf_counter() - born[index]
            if output.finished or len(result["tokens"]) >= request.get("cancel", float("inf")):
                result["end"] = time.perf_counter() - born[index]
                if not output.finished:
                    engine.abort_request([output.request_id])
    for _ in range(3):  # what was settled last is freed with the next step
        engine.step()
    seconds = time.perf_counter() - started
    return {
        "requests": results, "steps": steps, "seconds": seconds, "pages": total, "free_before": free,
        "free_after": manager.block_pool.get_num_free_blocks(),
        "left": sum(len(one.req_to_blocks) for one in manager.coordinator.single_type_managers),
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.parse_args().out.write_text(json.dumps(run(json.load(sys.stdin))))
