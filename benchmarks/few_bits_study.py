"""NPFT against its control, and MSQ against uniform and layer-wise widths, by perplexity, on the bundled base.

    python benchmarks/few_bits_study.py                                  # the tables of what has been measured
    python benchmarks/few_bits_study.py --measure --arms base npft npft-control --folder runs/few-bits

All arms are tuned on the same docstrings of Python's standard library, with the same steps, batches and schedule.
Perplexity is measured on docstrings held out ("near") and on the language reference ("far"). Decided before anything
was measured: NPFT closes the gap of plain 4-bit rounding if the perplexity rounded falls by at least a quarter of the
base's own gap, and by a tenth of it more than the control's; MSQ holds quality if its perplexity is at most 1 %
above that of the same training at 8 bits. What exists is skipped, so a run that was stopped goes on.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import append_row, arguments, print_table, read_rows
from made_variants import make

from metier.specializers import Recipe, Shelf, find_base

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "few_bits_study.jsonl"
ROWS = 512
WINDOWS = 24
WINDOW_TOKENS = 256

TRAINING: dict[str, Any] = {"batch_rows": 4, "warmup_steps": 5, "schedule": "linear"}
NPFT = {"method": "npft", "learning_rate": 1e-4, "fisher_rows": 64, "steps": 96, **TRAINING}
MSQ = {
    "method": "msq",
    "learning_rate": 1e-4,
    "steps": 40,
    "finish_steps": 10,
    "drop_every_steps": 3,
    "min_bits": 3,
    "on_missed": "drop",
    **TRAINING,
}
ARMS: dict[str, list[dict[str, Any]]] = {
    "base": [],
    "npft": [NPFT],
    "npft-control": [{**NPFT, "noise": "none"}],
    "npft-step": [{**NPFT, "noise": "step", "step_group_size": 64, "resample": "step"}],
    "msq-8": [{**MSQ, "allocation": "uniform", "target_bits": 8}],
    "msq-6": [{**MSQ, "target_bits": 6}],
    "msq-6-hessian": [{**MSQ, "target_bits": 6, "curvature": "hessian", "trace_rows": 4}],
    # The same allocation at once, by sensitivity alone, and all steps at fixed widths: what the search costs.
    "msq-6-at-once": [{**MSQ, "target_bits": 6, "finish_steps": 39}],
    "msq-6-uniform": [{**MSQ, "allocation": "uniform", "target_bits": 6}],
    "msq-6-layers": [{**MSQ, "allocation": "layers", "target_bits": 6}],
    "msq-5": [{**MSQ, "target_bits": 5}],
    "msq-5-uniform": [{**MSQ, "allocation": "uniform", "target_bits": 5}],
    "msq-5-layers": [{**MSQ, "allocation": "layers", "target_bits": 5}],
}
# How a dense arm is rounded before it is measured: (bits, group size), or not at all.
ROUNDINGS: dict[str, tuple[int, int | None] | None] = {
    "none": None,
    "rtn4-g64": (4, 64),
    "rtn4-channel": (4, None),
}


def checkpoint_of(arm: str, base: str, shelf: Shelf) -> Path:
    """The arm's checkpoint folder, made if it is not there yet."""
    if not ARMS[arm]:
        return find_base(base)
    recipe = Recipe.model_validate(
        {
            "name": arm,
            "data": {"program": "offline_text.py:rows", "size": ROWS},
            "methods": ARMS[arm],
            "folder": ROOT / "examples",
        }
    )

    return shelf.path(make(arm, recipe, shelf, base)) / "weights"


