"""Answers from long documents: decode with retrieval against full attention, question by question.

A document is a piece of a story with six facts planted in it, two of each kind; each question asks for one, and its
whole answer is written by decode steps. Several questions share a document, so intervals are drawn over documents. A
kind counts where full attention answers 60 % of it.
Results are appended to a JSONL file, document by document; what is there is not asked again.

    python benchmarks/fier_quality.py --results benchmarks/fier_quality.jsonl
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from harness import arguments, interval, print_table, read_rows, resamples
from retrieval_arms import BLOCK, Arm, ArmEngine, prose

from metier.specializers.shelf.base_model import find_base

ARMS = ("full", "fier:128", "fier:256", "fier:440", "quest:256", "window:256")
NAMES = ("Anna", "Boris", "Clara", "David", "Elena", "Frank", "Greta", "Henry", "Irene", "Jacob", "Laura", "Martin")
THINGS = ("box", "door", "safe", "locker", "chest", "bag", "gate", "drawer")
FRUITS = ("apples", "pears", "plums", "figs", "grapes", "melons", "cherries", "lemons", "peaches", "mangoes")
CLEAR = 0.6
ANSWER_TOKENS = 14


def facts(document: int) -> list[tuple[str, str, str, str, str]]:
    """Kind, sentence, question, how the answer begins, and its key, six of them."""
    rng = random.Random(document)
    names, things = rng.sample(NAMES, 4), rng.sample(THINGS, 2)
    fruits = rng.sample(FRUITS, 2)
    found = []
    for number in range(2):
        thing, code = things[number], "".join(rng.choice("123456789") for _ in range(5))
        called, likes = names[number], names[2 + number]
        phone, fruit = "".join(rng.choice("123456789") for _ in range(6)), fruits[number]
        found += [
            ("code", f"The secret code of the {thing} is {code}.", f"What is the secret code of the {thing}?",
             f"The secret code of the {thing} is", code),
            ("phone", f"The telephone number of {called} is {phone}.", f"What is the telephone number of {called}?",
             f"The telephone number of {called} is", phone),
            ("fruit", f"The favourite fruit of {likes} is {fruit}.", f"What is the favourite fruit of {likes}?",
             f"The favourite fruit of {likes} is", fruit),
        ]  # fmt: skip
    return found


def prompts(engine: ArmEngine, body: list[int], document: int, context: int) -> list[list[int]]:
    """Token ids of a document with each of its questions, `context` at most, each one more than whole blocks."""

    def ids(text: str) -> list[int]:
        found: list[int] = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    rng = random.Random(-1 - document)
    planted = facts(document)
    ends = [ids(f"\n\n{f[2]}<|im_end|>\n<|im_start|>assistant\n{f[3]}") for f in planted]
    pieces = [ids(f"\n{f[1]}\n") for f in rng.sample(planted, len(planted))]
    start = ids("<|im_start|>user\n")
    room = context - len(start) - sum(map(len, pieces)) - max(map(len, ends)) - BLOCK
    first = rng.randrange(len(body) - context)
    places = [0, *sorted(rng.sample(range(room), len(pieces)))]
    text = start
    for before, place, piece in zip(places, places[1:], pieces, strict=False):
        text = [*text, *body[first + before : first + place], *piece]
    found = []
    for end in ends:  # one token more than whole blocks: as much of the story's rest as that takes
        rest = room - places[-1] + (1 - len(text) - (room - places[-1]) - len(end)) % BLOCK
        found.append([*text, *body[first + places[-1] : first + places[-1] + rest], *end])
    return found


def mean_over_documents(by_document: list[list[float]]) -> tuple[float, float, float]:
    """Mean with its 95 % interval, resampling documents."""
    sums = np.array([[sum(d), len(d)] for d in by_document])
    total = sums[resamples(len(sums))].sum(axis=1)
    return float(sums[:, 0].sum() / sums[:, 1].sum()), *interval(total[:, 0] / total[:, 1])


def report(records: list[dict[str, Any]], arms: list[str]) -> None:
    """Right answers of each arm, and the paired difference to full attention, in the kinds that count."""
    right: dict[str, dict[tuple[str, int, int], float]] = defaultdict(dict)
    for record in records:
        right[record["arm"]][record["kind"], record["document"], record["question"]] = float(record["right"])
    full = right["full"]
    kinds = sorted({kind for kind, _, _ in full})
    share = {kind: float(np.mean([v for key, v in full.items() if key[0] == kind])) for kind in kinds}
    counted = [kind for kind in kinds if share[kind] >= CLEAR]
    print("full attention: " + ", ".join(f"{kind} {share[kind]:.1%}" for kind in kinds) + f"; counted: {counted}")
    rows = []
    for arm in arms:
        own = right[arm]
        cells = [f"{np.mean([v for key, v in own.items() if key[0] == kind] or [np.nan]):.1%}" for kind in kinds]
        documents: dict[int, list[float]] = defaultdict(list)
        for key, value in own.items():
            if key[0] in counted and key in full:
                documents[key[1]].append(value - full[key])
        if not documents:
            continue
        mean, low, high = (100 * x for x in mean_over_documents(list(documents.values())))
        overall = np.mean([v for key, v in own.items() if key[0] in counted])
        items = sum(map(len, documents.values()))
        rows.append((arm, *cells, f"{overall:.1%}", f"{mean:+.1f} ({low:+.1f} to {high:+.1f})", f"{items}"))
    print_table(("attention", *kinds, "counted", "minus full, points (95 %)", "items"), rows)


def main() -> None:
    """Parse the command line, ask what has not been asked, print the table."""
    parser = arguments(__doc__, base=True, threads=2)
    parser.add_argument("--results", type=Path, default=Path("fier_quality.jsonl"))
    parser.add_argument("--context", type=int, default=4000, help="tokens of a prompt (default 4000)")
    parser.add_argument("--documents", type=int, default=36)
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    options = parser.parse_args()
    records = [row for row in read_rows(options.results) if row["context"] == options.context]
    known = {(r["document"], r["arm"]) for r in records}
    missing = {d: [a for a in options.arms if (d, a) not in known] for d in range(options.documents)}
    if any(missing.values()):
        engine = ArmEngine(find_base(options.base), threads=options.threads, cache_mib=512)
        body = engine.tokenizer(prose(), add_special_tokens=False)["input_ids"]
        with options.results.open("a", encoding="utf-8") as file:
            for document, arms in missing.items():
                asked = prompts(engine, body, document, options.context) if arms else []
                for arm in arms:
                    texts = engine.answer(Arm.parse(arm), asked, ANSWER_TOKENS)
                    lines = []
                    for question, (fact, text) in enumerate(zip(facts(document), texts, strict=True)):
                        record = {
                            "context": options.context, "document": document, "question": question, "kind": fact[0],
                            "arm": arm, "right": fact[4] in text, "text": text,
                        }  # fmt: skip
                        records.append(record)
                        lines.append(json.dumps(record) + "\n")
                    file.write("".join(lines))  # a document's questions together: the file holds whole arms only
                    file.flush()
    report(records, options.arms)


if __name__ == "__main__":
    main()
