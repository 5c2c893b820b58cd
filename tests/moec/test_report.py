"""The report as data, text and page."""

import html.parser
import json

import pytest

from moec.report import GraphReport, PassRecord, Report
from moec.view.tables import alike, pass_diff, pass_title, render_text, steps


def test_counts_and_completeness(values):
    report = values.report()
    assert (report.graphs, len(report.sites), report.complete) == (1, 2, True)
    declined = values.report((values.site(0), values.site(1, "declined")))
    assert not declined.complete
    assert not values.report(graph_breaks=[("a call", "m.py:1")]).complete
    assert not values.report(not_rolled=[values.MISS]).complete
    assert not Report().complete


def test_json_reads_back_with_everything(values):
    data = json.loads(values.report().to_json())
    assert [site["name"] for site in data["sites"]] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert [(p["graph"], p["name"], p["rewrites"]) for p in data["passes"]] == [
        (0, "raise", 0),
        (0, "fuse", 1),
        (0, "sweep", 0),
    ]
    assert data["passes"][1]["text"].startswith("%a = one")
    assert data["notes"] == ["a note"]


def test_dict_without_texts_is_small(values):
    passes = values.report().to_dict(texts=False)["passes"]
    assert all("text" not in record for record in passes)
    assert [record["name"] for record in passes] == ["raise", "fuse", "sweep"]


def test_repr_is_one_short_line(values):
    assert repr(values.report()) == "Report(graphs=1, sites=2, fused=2, seconds=1.25)"


def test_like_layers_share_a_line_and_others_do_not(values):
    many = tuple(values.site(i) for i in range(48))
    odd = values.site(48, "declined", reasons=(values.MISS,))
    groups = alike((*many, odd))
    assert [len(group.sites) for group in groups] == [48, 1]
    assert groups[0].name == "model.layers.0.mlp … model.layers.47.mlp (48 layers)"
    different = alike((values.site(0), values.site(1, top_k=4)))
    assert len(different) == 2


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_text_keeps_to_its_width_and_has_no_control_codes(values, width):
    text = render_text(values.report((values.site(0), values.site(1, "declined", reasons=(values.MISS,)))), width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    for word in ("fused", "declined", "hit_loop", "cpp.experts", "top-k is over the wrong axis", "model.py:20"):
        assert word in text


def test_print_is_the_table(values, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = str(values.report())
    assert "2 MoE layers found · 2 fused · 0 declined" in text
    assert "kernels" in text


def test_markup_in_user_text_is_shown_as_it_is(values):
    text = render_text(
        values.report((values.site(0, name="[bold]m[/bold]"),), graph_breaks=[("[red]x", "[y].py:1")]), 120
    )
    assert "[bold]m[/bold]" in text
    assert "[red]x  at [y].py:1" in text


def test_nothing_found_says_so():
    assert "no MoE layer was found" in render_text(Report([GraphReport((), (), 3)]), 100)


def test_breaks_and_loops_are_listed(values):
    text = render_text(values.report(graph_breaks=[("data-dependent branch", "m.py:3")], not_rolled=[values.MISS]), 120)
    assert "data-dependent branch  at m.py:3" in text
    assert "loops over experts that were not rolled" in text


def test_diff_of_each_pass(values):
    pairs = list(steps(values.report().graph_reports[0]))
    assert [pass_diff(*pair) != "" for pair in pairs] == [False, True, False]
    diff = pass_diff(*pairs[1]).splitlines()
    assert "-%b = two" in diff
    assert "+%c = <moe>" in diff
    assert pass_title(*pairs[1]) == "fuse: 1 rewrite, 2.5 ms, 3 → 3 lines"
    assert pass_title(*pairs[0]) == "raise: 0 rewrites, 1.0 ms, 3 lines"


class _Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_well_formed_self_contained_and_escaped(values, tmp_path):
    evil = "<script>alert('x')</script> & co"
    site = values.site(1, "declined", reasons=(values.MISS,), name=evil)
    report = values.report((values.site(0), site), graph_breaks=[(evil, "m.py:3")])
    path = report.to_html(tmp_path / "page.html")
    source = path.read_text(encoding="utf-8")
    page = _Page()
    page.feed(source)
    assert page.open == []
    assert page.links == []
    assert "<script" not in source
    assert "url(" not in source
    assert page.text.count(evil) >= 3
    assert source.count('data-name="kernels"') == 2  # a narrow window shows each cell with its column's name
    assert '<td data-name="kernels"></td>' in source  # and leaves empty ones out
    for part in (values.IR, "+%c = <moe>", "experts{} -> f32", "top-k is over the wrong axis", "a note"):
        assert part in page.text


def test_page_of_an_empty_report(tmp_path):
    source = (
        Report([GraphReport((), (PassRecord("raise", 0, 0.1, "return"),), 1)]).to_html(tmp_path / "e.html").read_text()
    )
    assert "No MoE layer was found" in source
