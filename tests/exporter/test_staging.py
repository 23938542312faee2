"""A bundle appears whole or not at all, and nothing that existed is damaged on the way."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from refusals import assert_tells, snapshot

from exporter.staging import check_destination, staged
from runtime.errors import UserError


def write(directory: Path, content: str = "new") -> None:
    (directory / "manifest.json").write_text(json.dumps({"schema": 1, "tool": "nemotron-export 0.1.0"}))
    (directory / "model.onnx").write_text(content)
    (directory / "engines").mkdir()
    (directory / "engines" / "model.plan").write_text(content)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle that exists already."""
    (tmp_path / "place" / "bundle").mkdir(parents=True)
    write(tmp_path / "place" / "bundle", "old")
    return tmp_path / "place" / "bundle"


def stage(destination: Path, force: bool, then: BaseException | Callable[[Path], None]) -> None:
    """Write a bundle, and fail or do something else before it is done."""
    with staged(destination, force) as directory:
        write(directory)
        if isinstance(then, BaseException):
            raise then
        then(directory)


def refusal(destination: Path, force: bool = False) -> UserError:
    with pytest.raises(UserError) as refused, staged(destination, force):
        raise AssertionError("work was begun")
    return refused.value


def test_what_was_written_appears_under_its_name_and_nothing_else_does(tmp_path: Path) -> None:
    with staged(tmp_path / "bundle") as directory:
        write(directory)
        expected = snapshot(directory)
        assert not (tmp_path / "bundle").exists()
    assert snapshot(tmp_path / "bundle") == expected
    assert list(tmp_path.iterdir()) == [tmp_path / "bundle"]


def test_parents_are_made(tmp_path: Path) -> None:
    with staged(tmp_path / "a" / "b" / "bundle") as directory:
        write(directory)
    assert (tmp_path / "a" / "b" / "bundle" / "model.onnx").read_text() == "new"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o077, 0o700), (0o002, 0o775)])
