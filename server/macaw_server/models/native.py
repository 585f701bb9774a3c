"""From transformers' modules to the weights of the native CPU decoder.

The families here differ in small ways only, and those can be read off their modules. What is read is not believed: the
load-time probe compares the native decoder's answers with the stock model's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from macaw_kernels.cpu.decoder import Activation, DecoderWeights, LayerWeights, LinearWeights, NormWeights
from macaw_server.engine.attention import LayerSpec

FAMILIES = frozenset(
    {
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "olmo3",
        "phi3",
        "qwen2",
        "qwen3",
        "seed_oss",
        "smollm3",
        "starcoder2",
    }
)
"""Values of `model_type` whose models have the native decoder's shape."""

_ACTIVATIONS: dict[str, Activation] = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
    "ReLU": "relu",
}


class NotNativeError(Exception):
    """The native decoder does not cover this model; the message says what it lacks."""


def read_weights(model: Any, layers: Mapping[int, LayerSpec], max_model_len: int) -> DecoderWeights:
    """Describe a stock model in the native decoder's terms; nothing is copied.

    Args:
        model: A transformers model for causal language modelling, on the CPU.
        layers: Its attention layers, as seen in a forward pass.
        max_model_len: Positions for which rotary tables are made.

    Raises:
        NotNativeError: Some part of it has no native counterpart.
    """
    config = model.config.get_text_config()
    if config.model_type not in FAMILIES:
        raise NotNativeError(f"models of type {config.model_type} have no native decoder")
    specs = [layers[i] for i in sorted(layers)]
    heads = specs[0].heads
    if any(spec.heads != heads for spec in specs) or heads.head_dim != heads.v_head_dim:
        raise NotNativeError("its layers differ in their heads")
    body = model.model
    modules = list(body.layers)
    ropes, rope_of_layer = _ropes(body, modules, max_model_len)
    final_norm = body.norm
    embedding = model.get_input_embeddings()
    return DecoderWeights(
        heads=heads,
        embedding=embedding.weight,
        layers=[_layer(module, spec, rope) for module, spec, rope in zip(modules, specs, rope_of_layer, strict=True)],
        final_norm=_norm(final_norm),
        lm_head=_linear(model.lm_head),
        activation=_activation(modules[0].mlp),
        eps=_eps(final_norm),
        layer_norm=isinstance(final_norm, nn.LayerNorm),
        ropes=ropes,
        # In the dtype of the embedding, as the stock model multiplies.
        embedding_scale=float(torch.as_tensor(getattr(embedding, "embed_scale", 1.0)).to(embedding.weight.dtype))
        * float(getattr(body, "embedding_multiplier", 1.0)),
        residual_scale=float(getattr(modules[0], "residual_multiplier", 1.0)),
        logit_scale=1.0 / float(getattr(config, "logits_scaling", 1.0)),
        logit_soft_cap=getattr(config, "final_logit_softcapping", None),
    )


def free_weights(model: nn.Module) -> None:
    """Give back the memory of a model whose weights are packed; its embedding stays."""
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    for parameter in model.parameters():
        if parameter is not embedding:
            parameter.data = parameter.data.new_empty(0)


def _layer(layer: Any, spec: LayerSpec, rope: int | None) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    gate, up, down = _mlp(mlp)
    after = hasattr(layer, "post_feedforward_layernorm")  # its attention's and MLP's outputs are normalised
    before = hasattr(layer, "input_layernorm")
    mlp_norm = getattr(layer, "pre_feedforward_layernorm", None) if after else layer.post_attention_layernorm
    return LayerWeights(
        qkv=_qkv(attention),
        o=_linear(attention.o_proj),
        gate=gate,
        up=up,
        down=down,
        input_norm=_norm(layer.input_layernorm) if before else None,
        mlp_norm=None if mlp_norm is None else _norm(mlp_norm),
        post_attention_norm=_norm(layer.post_attention_layernorm) if after else None,
        post_mlp_norm=_norm(layer.post_feedforward_layernorm) if after else None,
        q_norm=_norm(attention.q_norm).weight if hasattr(attention, "q_norm") else None,
        k_norm=_norm(attention.k_norm).weight if hasattr(attention, "k_norm") else None,
        scale=spec.scale,
        window=spec.window,
        soft_cap=spec.soft_cap,
        rope=rope,
    )


