"""Few-bit checkpoints: the layout read back by the format's own library, the plan's rules, the files' promises."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file

from metier.agents import RecipeError
from metier.specializers.checkpoints.checkpoint_files import CheckpointReader, CheckpointWriter
from metier.specializers.checkpoints.compressed_tensors import linear_layers, pack_int4, write_compressed
from metier.specializers.checkpoints.quantisation_plan import LAYER_NAMES, Scheme, check_plan, choose_schemes
from metier.specializers.checkpoints.quantisers import dequantise, round_to_nearest
from metier.specializers.checkpoints.stored_weights import dense_names, quantised_layers, read_dense, unpack_integers

W8A8, W4A16 = Scheme(8), Scheme(4, 32)


def compress(base: Path, target: Path, plan: dict[str, Scheme]) -> dict[str, torch.Tensor]:
    """Quantise by rounding; returns what each layer should be when it is read back."""
    reader = CheckpointReader(base)
    expected: dict[str, torch.Tensor] = {}

    def layers() -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        for name, scheme in plan.items():
            weight = reader.read(f"{name}.weight")
            values, scale = round_to_nearest(weight, bits=scheme.bits, group_size=scheme.group_size)
            expected[name] = dequantise(values, scale)
            yield name, values, scale

    write_compressed(reader, target, plan, layers())
    return expected


@pytest.mark.parametrize("scheme", [W8A8, W4A16], ids=["w8a8", "w4a16"])
def test_the_format_library_reads_what_was_written(tmp_path: Path, tiny_base: Path, scheme: Scheme) -> None:
    reader = CheckpointReader(tiny_base)
    plan = choose_schemes(linear_layers(reader), scheme, {})
    assert len(plan) == 14
    expected = compress(tiny_base, tmp_path / "w", plan)
    tensors = load_file(tmp_path / "w" / "model.safetensors")
    for name, weight in expected.items():
        if scheme.bits == 8:
            values = tensors[f"{name}.weight"]
            assert values.dtype == torch.int8 and tensors[f"{name}.weight_scale"].shape == (len(values), 1)
        else:
            shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
            values = unpack_from_int32(tensors[f"{name}.weight_packed"], 4, shape)
        assert torch.equal(dequantise(values, tensors[f"{name}.weight_scale"]), weight)
    written = json.loads((tmp_path / "w" / "config.json").read_text())
    config = QuantizationConfig.model_validate(written["quantization_config"])
    assert config.format == scheme.format and config.ignore == ["lm_head"]
    assert set(config.config_groups) == {"group_0"}
    source = load_file(tiny_base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(tensors[name], source[name])


def test_layers_may_differ_and_are_named_in_the_config(tmp_path: Path, tiny_base: Path) -> None:
    layers = linear_layers(CheckpointReader(tiny_base))
    plan = choose_schemes(layers, W8A8, {"*.mlp.*": W4A16, "*.layers.1.*": None, "*.1.self_attn.o_proj": W8A8})
    check_plan(plan, layers)
    expected = compress(tiny_base, tmp_path / "w", plan)
    config = json.loads((tmp_path / "w" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    QuantizationConfig.model_validate(config)
    groups = {group["format"]: group["targets"] for group in config["config_groups"].values()}
    assert sorted(groups["pack-quantized"]) == [f"model.layers.0.mlp.{n}_proj" for n in ("down", "gate", "up")]
    assert len(groups["int-quantized"]) == 5
    assert len(config["ignore"]) == 1 + 6
    reader = CheckpointReader(tmp_path / "w")
    assert quantised_layers(reader) == set(plan)
    assert dense_names(reader) == sorted(CheckpointReader(tiny_base).tensors)
    source = load_file(tiny_base / "model.safetensors")
    for name in dense_names(reader):
        wanted = expected.get(name.removesuffix(".weight"), source[name])
        assert torch.equal(read_dense(reader, name, torch.float32), wanted)


def test_int4_packing_is_eight_nibbles_lowest_first() -> None:
    values = torch.randint(-8, 8, (5, 32), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    packed = pack_int4(values)
    for row in range(5):
        for word in range(4):
            total = sum((int(values[row, word * 8 + i]) + 8) * 16**i for i in range(8))
            assert int(packed[row, word]) % 2**32 == total
    assert torch.equal(unpack_integers(packed, 4) - 8, values)


def test_plans_the_kernels_would_refuse() -> None:
    names = [f"model.layers.0.{'self_attn' if n[0] in 'qkvo' else 'mlp'}.{n}" for n in LAYER_NAMES]
    layers: dict[str, tuple[int, ...]] = {name: (64, 96) for name in names}
    whole = dict.fromkeys(names, W8A8)
    check_plan(whole, layers)
    with pytest.raises(RecipeError, match=r"q_proj has scheme w8a8 and k_proj has none; .*q_proj, k_proj, v_proj"):
        check_plan({names[0]: W8A8, names[3]: W8A8}, layers)
    with pytest.raises(RecipeError, match=r"gate_proj has scheme w8a8 and up_proj has w4a16-g32"):
        check_plan({**whole, names[5]: W4A16}, layers)
    with pytest.raises(RecipeError, match=r"group_size 64 does not divide the 96 inputs of .*; .*such as 32\. "):
        check_plan(dict.fromkeys(names, Scheme(4, 64)), layers)
    with pytest.raises(RecipeError, match=r"down_proj has 40 outputs; expected a multiple of 32"):
        check_plan({names[6]: W4A16}, {names[6]: (40, 96)})
    # The three members count together: 40 + 8 + 16 is a multiple of 32.
    shapes: dict[str, tuple[int, ...]] = {names[0]: (40, 96), names[1]: (8, 96), names[2]: (16, 96)}
    check_plan(dict.fromkeys(shapes, W4A16), shapes)
    with pytest.raises(RecipeError, match="no layer is left to quantise"):
        check_plan({}, layers)


def test_patterns_that_match_nothing(tiny_base: Path) -> None:
    layers = linear_layers(CheckpointReader(tiny_base))
    with pytest.raises(RecipeError, match=r"pattern 'lm_head' matches no layer.*head, which often is the embedding"):
        choose_schemes(layers, W8A8, {"lm_head": W8A8})
    with pytest.raises(RecipeError, match=r"pattern '\*\.w_proj' matches no layer"):
        choose_schemes(layers, W8A8, {"*.w_proj": None})


def test_models_that_cannot_be_quantised(tmp_path: Path, tiny_base: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "other")
    save_file({"transformer.h.0.attn.c_attn.weight": torch.zeros(4, 4)}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(RecipeError, match=r"model_type 'llama' has no layers to quantise; .*named q_proj, k_proj"):
        linear_layers(CheckpointReader(tmp_path / "other"))
    compress(tiny_base, tmp_path / "w", dict.fromkeys(linear_layers(CheckpointReader(tiny_base)), W8A8))
    with pytest.raises(RecipeError, match="weights in 'w' are quantised already"):
        linear_layers(CheckpointReader(tmp_path / "w"))


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6, dtype=torch.int8).view(2, 3), "a": torch.randn(3, 2).bfloat16()}
    promised = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    path = tmp_path / "model.safetensors"
    with pytest.raises(ZeroDivisionError), CheckpointWriter(path, promised) as writer:
        writer.write("b", tensors["b"])
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with CheckpointWriter(path, promised) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[n], t) for n, t in tensors.items())
    copied = tmp_path / "copy"
    copied.mkdir()
    reader = CheckpointReader(tmp_path)
    with CheckpointWriter(copied / "model.safetensors", promised) as writer:
        for name in tensors:
            writer.copy(name, reader)
            assert torch.equal(reader.read(name), tensors[name])
    assert (copied / "model.safetensors").read_bytes() == path.read_bytes()


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from metier.specializers.checkpoints.checkpoint_files import CheckpointWriter

resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
with CheckpointWriter(Path(sys.argv[1]), {"a": (torch.float32, (2000,))}) as writer:
    writer.write("a", torch.zeros(2000))
"""


def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    script = [sys.executable, "-c", FULL_DISK, str(tmp_path / "model.safetensors")]
    failed = subprocess.run(script, capture_output=True, text=True, check=False, env={**os.environ})
    assert "OSError: [Errno 27]" in failed.stderr
    assert not list(tmp_path.iterdir())
