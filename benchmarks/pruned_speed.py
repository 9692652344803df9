"""What pruning buys on the engine: decode and prefill of narrower and shallower checkpoints against their base.

Shapes only: the checkpoints are slices of the base, untrained, since speed does not depend on what weights say.
Every engine lives in a process of its own, all run alike (compiled, or `--eager`), and they take turns round by
round; ratios are taken within a round, disturbed samples are measured again (see `lora_decode.py`).

    python benchmarks/pruned_speed.py --rounds 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from lora_decode import MEASURES, Sample, Worker, least_disturbed, paired_columns

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
    from vllm import LLM

    llm = LLM(
        str(folder),
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=512 << 20,
        block_size=32,
        enable_prefix_caching=False,
        enforce_eager=eager,
    )
    print("@{}", flush=True)
    for line in sys.stdin:
        sample = MEASURES[line.strip()](llm.llm_engine, [None] * 4, steps)
        print("@" + json.dumps(vars(sample)), flush=True)


def compare(folders: dict[str, Path], options: argparse.Namespace) -> dict[str, dict[str, list[Sample]]]:
    """Measure every workload on each engine in turn, round by round; round 0 warms up and is not counted."""
    workers = {}
    for name, folder in folders.items():
        arguments = [__file__, "--worker", str(folder), "--steps", str(options.steps)]
        workers[name] = Worker([*arguments, *(["--eager"] if options.eager else [])], threads=options.threads)
        print(f"{name}: ready after {workers[name].ready_s:.1f} s", file=sys.stderr)
    samples: dict[str, dict[str, list[Sample]]] = {name: {w: [] for w in WORKLOADS} for name in workers}
    try:
        for number in range(options.rounds + 1):
            for workload in WORKLOADS:
                turn = number % len(workers)
                for name in [*list(workers)[turn:], *list(workers)[:turn]]:
                    worker = workers[name]
                    sample = least_disturbed(worker.measure(workload) for _ in range(1 + options.retries))
                    if number:
                        samples[name][workload].append(sample)
            print(f"round {number} of {options.rounds} done", file=sys.stderr)
    finally:
        for worker in workers.values():
            worker.close()
    return samples


def report(
    samples: dict[str, dict[str, list[Sample]]], parameters: dict[str, int], options: argparse.Namespace
) -> None:
    """One table per workload: median (min-max) and paired ratios to the base."""
    how = "eager" if options.eager else "compiled"
    for workload, title in WORKLOADS.items():
        disturbed = statistics.median(s.others for per in samples.values() for s in per[workload])
        print(f"\n{title}: {how}, {options.threads} threads, {options.rounds} rounds, ", end="")
        print(f"other programs' share {disturbed:.0%} at the median")
        heads = ("checkpoint", "parameters / base", "tokens/s", "CPU s per 1k", "speed / base", "base CPU / CPU")
        print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
        for name, per_workload in samples.items():
            size = f"{parameters[name] / parameters['base']:.3f}"
            columns = (size, *paired_columns(per_workload[workload], samples["base"][workload]))
            print(f"| {name} | " + " | ".join(columns) + " |")


def main() -> None:
    """Parse the command line, cut the checkpoints, run the rounds, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m", help="bundled base, folder or Hugging Face id")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds (default 5)")
    parser.add_argument("--steps", type=int, default=48, help="decode steps timed per round (default 48)")
    parser.add_argument("--threads", type=int, default=2, help="OMP threads per engine (default 2)")
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
        report(compare(folders, options), parameters, options)


if __name__ == "__main__":
    main()
