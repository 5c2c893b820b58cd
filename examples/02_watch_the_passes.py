"""See what moec found, the layer as IR, and what each pass changed in the graph."""

import runpy
from pathlib import Path

import torch

import moec
from moec.view.tables import pass_diff, pass_title, steps


def main():
    model, args = runpy.run_path(str(Path(__file__).with_name("01_compile.py")))["make"]()
    with torch.no_grad():
        report = moec.explain(model, *args)

    print(report)
    print()
    for site in report.sites:
        print(site.ir)
    for graph in report.graph_reports:
        for before, after in steps(graph):
            print(f"\n--- {pass_title(before, after)}")
            print(pass_diff(before, after) or "(no change)")


if __name__ == "__main__":
    main()
