"""No adapter folder ends in a traceback or hangs: it is served, or refused by its name before an engine sees it."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from metier.agents import AdapterError
from metier.runtime.plugin.adapters.trex_gate import TrexGate, gated_lanes
from metier.specializers import Shelf, check_adapter
from metier.specializers.adapters.adapter_conversion import convert_adapter
from metier.specializers.adapters.adapter_files import LARGEST_CHANGE
from metier.specializers.adapters.adoption import adopt_adapter
from metier.specializers.adapters.semantic_map import SemanticMap
from metier.specializers.adapters.trex_shape import LAYER_PARTS, read_trex_shape
from tests.mutated_text import mutated
from tests.specializers.adapters.test_adapter_check import change_tensors
from tests.specializers.adapters.test_adapter_conversion import EXACT, write_adapter
from tests.specializers.adapters.test_adapter_mending import FOREIGN, rename
from tests.tiny_model import write_random_lora
from tests.tiny_trex import write_random_trex

SEED = 20
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 2**63, 10**30, 1e30, float("nan"), float("inf"), "", "x" * 3000, [], {}, [[]], ["q_proj"],
    "(a+)+$", {"q_proj": 3}, {"(.*)*": 4}, "all-linear", [1, "q_proj"], {"a": {}}, "\ud800", "\0",
)  # fmt: skip


_FIELDS = (
    "rank_pattern", "use_rslora", "exclude_modules", "init_lora_weights", "alpha_pattern", "layers_to_transform",
    "layers_pattern", "fan_in_fan_out", "modules_to_save", "target_parameters",
)  # fmt: skip


def _of_config(config: bytes, header: dict[str, Any], data: bytes, draw: random.Random) -> tuple[bytes, bytes]:
    fields = json.loads(config)
    inner = fields.get("trex")
    if isinstance(inner, dict) and draw.random() < 0.7:
        inner[draw.choice([*inner])] = draw.choice(_VALUES)
    else:
        fields[draw.choice([*fields, *_FIELDS])] = draw.choice(_VALUES)
    return json.dumps(fields).encode(), whole(header, data)


def _of_config_text(config: bytes, header: dict[str, Any], data: bytes, draw: random.Random) -> tuple[bytes, bytes]:
    return mutated(config.decode(), draw), whole(header, data)


def _of_header(config: bytes, header: dict[str, Any], data: bytes, draw: random.Random) -> tuple[bytes, bytes]:
    name = draw.choice([*header])
    change = draw.randrange(8)
    if change == 0:
        header[name] = draw.choice(_VALUES)
    elif change == 1:
        header[name]["data_offsets"] = [draw.randrange(-5, len(data) + 5) for _ in range(draw.choice((1, 2, 2, 2, 3)))]
    elif change == 2:
        header[name]["dtype"] = draw.choice(("I8", "BOOL", "F64", "F8_E4M3", "F8_E5M2", "F4", "Q9", "I64", 3, None))
    elif change == 3:
        header[name]["shape"] = draw.choice(([], [0], [2**62, 2**62], [-1], [1.5], "x", [1] * 500, [True], None))
    elif change == 4:
        del header[name]
    elif change == 5:
        header[f"{name}x"] = header[name]
    elif change == 6:
        header["__metadata__"] = draw.choice(_VALUES)
    else:
        header[name]["data_offsets"] = header[draw.choice([*header])].get("data_offsets", [0, 1])
    return config, whole(header, data)


def _of_header_text(config: bytes, header: dict[str, Any], data: bytes, draw: random.Random) -> tuple[bytes, bytes]:
    text = draw.choice(
        (
            b"[" * 100_000, b"{" * 50, b"[]", b"3", b"null", b'"x"', b"\xff\xfe", b'{"a": 1, "a": 2}', b" " * 9,
            mutated(json.dumps(header, indent=1), draw),
        )
    )  # fmt: skip
    length = draw.choice((len(text), len(text), len(text), 2**32, 2**63, 0, 1))
    return config, struct.pack("<Q", length) + text + data


def _of_values(config: bytes, header: dict[str, Any], data: bytes, draw: random.Random) -> tuple[bytes, bytes]:
    place = 4 * draw.randrange(len(data) // 4)
    value = draw.choice((float("nan"), float("inf"), -float("inf"), 3e38, -1e20, 1e6, 65_000.0))
    return config, whole(header, data[:place] + struct.pack("<f", value) + data[place + 4 :])


def _of_length(config: bytes, header: dict[str, Any], data: bytes, draw: random.Random) -> tuple[bytes, bytes]:
    return config, whole(header, data)[: draw.randrange(len(data))] if draw.random() < 0.5 else whole(
        header, data + b"x"
    )


_CHANGES: tuple[Callable[..., tuple[bytes, bytes]], ...] = (
    _of_config, _of_config, _of_config_text, _of_header, _of_header, _of_header_text, _of_values, _of_length,
)  # fmt: skip


def whole(header: dict[str, Any], data: bytes) -> bytes:
    """A safetensors file."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def campaign(adapter: Path, seed: str, count: int, check: Callable[[], object]) -> int:
    """Check `count` mutations of an adapter, and return how many were refused, each by an error that names it."""
    config, weights = (adapter / CONFIG).read_bytes(), (adapter / WEIGHTS).read_bytes()
    length = int.from_bytes(weights[:8], "little")
    header, data = weights[8 : 8 + length], weights[8 + length :]
    refused = 0
    for number in range(count):
        draw = random.Random(f"{SEED}|{seed}|{number}")
        new_config, new_weights = draw.choice(_CHANGES)(config, json.loads(header), data, draw)
        (adapter / CONFIG).write_bytes(new_config)
        (adapter / WEIGHTS).write_bytes(new_weights)
        try:
            check()
        except AdapterError as error:
            refused += 1
            assert str(adapter) in str(error)
            assert len(str(error)) < 6000
        except BaseException as error:
            error.add_note(f"mutation {number}: {new_config[:600]!r} {new_weights[:300]!r}")
            raise
    return refused


