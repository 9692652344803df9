"""What few bits buy on the engine and cost in perplexity: W8A8 and W4A16 checkpoints against their base.

The checkpoints are variants, made by `metier make` as a user makes them, and kept on a shelf between runs. Every
engine lives in a process of its own and they take turns round by round; ratios are taken within a round, disturbed
samples are measured again (see `engine_process.py`). Perplexities are on windows of the language reference.
`--rounds 0` makes the variants only.

    python benchmarks/quantised_speed.py --rounds 5
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from harness import arguments, print_table
from pruned_speed import compare_checkpoints, report

from metier.specializers import Recipe, Shelf, Variant, find_base, produce

ROOT = Path(__file__).parents[1]
DATA = {"program": "../puzzles.py:solver_rows", "size": 512}
METHODS: dict[str, dict[str, Any]] = {
    "w8a8 rtn": {"scheme": "w8a8"},
    "w8a8 gptq": {"scheme": "w8a8", "rounding": "gptq"},
    "w4a16 rtn": {"scheme": "w4a16", "clip_search": False},
    "w4a16 rtn, clipped": {"scheme": "w4a16"},
    "w4a16 gptq": {"scheme": "w4a16", "rounding": "gptq"},
    "mixed": {"scheme": "w8a8", "overrides": {"*.gate_proj": "w4a16", "*.up_proj": "w4a16"}},
}
TIMED = ("w8a8 rtn", "w4a16 rtn, clipped", "mixed")
"""How weights were rounded does not change what computing with them costs."""


def make(name: str, shelf: Shelf, options: argparse.Namespace) -> Variant:
    """Make one variant, or find it on the shelf."""
    method = {"method": "ptq", "perplexity_windows": options.windows, **METHODS[name]}
    recipe = {
        "name": name.replace(" ", "-").replace(",", ""),
        "methods": [method],
        "data": DATA if method.get("rounding") == "gptq" else None,
        "folder": ROOT / "examples" / "recipes",
    }
    return produce(Recipe.model_validate(recipe), shelf=shelf, base=options.base)


def describe(variants: dict[str, Variant]) -> None:
    """Print what each variant's card says."""
    heads = ("variant", "file / base", "weight error", "perplexity", "base's", "CPU s to make")
    rows = []
    for name, variant in variants.items():
        card = variant.card
        columns = (
            f"{card['size_ratio']:.3f}",
            f"{card['weight_error']:.4f}",
            f"{card.get('perplexity', float('nan')):.3f}",
            f"{card.get('perplexity_before', float('nan')):.3f}",
            f"{card['cpu_s']:.0f}",
        )
        rows.append((name, *columns))
    print()
    print_table(heads, rows)


def main() -> None:
    """Parse the command line, make the variants, run the rounds, print the tables."""
    parser = arguments(__doc__, rounds=5, base=True, threads=2)
    parser.add_argument("--shelf", type=Path, default=Path("runs/quantised-shelf"), help="where variants are kept")
    parser.add_argument("--variants", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="VARIANT")
    parser.add_argument("--windows", type=int, default=32, help="windows of 256 tokens for perplexity (default 32)")
    parser.add_argument("--steps", type=int, default=48, help="decode steps timed per round (default 48)")
    parser.add_argument("--retries", type=int, default=4, help="repeats of a disturbed sample (default 4)")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    shelf = Shelf(options.shelf)
    variants = {name: make(name, shelf, options) for name in options.variants}
    describe(variants)
    if options.rounds:
        timed = {name: shelf.path(variant) / "weights" for name, variant in variants.items() if name in TIMED}
        folders = {"base": find_base(options.base), **timed}
        report(compare_checkpoints(folders, options), list(folders), options)


if __name__ == "__main__":
    main()
