"""Files are replaced whole, and nothing is left beside them."""

import pytest

from moec import files
from moec.files import write_whole


@pytest.mark.parametrize("content", ["naïve φ\n", b"\x00\xff"])
def test_content_replaces_what_was_there(tmp_path, content):
    path = tmp_path / "kept"
    path.write_text("old")
    write_whole(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "kept"
    path.write_text("old")

    def refuse(*_):
        raise OSError("no space left")

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