def check_lora(adapter: Path, base: Path) -> None:
    """Check it as the engine's door does; one that is taken is what vLLM takes too, with numbers that it can hold."""
    facts = check_adapter(adapter, base, slot_rank=8)
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_dict(json.loads((adapter / CONFIG).read_text()))
    assert helper._validate_features() == []
    tensors = load_file(adapter / WEIGHTS)
    assert len(tensors) == 2 * len(facts.modules)
    for module in facts.modules:
        a, b = (tensors[f"base_model.model.{module}.lora_{half}.weight"].float() for half in "AB")
        rank, scaling = helper.get_rank_and_scaling(module)
        assert a.shape[0] == b.shape[1] == rank <= facts.rank
        assert torch.isfinite((scaling * b).half()).all() and (scaling * b @ a).abs().max() <= LARGEST_CHANGE


def check_trex(adapter: Path, base: Path) -> None:
    """Check it as the engine's door does; one that is taken is what our loader reads, with numbers it can hold."""
    facts = check_adapter(adapter, base, slot_rank=16)
    shape = read_trex_shape(adapter)
    assert shape is not None
    c = torch.tensor([SemanticMap.load(adapter).intuition("What is 2 + 2?")])
    tensors = load_file(adapter / WEIGHTS)
    assert len(tensors) == 5 * len(facts.modules) + 2
    for module in facts.modules:
        parts = {part: tensors[f"base_model.model.{module}.{part}"].float() for part in LAYER_PARTS}
        gate = TrexGate.from_scalars(shape, omega=float(parts["trex_omega"]), gamma=float(parts["trex_gamma"]))
        x = torch.ones(1, parts["lora_A.weight"].shape[1])
        h = x @ torch.cat([parts["lora_A.weight"], parts["lora_router.weight"]]).T
        assert torch.isfinite(gated_lanes(h, gate, c) @ parts["lora_B.weight"].T).all()


CHECKED: dict[str, tuple[Callable[..., Path], Callable[[Path, Path], None]]] = {
    "lora": (partial(write_random_lora, rank=4), check_lora),
    "trex": (partial(write_random_trex, r1=2, r2=4), check_trex),
}


@pytest.mark.parametrize("kind", CHECKED)
def test_a_mutated_adapter_is_served_or_refused_by_name(tmp_path: Path, tiny_base: Path, kind: str) -> None:
    write, check = CHECKED[kind]
    adapter = write(tmp_path / "adapter", tiny_base)
    check(adapter, tiny_base)
    assert 90 < campaign(adapter, kind, 150, lambda: check(adapter, tiny_base)) < 150


def test_a_mutated_adapter_of_another_tool_is_added_or_refused_by_name(tmp_path: Path, tiny_base: Path) -> None:
    adapter, shelf = write_random_lora(tmp_path / "adapter", tiny_base, rank=4), Shelf(tmp_path / "shelf")
    change_tensors(adapter, lambda tensors: rename(tensors, FOREIGN["vision and language"]))
    add = partial(adopt_adapter, adapter, name="it", shelf=shelf, base=tiny_base)
    assert 60 < campaign(adapter, "another tool", 120, add) < 120


@pytest.mark.faults
@pytest.mark.parametrize("kind", CHECKED)
def test_a_thousand_mutated_adapters(tmp_path: Path, tiny_base: Path, kind: str) -> None:
    write, check = CHECKED[kind]
    adapter = write(tmp_path / "adapter", tiny_base)
    assert campaign(adapter, f"{kind}, many", 1000, lambda: check(adapter, tiny_base)) > 700


CONVERTED = ("VERA", "LOHA", "MISS", "VBLORA")


@pytest.mark.parametrize("kind", CONVERTED[:2])
def test_a_mutated_adapter_of_another_kind_is_converted_or_refused_by_name(
    tmp_path: Path, tiny_base: Path, kind: str
) -> None:
    convert(tmp_path, tiny_base, kind, 12)


@pytest.mark.faults
@pytest.mark.parametrize("kind", CONVERTED)
def test_four_hundred_mutated_adapters_of_other_kinds(tmp_path: Path, tiny_base: Path, kind: str) -> None:
    convert(tmp_path, tiny_base, kind, 100)


def convert(folder: Path, base: Path, kind: str, count: int) -> None:
    adapter = write_adapter(folder / "adapter", base, kind, **{**EXACT, "LOHA": {"r": 2}}[kind])
    out = folder / "out"

    def check() -> None:
        shutil.rmtree(out, ignore_errors=True)
        convert_adapter(adapter, base, out, accept_error=0.5)

    assert campaign(adapter, kind, count, check) > count // 2


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("what", ["a pipe", "a folder", "a device", "a large file"])
def test_what_is_no_file_or_too_large_is_refused_unread(tmp_path: Path, tiny_base: Path, file: str, what: str) -> None:
    adapter = write_random_lora(tmp_path / "adapter", tiny_base, rank=4)
    path = adapter / file
    path.unlink()
    if what == "a pipe":
        os.mkfifo(path)
    elif what == "a folder":
        path.mkdir()
    elif what == "a device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as out:  # a header of 4 GiB, in a file that takes no room
            out.write(struct.pack("<Q", 2**32))
            out.truncate(2**33)
    with pytest.raises(AdapterError, match="regular file|folder|larger than 4 MiB|at most 100000000 are read"):
        check_adapter(adapter, tiny_base, slot_rank=8)
