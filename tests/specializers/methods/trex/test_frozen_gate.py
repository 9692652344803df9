"""A T-REX adapter with its gate held fixed is a LoRA: exactly in algebra, measured where the gate moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from metier.agents import Message, RecipeError, TrafficRow
from metier.specializers import check_adapter
from metier.specializers.adapters.semantic_map import SemanticMap
from metier.specializers.adapters.trex_shape import SHARPNESS, TrexShape
from metier.specializers.methods.trex.frozen_gate import FrozenGateSettings, cluster_rows, freeze_gate
from metier.specializers.methods.trex.gate_projection import GateMoments, frozen_factors
from metier.specializers.methods.trex.layer import combine_experts
from tests.tiny_trex import TASKS, write_random_trex


@pytest.fixture(scope="module")
def task_rows() -> list[TrafficRow]:
    return [
        TrafficRow(
            role="solver", messages=(Message(role="user", content=text),), reply=f"It is {len(text)}.", task=text
        )
        for text in TASKS
    ]


def test_factors_give_the_update_of_a_fixed_gate_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    r1, r2, d_in, d_out = 3, 5, 16, 12
    a, b, x = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((r1, d_in), (d_out, r2), (7, d_in))
    )
    gate = torch.randn(r1 * r2, generator=generator, dtype=torch.float64)
    gamma = torch.tensor([0.003], dtype=torch.float64)
    lora_a, lora_b = frozen_factors(a, b, gate, gamma)
    assert (lora_a.shape, lora_b.shape) == ((r1, d_in), (d_out, r1))
    z = torch.zeros(7, r2, dtype=torch.float64)
    for t in range(7):
        for i in range(r1):
            for j in range(r2):
                z[t, j] += (a[i] @ x[t]) * gate[i * r2 + j]
    expected = torch.sigmoid(SHARPNESS * gamma) * (z @ b.T)
    torch.testing.assert_close(x @ lora_a.T @ lora_b.T, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(combine_experts(x @ a.T, gate.expand(7, -1)), z, rtol=1e-12, atol=1e-12)


def test_the_fixed_gate_is_the_mean_or_the_best_in_what_it_does() -> None:
    generator = torch.Generator().manual_seed(0)
    h, gate = torch.randn(50, 3, generator=generator).double(), torch.rand(50, 15, generator=generator).double()
    h[:, 0] += gate[:, 0] * 3  # what a gate does depends on the h it meets, which its mean does not see
    moments = GateMoments(TrexShape.released(3, 5))
    moments.add(h[:20], gate[:20])
    moments.add(h[20:], gate[20:])
    torch.testing.assert_close(moments.gate("mean"), gate.mean(dim=0))
    z = combine_experts(h, gate)
    oracle = torch.linalg.lstsq(h, z).solution.flatten()
    torch.testing.assert_close(moments.gate("least_squares"), oracle, rtol=1e-6, atol=1e-8)

    def error(fixed: torch.Tensor) -> float:
        return float((combine_experts(h, fixed.expand(50, -1)) - z).square().mean())

    assert error(moments.gate("least_squares")) < error(moments.gate("mean"))


def test_a_direction_that_never_occurs_leaves_the_gate_finite() -> None:
    moments = GateMoments(TrexShape.released(2, 2))
    h = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    moments.add(h, torch.ones(2, 4))
    torch.testing.assert_close(moments.gate("least_squares").view(2, 2)[0], torch.ones(2).double())
    assert moments.gate("least_squares").isfinite().all()
    nothing = GateMoments(TrexShape.released(2, 2))
    nothing.add(torch.zeros(2, 2), torch.ones(2, 4))
    assert nothing.gate("least_squares").isfinite().all()


def test_a_gate_that_no_token_moves_is_exported_without_loss(
    tmp_path: Path, tiny_base: Path, task_rows: list[TrafficRow]
) -> None:
    # A router of zeros is uniform for every token, and without intuition the task does not move the gate either.
    adapter = write_random_trex(tmp_path / "adapter", tiny_base, k_task=0.0, router_std=0.0)
    for done in freeze_gate(adapter, tiny_base, task_rows, tmp_path / "out"):
        assert done.error.share < 0.02  # what bfloat16 keeps of the written halves
        assert done.loss.frozen == pytest.approx(done.loss.token_gate, abs=0.01)


def test_each_cluster_with_rows_becomes_a_lora_nearer_to_the_gate_than_no_adapter(
    tmp_path: Path, tiny_base: Path, task_rows: list[TrafficRow]
) -> None:
    adapter = write_random_trex(tmp_path / "adapter", tiny_base, r1=2, r2=4)
    clusters = cluster_rows(task_rows, SemanticMap.load(adapter))
    assert sum(map(len, clusters.values())) == len(task_rows)
    steps: list[tuple[int, int]] = []
    found = list(freeze_gate(adapter, tiny_base, task_rows, tmp_path / "out", on_progress=lambda *at: steps.append(at)))
    kept = [k for k, members in clusters.items() if len(members) >= 2]
    assert [done.cluster for done in found] == kept and steps[-1] == (len(kept), len(kept))
    for done in found:
        facts = check_adapter(done.folder, tiny_base, slot_rank=8)
        assert (facts.kind, facts.rank, facts.scaling, facts.dtype) == ("lora", 2, 1.0, "BF16")
        assert done.calibration_rows + done.held_out_rows == len(clusters[done.cluster])
        assert 0 < done.error.share < 1
        assert done.error.kl_nats < done.error.base_kl_nats


def test_the_gate_is_the_mean_of_each_token_of_each_row(
    tmp_path: Path, tiny_base: Path, task_rows: list[TrafficRow]
) -> None:
    """Batches and padding change nothing: rows one at a time give the same adapter."""
    from safetensors.torch import load_file

    adapter = write_random_trex(tmp_path / "adapter", tiny_base, r1=2, r2=2, targets=["q_proj", "down_proj"])
    outs = []
    for batch_rows in (1, 8):
        settings = FrozenGateSettings(batch_rows=batch_rows, calibration_rows=5, held_out_rows=2)
        outs.append(list(freeze_gate(adapter, tiny_base, task_rows, tmp_path / str(batch_rows), settings=settings)))
    for one, many in zip(*outs, strict=True):
        assert one.error.kl_nats == pytest.approx(many.error.kl_nats, rel=0.02)
        first, second = (load_file(done.folder / "adapter_model.safetensors") for done in (one, many))
        for name, value in first.items():
            torch.testing.assert_close(value, second[name], rtol=0.01, atol=1e-4)


def test_rows_that_cannot_be_used_are_refused(tmp_path: Path, tiny_base: Path, task_rows: list[TrafficRow]) -> None:
    adapter = write_random_trex(tmp_path / "adapter", tiny_base, targets=["q_proj"])
    unknown = [task_rows[0].model_copy(update={"task": ""})]
    with pytest.raises(RecipeError, match="row 1 has no task"):
        next(freeze_gate(adapter, tiny_base, unknown, tmp_path / "out"))
    with pytest.raises(RecipeError, match="none of the 1 rows shares its cluster with another"):
        next(freeze_gate(adapter, tiny_base, task_rows[:1], tmp_path / "out"))
