"""Comparing two runs of a model layer by layer, each layer of the second being given its input in the first.

Logits compare a whole model at once, but not where it routes: a token whose experts are nearly tied goes to another
one when its hidden state is rounded otherwise, and from there on its row is another row. Both answers are right. With
the same input for each layer a routing flip ends with its layer, and an attention layer comes before any router:
it must agree in every row, and what follows it in most rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from macaw_server.engine.attention import UnsupportedAttentionError

MOST_ROWS = 0.75
"""Of the rows of a layer, at least so many must agree where a router may have flipped the others."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

Rows = Seq[tuple[int, int]]
"""What the rows of a forward pass are: (prompt, position)."""


def routes(hf: Any) -> bool:
    """Whether a model of this configuration chooses between experts."""
    config = hf.get_text_config()
    return any((getattr(config, name, None) or 0) > 1 for name in _EXPERTS)


class Difference(NamedTuple):
    """The largest differences of any layer, in standard deviations of what the layer gave in the first run.

    Attributes:
        attention: Of any row of an attention layer's output.
        rest: Of a decoder layer's output, the rows beyond `MOST_ROWS` left out.
    """

    attention: float
    rest: float


class LayerTrace:
    """The layers' inputs and outputs in a first run, and how far a second one is from them.

    Args:
        model: Its attention modules have a ``layer_idx``, and its decoder layers are elements of a list.
        attention: The attention modules by ``layer_idx``.

    Raises:
        UnsupportedAttentionError: The decoder layers cannot be told apart.
    """

    def __init__(self, model: nn.Module, attention: Mapping[int, nn.Module]) -> None:
        names = {module: name for name, module in model.named_modules()}
        self._attention = dict(attention)
        self._layers: dict[int, nn.Module] = {}
        for i, module in attention.items():
            found = re.match(r".*\.\d+(?=\.)", names[module])
            if found is None:
                raise UnsupportedAttentionError(f"{names[module]} is not in a list of layers")
            self._layers[i] = model.get_submodule(found[0])
        self._inputs: dict[tuple[int, int, int], Tensor] = {}  # by layer, prompt and position
        self._outputs: dict[tuple[str, int, int, int], Tensor] = {}
        self._errors: dict[tuple[str, int], list[Tensor]] = {}

    @contextmanager
    def record(self, rows: Rows) -> Iterator[None]:
        """Note what the layers take and give in a forward pass over these rows."""

        def on_input(layer: int, hidden: Tensor) -> Tensor:
            self._inputs.update({(layer, *row): x for row, x in zip(rows, hidden[0], strict=True)})
            return hidden

        def on_output(kind: str, layer: int, hidden: Tensor) -> None:
            self._outputs.update({(kind, layer, *row): x for row, x in zip(rows, hidden[0], strict=True)})

        with self._hooks(on_input, on_output):
            yield

    @contextmanager
    def compare(self, rows: Rows) -> Iterator[None]:
        """Give each layer the input that it had, and note how far its output is from what it was."""

        def on_input(layer: int, hidden: Tensor) -> Tensor:
            return torch.stack([self._inputs[layer, *row] for row in rows]).view_as(hidden)

        def on_output(kind: str, layer: int, hidden: Tensor) -> None:
            expected = torch.stack([self._outputs[kind, layer, *row] for row in rows]).float()
            error = (hidden[0].float() - expected).abs().flatten(1).amax(1) / expected.std().clamp_min(1e-6)
            self._errors.setdefault((kind, layer), []).append(error)

        with self._hooks(on_input, on_output):
            yield

    def difference(self) -> Difference:
        """Over all that was compared; infinite where a layer took no part, or gave what is not a number."""
        worst = {"attention": 0.0, "layer": 0.0}
        for kind in worst:
            for layer in self._layers:
                found = self._errors.get((kind, layer))
                if found is None:
                    return Difference(torch.inf, torch.inf)
                errors = torch.cat(found).nan_to_num(nan=torch.inf).sort().values
                last = len(errors) if kind == "attention" else int(len(errors) * MOST_ROWS)
                worst[kind] = max(worst[kind], errors[last - 1].item())
        return Difference(worst["attention"], worst["layer"])

    @contextmanager
    def _hooks(
        self, on_input: Callable[[int, Tensor], Tensor], on_output: Callable[[str, int, Tensor], None]
    ) -> Iterator[None]:
        def before(layer: int) -> Callable[..., Any]:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if args:
                    return (on_input(layer, args[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": on_input(layer, kwargs["hidden_states"])}

            return hook

        def after(kind: str, layer: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                on_output(kind, layer, output[0] if isinstance(output, tuple) else output)

            return hook

        handles = []
        for i, layer in self._layers.items():
            handles.append(layer.register_forward_pre_hook(before(i), with_kwargs=True))
            handles.append(layer.register_forward_hook(after("layer", i)))
            handles.append(self._attention[i].register_forward_hook(after("attention", i)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
