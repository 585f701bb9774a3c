"""A decoder-only transformer's whole step in one native call; see csrc/decoder.h for what it covers."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from macaw_kernels.cpu.attention import AttentionArgs, plan_arguments
from macaw_kernels.cpu.build import load_library
from macaw_kernels.cpu.linear import PackedLinear, PackedMatrixStruct, WeightType
from macaw_kernels.types import AttentionPlan, HeadConfig

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}

PHASES = ("rows", "qkv", "rotate", "attend", "output", "inner", "down", "logits")
"""Parts of a step, as `Phase` of csrc/decoder.h; `rows` are norms and residuals."""

Activation = Literal["silu", "gelu_tanh", "gelu", "relu"]


@dataclass(slots=True)
class LinearWeights:
    """``[n, k]`` weight and ``[n]`` bias of a linear layer."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(slots=True)
class NormWeights:
    """``[n]`` factor and shift of a norm; the factor is the whole of it (Gemma's is ``1 + weight``)."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(slots=True)
class LayerWeights:
    """One layer: ``x += o(attention(norm(x)))``, then ``x += down(act(gate(norm(x))) * up(norm(x)))``.

    Attributes:
        qkv: Queries, keys and values one below the other.
        o: Attention's output projection.
        gate: None for a plain MLP, ``down(act(up(x)))``.
        up: First projection of the MLP.
        down: Second one.
        input_norm: Before attention; None in models that normalise afterwards.
        mlp_norm: Before the MLP; likewise.
        post_attention_norm: Of what attention adds to the residual.
        post_mlp_norm: Of what the MLP adds.
        q_norm: ``[head_dim]``, of each query head; or ``[num_q_heads * head_dim]``, of all together.
        k_norm: Likewise of keys.
        sinks: ``[num_q_heads]`` attention sinks.
        scale: Of attention scores.
        window: Sliding window in positions.
        soft_cap: Of attention scores.
        rope: Index of the layer's rotary table; None without.
    """

    qkv: LinearWeights
    o: LinearWeights
    gate: LinearWeights | None
    up: LinearWeights
    down: LinearWeights
    input_norm: NormWeights | None
    mlp_norm: NormWeights | None
    scale: float
    post_attention_norm: NormWeights | None = None
    post_mlp_norm: NormWeights | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    sinks: Tensor | None = None
    window: int | None = None
    soft_cap: float | None = None
    rope: int | None = 0


@dataclass(slots=True)
class DecoderWeights:
    """A model, as stock modules hold it.

    Attributes:
        heads: Of every layer; `head_dim` and `v_head_dim` are the same.
        embedding: ``[vocab, hidden]``, float32 or bfloat16.
        layers: From the first to the last.
        final_norm: Before the output projection.
        lm_head: Output projection.
        activation: Of the MLPs.
        eps: Of all norms.
        layer_norm: Norms subtract the mean.
        ropes: Up to two pairs of tables, cosine and sine, ``[max_model_len, rope_dim / 2]`` each.
        embedding_scale: Factor of the embeddings.
        residual_scale: Factor of what is added to the residual.
        logit_scale: Factor of the logits.
        logit_soft_cap: ``cap * tanh(logit / cap)``.
    """

    heads: HeadConfig
    embedding: Tensor
    layers: Sequence[LayerWeights]
    final_norm: NormWeights
    lm_head: LinearWeights
    activation: Activation
    eps: float
    layer_norm: bool = False
    ropes: Sequence[tuple[Tensor, Tensor]] = ()
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, PackedMatrixStruct) for name in ("qkv", "o", "gate", "up", "down")),
        *((name, _Norm) for name in ("input_norm", "post_attention_norm", "mlp_norm", "post_mlp_norm")),
        *((name, ctypes.c_void_p) for name in ("q_norm", "k_norm", "sinks", "k_pages", "v_pages")),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("rope", ctypes.c_int32),
        ("kind", ctypes.c_int32),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_layers", "hidden", "intermediate", "vocab")),
        *((name, ctypes.c_int32) for name in ("num_q_heads", "num_kv_heads", "head_dim", "page_size")),
        *((name, ctypes.c_int32) for name in ("kv_dtype", "embedding_dtype", "layer_norm", "qk_norm_whole")),
        *((name, ctypes.c_int32) for name in ("activation", "rope_dim")),
        *((name, ctypes.c_float) for name in ("eps", "embedding_scale", "residual_scale", "logit_scale")),
        *((name, ctypes.c_float) for name in ("logit_soft_cap", "reserved")),
        ("embedding", ctypes.c_void_p),
        ("rope_cos", ctypes.c_void_p * 2),
        ("rope_sin", ctypes.c_void_p * 2),
        ("final_norm", _Norm),
        ("lm_head", PackedMatrixStruct),
        ("layers", ctypes.POINTER(_Layer)),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("attention", AttentionArgs * 2),
        ("num_tokens", ctypes.c_int64),
        ("token_ids", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("attention_workspace", ctypes.c_int64),
        ("phase_s", ctypes.c_void_p),
    )


class NativeDecoder:
    """A model with packed weights, and its forward pass over a ragged batch.

    Attributes:
        phase_s: Seconds are added up here, one sum for each of `PHASES`; None unless someone wants to know.

    Args:
        weights: Copied, except for the embedding.
        weight_type: How matrices are packed.

    Raises:
        ValueError: Shapes or dtypes that the kernels do not take.
        NativeBuildError: There are no native kernels here.
    """

    def __init__(self, weights: DecoderWeights, weight_type: WeightType) -> None:
        self._library = load_library()
        self._library.macaw_decoder_workspace.restype = ctypes.c_int64
        self._kept: list[Any] = []  # whatever the structures point to
        self.heads = weights.heads
        self.vocab_size, hidden = weights.embedding.shape
        self.max_model_len = min((len(cos) for cos, _ in weights.ropes), default=sys.maxsize)
        self.weight_bytes = 0
        self.weight_type = weight_type
        self._kv: tuple[object, object] | None = None
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self.phase_s: NDArray[np.float64] | None = None

        self._windows = sorted({layer.window for layer in weights.layers}, key=lambda window: window or 0)
        if len(self._windows) > 2 or len(weights.ropes) > 2:
            raise ValueError(f"windows {self._windows} and {len(weights.ropes)} rotary tables; two kinds at most")
        self._layers = (_Layer * len(weights.layers))(*(self._layer(layer) for layer in weights.layers))
        ropes = [(self._floats(cos), self._floats(sin)) for cos, sin in weights.ropes]
        nothing = [None] * (2 - len(ropes))
        q_norm = weights.layers[0].q_norm
        embedding = weights.embedding.detach().contiguous()
        self._kept.append(embedding)
        self._struct = _Decoder(
            num_layers=len(weights.layers),
            hidden=hidden,
            intermediate=weights.layers[0].up.weight.shape[0],
            vocab=weights.lm_head.weight.shape[0],
            num_q_heads=self.heads.num_q_heads,
            num_kv_heads=self.heads.num_kv_heads,
            head_dim=self.heads.head_dim,
            embedding_dtype=_DTYPES[embedding.dtype],
            layer_norm=weights.layer_norm,
            qk_norm_whole=q_norm is not None and q_norm.numel() != self.heads.head_dim,
            activation=_ACTIVATIONS[weights.activation],
            rope_dim=2 * weights.ropes[0][0].shape[1] if weights.ropes else 0,
            eps=weights.eps,
            embedding_scale=weights.embedding_scale,
            residual_scale=weights.residual_scale,
            logit_scale=weights.logit_scale,
            logit_soft_cap=weights.logit_soft_cap or 0.0,
            embedding=embedding.data_ptr(),
            rope_cos=(ctypes.c_void_p * 2)(*(cos for cos, _ in ropes), *nothing),
            rope_sin=(ctypes.c_void_p * 2)(*(sin for _, sin in ropes), *nothing),
            final_norm=self._norm(weights.final_norm),
            lm_head=self._packed(weights.lm_head),
            layers=self._layers,
        )

    def forward(
        self,
        token_ids: Tensor,
        plan: AttentionPlan,
        slot_mapping: Tensor,
        rows: Tensor,
        k_pages: Mapping[int, Tensor],
        v_pages: Mapping[int, Tensor],
    ) -> Tensor:
        """Run a step; all K/V is stored before a layer's attention runs.

        Args:
            token_ids: ``[num_tokens]`` int64, each below `vocab_size`.
            plan: The step's attention.
            slot_mapping: ``[num_tokens]`` int64.
            rows: ``[num_rows]`` int64, tokens whose logits are wanted.
            k_pages: By layer ``[num_pages, page_size, num_kv_heads, head_dim]``, float32 or bfloat16, contiguous.
            v_pages: Likewise.

        Returns:
            ``[num_rows, vocab]`` float32.

        Raises:
            ValueError: Pages, token ids or positions that the decoder does not have.
        """
        self._bind(k_pages, v_pages, plan)
        if int(token_ids.max()) >= self.vocab_size or int(token_ids.min()) < 0:
            raise ValueError(f"token ids must be from 0 to {self.vocab_size - 1}")
        if plan.max_page >= len(k_pages[0]):
            raise ValueError(f"the plan uses page {plan.max_page}, there are {len(k_pages[0])}")
        if int(plan.context_lens.max()) > self.max_model_len:
            raise ValueError(
                f"a context of {plan.context_lens.max()} tokens; the rotary tables are made for {self.max_model_len}"
            )
        threads = torch.get_num_threads()
        logits = torch.empty(len(rows), self._struct.vocab, dtype=torch.float32)
        kinds = [plan_arguments(plan, window, threads) for window in self._windows]
        attention_workspace = max(kind.workspace_bytes for kind in kinds)
        step = _Step(
            attention=(AttentionArgs * 2)(*(kind.args for kind in kinds)),
            num_tokens=len(token_ids),
            token_ids=token_ids.data_ptr(),
            slots=slot_mapping.data_ptr(),
            rows=rows.data_ptr(),
            num_rows=len(rows),
            logits=logits.data_ptr(),
            attention_workspace=attention_workspace,
            phase_s=None if self.phase_s is None else self.phase_s.ctypes.data,
        )
        self._struct.page_size = plan.page_size
        pointers = (ctypes.byref(self._struct), ctypes.byref(step))
        needed = self._library.macaw_decoder_workspace(*pointers)
        if self._workspace.numel() < needed:
            self._workspace = torch.empty(needed, dtype=torch.uint8)
        step.workspace = self._workspace.data_ptr()
        self._library.macaw_decoder_forward(*pointers, ctypes.c_int32(threads))
        return logits

    def _bind(self, k_pages: Mapping[int, Tensor], v_pages: Mapping[int, Tensor], plan: AttentionPlan) -> None:
        """Point the layers to the pages; they stay the same from step to step."""
        if self._kv is not None and self._kv[0] is k_pages and self._kv[1] is v_pages:
            return
        for i, layer in enumerate(self._layers):
            k, v = k_pages[i], v_pages[i]
            expected = (k.shape[0], plan.page_size, self.heads.num_kv_heads, self.heads.head_dim)
            if k.shape != expected or v.shape != expected or k.dtype != v.dtype or k.dtype not in _DTYPES:
                raise ValueError(
                    f"layer {i}: pages of {tuple(k.shape)} {k.dtype} and {tuple(v.shape)} {v.dtype}; "
                    f"{expected} and float32 or bfloat16 are accepted"
                )
            layer.k_pages, layer.v_pages = k.data_ptr(), v.data_ptr()
            self._struct.kv_dtype = _DTYPES[k.dtype]
        self._kv = (k_pages, v_pages)

    def _layer(self, layer: LayerWeights) -> _Layer:
        return _Layer(
            qkv=self._packed(layer.qkv),
            o=self._packed(layer.o),
            gate=PackedMatrixStruct() if layer.gate is None else self._packed(layer.gate),
            up=self._packed(layer.up),
            down=self._packed(layer.down),
            input_norm=self._norm(layer.input_norm),
            mlp_norm=self._norm(layer.mlp_norm),
            post_attention_norm=self._norm(layer.post_attention_norm),
            post_mlp_norm=self._norm(layer.post_mlp_norm),
            q_norm=self._floats(layer.q_norm),
            k_norm=self._floats(layer.k_norm),
            sinks=self._floats(layer.sinks),
            kind=self._windows.index(layer.window),
            scale=layer.scale,
            soft_cap=layer.soft_cap or 0.0,
            rope=-1 if layer.rope is None else layer.rope,
        )

    def _packed(self, linear: LinearWeights) -> PackedMatrixStruct:
        packed = PackedLinear(linear.weight, linear.bias, self.weight_type)
        self._kept.append(packed)
        self.weight_bytes += packed.num_bytes
        return packed.struct

    def _norm(self, norm: NormWeights | None) -> _Norm:
        return _Norm() if norm is None else _Norm(self._floats(norm.weight), self._floats(norm.bias))

    def _floats(self, tensor: Tensor | None) -> int | None:
        """Keep a float32 copy; its address."""
        if tensor is None:
            return None
        copy = tensor.detach().to(torch.float32, copy=True).contiguous()
        self._kept.append(copy)
        return copy.data_ptr()