def test_a_bundle_is_as_private_as_the_user_has_everything(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with staged(tmp_path / "bundle") as directory:
            write(directory)
    finally:
        os.umask(before)
    assert (tmp_path / "bundle").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("error", [ValueError("bug"), UserError("x; y"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failure_leaves_nothing_not_even_parents(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(type(error)) as raised:
        stage(tmp_path / "mine" / "a" / "b" / "bundle", False, error)
    assert raised.value is error
    assert snapshot(tmp_path) == {"mine": None}


def test_a_failure_in_a_parent_that_someone_else_uses_by_now_is_still_told_as_it_is(tmp_path: Path) -> None:
    def intrude(_: Path) -> None:
        (tmp_path / "a" / "theirs").write_text("kept")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "a" / "b" / "bundle", False, intrude)
    assert snapshot(tmp_path) == {"a": None, "a/theirs": b"kept"}


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt()])
def test_a_failure_leaves_the_bundle_that_was_to_be_replaced(bundle: Path, error: BaseException) -> None:
    before = snapshot(bundle.parent)
    within = snapshot(bundle)

    def fail(_: Path) -> None:
        assert snapshot(bundle) == within  # it is there all along
        raise error

    with pytest.raises(type(error)):
        stage(bundle, True, fail)
    assert snapshot(bundle.parent) == before


def test_force_replaces_a_bundle_whole(bundle: Path) -> None:
    (bundle / "golden.npz").write_text("of the old one")
    with staged(bundle, force=True) as directory:
        write(directory)
        expected = snapshot(directory)
    assert snapshot(bundle) == expected
    assert list(bundle.parent.iterdir()) == [bundle]


def test_an_older_or_newer_version_of_a_bundle_is_one_too(bundle: Path) -> None:
    (bundle / "manifest.json").write_text(json.dumps({"schema": 9, "tool": "nemotron-export 7.0"}))
    check_destination(bundle, force=True)


def empty_directory(place: Path) -> None:
    place.mkdir()


def file(place: Path) -> None:
    place.write_text("mine")


def directory_of_the_user(place: Path) -> None:
    place.mkdir()
    (place / "thesis.tex").write_text("mine")


def browser_extension(place: Path) -> None:
    place.mkdir()
    (place / "manifest.json").write_text('{"manifest_version": 3, "name": "mine"}')


def list_as_manifest(place: Path) -> None:
    place.mkdir()
    (place / "manifest.json").write_text('["nemotron-export 0.1.0"]')


def damaged_manifest(place: Path) -> None:
    place.mkdir()
    (place / "manifest.json").write_bytes(b'{"tool": "nemotron-export 0.1.0", \xff')


def directory_called_manifest(place: Path) -> None:
    (place / "manifest.json").mkdir(parents=True)


def dangling_link(place: Path) -> None:
    place.symlink_to(place.with_name("nowhere"))


def link_to_a_bundle(place: Path) -> None:
    real = place.with_name("real")
    real.mkdir()
    write(real)
    place.symlink_to(real)


OTHERS: tuple[Callable[[Path], None], ...] = (
    empty_directory,
    file,
    directory_of_the_user,
    browser_extension,
    list_as_manifest,
    damaged_manifest,
    directory_called_manifest,
    dangling_link,
    link_to_a_bundle,
)


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: other.__name__)
def test_whatever_is_there_is_never_written_over_or_deleted(tmp_path: Path, other: Callable[[Path], None]) -> None:
    place = tmp_path / "place"
    other(place)
    before = snapshot(tmp_path)
    assert_tells(refusal(place), place, "exists", "--force")
    assert_tells(refusal(place, force=True), place, "is not a bundle", "choose another place")
    assert snapshot(tmp_path) == before
    assert place.is_symlink() == (other in (dangling_link, link_to_a_bundle))


def test_a_bundle_is_not_replaced_unasked(bundle: Path) -> None:
    before = snapshot(bundle.parent)
    assert_tells(refusal(bundle), bundle, "exists", "--force")
    assert snapshot(bundle.parent) == before


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_at_the_destination_meanwhile_is_kept(tmp_path: Path, force: bool) -> None:
    place = tmp_path / "place"
    with pytest.raises(UserError) as refused:
        stage(place, force, lambda _: directory_of_the_user(place))
    assert_tells(refused.value, place)
    assert snapshot(tmp_path) == {"place": None, "place/thesis.tex": b"mine"}


def test_a_file_where_a_directory_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert_tells(refusal(tmp_path / "file" / "a" / "bundle"), tmp_path / "file", "is not a directory")
    assert snapshot(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("path", ["x" * 300, "a/" + "x" * 300 + "/bundle", "a/b/" + "x" * 250])
def test_a_name_too_long_for_the_file_system_is_told_and_leaves_no_parents(tmp_path: Path, path: str) -> None:
    assert_tells(refusal(tmp_path / path), tmp_path / path, "name too long", "choose another place")
    assert snapshot(tmp_path) == {}


@pytest.fixture
def unwritable() -> Iterator[Path]:
    """A directory that the process may read and not write; root gives up its rights for it."""
    root = Path(tempfile.mkdtemp())  # not below tmp_path, which other users may not even enter
    root.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield root
    finally:
        os.seteuid(user)
        root.chmod(0o755)
        shutil.rmtree(root)


@pytest.mark.parametrize("path", ["bundle", "a/b/bundle"])
def test_a_place_that_cannot_be_written_is_named(unwritable: Path, path: str) -> None:
    assert_tells(refusal(unwritable / path), unwritable, "Permission denied", "choose another place")
    assert snapshot(unwritable) == {}


def test_a_bundle_in_a_place_that_cannot_be_written_stays(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(bundle.parent)

    def denied(path: Path, *args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", denied)
    assert_tells(refusal(bundle, force=True), bundle, "Permission denied")
    assert snapshot(bundle.parent) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_with_the_destination_and_leaves_nothing(bundle: Path, number: int) -> None:
    before = snapshot(bundle.parent)
    for destination, force in ((bundle, True), (bundle.parent / "a" / "other", False)):
        full = OSError(number, os.strerror(number), "some/file/of/the/checkpoint")  # as shutil.copyfile names it
        with pytest.raises(UserError) as refused:
            stage(destination, force, full)
        assert_tells(refused.value, destination, os.strerror(number), "free space there")
        assert "some/file" not in str(refused.value)
        assert snapshot(bundle.parent) == before


def test_another_fault_of_the_system_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), staged(tmp_path / "bundle"):
        raise PermissionError(errno.EACCES, "Permission denied", "checkpoint/tokenizer.json")


class Renames:
    """Path.rename, whose n-th call raises, before or after it has done its work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: int, error: BaseException, done: bool) -> None:
        self.count = 0
        original = Path.rename

        def rename(path: Path, target: Path) -> Path:
            self.count += 1
            if self.count != failing:
                return original(path, target)
            if done:
                original(path, target)
            raise error

        monkeypatch.setattr(Path, "rename", rename)


@pytest.mark.parametrize(("failing", "done"), [(1, False), (1, True), (2, False)])
def test_an_interruption_between_the_renames_leaves_the_old_bundle(bundle: Path, monkeypatch, failing, done) -> None:
    before = snapshot(bundle.parent)
    renames = Renames(monkeypatch, failing, KeyboardInterrupt(), done)
    with pytest.raises(KeyboardInterrupt), staged(bundle, force=True) as directory:
        write(directory)
    assert renames.count >= failing
    assert snapshot(bundle.parent) == before


def test_an_interruption_after_the_renames_leaves_the_new_bundle_alone(bundle: Path, monkeypatch) -> None:
    Renames(monkeypatch, 2, KeyboardInterrupt(), done=True)
    with pytest.raises(KeyboardInterrupt), staged(bundle, force=True) as directory:
        write(directory)
    assert (bundle / "model.onnx").read_text() == "new"
    assert list(bundle.parent.iterdir()) == [bundle]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_mount_point_or_a_full_directory_is_told_and_the_old_bundle_stays(bundle: Path, monkeypatch, failing) -> None:
    before = snapshot(bundle.parent)
    Renames(monkeypatch, failing, OSError(errno.EBUSY, "Device or resource busy"), done=False)
    with pytest.raises(UserError) as refused, staged(bundle, force=True) as directory:
        write(directory)
    assert_tells(refused.value, bundle, "busy", "choose another place")
    assert snapshot(bundle.parent) == before


def test_an_interruption_while_the_old_bundle_is_deleted_leaves_no_rest_of_it(bundle: Path, monkeypatch) -> None:
    original, calls = shutil.rmtree, []

    def rmtree(path: Path, *args: object, **options: object) -> None:
        calls.append(path)
        if len(calls) == 1:
            (Path(path) / "model.onnx").unlink()
            raise KeyboardInterrupt
        original(path, ignore_errors=True)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(KeyboardInterrupt), staged(bundle, force=True) as directory:
        write(directory)
    assert (bundle / "model.onnx").read_text() == "new"
    assert list(bundle.parent.iterdir()) == [bundle]


@pytest.mark.parametrize("name", [".", "engines/..", "../bundle/"])
def test_the_bundle_the_user_stands_in_can_be_replaced(bundle: Path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(bundle)
    with staged(Path(name), force=True) as directory:
        write(directory)
    assert (bundle / "model.onnx").read_text() == "new"
    assert list(bundle.parent.iterdir()) == [bundle]
