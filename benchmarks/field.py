r"""The table of the whole field: mean KL of every method at every budget, from what `keepkv fidelity --json` printed.

    keepkv fidelity book.txt --methods "$(keepkv methods --json | jq -r 'map(.name) | join(",")')" \
        --budgets 50%,25%,10%,5% --segments 2 --json > results/field-book.json
    python benchmarks/field.py results/field-*.json

Markdown on standard output. Budgets are equal bytes (minicache: more slots in the same bytes); seconds are those of
compressing the first file's contexts to 10%, with the repetition where the method needs one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    args = parser.parse_args()
    texts = [{(row["method"], row["budget"]): row for row in json.loads(file.read_text())} for file in args.results]
    names, budgets = (list(dict.fromkeys(key[i] for key in texts[0])) for i in (0, 1))
    heads = [file.stem.removeprefix("field-") for file in args.results]
    first = next(iter(texts[0].values()))
    print(
        f"Mean KL to the full cache (nats) at {' / '.join(budgets)}; {first['segments']} stretches of "
        f"{first['context_tokens']:,} tokens a text, the next {first['continuation_tokens'] - 1} true tokens each.\n"
    )
    print("| method | " + " | ".join(heads) + " | seconds |\n|---" + "|---" * (len(heads) + 1) + "|")
    for name in names:
        cells = [" / ".join(f"{text[name, budget]['kl']:.3f}".lstrip("0") for budget in budgets) for text in texts]
        seconds = texts[0][name, "10%" if "10%" in budgets else budgets[0]]["compress_seconds"]
        print(f"| {name} | " + " | ".join(cells) + f" | {seconds:.1f} |")


if __name__ == "__main__":
    main()
