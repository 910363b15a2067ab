"""The cache folder is its owner's alone, or is not used; what is written there appears whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from specplug import cache_folder
from specplug.cache_folder import CacheError, check_private, default_cache_folder, new_file, private_folder


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Under the umask of a system whose users share groups."""
    monkeypatch.setenv("SPECPLUG_CACHE", str(tmp_path / "cache"))
    before = os.umask(0o002)
    yield tmp_path / "cache"
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_folders_are_made_for_their_owner(root: Path) -> None:
    assert private_folder() == root
    assert private_folder("a/b") == root / "a" / "b"
    assert [mode(folder) for folder in (root, root / "a", root / "a" / "b")] == [0o700] * 3


@pytest.mark.parametrize("part", ["", "a", "a/b"])
@pytest.mark.parametrize("bits", [0o770, 0o702])
def test_what_others_may_write_to_is_refused(root: Path, part: str, bits: int) -> None:
    private_folder("a/b")
    (root / part).chmod(bits)
    with pytest.raises(CacheError, match=f"others may write to {root / part}"):
        private_folder("a/b")
    (root / part).chmod(0o755)
    private_folder("a/b")


def test_what_belongs_to_somebody_else_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private_folder()
    (root / "file").touch(mode=0o600)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    for refused in (private_folder, lambda: check_private(root / "file")):
        with pytest.raises(CacheError, match=f"belongs to user {me} and not to user {me + 1}: .*SPECPLUG_CACHE"):
            refused()


def test_a_folder_that_cannot_be_made_says_so(root: Path) -> None:
    root.touch()
    with pytest.raises(CacheError, match="cannot be created: File exists"):
        private_folder("a")


def test_users_without_a_home_are_told_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache_folder.Path, "home", homeless)
    monkeypatch.delenv("SPECPLUG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / "specplug"
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(CacheError, match="no home folder: set SPECPLUG_CACHE"):
        private_folder()


@pytest.mark.parametrize(("name", "bits"), [("a.bin", 0o600), ("a.so", 0o700)])
def test_files_appear_whole_and_private(root: Path, name: str, bits: int) -> None:
    path = private_folder() / name
    with new_file(path) as temporary:
        temporary.unlink()
        temporary.write_text("as a linker writes it: a file of its own making")
        assert not path.exists()
    check_private(path)
    assert mode(path) == bits
    with pytest.raises(ValueError, match="half-way"), new_file(path) as temporary:
        raise ValueError("half-way")
    assert [file.name for file in root.iterdir()] == [name]
