"""A model run layer by layer from its files: the memory of one layer, for calibration and for perplexity.

Quantised checkpoints run too, dequantised as they are read and with the inputs of W8A8 layers rounded as kernels do,
so both sides of a comparison take the same way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...agents.errors import RecipeError
from .checkpoint_files import AddedWeights, CheckpointReader
from .compressed_tensors import dense_names, read_dense, rounds_inputs
from .quantisers import round_activations

__all__ = ["LayerStream", "Sequences", "load_dense_model"]

_LAYERS = "model.layers"


@dataclass
class Sequences:
    """Token sequences on their way through the model: hidden states [1, tokens, hidden], and what layers are given."""

    states: list[torch.Tensor] = field(default_factory=list)
    context: list[dict[str, Any]] = field(default_factory=list)


class LayerStream:
    """Runs a decoder-only checkpoint of the Llama family one layer at a time, in float32.

    `merged` is a LoRA that counts as part of the weights. Raises: RecipeError when the checkpoint is built in
    another way.
    """

    def __init__(self, folder: Path, merged: AddedWeights | None = None) -> None:
        from transformers import AutoModelForCausalLM

        self.reader = CheckpointReader(folder)
        self._merged = merged
        with torch.device("meta"):
            self._model = AutoModelForCausalLM.from_config(_dense_config(folder), dtype=torch.float32).eval()
        inner: Any = getattr(self._model, "model", None)
        missing = [n for n in ("embed_tokens", "layers", "norm", "rotary_emb") if not hasattr(inner, n)]
        if missing:
            raise RecipeError(
                f"{type(self._model).__name__} has no {', '.join(f'model.{name}' for name in missing)}",
                expected="a model built like Llama: model.embed_tokens, model.layers, model.norm, model.rotary_emb",
                remedy="Use a model of the Llama family (Llama, Mistral, Qwen, SmolLM).",
            )
        self._model.requires_grad_(False)
        self._inner = inner
        self._stack = inner.layers
        inner.rotary_emb = type(inner.rotary_emb)(config=self._model.config)  # computed, with nothing to load

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self._stack)

    def embed(self, rows: Sequence[Sequence[int]]) -> Sequences:
        """Start token sequences: their embeddings, and the positions and masks that layers want."""
        sequences = Sequences()

        class Reached(Exception):
            pass

        def catch(_layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            sequences.states.append(args[0] if args else kwargs.pop("hidden_states"))
            sequences.context.append(kwargs)
            raise Reached

        self._fill(self._inner.embed_tokens, "model.embed_tokens")
        hook = self._stack[0].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            for row in rows:
                try:
                    self._inner(input_ids=torch.tensor([list(row)]), use_cache=False)
                except Reached:
                    pass
        finally:
            hook.remove()
            self._inner.embed_tokens.to_empty(device="meta")
        return sequences

    def run_layer(
        self, number: int, sequences: Sequences, *, prepare: Callable[[Any, Sequences], None] | None = None
    ) -> None:
        """Move the sequences through one layer. `prepare(layer, sequences)` may change its weights first."""
        layer, prefix = self._stack[number], f"{_LAYERS}.{number}"
        self._fill(layer, prefix)
        if prepare is not None:
            prepare(layer, sequences)
        rounded = [m for name, m in layer.named_modules() if rounds_inputs(self.reader, f"{prefix}.{name}")]
        hooks = [m.register_forward_pre_hook(lambda _, args: (round_activations(args[0]),)) for m in rounded]
        for row in range(len(sequences.states)):
            sequences.states[row] = self.forward(layer, sequences, row)
        for hook in hooks:
            hook.remove()
        layer.to_empty(device="meta")

    def forward(self, layer: Any, sequences: Sequences, row: int) -> torch.Tensor:
        """What a layer makes of one sequence."""
        output = layer(sequences.states[row], **sequences.context[row])
        hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def next_token_logits(self, sequences: Sequences) -> torch.Tensor:
        """Logits [sequences, vocabulary] of what follows each sequence, after the last layer."""
        last = torch.cat([states[:, -1] for states in sequences.states])
        return self._normed(last) @ self._head().T

    def losses(self, sequences: Sequences, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Cross-entropy in nats of each token but the first of each row, after the last layer."""
        head, losses = self._head(), []
        for states, row in zip(sequences.states, rows, strict=True):
            logits = self._normed(states)[0, :-1] @ head.T
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(list(row[1:])), reduction="none"))
        return losses

    def _normed(self, states: torch.Tensor) -> torch.Tensor:
        self._fill(self._inner.norm, "model.norm")
        normed: torch.Tensor = self._inner.norm(states)
        return normed

    def _head(self) -> torch.Tensor:
        tied = "lm_head.weight" not in self.reader.tensors
        return read_dense(self.reader, "model.embed_tokens.weight" if tied else "lm_head.weight", torch.float32)

    def _fill(self, module: Any, prefix: str) -> None:
        module.to_empty(device="cpu")
        for name, parameter in module.named_parameters():
            weight = read_dense(self.reader, f"{prefix}.{name}", torch.float32)
            parameter.copy_(weight if self._merged is None else self._merged.add(f"{prefix}.{name}", weight))


def load_dense_model(folder: Path, dtype: torch.dtype) -> Any:
    """Load a checkpoint as a transformers model with dense weights, dequantised where they are quantised."""
    from transformers import AutoModelForCausalLM

    reader = CheckpointReader(folder)
    model = AutoModelForCausalLM.from_config(_dense_config(folder), dtype=dtype)
    parameters = dict(model.named_parameters())
    unknown = set(dense_names(reader)) - set(parameters) - {"lm_head.weight"}  # which may be a copy of the embedding
    assert not unknown, unknown
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(read_dense(reader, name, dtype))
    return model.eval()


def _dense_config(folder: Path) -> Any:
    from transformers import AutoConfig

    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    content.pop("quantization_config", None)
    return AutoConfig.for_model(**content)