def rounded(folder: Path, bits: int, group_size: int | None, target: Path) -> Path:
    """A copy of a dense checkpoint with every linear layer of its blocks rounded to the nearest, without clipping."""
    import torch
    from safetensors.torch import save_file

    from metier.specializers.checkpoints.checkpoint_files import CheckpointReader
    from metier.specializers.checkpoints.compressed_tensors import linear_layers
    from metier.specializers.checkpoints.quantisers import dequantise, round_to_nearest

    reader = CheckpointReader(folder)
    layers = linear_layers(reader)
    tensors = {}
    for name in reader.tensors:
        tensor = reader.read(name)
        if name.removesuffix(".weight") in layers:
            values, scale = round_to_nearest(tensor.float(), bits=bits, group_size=group_size)
            tensor = dequantise(values, scale)
        tensors[name] = tensor.to(torch.float32)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def token_rows(base: str) -> dict[str, list[list[int]]]:
    """What perplexity is measured on, as tokens, by name of the text."""
    from transformers import AutoTokenizer

    from metier.specializers.checkpoints.perplexity import offline_text, text_windows

    sys.path.insert(0, str(ROOT / "examples"))
    from offline_text import held_out

    tokenizer = AutoTokenizer.from_pretrained(find_base(base))
    kept = held_out()
    chosen = kept[:: max(1, len(kept) // WINDOWS)][:WINDOWS]
    near = [tokenizer(text, add_special_tokens=False)["input_ids"][:WINDOW_TOKENS] for text in chosen]
    return {"near": near, "far": text_windows(tokenizer, offline_text()[1], count=WINDOWS, tokens=WINDOW_TOKENS)}


def measure(arms: Sequence[str], base: str, folder: Path) -> None:
    """Make and measure what is missing, one line of results at a time."""
    from metier.specializers.checkpoints.perplexity import measure_perplexity

    shelf, texts = Shelf(folder / "shelf"), token_rows(base)
    done = {(row["arm"], row["rounding"]) for row in read_rows(RESULTS)}
    for arm in arms:
        wanted = [
            name for name in ROUNDINGS if (name == "none" or not arm.startswith("msq")) and (arm, name) not in done
        ]
        if not wanted:
            continue
        checkpoint = checkpoint_of(arm, base, shelf)
        card = shelf.get(arm).card if ARMS[arm] else {}
        for name in wanted:
            how = ROUNDINGS[name]
            place = checkpoint if how is None else rounded(checkpoint, *how, folder / "rounded")
            row: dict[str, Any] = {"arm": arm, "rounding": name}
            row |= {text: round(measure_perplexity(place, rows), 4) for text, rows in texts.items()}
            kept = ("average_bits", "served_average_bits", "dropped_anyway", "noisy_weights", "final_loss", "cpu_s")
            row |= {key: card[key] for key in kept if key in card}
            append_row(RESULTS, row)
            print(row)
    shutil.rmtree(folder / "rounded", ignore_errors=True)


def report() -> None:
    """Both tables, from what there is."""
    found = {(row["arm"], row["rounding"]): row for row in read_rows(RESULTS)}
    if ("base", "none") not in found:
        print("nothing measured yet: --measure --arms base first")
        return
    lines = []
    for (arm, name), row in found.items():
        if arm.startswith("msq"):
            continue
        cells = [f"{row['near']:.2f}", f"{row['far']:.2f}"]
        plain, dense, own = found.get(("base", name)), found[("base", "none")], found.get((arm, "none"))
        for text in ("near", "far"):
            gap = plain[text] - dense[text] if plain else 0.0
            cells.append(f"{(plain[text] - row[text]) / gap:.0%}" if plain and gap else "")
        cells.append(f"{row['far'] - own['far']:.2f}" if own and name != "none" else "")
        lines.append((arm, name, *cells))
    print_table(("arm", "rounding", "near", "far", "gap closed, near", "gap closed, far", "own gap, far"), lines)
    lines = []
    eight = found.get(("msq-8", "none"))
    for (arm, _), row in found.items():
        if arm.startswith("msq"):
            above = [f"{row[text] / eight[text] - 1:+.1%}" if eight else "" for text in ("near", "far")]
            kept = ("average_bits", "served_average_bits", "near", "far")
            lines.append((arm, *(f"{row[name]:.2f}" for name in kept), *above))
    print()
    print_table(("arm", "bits", "served bits", "near", "far", "loss against 8 bits, near", "far"), lines)


def main() -> None:
    parser = arguments(__doc__, base=True)
    parser.add_argument("--measure", action="store_true", help="make and measure what is missing")
    parser.add_argument("--arms", nargs="+", choices=sorted(ARMS), default=list(ARMS))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "few-bits")
    options = parser.parse_args()
    if options.measure:
        options.folder.mkdir(parents=True, exist_ok=True)
        measure(options.arms, options.base, options.folder)
    report()


if __name__ == "__main__":
    main()
