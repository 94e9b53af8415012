"""Writes the stretches `keepkv fidelity` measures on, as token ids, for scripts of another environment (keepkv's own)."""

import argparse
import json
from pathlib import Path

from transformers import AutoTokenizer

from keepkv.eval.fidelity import split_into_segments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of the model, for its tokenizer")
    parser.add_argument("--texts", nargs="+", type=Path, required=True)
    parser.add_argument("--segments", type=int, default=3)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--continuation", type=int, default=192)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = {
        path.stem: split_into_segments(
            tokenizer, path.read_text("utf-8"), args.segments, args.context, args.continuation
        ).tolist()
        for path in args.texts
    }
    args.output.write_text(json.dumps({"context": args.context, "continuation": args.continuation, "texts": texts}))


if __name__ == "__main__":
    main()
