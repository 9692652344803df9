"""What pruning buys on the engine: decode and prefill of narrower and shallower checkpoints against their base.

Shapes only: the checkpoints are slices of the base, untrained, since speed does not depend on what weights say.
Every engine lives in a process of its own, all run alike (compiled, or `--eager`), and they take turns round by
round; ratios are taken within a round, disturbed samples are measured again (see `engine_process.py`).

    python benchmarks/pruned_speed.py --rounds 5
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from engine_process import MEASURES, Compared, Worker, answer_with, compare, disturbed, paired_columns, small_engine
from harness import arguments, print_table

from metier.specializers.shelf.base_model import find_base

WORKLOADS = {"decode-16": "decode, batch 16", "decode-1": "decode, batch 1", "prefill": "prefill of 900 tokens"}
SHAPES: dict[str, dict[str, int]] = {
    "base": {},
    "hidden 512": {"hidden_size": 512},
    "hidden 448": {"hidden_size": 448},
    "hidden 432": {"hidden_size": 432},
    "hidden 400": {"hidden_size": 400},
    "mlp 960": {"intermediate_size": 960},
    "layers 24": {"num_hidden_layers": 24},
}


def write_shape(base: Path, folder: Path, shape: dict[str, int]) -> int:
    """Write the base cut to a shape, first channels, neurons or blocks kept; returns its number of parameters."""
    import shutil

    import torch
    from transformers import AutoModelForCausalLM

    from metier.specializers.checkpoints.dense_checkpoint import dense_tensors, write_dense
    from metier.specializers.checkpoints.prunable_models import read_prunable
    from metier.specializers.methods.pat.merge import merge_model, merged_config
    from metier.specializers.methods.pat.tuner import operator_sites
    from metier.specializers.methods.pruning.depth import renumber

    facts = read_prunable(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    tensors, config = dense_tensors(model), dict(facts.config)
    if "hidden_size" in shape:
        keep = torch.arange(shape["hidden_size"])
        sites = dict.fromkeys(operator_sites(facts.layers))
        tensors = merge_model(
            tensors.items(),
            sites,
            keep,
            facts.family,
            hidden_size=facts.hidden_size,
            tied=facts.tied,
            untie=False,
        )
        config = merged_config(facts, shape["hidden_size"], untie=False)
    if "intermediate_size" in shape:
        neurons = shape["intermediate_size"]
        for name, tensor in tensors.items():
            if ".mlp." in name:
                tensors[name] = tensor[:, :neurons] if "down_proj" in name else tensor[:neurons]
        config["intermediate_size"] = neurons
    if "num_hidden_layers" in shape:
        kept = range(shape["num_hidden_layers"])
        tensors = {new: tensor for name, tensor in tensors.items() if (new := renumber(name, kept)) is not None}
        config["num_hidden_layers"] = len(kept)
    write_dense(folder, tensors, config)
    for path in base.iterdir():
        if path.name.startswith(
            ("tokenizer", "chat_template", "generation_config", "special_tokens", "vocab", "merges")
        ):
            shutil.copyfile(path, folder / path.name)
    return read_prunable(folder).parameters


def serve(folder: Path, steps: int, eager: bool) -> None:
    """Be the engine of one worker process: answer each workload name with one sample."""
    engine = small_engine(str(folder), eager=eager)
    answer_with(lambda workload: MEASURES[workload](engine, [None] * 4, steps))


def compare_checkpoints(folders: Mapping[str, Path], options: argparse.Namespace) -> Compared:
    """Measure every workload on an engine for each checkpoint, in turns."""
    return compare(
        {name: partial(start_worker, folder, options) for name, folder in folders.items()},
        dict.fromkeys(folders, list(WORKLOADS)),
        options,
    )


def start_worker(folder: Path, options: argparse.Namespace) -> Worker:
    """A process of this program with a checkpoint in an engine."""
    arguments = [__file__, "--worker", str(folder), "--steps", str(options.steps)]
    return Worker([*arguments, *(["--eager"] if options.eager else [])], threads=options.threads)


def report(
    samples: Compared,
    names: list[str],
    options: argparse.Namespace,
    heads: tuple[str, ...] = (),
    more: Mapping[str, tuple[str, ...]] | None = None,
) -> None:
    """One table per workload: median (min-max) and paired ratios to the base; `more` are cells under `heads`."""
    how = "eager" if options.eager else "compiled"
    heads = ("checkpoint", *heads, "tokens/s", "CPU s per 1k", "speed / base", "base CPU / CPU")
    for workload, title in WORKLOADS.items():
        print(f"\n{title}: {how}, {options.threads} threads, {options.rounds} rounds, {disturbed(samples, workload)}")
        print_table(
            heads, [(n, *(more or {}).get(n, ()), *paired_columns(samples, n, "base", workload)) for n in names]
        )


def main() -> None:
    """Parse the command line, cut the checkpoints, run the rounds, print the tables."""
    parser = arguments(__doc__, rounds=5, base=True, threads=2)
    parser.add_argument("--steps", type=int, default=48, help="decode steps timed per round (default 48)")
    parser.add_argument("--retries", type=int, default=4, help="repeats of a disturbed sample (default 4)")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(options.worker, options.steps, options.eager)
        return
    base = find_base(options.base)
    shapes = ["base", *(name for name in options.shapes if name != "base")]
    with tempfile.TemporaryDirectory(prefix="metier-pruned-bench-") as scratch:
        folders = {name: Path(scratch) / name.replace(" ", "-") for name in shapes}
        parameters = {name: write_shape(base, folder, SHAPES[name]) for name, folder in folders.items()}
        samples = compare_checkpoints(folders, options)
        sizes = {name: (f"{parameters[name] / parameters['base']:.3f}",) for name in folders}
        report(samples, list(folders), options, ("parameters / base",), sizes)


if __name__ == "__main__":
    main()