def _qkv(attention: Any) -> LinearWeights:
    if hasattr(attention, "qkv_proj"):
        return _linear(attention.qkv_proj)
    parts = [_linear(projection) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
    biases = [part.bias for part in parts if part.bias is not None]
    if biases and len(biases) < len(parts):
        raise NotNativeError("some of its query, key and value projections have a bias, some have not")
    return LinearWeights(torch.cat([part.weight for part in parts]), torch.cat(biases) if biases else None)


def _mlp(mlp: Any) -> tuple[LinearWeights | None, LinearWeights, LinearWeights]:
    """Gate (or None), up and down projection."""
    if hasattr(mlp, "gate_up_proj"):
        both = _linear(mlp.gate_up_proj)
        gate, up = both.weight.chunk(2)
        biases = (None, None) if both.bias is None else both.bias.chunk(2)
        return LinearWeights(gate, biases[0]), LinearWeights(up, biases[1]), _linear(mlp.down_proj)
    if hasattr(mlp, "gate_proj"):
        return _linear(mlp.gate_proj), _linear(mlp.up_proj), _linear(mlp.down_proj)
    if hasattr(mlp, "c_fc"):
        return None, _linear(mlp.c_fc), _linear(mlp.c_proj)
    raise NotNativeError(f"its MLP, {type(mlp).__name__}, is unknown")


def _linear(module: Any) -> LinearWeights:
    if type(module) is not nn.Linear:
        raise NotNativeError(f"{type(module).__name__} stands where a linear layer is expected")
    return LinearWeights(module.weight.detach(), None if module.bias is None else module.bias.detach())


def _norm(module: Any) -> NormWeights:
    weight = module.weight.detach().float()
    if type(module).__name__.startswith("Gemma"):
        weight = 1.0 + weight
    bias = getattr(module, "bias", None)
    return NormWeights(weight, None if bias is None else bias.detach())


def _eps(module: Any) -> float:
    return float(getattr(module, "variance_epsilon", None) or module.eps)


def _activation(mlp: Any) -> Activation:
    for name in ("act_fn", "activation_fn", "act"):
        if hasattr(mlp, name):
            kind = type(getattr(mlp, name)).__name__
            if kind in _ACTIVATIONS:
                return _ACTIVATIONS[kind]
            raise NotNativeError(f"its activation, {kind}, is unknown")
    raise NotNativeError(f"its MLP, {type(mlp).__name__}, has no known activation")


def _ropes(body: Any, modules: list[Any], max_model_len: int) -> tuple[list[tuple[Tensor, Tensor]], list[int | None]]:
    """Cosine and sine tables, and which of them each layer uses."""
    rotary = body.rotary_emb
    kinds = [_layer_type(body, i) for i in range(len(modules))]
    if "layer_type" not in inspect.signature(rotary.forward).parameters:
        kinds = [None] * len(modules)
    distinct = sorted(set(kinds), key=str)
    if len(distinct) > 2:
        raise NotNativeError(f"it has {len(distinct)} kinds of rotary embeddings")
    positions = torch.arange(max_model_len).unsqueeze(0)
    like = torch.zeros(1, 1, 1, dtype=torch.float32)  # of the tables' dtype
    tables = []
    with torch.inference_mode():
        for kind in distinct:
            args = () if kind is None else (kind,)
            cos, sin = (table[0] for table in rotary(like, positions, *args))
            half = cos.shape[-1] // 2
            if not (torch.equal(cos[:, :half], cos[:, half:]) and torch.equal(sin[:, :half], sin[:, half:])):
                raise NotNativeError("its rotary embedding is not by halves")
            tables.append((cos[:, :half].clone(), sin[:, :half].clone()))
    return tables, [
        distinct.index(kind) if _uses_rope(module.self_attn) else None
        for kind, module in zip(kinds, modules, strict=True)
    ]


def _layer_type(body: Any, index: int) -> str | None:
    types = getattr(body.config, "layer_types", None)
    return None if types is None else str(types[index])


def _uses_rope(attention: Any) -> bool:
    """SmolLM3 and EXAONE 4 leave it out in some layers."""
    if hasattr(attention, "use_rope"):
        return bool(attention.use_rope)
    if hasattr(attention, "sliding_window_pattern"):
        return attention.sliding_window is None or bool(attention.is_sliding)
    return True
