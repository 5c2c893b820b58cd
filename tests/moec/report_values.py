"""Hand-made reports that the tests of people's views share."""

from moec.report import GraphReport, PassRecord, Reason, Report, Site

IR = """moe @layers.0 (%x: f32[T, 16]) -> f32[T, 16] {
  %s = score softmax_f32(linear(%x, @gate))  : f32[T, 8]
}"""


def site(i: int = 0, status: str = "fused", **changes: object) -> Site:
    """One site; `changes` replaces fields."""
    values: dict[str, object] = {
        "name": f"model.layers.{i}.mlp",
        "status": status,
        "form": "hit_loop",
        "router": "linear → softmax → topk → renormalize",
        "experts": "gated(silu), F=24",
        "num_experts": 8,
        "top_k": 2,
        "capacity": "dropless",
        "kernels": ("cpp.router", "cpp.experts") if status == "fused" else (),
        "reasons": (),
        "location": "model.py:12",
        "ir": IR if status == "fused" else "",
        "spec": "experts{} -> f32" if status == "fused" else "",
    }
    return Site(**{**values, **changes})  # type: ignore[arg-type]


MISS = Reason("top-k is over the wrong axis", "dim=0 <T>", "model.py:20", "use dim=-1 & keep the tokens' axis")


def report(sites: tuple[Site, ...] = (), **changes: object) -> Report:
    """A report of one graph with two passes."""
    passes = (
        PassRecord("raise", 0, 1.0, "%a = one\n%b = two\nreturn %b"),
        PassRecord("fuse", 1, 2.5, "%a = one\n%c = <moe>\nreturn %c"),
        PassRecord("sweep", 0, 0.1, "%a = one\n%c = <moe>\nreturn %c"),
    )
    graph = GraphReport(sites or (site(0), site(1)), passes, 3, ("a note",))
    made = Report([graph], seconds=1.25)
    for name, value in changes.items():
        setattr(made, name, value)
    return made
