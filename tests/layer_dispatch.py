"""Source of a sampled layer's dispatch: rows to experts and back, in every form of the grammar."""

from __future__ import annotations

from layer_parts import Parts


def _call(p: Parts, rows: str) -> tuple[str, str]:
    """An expert's call on rows, and the multiplication by weights: (call, factor)."""
    factor = "w[token, slot, None]"
    if p.twist == "weight_twice":
        factor = f"{factor} * {factor}"
    if p.twist == "weight_inside":
        return f"expert({rows} * {factor})", ""
    return f"expert({rows})", f" * {factor}"


def _skip(p: Parts) -> list[str]:
    return ["    if i == 1:", "        continue"] if p.twist == "skip_expert" else []


def _added(p: Parts) -> list[str]:
    """token, rows → y."""
    return {
        "index_add": ["    y.index_add_(0, token, rows.to(y.dtype))"],
        "setitem": ["    y[token] += rows.to(y.dtype)"],
        "scatter_add": ["    y.scatter_add_(0, token.unsqueeze(-1).expand(-1, H), rows.to(y.dtype))"],
        "index_put": ["    y.index_put_((token,), rows.to(y.dtype), accumulate=True)"],
    }[p.combine]


def _where_loop(p: Parts) -> list[str]:
    call, factor = _call(p, "x[None, token].reshape(-1, H)")
    return [
        "y = torch.zeros((x.shape[0], H), dtype=x.dtype, device=x.device)",
        "mask = F.one_hot(e, num_classes=E).permute(2, 1, 0)",
        "for i in range(E):",
        *_skip(p),
        "    expert = self.experts[i]",
        "    slot, token = torch.where(mask[i])",
        f"    rows = {call}{factor}",
        *_added(p),
    ]


def _enumerate_loop(p: Parts) -> list[str]:
    call, factor = _call(p, "x[token]")
    return [
        "y = torch.zeros_like(x)",
        "for i, expert in enumerate(self.experts):",
        *_skip(p),
        "    token, slot = torch.where(e == i)",
        "    if token.numel() == 0:",
        "        continue",
        f"    rows = {call}{factor}",
        *_added(p),
    ]


def _nonzero_loop(p: Parts) -> list[str]:
    call, factor = _call(p, "x[token]")
    return [
        "y = torch.zeros_like(x)",
        "for i, expert in enumerate(self.experts):",
        *_skip(p),
        "    at = (e == i).nonzero()",
        "    token, slot = at[:, 0], at[:, 1]",
        f"    rows = {call}{factor}",
        *_added(p),
    ]


def _mask_loop(p: Parts) -> list[str]:
    factor = "weight[mask].unsqueeze(-1)"
    call = "expert(x[mask])"
    product = f"{factor} * {call}" if p.twist != "weight_inside" else f"expert(x[mask] * {factor})"
    return [
        "y = torch.zeros_like(x)",
        "for i, expert in enumerate(self.experts):",
        *_skip(p),
        "    mask = (e == i).any(-1)",
        "    if not mask.any():",
        "        continue",
        "    weight = (w * (e == i)).sum(-1)",
        f"    y[mask] += {product}" if p.twist != "weight_twice" else f"    y[mask] += {factor} * {product}",
    ]


def _hit_loop(p: Parts) -> list[str]:
    call, factor = _call(p, "x[token]")
    return [
        "y = torch.zeros_like(x)",
        "mask = F.one_hot(e, num_classes=E).permute(2, 1, 0)",
        "hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()",
        "for i in hit:",
        "    i = i[0]",
        "    expert = self.experts[i]",
        "    slot, token = torch.where(mask[i])",
        f"    rows = {call}{factor}",
        *_added(p),
    ]


def _stacked_loop(p: Parts) -> list[str]:
    factor = "w[token, slot, None]"
    x = f"x[token] * {factor}" if p.twist == "weight_inside" else "x[token]"
    up, down = (", self.up_bias[i]", ", self.down_bias[i]") if p.bias else ("", "")
    tail = "" if p.twist == "weight_inside" else f" * {factor}"
    return [
        "y = torch.zeros_like(x)",
        "for i in range(E):",
        *_skip(p),
        "    token, slot = torch.where(e == i)",
        f"    h = phi(F.linear({x}, self.up[i]{up}))",
        f"    rows = F.linear(h, self.down[i]{down}){tail * (2 if p.twist == 'weight_twice' else 1)}",
        *_added(p),
    ]


