"""A grammar of MoE layers as runnable source: routers × selections × dispatches × bodies × combines × dtypes."""

from __future__ import annotations

from hypothesis import strategies as st
from layer_dispatch import DISPATCH
from layer_parts import (
    ACTS,
    BODIES,
    COMBINES,
    EXTRAS,
    LOOPS,
    ROUTERS,
    SELECTS,
    STACKED,
    TWISTS,
    WEIGHTS,
    H,
    Parts,
    Sample,
)


@st.composite
def parts(draw: st.DrawFn, twisted: bool = False) -> Parts:
    """The choices; with `twisted`, one that moec need not know."""
    experts = draw(st.sampled_from((4, 2, 6, 8)))
    select = draw(st.sampled_from(SELECTS))
    if select == "groups":
        experts = draw(st.sampled_from((4, 8)))
    k = draw(st.sampled_from([n for n in (2, 1, 3, experts) if n <= (experts // 2 if select == "groups" else experts)]))
    dispatch = draw(st.sampled_from((*LOOPS, *STACKED)))
    body = draw(st.sampled_from(BODIES if dispatch in LOOPS else BODIES[:4]))
    weights = draw(st.sampled_from(WEIGHTS))
    bias = draw(st.booleans()) and dispatch in (*LOOPS, "gathered_einsum", "stacked_loop", "gathered_bmm")
    return Parts(
        experts,
        k,
        draw(st.sampled_from((12, 8, 16))),
        draw(st.sampled_from(ROUTERS)),
        draw(st.booleans()),
        select,
        weights,
        draw(st.sampled_from((1.0, 2.5))),
        dispatch,
        body,
        draw(st.sampled_from(ACTS)),
        bias,
        draw(st.sampled_from(COMBINES)),
        draw(st.sampled_from(TWISTS)) if twisted else "none",
        draw(st.sampled_from(EXTRAS)),
    )


@st.composite
def samples(draw: st.DrawFn, twists: float = 0.3) -> Sample:
    """A module of the grammar, in one case of 1 / `twists` with a twist."""
    twisted = draw(st.integers(0, 99)) < 100 * twists
    chosen = draw(parts(twisted=twisted))
    dtype = draw(st.sampled_from(("float32", "float32", "float32", "bfloat16")))
    tokens = draw(st.sampled_from((7, 13, 1, 32)))
    shape = (1, tokens, H) if chosen.extra == "three_axes" else (tokens, H)
    training = draw(st.booleans())
    name = " ".join(str(v) for v in vars(chosen).values())
    supported = not twisted and not _gap(chosen, tokens)
    return Sample(write(chosen, dtype), tokens, dtype, training, supported, name, shape)


def _gap(p: Parts, tokens: int) -> bool:
    """Known gap of the matcher: one token repeated for every expert looks like E tokens."""
    return p.dispatch == "dense_bmm" and tokens == 1


def write(p: Parts, dtype: str) -> str:
    """The module as source."""
    return "\n".join(
        [
            "import torch",
            "import torch.nn.functional as F",
            "from torch import nn",
            "",
            f"H, N, E, K = {H}, {p.width}, {p.experts}, {p.k}",
            "",
            *(_GROUPS.splitlines() if p.dispatch == "grouped" else []),
            "",
            *_activation(p),
            "",
            *_expert(p),
            "",
            "class MoE(nn.Module):",
            *_init(p),
            "",
            *_route(p),
            "",
            *_forward(p),
            "",
            "",
            "def make():",
            "    torch.manual_seed(0)",
            f"    return MoE().to(torch.{dtype})",
            "",
        ]
    )


_GROUPS = """
if not hasattr(torch.ops.fuzz, "groups"):  # torch's own takes few dtypes and sizes on a CPU

    def bounds(ends):
        return list(zip([0, *ends.tolist()[:-1]], ends.tolist()))

    @torch.library.custom_op("fuzz::groups", mutates_args=())
    def groups(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[a:b] @ w[e] for e, (a, b) in enumerate(bounds(ends))])

    @torch.library.custom_op("fuzz::groups_backward", mutates_args=())
    def groups_backward(
        g: torch.Tensor, x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parts = list(enumerate(bounds(ends)))
        dx = torch.cat([g[a:b] @ w[e].t() for e, (a, b) in parts])
        return dx, torch.stack([x[a:b].t() @ g[a:b] for e, (a, b) in parts])

    groups.register_fake(lambda x, w, ends: x.new_empty(x.shape[0], w.shape[2]))
    groups_backward.register_fake(lambda g, x, w, ends: (torch.empty_like(x), w.new_empty(w.shape)))
    groups.register_autograd(
        lambda ctx, g: (*torch.ops.fuzz.groups_backward(g, *ctx.saved_tensors), None),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
"""

_ACTS = {
    "silu": "F.silu(x)",
    "gelu": "F.gelu(x)",
    "gelu_tanh": "F.gelu(x, approximate='tanh')",
    "relu": "torch.relu(x)",
    "sigmoid": "x.sigmoid()",
    "swish": "x * torch.sigmoid(x * 1.702)",
    "relu2": "F.relu(x).square()",
    "clamped": "F.silu(x.clamp(max=2.0))",
}


def _activation(p: Parts) -> list[str]:
    halves = {
        "gated": "a, b = h.chunk(2, dim=-1)",
        "gated_swapped": "a, b = h[..., N:], h[..., :N]",
        "interleaved": "a, b = h[..., ::2], h[..., 1::2]",
    }
    lines = ["def act(x):", f"    return {_ACTS[p.act]}", "", "", "def phi(h):"]
    if p.twist == "norm":
        lines.append("    h = F.layer_norm(h, h.shape[-1:])")
    if p.body in halves:
        return [*lines, f"    {halves[p.body]}", "    return act(a) * b"]
    return [*lines, "    return act(h)"]


def _expert(p: Parts) -> list[str]:
    if p.dispatch not in LOOPS:
        return []
    rows = "N" if p.body in ("plain", "separate") else "2 * N"
    lines = [
        "class Expert(nn.Module):",
        "    def __init__(self, bias):",
        "        super().__init__()",
        f"        self.up, self.down = nn.Linear(H, {rows}, bias=bias), nn.Linear(N, H, bias=bias)",
    ]
    if p.body == "separate":
        lines.append("        self.gate = nn.Linear(H, N, bias=bias)")
    lines += ["", "    def forward(self, x):"]
    if p.body == "separate":
        return [*lines, "        return self.down(phi(self.gate(x)) * self.up(x))"]
    return [*lines, "        return self.down(phi(self.up(x)))"]


def _init(p: Parts) -> list[str]:
    lines = [
        "    def __init__(self):",
        "        super().__init__()",
        f"        self.gate = nn.Linear(H, E, bias={p.gate_bias})",
    ]
    if p.select == "sigmoid_bias":
        lines.append("        self.register_buffer('shift', torch.randn(E) * 0.1)")
    if p.dispatch in LOOPS:
        one = f"{p.bias} or e == 1" if p.twist == "one_bias" else str(p.bias)
        lines.append(f"        self.experts = nn.ModuleList(Expert({one}) for e in range(E))")
        if p.twist == "tied":
            lines.append("        self.experts[1] = self.experts[0]")
    else:
        rows = "N" if p.body == "plain" else "2 * N"
        lines.append(f"        self.up = nn.Parameter(torch.randn(E, {rows}, H) * 0.3)")
        lines.append("        self.down = nn.Parameter(torch.randn(E, H, N) * 0.3)")
        if p.bias:
            lines.append(f"        self.up_bias = nn.Parameter(torch.randn(E, {rows}))")
            lines.append("        self.down_bias = nn.Parameter(torch.randn(E, H))")
    if p.extra == "shared":
        lines.append("        self.shared = nn.Sequential(nn.Linear(H, N), nn.SiLU(), nn.Linear(N, H))")
    return lines


_LOGITS = {
    "linear": ["logits = self.gate(x)"],
    "functional": ["logits = F.linear(x, self.gate.weight, self.gate.bias)"],
    "matmul": ["logits = x @ self.gate.weight.t()"],
    "einsum": ["logits = torch.einsum('th,eh->te', x, self.gate.weight)"],
    "float": ["logits = F.linear(x.float(), self.gate.weight.float())"],
}

_SELECT = {
    "softmax": ["score = logits.softmax(-1)", "w, e = score.topk(K, dim=-1)"],
    "softmax_f32": ["score = F.softmax(logits, dim=-1, dtype=torch.float)", "w, e = torch.topk(score, K, dim=-1)"],
    "sigmoid": ["score = logits.sigmoid()", "w, e = torch.topk(score, K, dim=-1, sorted=False)"],
    "sigmoid_bias": [
        "score = logits.sigmoid()",
        "e = (score + self.shift).topk(K, dim=-1)[1]",
        "w = score.gather(1, e)",
    ],
    "topk_softmax": ["w, e = logits.topk(K, dim=-1)", "w = w.softmax(-1)"],
    "softplus": ["score = F.softplus(logits)", "w, e = score.topk(K, dim=-1)"],
    "logits": ["w, e = torch.topk(logits, K, dim=-1)"],
    "scattered": [
        "top, e = logits.topk(K, dim=-1)",
        "score = torch.sigmoid(torch.full_like(logits, float('-inf')).scatter_(1, e, top))",
        "w = score.gather(1, e)",
    ],
    "groups": [
        "score = logits.sigmoid()",
        "best = score.view(-1, 2, E // 2).topk(2, dim=-1)[0].sum(-1)",
        "mask = torch.zeros_like(best).scatter_(1, best.topk(1, dim=-1)[1], 1)",
        "wide = mask.unsqueeze(-1).expand(-1, 2, E // 2).reshape(-1, E)",
        "e = score.masked_fill(~wide.bool(), float('-inf')).topk(K, dim=-1)[1]",
        "w = score.gather(1, e)",
    ],
}

_WEIGHTS = {
    "plain": [],
    "normal": ["w = w / w.sum(-1, keepdim=True)"],
    "normal_eps": ["w = w / (w.sum(dim=-1, keepdim=True) + 1e-20)"],
    "normal_inplace": ["w = w / w.sum(dim=-1, keepdim=True)"],
    "normal_clamp": ["w = w / w.sum(-1, keepdim=True).clamp(min=1e-6)"],
}


def _route(p: Parts) -> list[str]:
    logits = list(_LOGITS["linear" if p.gate_bias and p.router in ("matmul", "einsum", "float") else p.router])
    select = list(_SELECT[p.select])
    lines = [*logits, *select]
    normal = list(_WEIGHTS[p.weights])
    if p.weights == "normal_inplace":
        normal = (
            ["w = w * 1.0", "w /= w.sum(dim=-1, keepdim=True)"]
            if p.select == "topk_softmax"
            else ["w /= w.sum(dim=-1, keepdim=True)"]
        )
    if p.select != "logits":  # logits may sum to nothing
        lines += normal
    if p.scale != 1.0:
        lines.append(f"w = w * {p.scale}")
    lines += {
        "weights_squared": ["w = w * w"],
        "wrong_slot": ["w = w.flip(-1)"],
        "weights_by_choice": ["w = w * (1 + 0.1 * e)"],
        "smallest": ["w, e = logits.topk(K, dim=-1, largest=False)"],
        "shifted_choice": ["e = (e + 1) % E"],
        "extra_scale_token": ["w = w * x.mean(-1, keepdim=True)"],
        "axis": ["w = w.softmax(0)"],
    }.get(p.twist, [])
    lines.append("return w.to(x.dtype), e, logits")
    return ["    def route(self, x):", *(f"        {line}" for line in lines)]


def _forward(p: Parts) -> list[str]:
    lines = ["x = inputs.view(-1, H)", "w, e, logits = self.route(x)"]
    lines += DISPATCH[p.dispatch](p)
    if p.twist == "second_user":
        lines.append(
            "y = y + h.sum() * 0.001"
            if p.dispatch in STACKED and p.dispatch != "stacked_loop"
            else "y = y + w.sum() * 0.001"
        )
    if p.twist == "count_used":
        lines.append("y = y * (1 + torch.bincount(e.reshape(-1), minlength=E).to(y.dtype)[0])")
    if p.twist == "rows_mixed":
        lines.append("y = y.roll(1, 0)")
    lines += {
        "residual": ["y = x + y"],
        "shared": ["y = y + self.shared(x)"],
        "three_axes": ["y = y.view(inputs.shape)"],
    }.get(p.extra, [])
    result = {
        "logits": "return y, logits",
        "aux": "return y, (logits.softmax(-1).mean(0) * F.one_hot(e, E).to(y.dtype).mean((0, 1))).sum()",
    }
    lines.append(result.get(p.extra, "return y"))
    return ["    def forward(self, inputs):", *(f"        {line}" for line in lines)]
