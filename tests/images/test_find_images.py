"""Finding image files: each once, in a stable order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from vitdeploy.errors import ImageError
from vitdeploy.images.decode import find_images


def test_find_images(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.PNG", "c.txt", "sub/d.webp", "sub/.hidden.jpg", ".git/e.jpg", "sub/deep/f.tiff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    inside = [tmp_path / name for name in ("a.PNG", "b.jpg", "sub/d.webp", "sub/deep/f.tiff")]
    assert find_images([tmp_path]) == inside
    assert find_images([str(tmp_path)]) == inside
    named = [tmp_path / "sub" / ".hidden.jpg", tmp_path / "c.txt"]
    assert find_images([*named, tmp_path / "b.jpg", tmp_path]) == [
        *named,
        tmp_path / "b.jpg",
        inside[0],
        *inside[2:],
    ]
    assert find_images([]) == []


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.JP2", "sub/c.jp2", "notes.txt", "sub/.hidden.txt", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    unread = Counter[str]()
    assert find_images([tmp_path, tmp_path / "notes.txt"], unread) == [
        tmp_path / "a.jpg", tmp_path / "notes.txt",
    ]  # fmt: skip
    assert unread == {".jp2": 2, ".txt": 1, "": 1}
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(ImageError, match=r"no image in directory .*not read: 2 \.jp2, 2 other files"):
        find_images([tmp_path])


def test_find_images_ends_where_links_go_in_circles(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    (tmp_path / "again").symlink_to(tmp_path)
    assert find_images([tmp_path]) == [tmp_path / "a.jpg"]


def test_find_images_refuses_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        find_images([tmp_path / "nowhere"])
    with pytest.raises(ImageError, match="no image in directory") as caught:
        find_images([tmp_path])
    assert "JPEG" in str(caught.value.hint)
