"""What few bits buy on the engine and cost in perplexity: W8A8 and W4A16 checkpoints against their base.

The checkpoints are variants, made by `metier make` as a user makes them, and kept on a shelf between runs. Every
engine lives in a process of its own and they take turns round by round; ratios are taken within a round, disturbed
samples are measured again (see `lora_decode.py`). Perplexities are on windows of the language reference.

    python benchmarks/quantised_speed.py --rounds 5
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from lora_decode import Sample, paired_columns
from pruned_speed import WORKLOADS, compare

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
    print("\n| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for name, variant in variants.items():
        card = variant.card
        columns = (
            f"{card['size_ratio']:.3f}",
            f"{card['weight_error']:.4f}",
            f"{card.get('perplexity', float('nan')):.3f}",
            f"{card.get('perplexity_before', float('nan')):.3f}",
            f"{card['cpu_s']:.0f}",
        )
        print(f"| {name} | " + " | ".join(columns) + " |")


def report(samples: dict[str, dict[str, list[Sample]]], options: argparse.Namespace) -> None:
    """One table per workload: median (min-max) and paired ratios to the base."""
    how = "eager" if options.eager else "compiled"
    for workload, title in WORKLOADS.items():
        disturbed = statistics.median(s.others for per in samples.values() for s in per[workload])
        print(f"\n{title}: {how}, {options.threads} threads, {options.rounds} rounds, ", end="")
        print(f"other programs' share {disturbed:.0%} at the median")
        heads = ("checkpoint", "tokens/s", "CPU s per 1k", "speed / base", "base CPU / CPU")
        print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
        for name, per_workload in samples.items():
            columns = paired_columns(per_workload[workload], samples["base"][workload])
            print(f"| {name} | " + " | ".join(columns) + " |")


def main() -> None:
    """Parse the command line, make the variants, run the rounds, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m", help="bundled base, folder or Hugging Face id")
    parser.add_argument("--shelf", type=Path, default=Path("runs/quantised-shelf"), help="where variants are kept")
    parser.add_argument("--variants", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="VARIANT")
    parser.add_argument("--windows", type=int, default=32, help="windows of 256 tokens for perplexity (default 32)")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds; 0 makes the variants only (default 5)")
    parser.add_argument("--steps", type=int, default=48, help="decode steps timed per round (default 48)")
    parser.add_argument("--threads", type=int, default=2, help="OMP threads per engine (default 2)")
    parser.add_argument("--retries", type=int, default=4, help="repeats of a disturbed sample (default 4)")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    shelf = Shelf(options.shelf)
    variants = {name: make(name, shelf, options) for name in options.variants}
    describe(variants)
    if options.rounds:
        timed = {name: shelf.path(variant) / "weights" for name, variant in variants.items() if name in TIMED}
        report(compare({"base": find_base(options.base), **timed}, options), options)


if __name__ == "__main__":
    main()
