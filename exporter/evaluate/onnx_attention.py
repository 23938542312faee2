"""The two attention operators of our graphs: ONNX's own, and ONNX Runtime's GroupQueryAttention."""

from __future__ import annotations

import torch

from exporter.evaluate import ops
from exporter.evaluate.onnx_attributes import Attributes
from exporter.evaluate.program import CannotEvaluate, Compute

Tensor = torch.Tensor


def attention(a: Attributes) -> Compute:
    """`Attention` of opset 24 on 4-D tensors and a cache of static capacity.

    Causal means j ≤ i + (nonpad_kv_seqlen − queries) with lengths, and j ≤ i without, as in ONNX's reference
    implementation.
    """
    is_causal, scale = bool(a.get("is_causal", 0)), a.get("scale")
    for name in ("qk_matmul_output_mode", "q_num_heads", "kv_num_heads"):
        a.only(name, 0)
    a.only("softcap", 0.0)
    a.only("softmax_precision", None, 1)  # FLOAT: what is computed here in any case

    def compute(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        past_key: Tensor | None = None,
        past_value: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        if past_key is not None or past_value is not None:
            raise CannotEvaluate("past_key of Attention")
        queries, keys = query.shape[2], key.shape[2]
        masks = [] if mask is None else [mask]
        if is_causal:
            masks.append(ops.causal(queries, keys, torch.zeros(1) if lengths is None else lengths - queries))
        if lengths is not None:
            masks.append(ops.shorter(keys, lengths))
        return ops.attend(query, key, value, masks, query.shape[-1] ** -0.5 if scale is None else scale)

    return compute


def group_query_attention(a: Attributes) -> Compute:
    """`com.microsoft::GroupQueryAttention`, with rotary inside or ahead of it, where past and present are one buffer.

    A cache of int8 is read as it is written: a step's own keys and values are rounded before they are multiplied.

    `seqlens_k` is each row's last valid key after the step. A row has as many new tokens as its keys leave room for:
    a prefill, in which no row has a past, starts at 0; later steps are of one length.
    """
    heads, kv_heads, scale = a.get("num_heads"), a.get("kv_num_heads"), a.get("scale")
    rotates = bool(a.only("do_rotary", 0, 1))
    a.only("rotary_interleaved", 0)
    a.only("kv_cache_bit_width", 0, 8)
    for name in ("k_quant_type", "v_quant_type"):
        a.only(name, "NONE", "PER_CHANNEL")  # the scales' shape says the rest

    def split(x: Tensor, count: int) -> Tensor:
        return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)

    def compute(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        last_key: Tensor,
        total: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        *others: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        positions_and_masks, scales = others[:3], (*others[3:], None, None)[:2]
        if any(given is not None for given in positions_and_masks):
            raise CannotEvaluate(f"position_ids, attention_bias or head_sink of {a.label}")
        sequence = query.shape[1]
        starts = torch.zeros_like(last_key) if int(total) <= sequence else last_key + 1 - sequence
        positions = starts.long()[:, None] + torch.arange(sequence)
        room = max(int(total) - past_key.shape[2], 0)
        past_key, past_value = (torch.nn.functional.pad(past, (0, 0, 0, room)) for past in (past_key, past_value))

        def turned(x: Tensor, count: int) -> Tensor:
            if not rotates or cos is None or sin is None:
                return split(x, count)
            return ops.rotate(split(x, count), cos, sin, positions, 2 * cos.shape[1]).to(x.dtype)

        news = (turned(key, kv_heads), split(value, kv_heads))
        present_key, present_value = (
            ops.write_cache(past, new if by is None else quantized(new, by), starts)
            for past, new, by in zip((past_key, past_value), news, scales, strict=True)
        )
        read_key, read_value = (
            present if by is None else present.float() * by
            for present, by in zip((present_key, present_value), scales, strict=True)
        )
        queries = turned(query, heads)
        seen = ops.causal(sequence, present_key.shape[2], starts)
        context = ops.attend(queries, read_key, read_value, [seen], scale or queries.shape[-1] ** -0.5)
        return context.transpose(1, 2).flatten(2), present_key, present_value

    return compute


def quantized(x: Tensor, scale: Tensor) -> Tensor:
    """The nearest int8 as ONNX Runtime's kernels find it: ties to even, by the scale's reciprocal in fp32."""
    return (x.float() * scale.reciprocal()).round().clamp(-128, 127).to(torch.int8)
