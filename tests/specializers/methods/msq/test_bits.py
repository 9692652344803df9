"""The bit map and its rules, against plain reckoning."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from metier.specializers.methods.msq.bits import (
    BitUnit,
    average_bits,
    bit_units,
    bits_to_drop,
    drop_bits,
    drop_to_target,
    rank_bits,
)


def llama_layers(blocks: int) -> dict[str, tuple[int, int]]:
    shapes = {
        "self_attn.q_proj": (128, 64),
        "self_attn.k_proj": (64, 64),
        "self_attn.v_proj": (64, 64),
        "self_attn.o_proj": (64, 128),
        "mlp.gate_proj": (128, 64),
        "mlp.up_proj": (128, 64),
        "mlp.down_proj": (64, 128),
    }
    return {f"model.layers.{i}.{name}": shape for i in range(blocks) for name, shape in shapes.items()}


def test_what_an_engine_fuses_is_one_unit() -> None:
    units = bit_units(llama_layers(2))
    assert [unit.name for unit in units] == [
        f"model.layers.{i}.{name}" for i in range(2) for name in ("qkv", "o", "gate_up", "down")
    ]
    assert units[0].layers == tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    assert [unit.weights for unit in units[:4]] == [256 * 64, 64 * 128, 256 * 64, 64 * 128]
    assert units[5].block == "model.layers.1"


def test_an_unknown_layer_is_a_unit_of_its_own() -> None:
    (unit,) = bit_units({"model.layers.0.mlp.fc1": (8, 4)})
    assert unit == BitUnit("model.layers.0.fc1", "model.layers.0", ("model.layers.0.mlp.fc1",), 32)


def test_the_average_is_over_weights() -> None:
    units = [BitUnit("a", "x", ("a",), 300), BitUnit("b", "x", ("b",), 100)]
    assert average_bits({"a": 4, "b": 8}, units) == 5.0


def test_units_below_the_mean_sensitivity_lose_two_bits() -> None:
    assert bits_to_drop({"a": 1.0, "b": 2.0, "c": 9.0}) == {"a": 2, "b": 2, "c": 1}
    assert bits_to_drop({"a": 1.0, "b": 1.0}) == {"a": 1, "b": 1}


UNITS = [BitUnit(name, name[0], (name,), 100) for name in ("a1", "a2", "b1", "b2")]


def test_only_clear_units_lose_bits_the_least_sensitive_first() -> None:
    bits = {"a1": 8, "a2": 8, "b1": 8, "b2": 3}
    drops = {"a1": 1, "a2": 2, "b1": 1, "b2": 2}
    nonzero = {"a1": 0.05, "a2": 0.05, "b1": 0.2, "b2": 0.0}
    sensitivity = {"a1": 2.0, "a2": 1.0, "b1": 0.1, "b2": 0.1}
    rules = {"below": 0.1, "min_bits": 3}
    assert drop_bits(bits, drops, nonzero, sensitivity, UNITS, target_bits=2.0, **rules) == bits | {"a1": 7, "a2": 6}  # type: ignore[arg-type]
    assert drop_bits(bits, drops, nonzero, sensitivity, UNITS, target_bits=6.3, **rules) == bits | {"a2": 6}  # type: ignore[arg-type]
    assert drop_bits(bits, drops, nonzero, sensitivity, UNITS, target_bits=6.8, **rules) == bits  # type: ignore[arg-type]


@given(
    st.lists(st.integers(2, 8), min_size=4, max_size=4),
    st.lists(st.floats(0, 10), min_size=4, max_size=4),
    st.floats(2, 8),
)
def test_dropping_reaches_the_target_and_never_adds_a_bit(
    widths: list[int], sensitivity: list[float], target: float
) -> None:
    names = [unit.name for unit in UNITS]
    bits, cost = dict(zip(names, widths, strict=True)), dict(zip(names, sensitivity, strict=True))
    found = drop_to_target(bits, cost, UNITS, min_bits=2, target_bits=target)
    assert all(2 <= found[name] <= bits[name] for name in names)
    assert average_bits(found, UNITS) <= target
    steps = sum(bits[name] - found[name] for name in names)
    if steps:  # no bit too many
        assert average_bits(found, UNITS) + 1 / len(UNITS) > target


def test_whole_blocks_are_ranked() -> None:
    found = rank_bits({"a": -0.9, "b": -0.2}, UNITS, high=8, low=4, target_bits=6.0)
    assert found == {"a1": 4, "a2": 4, "b1": 8, "b2": 8}
    assert set(rank_bits({"a": 0.9, "b": 0.2}, UNITS, high=8, low=4, target_bits=5.0).values()) == {4}
