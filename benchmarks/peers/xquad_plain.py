"""Checks a run's full cache on XQuAD against plain transformers: own prompt, own greedy loop, own scores, nothing of keepkv.

    keepkv eval runs/xquad --data xquad.en.json --by answer --lengths 1024 --samples 5 --methods snapkv --budgets 10%
    python benchmarks/peers/xquad_plain.py --run runs/xquad --data xquad.en.json --model MODEL_FOLDER

Only the texts and questions are taken from the run (its folder `texts`, and `ask` in its records); the right answers come from
the file. The tokens of text and question are made at once. Prints how many answers are word for word the same, and both means
of every score; ends with status 1 if a mean differs by more than 0.001.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import string
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


def normal(text: str) -> str:
    """As SQuAD v1.1's evaluation does: lower case, then punctuation, articles and spare white space go."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(prediction: str, truth: str) -> float:
    guess, right = normal(prediction).split(), normal(truth).split()
    same = sum((collections.Counter(guess) & collections.Counter(right)).values())
    if same == 0:
        return float(guess == right)
    precision, recall = same / len(guess), same / len(right)
    return 2 * precision * recall / (precision + recall)


def contains(prediction: str, truth: str) -> float:
    def bare(text: str) -> str:
        return " ".join(re.sub(r"[,.'\"“”]", "", text.lower()).split())

    return float(bare(truth) in bare(prediction))


@torch.inference_mode()
def answer(model, tokenizer, text: str, question: str, limit: int) -> str:
    chat = [{"role": "user", "content": f"{text.strip()}\n\n{question.strip()}"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    cache, words = DynamicCache(config=model.config), []
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    while len(words) < limit:
        word = int(logits[0, -1].argmax())
        if word in ends:
            break
        words.append(word)
        logits = model(torch.tensor([[word]]), past_key_values=cache).logits
    return tokenizer.decode(words, skip_special_tokens=True).strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True, help="a folder or a Hugging Face id")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()
    gold = collections.defaultdict(set)
    for article in json.loads(args.data.read_text())["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                gold[qa["question"]] |= {a["text"] for a in qa["answers"]}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    rows = [json.loads(line) for line in (args.run / "records.jsonl").read_text().splitlines()]
    same, our_scores, their_scores = 0, collections.defaultdict(list), collections.defaultdict(list)
    full = [row for row in rows if row["method"] == "full"]
    for row in full:
        text = (args.run / "texts" / f"{row['task']}-{row['length']}-{row['sample']}.txt").read_text()
        answer_text = answer(model, tokenizer, text, row["ask"], args.max_new_tokens)
        same += answer_text == row["answer"]
        right = gold[row["ask"]]
        rules = {"contains": contains, "f1": f1, "exact": lambda guess, truth: float(normal(guess) == normal(truth))}
        for name, rule in rules.items():
            their_scores[name].append(max(rule(answer_text, truth) for truth in right))
            our_scores[name].append(row["score"] if name == "contains" else row["measures"][name])
    print(f"{same} of {len(full)} answers are word for word the same")
    means = {name: (sum(our_scores[name]) / len(full), sum(their_scores[name]) / len(full)) for name in their_scores}
    for name, (ours_mean, theirs_mean) in means.items():
        print(f"{name:9} keepkv's full cache {ours_mean:.4f}  plain transformers {theirs_mean:.4f}")
    return int(any(abs(ours_mean - theirs_mean) > 0.001 for ours_mean, theirs_mean in means.values()))


if __name__ == "__main__":
    sys.exit(main())
