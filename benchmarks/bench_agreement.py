"""Whether `metier bench` says of a server what `vllm bench serve` says: the same vLLM server, paired rounds.

    pip install pandas           # which `vllm bench serve` reads prompts with
    python benchmarks/bench_agreement.py --rounds 5

A vLLM server on one core, SmolLM2, the other one for the tools; each round either tool asks prompts of its own that
differ in a number only (no prompt is in the cache yet), 32 tokens an ask, streamed. With several at a time the asks
begin and end in step, and whether the next ones arrive before a step or after it moves all figures by a step. Bar:
medians of time to first token, of time for each further token, and the throughput within 5 % of each other.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path

from harness import Samples, arguments, machine, paired_rounds, spread

from metier.agents.messages import Message
from metier.agents.traffic import TrafficRow, write_traffic
from metier.runtime.bench.records import RequestRecord
from metier.runtime.bench.summary import level_figures
from metier.specializers.shelf.base_model import find_base

sys.path.insert(0, str(Path(__file__).parents[1]))
TOKENS = 32
TEXT = "Prompt {0}: describe a bridge over a river, who built it, what crosses it, and list {0} facts about it."
FIGURES = ("TTFT ms", "time per further token ms", "tokens/s")
# `vllm bench serve` as a module: the command `vllm` does not start with the CPU package.
THEIRS = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def ours(url: str, texts: list[str], at_once: int, folder: Path) -> tuple[float, ...]:
    """What `metier bench` finds."""
    traffic, out = folder / "traffic.jsonl", folder / "ours.jsonl"
    rows = [TrafficRow(role="any", messages=(Message(role="user", content=text),), reply="") for text in texts]
    write_traffic(traffic, rows)
    command = [str(Path(sys.executable).parent / "metier"), "bench", str(traffic), "--engine", url]
    command += ["--concurrency", str(at_once), "--max-tokens", str(TOKENS), "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    records = [RequestRecord.model_validate_json(line) for line in out.read_text(encoding="utf-8").splitlines()]
    out.unlink()
    figures = level_figures(records)
    assert not figures["failed"]
    return figures["ttft_p50_ms"], figures["itl_p50_ms"], figures["tokens_per_s"]


def theirs(url: str, base: Path, texts: list[str], at_once: int, folder: Path) -> tuple[float, ...]:
    """What `vllm bench serve` finds."""
    data = folder / "custom.jsonl"
    data.write_text("".join(json.dumps({"prompt": text, "output_tokens": TOKENS}) + "\n" for text in texts))
    options = {
        "--backend": "openai-chat", "--endpoint": "/v1/chat/completions", "--base-url": url,
        "--model": str(base), "--served-model-name": "tiny", "--dataset-name": "custom", "--dataset-path": str(data),
        "--custom-output-len": str(TOKENS), "--num-prompts": str(len(texts)), "--max-concurrency": str(at_once),
        "--temperature": "0", "--result-dir": str(folder), "--result-filename": "theirs.json",
    }  # fmt: skip
    flags = ["--save-result", "--skip-chat-template", "--disable-shuffle"]
    words = [word for pair in options.items() for word in pair]
    subprocess.run([sys.executable, "-c", THEIRS, *words, *flags], check=True, capture_output=True)
    found = json.loads((folder / "theirs.json").read_text())
    assert found["completed"] == len(texts)
    return found["median_ttft_ms"], found["median_tpot_ms"], found["output_throughput"]


def main() -> None:
    """Start the server, let the tools take turns, print every round and the ratios."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--asks", type=int, default=24, help="asks of a round")
    parser.add_argument("--at-once", type=int, default=1, help="asks at a time")
    options = parser.parse_args()
    if find_spec("pandas") is None:
        raise SystemExit("`vllm bench serve` needs pandas to read prompts: pip install pandas")
    from tests.runtime.remote.stock_servers import stock_servers

    base = find_base("smollm2-135m")
    took: Samples[str, tuple[float, ...]] = Samples(("ours", "theirs"), options.journal)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with stock_servers(base, folder, kv_cache_mib=256, context_tokens=1024, compiled=True) as [server]:
            for number, tool in paired_rounds(list(took), options.rounds):
                first = 10_000 + options.asks * (2 * number + (tool == "theirs"))
                texts = [TEXT.format(first + n) for n in range(options.asks)]
                if tool == "ours":
                    found = ours(server.url, texts, options.at_once, folder)
                else:
                    found = theirs(server.url, base, texts, options.at_once, folder)
                shown = ", ".join(f"{figure} {value:.1f}" for figure, value in zip(FIGURES, found, strict=True))
                print(f"round {number}, {tool}: {shown}", flush=True)
                took.keep(number, tool, found)
    print(machine())
    for at, figure in enumerate(FIGURES):
        ratios = took.ratios("ours", "theirs", itemgetter(at))
        print(f"{figure}: ours ÷ theirs {spread(ratios, '.3f')}")


if __name__ == "__main__":
    main()
