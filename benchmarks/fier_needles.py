"""Needles in real text: whether decode with retrieval still reads out a code that full attention reads out.

A sentence with a code of five digits stands at a depth of 0 to 100 % of a story; the answer begins right before the
code, and the prompt's last token is a piece of its own, so that every digit is written by a decode step. Results are
appended to a JSONL file; what is there is not asked again.

    python benchmarks/fier_needles.py --results benchmarks/fier_needles.jsonl
"""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from harness import append_row, arguments, print_table, read_rows
from retrieval_arms import BLOCK, Arm, ArmEngine, prose

from metier.specializers.shelf.base_model import find_base

CONTEXTS = (1000, 2000, 4000, 7500)
DEPTHS = tuple(range(0, 101, 10))
ARMS = ("full", "fier:64", "fier:128", "fier:256", "fier:512", "quest:64", "quest:256", "window:256")
THINGS = ("box", "door", "safe", "locker", "chest", "bag", "gate", "drawer")
COLOURS = ("blue", "green", "yellow", "purple", "orange", "silver", "golden", "black")
ANSWER_TOKENS = 8


def needle(context: int, depth: int, told: str) -> tuple[str, str, str]:
    """The thing, its code, and the sentence with both, once or twice (`told`); the same for the same cell."""
    rng = random.Random(context * 1000 + depth)
    thing = f"{rng.choice(COLOURS)} {rng.choice(THINGS)}"
    code = "".join(rng.choice("123456789") for _ in range(5))
    again = f" Remember it. {code} is the secret code of the {thing}." if told == "twice" else ""
    return thing, code, f"\nThe secret code of the {thing} is {code}.{again}\n"


def prompt(engine: ArmEngine, body: list[int], context: int, depth: int, told: str) -> tuple[list[int], str]:
    """Token ids of one cell, at most `context` of them and one more than whole blocks, and the code."""
    thing, code, sentence = needle(context, depth, told)

    def ids(text: str) -> list[int]:
        found: list[int] = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    before = ids("<|im_start|>user\n")
    begun = f"<|im_start|>assistant\nThe secret code of the {thing} is"
    asked = f"\n\nWhat is the secret code of the {thing}?<|im_end|>\n{begun}"
    inside, after = ids(sentence), ids(asked)
    total = (context - 1) // BLOCK * BLOCK + 1
    text = body[: total - len(before) - len(inside) - len(after)]
    at = len(text) * depth // 100
    return [*before, *text[:at], *inside, *text[at:], *after], code


def report(records: list[dict[str, Any]], arms: list[str]) -> None:
    """Cells found, by context, and those that full attention finds and the arm does not."""
    found: dict[str, dict[tuple[int, int], bool]] = defaultdict(dict)
    for record in records:
        found[record["arm"]][record["context"], record["depth"]] = record["found"]
    contexts = sorted({cell[0] for cell in found["full"]})
    heads = ("attention", *(f"{context} tokens" for context in contexts), "of those full attention finds")
    rows = []
    for arm in arms:
        cells = found[arm]
        row = [f"{sum(v for c, v in cells.items() if c[0] == n)}/{sum(c[0] == n for c in cells)}" for n in contexts]
        both = [cells[cell] for cell in cells if found["full"].get(cell)]
        rows.append((arm, *row, f"{sum(both)}/{len(both)}"))
    print_table(heads, rows)


def main() -> None:
    """Parse the command line, ask what has not been asked, print the table."""
    parser = arguments(__doc__, base=True, threads=2)
    parser.add_argument("--results", type=Path, default=Path("fier_needles.jsonl"))
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--depths", type=int, nargs="+", default=list(DEPTHS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--told", choices=["once", "twice"], default="twice", help="how often the text says the code")
    options = parser.parse_args()
    records = [row for row in read_rows(options.results) if row["told"] == options.told]
    known = {(r["context"], r["depth"], r["arm"]) for r in records}
    cells = [(c, d) for c in options.contexts for d in options.depths]
    missing = {cell: [arm for arm in options.arms if (*cell, arm) not in known] for cell in cells}
    if any(missing.values()):
        engine = ArmEngine(find_base(options.base), threads=options.threads)
        body = engine.tokenizer(prose(), add_special_tokens=False)["input_ids"]
        if len(body) < max(options.contexts):
            raise SystemExit(f"the story has {len(body)} tokens")
        for (context, depth), arms in missing.items():
            for arm in arms:
                ids, code = prompt(engine, body, context, depth, options.told)
                text = engine.answer(Arm.parse(arm), [ids], ANSWER_TOKENS)[0]
                record = {
                    "told": options.told, "context": context, "depth": depth, "arm": arm, "found": code in text,
                    "text": text,
                }  # fmt: skip
                records.append(record)
                append_row(options.results, record)
    report(records, options.arms)


if __name__ == "__main__":
    main()