def _gathered_bmm(p: Parts) -> list[str]:
    up, down = (" + self.up_bias[flat]", " + self.down_bias[flat]") if p.bias else ("", "")
    inside = " * w.reshape(-1, 1)" if p.twist == "weight_inside" else ""
    outside = "" if inside else " * w.reshape(-1, 1)"
    return [
        "flat = e.reshape(-1)",
        f"rows = x.repeat_interleave(K, dim=0){inside}",
        f"h = torch.bmm(self.up[flat], rows.unsqueeze(-1)).squeeze(-1){up}",
        f"h = torch.bmm(self.down[flat], phi(h).unsqueeze(-1)).squeeze(-1){down}",
        f"h = h{outside * (2 if p.twist == 'weight_twice' else 1)}",
        "y = h.view(-1, K, H).sum(1)",
    ]


def _gathered_einsum(p: Parts) -> list[str]:
    up, down = (" + self.up_bias[e]", " + self.down_bias[e]") if p.bias else ("", "")
    return [
        f"h = phi(torch.einsum('th,tkfh->tkf', x, self.up[e]){up})",
        f"h = torch.einsum('tkf,tkhf->tkh', h, self.down[e]){down}",
        "y = torch.einsum('tk,tkh->th', w, h)"
        if p.twist != "weight_twice"
        else "y = torch.einsum('tk,tkh->th', w * w, h)",
    ]


def _grouped(p: Parts) -> list[str]:
    lines = [
        "flat = e.reshape(-1)",
        "order = flat.argsort(stable=True)",
        "counts = torch.histc(flat.float(), bins=E, min=0, max=E - 1)",
        "ends = counts.cumsum(0).to(torch.int32)",
        "rows = x[order // K]",
        "h = torch.ops.fuzz.groups(rows, self.up.transpose(1, 2), ends)",
        "h = torch.ops.fuzz.groups(phi(h), self.down.transpose(1, 2), ends)",
        "h = h * w.reshape(-1)[order].unsqueeze(-1)",
    ]
    if p.twist == "weight_twice":
        lines.append("h = h * w.reshape(-1)[order].unsqueeze(-1)")
    if p.combine == "index_add":
        return [*lines, "y = torch.zeros_like(x).index_add_(0, order // K, h)"]
    return [*lines, "y = h[order.argsort()].view(-1, K, H).sum(1)"]


def _dense_bmm(p: Parts) -> list[str]:
    return [
        "gates = torch.zeros((x.shape[0], E), dtype=x.dtype).scatter(1, e, w)",
        "h = torch.bmm(x.repeat(E, 1).view(E, -1, H), self.up.transpose(1, 2))",
        "h = torch.bmm(phi(h), self.down.transpose(1, 2))",
        "y = (h * gates.t().reshape(E, -1, 1)).sum(0)",
    ]


def _dense_einsum(p: Parts) -> list[str]:
    return [
        "gates = torch.zeros((x.shape[0], E), dtype=x.dtype).scatter(1, e, w)",
        "h = phi(torch.einsum('th,efh->etf', x, self.up))",
        "h = torch.einsum('etf,ehf->eth', h, self.down)",
        "y = torch.einsum('te,eth->th', gates, h)",
    ]


DISPATCH = {
    "where_loop": _where_loop,
    "mask_loop": _mask_loop,
    "hit_loop": _hit_loop,
    "enumerate_loop": _enumerate_loop,
    "nonzero_loop": _nonzero_loop,
    "stacked_loop": _stacked_loop,
    "gathered_bmm": _gathered_bmm,
    "gathered_einsum": _gathered_einsum,
    "grouped": _grouped,
    "dense_bmm": _dense_bmm,
    "dense_einsum": _dense_einsum,
}
