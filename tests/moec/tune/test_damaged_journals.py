"""Journals that are damaged or somebody else's: a search begins anew or continues, the report shows what is whole."""

import json
import random

import pytest
from damage import as_line, damaged, retyped
from tune_fakes import JOB, Steady

from moec.cli import commands as cli
from moec.errors import MoecError, TargetError
from moec.runtime import tune_cache
from moec.tune.run import finished, journal_path, tune
from moec.tune.view import plot


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path))
    tune_cache._load.cache_clear()
    return tmp_path / "tuning"


@pytest.fixture
def whole(folder):
    """The lines of a search's journal: the first, some measurements, the check."""
    tune(JOB, 1e9, Steady)
    (done,) = folder.glob("*.done")
    lines = done.read_bytes().splitlines(keepends=True)
    done.unlink()
    return [lines[0], *lines[1:40], lines[-1]]


def resumed(folder, content):
    """The entry of a search that found `content` as its journal, which ends after a measurement or two.

    Where the journal may be whole and says that the default plan cannot be used: what is said then.
    """
    journal_path(JOB, folder).write_bytes(content)
    try:
        result = tune(JOB, 1e-9, Steady)
    except MoecError as error:
        return str(error)
    (entry,) = tune_cache.load()
    assert entry == result.entry
    assert result.entry.median > 0
    assert tune_cache.Entry.parse(entry.to_line()) == entry
    return result


@pytest.mark.parametrize("seed", range(4))
def test_a_search_continues_from_a_journal_broken_by_chance(folder, whole, seed):
    rng = random.Random(seed)
    for _ in range(25):
        assert not isinstance(resumed(folder, damaged(rng, b"".join(whole))), str)


def test_a_search_continues_from_a_journal_with_another_value_at_any_place(folder, whole):
    head, record, check = whole[0], whole[1], whole[-1]
    rng = random.Random(5)
    changed = [
        *(as_line(value) + record for value in rng.sample(list(retyped(json.loads(head))), 60)),
        *(head + as_line(value) + record for value in retyped(json.loads(record))),
        *(head + record + as_line(value) for value in retyped(json.loads(check))),
    ]
    assert len(changed) > 200
    found = [resumed(folder, content) for content in rng.sample(changed, 200)]
    said = [each for each in found if isinstance(each, str)]
    assert len(said) < 20
    assert all(text.startswith(("nothing was measured", "the default plan cannot be used")) for text in said)


def test_a_folder_where_a_journal_should_be_is_named(folder):
    path = journal_path(JOB, folder)
    path.mkdir(parents=True)
    with pytest.raises(TargetError, match=f"{path} cannot be used.*MOEC_CACHE_DIR"):
        tune(JOB, 1e-9, Steady)


def test_the_report_shows_what_is_whole(folder, whole, capsys):
    """Of hundreds of journals, most of them broken, with a folder of such a name among them."""
    rng = random.Random(9)
    contents = [damaged(rng, b"".join(whole)) for _ in range(100)]
    contents += [as_line(value) + b"".join(whole[1:]) for value in rng.sample(list(retyped(json.loads(whole[0]))), 150)]
    contents += [b"".join((*whole[:5], as_line(value))) for value in retyped(json.loads(whole[1]))]
    for i, content in enumerate(contents):
        (folder / f"damaged{i:03}.done").write_bytes(content)
    (folder / "a folder.done").mkdir()
    (folder / "whole.done").write_bytes(b"".join(whole))
    found = finished()
    assert 1 <= len(found) < len(contents) // 2
    assert any(job == JOB for job, _, _ in found)
    for arguments in (["--json"], []):
        assert cli.run(["tune", "report", *arguments]) == cli.OK, capsys.readouterr().err


def test_a_profile_is_no_formula_in_the_plot(folder, whole):
    head = json.loads(whole[0])
    head["job"]["profile"] = "[/x] $\\foo$"
    (folder / "odd.done").write_bytes(b"".join((as_line(head), *whole[1:])))
    assert plot(finished(), folder / "plot.png").stat().st_size > 5000
