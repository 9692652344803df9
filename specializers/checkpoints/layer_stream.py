"""A model run layer by layer from its files: the memory of one layer, for calibration and for perplexity.

What is computed is the family's own code: its forward pass runs once without layers, and notes what each layer is
given (masks and positions differ from layer to layer); then the layers run one after the other, over all sequences;
then the forward pass again from the last layer's output on, for whatever the family does with it up to the logits.
That this is the model is checked on a few tokens. Quantised checkpoints run too, dequantised as they are read and
with the inputs of W8A8 layers rounded as kernels do, so both sides of a comparison take the same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...agents.errors import RecipeError
from .checkpoint_files import AddedWeights, CheckpointReader
from .dense_model import build_without_weights, load_dense_model
from .quantisers import round_activations
from .stored_weights import dense_names, read_dense, rounds_inputs

__all__ = ["LayerStream", "Sequences"]

# Logits of a streamed and of the whole model are equal up to the order of sums.
_MOST_DIFFERENCE = 1e-3
_PROBE_TOKENS = 40
# Config → whether models of it can be streamed: weights do not change that.
_streamable: dict[str, bool] = {}


@dataclass
class Sequences:
    """Token sequences on their way through the model: hidden states [1, tokens, hidden], and what layers are given.

    `context[row][layer]` has the further arguments of that layer for that sequence, by place and by name.
    """

    rows: list[torch.Tensor] = field(default_factory=list)
    states: list[torch.Tensor] = field(default_factory=list)
    context: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=list)


@dataclass(frozen=True)
class _Place:
    """Where a weight goes in the model, and its name in the checkpoint."""

    module: Any
    attribute: str
    stored: str


class LayerStream:
    """Runs a decoder-only checkpoint one layer at a time, in float32.

    `merged` is a LoRA that counts as part of the weights. A model whose weights are stored under other names than its
    own is held in memory whole. Raises: RecipeError when the model has no stack of layers, or lacks a weight.
    """

    def __init__(self, folder: Path, merged: AddedWeights | None = None) -> None:
        self.reader = CheckpointReader(folder)
        self._merged = merged
        self._model = build_without_weights(folder)
        self._outer, self._inner = self._places()
        if self._stored_otherwise():
            self._model = load_dense_model(folder, torch.float32, merged).requires_grad_(False)
            self._outer, self._inner = (), {}
        self._prefix, self._stack = _find_layers(self._model)
        for name, module in self._model.named_modules():
            if rounds_inputs(self.reader, name):
                module.register_forward_pre_hook(lambda _, args: (round_activations(args[0]), *args[1:]))
        key = hashlib.sha256(self._model.config.to_json_string().encode()).hexdigest()
        if key not in _streamable:
            _streamable[key] = self._check()
        self.exact = _streamable[key]

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self._stack)

    def layer_name(self, number: int) -> str:
        """A layer's name, such as `model.layers.3`."""
        return f"{self._prefix}.{number}"

    def logits(self, rows: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        """Logits [tokens, vocabulary] of each row, one after the other.

        A family whose layers hand each other more than hidden states runs whole for each row: right, and slower.
        """
        if not self.exact:
            for row in rows:
                yield self._whole(row)
            return
        sequences = self.embed(rows)
        for number in range(self.depth):
            self.run_layer(number, sequences)
        yield from self._after_layers(sequences)

    def embed(self, rows: Sequence[Sequence[int]]) -> Sequences:
        """Start token sequences: their embeddings, and the positions and masks that layers want.

        Raises: RecipeError for a family that cannot run a layer at a time.
        """
        if not self.exact:
            raise RecipeError(
                f"{type(self._model).__name__} cannot run a layer at a time: its layers share more than hidden states",
                expected="layers that hand on hidden states alone",
                remedy="Set rounding: rtn, which needs no calibration.",
            )
        return self._embed(rows)

    def run_layer(
        self, number: int, sequences: Sequences, *, prepare: Callable[[Any, Sequences], None] | None = None
    ) -> None:
        """Move the sequences through one layer. `prepare(layer, sequences)` may change its weights first."""
        layer = self._stack[number]
        with torch.no_grad(), self._filled(self._inner.get(number, ())):
            if prepare is not None:
                prepare(layer, sequences)
            for row in range(len(sequences.states)):
                sequences.states[row] = self.forward(number, sequences, row)

    def forward(self, number: int, sequences: Sequences, row: int) -> torch.Tensor:
        """What a layer makes of one sequence."""
        args, kwargs = sequences.context[row][number]
        with torch.no_grad():
            output = self._stack[number](sequences.states[row], *args, **kwargs)
        hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    # -- the forward pass around the layers --------------------------------------------------------------

    def _embed(self, rows: Sequence[Sequence[int]]) -> Sequences:
        sequences = Sequences()
        with self._filled(self._outer):
            for row in rows:
                given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
                first: list[torch.Tensor] = []

                def note(
                    number: int,
                    hidden_states: torch.Tensor,
                    *args: Any,
                    given: list[Any] = given,
                    first: list[torch.Tensor] = first,
                    **kwargs: Any,
                ) -> torch.Tensor:
                    if not number:
                        first.append(hidden_states)
                    given.append((args, kwargs))
                    return hidden_states

                tokens = torch.tensor([list(row)])
                with self._layers_replaced(note), torch.no_grad():
                    self._model.base_model(input_ids=tokens, use_cache=False)
                sequences.rows.append(tokens)
                sequences.states.append(first[0])
                sequences.context.append(given)
        return sequences

    def _after_layers(self, sequences: Sequences) -> Iterator[torch.Tensor]:
        with self._filled(self._outer):
            for tokens, states in zip(sequences.rows, sequences.states, strict=True):

                def last(
                    number: int, hidden_states: torch.Tensor, *_: Any, states: torch.Tensor = states, **__: Any
                ) -> torch.Tensor:
                    return states if number == self.depth - 1 else hidden_states

                with self._layers_replaced(last):
                    logits = self._forward(tokens)
                yield logits

    def _whole(self, row: Sequence[int]) -> torch.Tensor:
        """Logits [tokens, vocabulary] of one row by the forward pass as it is, each layer read when its turn comes."""
        with self._filled(self._outer), self._layers_filled_in_turn():
            return self._forward(torch.tensor([list(row)]))

    def _forward(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self._model(input_ids=tokens, use_cache=False).logits
        return logits[0]

    def _check(self) -> bool:
        """Whether streaming gives what the forward pass gives, on a few tokens."""
        size = self._model.get_input_embeddings().num_embeddings
        row = [(7919 * (number + 1)) % size for number in range(_PROBE_TOKENS)]
        expected = self._whole(row).log_softmax(-1)
        try:
            sequences = self._embed([row])
            for number in range(self.depth):
                self.run_layer(number, sequences)
            found = next(self._after_layers(sequences)).log_softmax(-1)
        except (TypeError, IndexError, KeyError, AttributeError, RuntimeError):
            return False  # its layers are called, or answer, in a way of their own
        return found.shape == expected.shape and bool((found - expected).abs().max() <= _MOST_DIFFERENCE)

    # -- layers and weights ------------------------------------------------------------------------------

    @contextmanager
    def _layers_replaced(self, stand_in: Callable[..., torch.Tensor]) -> Iterator[None]:
        """Call `stand_in(number, hidden_states, …)` in place of each layer."""
        for number, layer in enumerate(self._stack):
            layer.forward = partial(stand_in, number)
        try:
            yield
        finally:
            for layer in self._stack:
                del layer.forward

    @contextmanager
    def _layers_filled_in_turn(self) -> Iterator[None]:
        hooks = []
        for number, layer in enumerate(self._stack):
            places = self._inner.get(number, ())
            hooks.append(layer.register_forward_pre_hook(lambda *_, places=places: self._fill(places)))
            hooks.append(layer.register_forward_hook(lambda *_, places=places: _empty(places)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _filled(self, places: Iterable[_Place]) -> Iterator[None]:
        self._fill(places)
        try:
            yield
        finally:
            _empty(places)

    def _fill(self, places: Iterable[_Place]) -> None:
        read: dict[str, Any] = {}  # a tied head is read once
        for place in places:
            if place.stored not in read:
                weight = read_dense(self.reader, place.stored, torch.float32)
                weight = weight if self._merged is None else self._merged.add(place.stored, weight)
                read[place.stored] = torch.nn.Parameter(weight, requires_grad=False)
            setattr(place.module, place.attribute, read[place.stored])

    def _places(self) -> tuple[tuple[_Place, ...], dict[int, tuple[_Place, ...]]]:
        """Where the weights outside the layers go, and those of each layer."""
        prefix, stack = _find_layers(self._model)
        stored = set(dense_names(self.reader))
        parameters = list(self._model.named_parameters(remove_duplicate=False))
        known = {id(parameter): name for name, parameter in reversed(parameters) if name in stored}
        outer: list[_Place] = []
        inner: dict[int, list[_Place]] = {number: [] for number in range(len(stack))}
        for name, parameter in parameters:
            module, _, attribute = name.rpartition(".")
            # A tied weight is stored under another name of the same parameter.
            place = _Place(
                self._model.get_submodule(module),
                attribute,
                name if name in stored else known.get(id(parameter), name),
            )
            if name.startswith(f"{prefix}."):
                inner[int(name.removeprefix(f"{prefix}.").partition(".")[0])].append(place)
            else:
                outer.append(place)
        return tuple(outer), {number: tuple(places) for number, places in inner.items()}

    def _stored_otherwise(self) -> bool:
        """Whether a weight, or a buffer that is no constant, is stored under a name that is not the model's own."""
        stored = set(dense_names(self.reader))
        places = [*self._outer, *(place for part in self._inner.values() for place in part)]
        parameters = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        buffers = set(self._model.state_dict()) - parameters
        return any(place.stored not in stored for place in places) or bool(buffers & stored)


def _empty(places: Iterable[_Place]) -> None:
    for place in places:
        weight = getattr(place.module, place.attribute)
        setattr(place.module, place.attribute, torch.nn.Parameter(weight.to("meta"), requires_grad=False))


def _find_layers(model: Any) -> tuple[str, Any]:
    """Name and modules of a model's stack of layers: the outermost list that is as long as its config says."""
    depth = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return name, module
    raise RecipeError(
        f"{type(model).__name__} has no list of {depth} layers",
        expected="a decoder with one stack of layers",
        remedy="Use another model.",
    )
