"""No adapter folder ends in a traceback or hangs: it is served, or refused by its name before an engine sees it."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metier.agents import AdapterError
from metier.specializers import check_adapter
from tests.mutated_text import mutated
from tests.tiny_model import write_random_lora

SEED = 20
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 2**63, 10**30, 1e30, float("nan"), float("inf"), "", "x" * 3000, [], {}, [[]], ["q_proj"],
    "(a+)+$", {"q_proj": 3}, {"(.*)*": 4}, "all-linear", [1, "q_proj"], {"a": {}}, "\ud800", "\0",
)  # fmt: skip


def _of_config(config: bytes, header: dict[str, Any], data: bytes, draw: random.Random) -> tuple[bytes, bytes]:
    fields = json.loads(config)
    name = draw.choice([*fields, "rank_pattern", "use_rslora", "exclude_modules", "init_lora_weights", "alpha_pattern"])
    fields[name] = draw.choice(_VALUES)
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


def campaign(folder: Path, base: Path, count: int) -> int:
    """Check `count` mutations of an adapter, and return how many were refused."""
    adapter = write_random_lora(folder / "adapter", base, rank=4)
    config, weights = (adapter / CONFIG).read_bytes(), (adapter / WEIGHTS).read_bytes()
    length = int.from_bytes(weights[:8], "little")
    header, data = weights[8 : 8 + length], weights[8 + length :]
    refused = 0
    for number in range(count):
        draw = random.Random(f"{SEED}|{number}")
        new_config, new_weights = draw.choice(_CHANGES)(config, json.loads(header), data, draw)
        (adapter / CONFIG).write_bytes(new_config)
        (adapter / WEIGHTS).write_bytes(new_weights)
        try:
            check_adapter(adapter, base, slot_rank=8)
        except AdapterError as error:
            refused += 1
            assert str(adapter) in str(error)
            assert len(str(error)) < 6000
        except BaseException as error:
            error.add_note(f"mutation {number}: {new_config[:300]!r} {new_weights[:300]!r}")
            raise
    return refused


def test_a_mutated_adapter_is_served_or_refused_by_name(tmp_path: Path, tiny_base: Path) -> None:
    assert campaign(tmp_path, tiny_base, 300) > 200


@pytest.mark.faults
def test_a_thousand_mutated_adapters(tmp_path: Path, tiny_base: Path) -> None:
    assert campaign(tmp_path, tiny_base, 1000) > 700


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
