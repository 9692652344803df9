"""One layer's decode step: FIER's kernel against vLLM's own, in paired rounds of CPU time.

    python benchmarks/fier_kernel.py --rounds 5

Heads as in SmolLM2-135M (9 on 3, 64 channels, bfloat16), one thread, random keys: this measures time, not quality.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Samples, arguments, clocked, machine, paired_rounds, spread

from metier.runtime.engines.vllm_environment import import_vllm

HEADS, KV_HEADS, D, BLOCK = 9, 3, 64, 128
SHAPES = ((512, 1), (2048, 1), (8192, 1), (32768, 1), (8192, 8))


def cpu_us(call: Callable[[], object], repeats: int) -> float:
    with clocked() as spent:
        for _ in range(repeats):
            call()
    return spent.cpu_s / repeats * 1e6


def steps(context: int, batch: int, budgets: list[int]) -> dict[str, Callable[[], object]]:
    """The same step by each way, on the same keys and values."""
    from vllm import _custom_ops as ops

    from metier.runtime.plugin.fier.fier_cpu import SideCache
    from metier.specializers.shelf.fier_settings import FierSettings

    blocks = context // BLOCK * batch
    table = torch.randperm(blocks).int().view(batch, -1)
    lengths = torch.full((batch,), context, dtype=torch.int32)
    cache = torch.zeros(blocks, KV_HEADS, 2 * BLOCK, D, dtype=torch.bfloat16)
    keys, values = cache.chunk(2, dim=2)
    key, value = (torch.randn(blocks * BLOCK, KV_HEADS, D).bfloat16() for _ in range(2))
    slots = torch.arange(blocks * BLOCK)
    scale = {"k_scale": 1.0, "v_scale": 1.0, "kv_cache_dtype": "auto"}
    ops.cpu_attn_reshape_and_cache(key, value, keys, values, slots, "vec", **scale)
    query, out = torch.randn(batch, HEADS, D).bfloat16(), torch.empty(batch, HEADS, D).bfloat16()
    starts = torch.arange(batch + 1, dtype=torch.int32)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=batch, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=D, seq_lens=lengths, dtype=torch.bfloat16,
        query_start_loc=starts, causal=True, sliding_window_size=-1, isa="vec", enable_kv_split=True,
        dynamic_causal=None, kv_cache_dtype="auto",
    )  # fmt: skip

    def stock() -> object:
        return ops.cpu_attention_with_kv_cache(
            query=query, key_cache=keys, value_cache=values, output=out, query_start_loc=starts, seq_lens=lengths,
            scale=0.125, causal=True, alibi_slopes=None, sliding_window=-1, block_table=table, softcap=0.0,
            scheduler_metadata=plan, s_aux=None, dynamic_causal=None, **scale,
        )  # fmt: skip

    found: dict[str, Callable[[], object]] = {"stock": stock}
    for budget in budgets:
        side = SideCache.allocate(
            blocks, BLOCK, KV_HEADS, D, torch.bfloat16, FierSettings(budget_tokens=budget, min_context_tokens=0)
        )
        side.store(key, slots, native=True)

        def retrieve(side: SideCache = side) -> None:
            side.decode(out, query, values, table, lengths, scale=0.125, native=True)

        found[f"top {budget}"] = retrieve
    return found


def main() -> None:
    options = arguments(__doc__, rounds=5)
    options.add_argument("--budgets", type=int, nargs="+", default=[128, 512])
    asked = options.parse_args()
    import_vllm(threads=1, in_process=True)
    torch.set_num_threads(1)
    from metier.runtime.plugin.fier.fier_cpu import load_operators

    reason = load_operators()
    if reason:
        raise SystemExit(f"the compiled operators are not in use: {reason}")
    print(machine())
    for context, batch in SHAPES:
        ways = steps(context, batch, asked.budgets)
        repeats = max(3, 400_000 // (context * batch))
        took_us: Samples[str, float] = Samples(list(ways), asked.journal)
        for number, name in paired_rounds(list(ways), asked.rounds):
            took_us.keep(number, name, cpu_us(ways[name], repeats if number else 1))
        print(f"{context} x {batch}: stock {spread(took_us['stock'], '.0f')} us", end="")
        for name in list(ways)[1:]:
            ratios = took_us.ratios("stock", name, float)
            print(f"; {name} {spread(took_us[name], '.0f')} us, {spread(ratios)}x", end="")
        print(flush=True)


if __name__ == "__main__":
    main()
