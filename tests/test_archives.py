"""Zip archives, ranges of slices and DICOM series of an upload: what is read, in which order, and what is refused."""

import gzip
import io
import stat
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from page_scans import save_picture
from pydicom.uid import generate_uid
from scan_files import gradient, write_dicom, write_nifti

from fmclip.errors import FmclipError, ScanError
from fmclip.page import uploads
from fmclip.page.uploads import Reading, take_scans
from fmclip.scans import archives
from fmclip.scans.archives import unpack
from fmclip.scans.scan import Unreadable
from fmclip.scans.series import group_series, parse_slices


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "get_upload_folder", lambda: str(tmp_path / "cache"))
    (tmp_path / "cache" / "u").mkdir(parents=True)
    return tmp_path / "cache" / "u"


def png(seed: int, folder: Path) -> bytes:
    return Path(save_picture(folder / f"{seed}.png", seed)).read_bytes()


def zipped(path: Path, members: dict[str, bytes], **options) -> str:
    path.parent.mkdir(exist_ok=True)  # goes with the last upload that was in it
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return str(path)


def test_the_scans_of_a_zip_are_read_in_the_order_of_their_names_which_nobody_sees(cache, tmp_path, capfd):
    members = {f"Mustermann/{seed}.png": png(seed, tmp_path) for seed in (2, 1, 3)}
    extra = {"__MACOSX/._1.png": b"x", "Mustermann/.DS_Store": b"x", "Mustermann/readme.txt": b"text"}
    upload = take_scans([zipped(cache / "a.zip", members | extra)], 5, 10)
    assert [scan.label for scan in upload.scans] == ["scan 5", "scan 6", "scan 7"]
    alone = [take_scans([save_picture(cache / f"{seed}.png", seed)], 1, 1).scans[0].digest for seed in (1, 2, 3)]
    assert [scan.digest for scan in upload.scans] == alone
    assert [str(error)[:12] for error in upload.errors] == ["scan 8 is a "]
    assert "Mustermann" not in str(upload.errors) + "".join(capfd.readouterr())
    assert not list(cache.rglob("*.zip"))


def test_an_archive_in_an_archive_is_refused_and_never_unpacked(cache, tmp_path):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("deep.png", png(1, tmp_path))
    upload = take_scans([zipped(cache / "a.zip", {"a.png": png(2, tmp_path), "b.zip": inner.getvalue()})], 1, 10)
    assert len(upload.scans) == 1
    assert "scan 2 is a zip archive" in str(upload.errors[0])


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "a/../../evil.png", "..\\evil.png", "C:\\evil.png"])
def test_members_that_lead_out_of_the_folder_refuse_the_archive(cache, tmp_path, name):
    upload = take_scans([zipped(cache / "a.zip", {"a.png": png(1, tmp_path), name: b"x"})], 1, 10)
    assert upload.scans == []
    assert "lead out of their folder" in str(upload.errors[0])
    assert "evil" not in str(upload.errors[0])
    assert not list(tmp_path.rglob("evil*"))


def test_links_encryption_and_other_packers_are_refused(cache, tmp_path):
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(cache / "l.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    zipped(cache / "b.zip", {"a.png": png(1, tmp_path)}, compression=zipfile.ZIP_BZIP2)
    content = bytearray(Path(zipped(cache / "e.zip", {"a.png": png(1, tmp_path)})).read_bytes())
    content[6] |= 1
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    (cache / "e.zip").write_bytes(content)
    upload = take_scans([str(cache / name) for name in ("l.zip", "b.zip", "e.zip")], 1, 10)
    assert [
        word in str(error) for word, error in zip(("links", "method", "encrypted"), upload.errors, strict=True)
    ] == [True] * 3


def test_bombs_are_refused_by_what_they_declare_and_by_what_they_unpack_to(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", 2**22)
    many = {f"{place}.png": bytes(2**20) for place in range(8)}
    path = zipped(cache / "a.zip", many, compression=zipfile.ZIP_DEFLATED)
    assert "unpacks to more than 4 MiB" in str(take_scans([path], 1, 10).errors[0])
    honest = Path(zipped(tmp_path / "b.zip", {"a": bytes(2**23)}, compression=zipfile.ZIP_DEFLATED)).read_bytes()
    liar = honest.replace(struct.pack("<I", 2**23), struct.pack("<I", 1000))
    cache.mkdir(exist_ok=True)
    (cache / "b.zip").write_bytes(liar)
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(Unreadable):
        unpack(cache / "b.zip", target)
    assert sum(file.stat().st_size for file in target.iterdir()) <= 2**22


def test_too_many_members_are_refused_before_one_is_read(cache, monkeypatch):
    monkeypatch.setattr(archives, "MAX_SCANS", 3)
    upload = take_scans([zipped(cache / "a.zip", {f"{place}.png": b"x" for place in range(4)})], 1, 10)
    assert "of 4 files: at most 3" in str(upload.errors[0])


def test_a_picture_with_an_archive_behind_it_is_the_picture(cache, tmp_path):
    hidden = Path(zipped(tmp_path / "a.zip", {"evil.png": png(2, tmp_path)})).read_bytes()
    both = cache / "both.png"
    both.write_bytes(png(1, tmp_path) + hidden)
    alone = take_scans([save_picture(cache / "alone.png", 1)], 1, 1).scans[0]
    assert [scan.digest for scan in take_scans([str(both)], 1, 10).scans] == [alone.digest]
    dicom = write_dicom(tmp_path / "a.dcm", gradient()).read_bytes()
    cache.mkdir(exist_ok=True)
    (cache / "c.dcm").write_bytes(hidden[:128].ljust(128, b"\0") + dicom[128:])
    assert len(take_scans([str(cache / "c.dcm")], 1, 10).scans) == 1


@fuzz(600)
@given(edits=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=6)), max_size=5), keep=st.floats(0, 1))
def test_damaged_archives_are_unpacked_or_refused_with_a_reason(tmp_path, edits, keep):
    folder = tmp_path / "out"
    folder.mkdir(exist_ok=True)
    seed = tmp_path / "seed.zip"
    if not seed.exists():
        zipped(seed, {"a/secret.png": b"abc" * 50, "b.png": b"de" * 99}, compression=zipfile.ZIP_DEFLATED)
    content = bytearray(seed.read_bytes())
    for place, patch in edits:
        start = int(place * len(content))
        content[start : start + len(patch)] = patch
    damaged = tmp_path / "damaged.zip"
    damaged.write_bytes(content[: int((0.3 + 0.7 * keep) * len(content))])
    reason, files = "", []
    try:
        files = unpack(damaged, folder)
    except Unreadable as refused:  # any other exception fails the test
        reason = str(refused)
    assert "secret" not in reason
    assert all(file.parent == folder for file in files)


@pytest.mark.parametrize(
    ("text", "slices"),
    [
        ("", ()),
        (" Middle ", ()),
        ("7", (7,)),
        ("3-6", (3, 4, 5, 6)),
        ("10-20:5, 2", (2, 10, 15, 20)),
        ("4 – 5", (4, 5)),
        ("3,3-4", (3, 4)),
    ],
)
def test_slices_are_read_as_a_person_writes_them(text, slices):
    assert parse_slices(text) == slices


@pytest.mark.parametrize("text", ["-1", "5-3", "1-5:0", "a-b", "1.5", "0-999", "1:2:3", "9999999"])
def test_other_texts_are_no_slices(text):
    with pytest.raises(FmclipError, match="No file was read"):
        parse_slices(text)


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_several_slices_of_one_volume_become_several_scans(cache, ending):
    volume = np.random.default_rng(0).random((20, 20, 9), dtype=np.float32)
    files = [str(write_nifti(cache / f"{name}.{ending}", volume)) for name in "abcd"]
    upload = take_scans(files[:1], 1, 10, Reading.parse("2-6:2", "as stored"))
    assert [scan.label for scan in upload.scans] == ["scan 1", "scan 2", "scan 3"]
    assert [scan.notes[-1] for scan in upload.scans] == [f"slice {index} is shown" for index in (2, 4, 6)]
    single = [
        take_scans([file], 1, 1, Reading.parse(text, "as stored")).scans[0]
        for file, text in zip(files[1:], "246", strict=True)
    ]
    assert [scan.digest for scan in upload.scans] == [scan.digest for scan in single]
    assert set(upload.windows.values()) == {"as stored"}


def test_a_slice_that_is_not_there_is_named_and_the_others_are_read(cache):
    path = write_nifti(cache / "a.nii", np.random.default_rng(0).random((20, 20, 5)))
    upload = take_scans([str(path)], 1, 10, Reading.parse("3-5", "as stored"))
    assert len(upload.scans) == 2
    assert "scan 3 has no slice 5: its slices are 0 to 4" in str(upload.errors[0])


def test_frames_of_a_dicom_file_are_slices_too(cache):
    frames = np.random.default_rng(0).integers(0, 255, (6, 32, 32), dtype=np.uint8)
    upload = take_scans([str(write_dicom(cache / "a.dcm", frames))], 1, 10, Reading.parse("1-3", "as stored"))
    assert len({scan.digest for scan in upload.scans}) == 3


def series(folder: Path, uid: str, heights: list[float]) -> list[str]:
    folder.mkdir(exist_ok=True)
    files = []
    for place, height in enumerate(heights):
        pixels = np.full((32, 32), 10 * int(height) + 5, np.uint8)
        pixels[0, 0], pixels[0, 1] = 0, 255
        position = {"ImagePositionPatient": [0, 0, height], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        files.append(str(write_dicom(folder / f"{place}-{uid[-5:]}.dcm", pixels, SeriesInstanceUID=uid, **position)))
    return files


def test_the_files_of_a_series_come_in_anatomical_order_and_slices_pick_among_them(cache):
    uid = generate_uid()
    upload = take_scans(series(cache, uid, [3, 1, 4, 0, 2]), 1, 10)
    assert [round(float(np.median(scan.pixels)) * 255) for scan in upload.scans] == [5, 15, 25, 35, 45]
    upload = take_scans(series(cache, uid, [3, 1, 4, 0, 2]), 1, 10, Reading.parse("1-2", "as stored"))
    assert [round(float(np.median(scan.pixels)) * 255) for scan in upload.scans] == [15, 25]
    upload = take_scans(series(cache, uid, [0, 1]), 1, 10, Reading.parse("7", "as stored"))
    assert "this series has slices 0 to 1" in str(upload.errors[0])


def test_series_of_two_patients_stay_apart(tmp_path):
    one, other = series(tmp_path, generate_uid(), [1, 0]), series(tmp_path, generate_uid(), [0, 1])
    groups = group_series([Path(path) for path in (one[0], other[0], one[1], other[1])])
    assert groups == [[Path(one[1]), Path(one[0])], [Path(other[0]), Path(other[1])]]


def test_an_upload_that_takes_too_long_ends_with_a_word(cache, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_SECONDS", -1)
    upload = take_scans([save_picture(cache / "a.png", 1)], 1, 10)
    assert isinstance(upload.errors[0], ScanError)
    assert "reading took too long" in str(upload.errors[0])


def test_a_gzip_bomb_is_not_unzipped_without_end(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(bytes(2**22)))
    assert not archives.gunzip(path, tmp_path / "out", 2**20)
    assert (tmp_path / "out").stat().st_size <= 2**20
