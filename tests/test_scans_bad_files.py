"""Whatever is uploaded, only `ScanError` comes out, its message is helpful and private, and the other files go on."""

import gzip
import io
import logging
import re
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scan_files import PATIENT, dicom_sample, gradient, png_chunk, tiff_header, write_dicom, write_nifti, write_png

from fmclip.errors import ScanError
from fmclip.scans import MAX_PIXELS, MAX_SCANS, find_scan_files, read_scan, read_scans, reader

NAME = "secret-4711"


def encoded(picture_format, **options):
    """Return the bytes of a small picture."""
    buffer = io.BytesIO()
    Image.fromarray(gradient()).save(buffer, picture_format, **options)
    return buffer.getvalue()


def zipped():
    """Return a zip archive with a picture in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", encoded("PNG"))
    return buffer.getvalue()


BAD = {
    "empty": (b"", r"is empty \(0 bytes\)"),
    "text named .png": (b"These are not the pixels you are looking for.\n" * 9, "is a text file"),
    "svg": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "is an SVG drawing"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj", "is a PDF document. Save it as PNG"),
    "zip": (zipped(), "is a zip archive.*Unpack it"),
    "gif": (encoded("GIF"), "is a GIF. Save it as PNG"),
    "avif": (b"\0\0\0\x20ftypavif" + bytes(99), "HEIC or AVIF"),
    "random bytes": (np.random.default_rng(0).bytes(5000), "of no kind that is read. Save it as PNG, JPEG"),
    "gzip of text": (gzip.compress(b"text" * 500), "gzip archive that holds no NIfTI volume"),
    "cut png": (encoded("PNG")[: len(encoded("PNG")) // 2], "could not be decoded as PNG: the file is cut short"),
    "cut jpeg": (encoded("JPEG")[:-300], "could not be decoded as JPEG: the file is cut short"),
    "cut bmp": (encoded("BMP")[:-300], "could not be decoded as BMP: the file is cut short"),
    "cut webp": (encoded("WEBP")[:-30], "could not be decoded as WebP"),
    "cut tiff": (encoded("TIFF")[:-300], "could not be decoded as TIFF"),
    "png signature alone": (b"\x89PNG\r\n\x1a\n", "could not be decoded as PNG"),
    "tiff header of 20000 x 20000": (tiff_header(20000, 20000), "is 20000 x 20000 pixels, more than the 40 million"),
    "16-bit tiff header of 20000 x 20000": (tiff_header(20000, 20000, 16), "is 20000 x 20000 pixels, more than"),
    "16-bit tiff without data": (tiff_header(200, 200, 16), "could not be decoded as TIFF: the file is cut short"),
    "dicom preamble alone": (bytes(128) + b"DICM", "DICOM"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_gets_its_reason(tmp_path, name):
    content, message = BAD[name]
    path = tmp_path / f"{NAME}.png"
    path.write_bytes(content)
    with pytest.raises(ScanError, match=f"^scan 7 .*{message}") as caught:
        read_scan(path, label="scan 7")
    assert NAME not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_missing_files_and_folders_get_their_reason(tmp_path):
    for path in (tmp_path / NAME, tmp_path, f"{NAME}\0.png"):
        with pytest.raises(ScanError, match=r"^scan (was not found|could not be opened)") as caught:
            read_scan(path)
        assert NAME not in str(caught.value)


def test_decompression_bombs_are_refused_before_they_unpack(tmp_path):
    bombs = [
        write_png(tmp_path / "declared.png", 20000, 20000, 8, 0, bytes(20001 * 1000)),
        write_png(tmp_path / "warned.png", 10000, 9500, 1, 0, bytes(1251 * 9500)),
    ]
    noise = tmp_path / "deflate.tif"
    tifffile.imwrite(noise, gradient().astype(np.uint16), compression="zlib", photometric="minisblack")
    raw, bomb = noise.read_bytes(), zlib.compress(bytes(200 * 2**20), 9)
    with tifffile.TiffFile(noise) as file:
        page = file.pages.first
        offset_tag, count_tag = page.tags[273], page.tags[279]
    patched = bytearray(raw + bomb)
    struct.pack_into("<I", patched, offset_tag.offset + 8, len(raw))
    struct.pack_into("<HI", patched, count_tag.offset + 2, 4, 1)
    struct.pack_into("<I", patched, count_tag.offset + 8, len(bomb))
    noise.write_bytes(patched)
    tracemalloc.start()
    try:
        for path in [*bombs, noise]:
            with pytest.raises(ScanError, match=r"than the 40 million pixels|unpacks to far more than it declares"):
                read_scan(path)
        assert tracemalloc.get_traced_memory()[1] < 60 * 2**20
    finally:
        tracemalloc.stop()


def test_a_png_with_more_text_than_pixels_is_refused(tmp_path):
    text = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100 * 2**20), 9))
    whole = encoded("PNG")
    (tmp_path / "a.png").write_bytes(whole[:33] + text + whole[33:])
    with pytest.raises(ScanError, match="could not be decoded as PNG"):
        read_scan(tmp_path / "a.png")


def test_a_file_above_the_size_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_FILE_BYTES", 2**20)
    (tmp_path / "a.bmp").write_bytes(b"BM" + bytes(2**20))
    with pytest.raises(ScanError, match="is larger than 1 MiB"):
        read_scan(tmp_path / "a.bmp")


def test_an_upload_goes_on_past_bad_files(tmp_path):
    names = ["text.png", "good.png", "cut.dcm", "volume.nii.gz", "nothing.tif", "good.dcm"]
    paths = [tmp_path / name for name in names]
    paths[0].write_text("text")
    Image.fromarray(gradient()).save(paths[1])
    paths[2].write_bytes(dicom_sample("CT_small.dcm").read_bytes()[:20000])
    write_nifti(paths[3], np.arange(60.0).reshape(3, 4, 5))
    paths[4].write_bytes(b"")
    write_dicom(paths[5], gradient())
    progress = []
    scans, errors = read_scans(paths, first=11, on_progress=lambda done, total: progress.append((done, total)))
    assert [good.label for good in scans] == ["scan 12", "scan 14", "scan 16"]
    assert [re.match(r"scan \d+", str(error)).group() for error in errors] == ["scan 11", "scan 13", "scan 15"]
    assert progress == [(done, 6) for done in range(1, 7)]
    assert read_scans([]) == ([], [])


def test_only_so_many_files_and_pixels_are_read(tmp_path, monkeypatch):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    scans, errors = read_scans([tmp_path / "a.png"] * (MAX_SCANS + 3))
    assert len(scans) == MAX_SCANS
    assert [str(error) for error in errors] == [
        f"only the first {MAX_SCANS} of {MAX_SCANS + 3} files were read. Upload the others separately."
    ]
    monkeypatch.setattr(reader, "MAX_UPLOAD_VALUES", 2 * 40 * 60)
    scans, errors = read_scans([tmp_path / "a.png"] * 3)
    assert len(scans) == 2
    assert "scan 3 was left out" in str(errors[0])


def test_folders_are_searched_and_hidden_files_left_out(tmp_path):
    for name in ("b/2.png", "b/1.png", "a.png", ".DS_Store", ".cache/x.png", "b/._1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    named = tmp_path / "b" / "2.png"
    found = find_scan_files([named, tmp_path, tmp_path / "missing.png"])
    inside = [path.relative_to(tmp_path).as_posix() for path in found]
    assert inside == ["b/2.png", "a.png", "b/1.png", "b/2.png", "missing.png"]


def test_nothing_private_is_printed_or_logged(tmp_path, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    file = tmp_path / f"{NAME}.dcm"
    for sample in ("MR_truncated.dcm", "badVR.dcm", "SC_rgb_jpeg_dcmtk.dcm", "CT_small.dcm"):
        file.write_bytes(dicom_sample(sample).read_bytes())
        read_scans([file])
    write_dicom(file, gradient(), WindowCenter=1, WindowWidth=5)
    for content in (file.read_bytes(), file.read_bytes()[:900], *(content for content, _ in BAD.values())):
        file.write_bytes(content)
        read_scans([file])
    printed = "".join(capfd.readouterr()) + caplog.text
    assert NAME not in printed
    assert PATIENT not in printed
    assert printed == ""


SEEDS = ("png", "wide.png", "jpg", "tif", "wide.tif", "deflate.tif", "bmp", "webp", "dcm", "jpeg.dcm", "nii", "nii.gz")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Return the bytes of one sound small file of every kind."""
    folder = tmp_path_factory.mktemp("seeds")
    wide = gradient(top=4000, dtype=np.uint16)
    for ending in ("png", "jpg", "bmp", "webp", "tif"):
        Image.fromarray(gradient()).save(folder / ending, {"jpg": "JPEG", "tif": "TIFF"}.get(ending, ending))
    Image.fromarray(wide).save(folder / "wide.png", "PNG")
    tifffile.imwrite(folder / "wide.tif", wide)
    tifffile.imwrite(folder / "deflate.tif", wide, compression="zlib", tile=(16, 16))
    write_dicom(folder / "dcm", np.stack([wide, wide]), WindowCenter=1000, WindowWidth=2000)
    (folder / "jpeg.dcm").write_bytes(dicom_sample("SC_rgb_jpeg_dcmtk.dcm").read_bytes())
    for name in ("nii", "nii.gz"):
        write_nifti(folder / f"a.{name}", np.arange(240.0).reshape(4, 6, 10)).rename(folder / name)
    return {name: (folder / name).read_bytes() for name in SEEDS}


@fuzz(2000)
@given(
    name=st.sampled_from(SEEDS),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=8)), max_size=6),
    in_header=st.booleans(),
    keep=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_damaged_files_give_a_scan_or_a_scan_error(seeds, tmp_path, name, edits, in_header, keep):
    content = bytearray(seeds[name])
    reach = min(len(content), 600) if in_header else len(content)
    for place, patch in edits:
        start = int(place * reach)
        content[start : start + len(patch)] = patch
    path = tmp_path / NAME
    path.write_bytes(content[: int(keep * len(content))])
    scans, errors = read_scans([path])  # any other exception fails the test
    assert len(scans) + len(errors) == 1
    for error in errors:
        assert str(error).startswith("scan 1 ")
        assert NAME not in str(error)
    for scan in scans:
        assert scan.pixels.size <= MAX_PIXELS * 3
        assert scan.pixels.min() >= 0
        assert scan.pixels.max() <= 1


def test_the_seeds_of_the_fuzz_are_sound(seeds, tmp_path):
    for name, content in seeds.items():
        path = Path(tmp_path, "a")
        path.write_bytes(content)
        assert read_scan(path).pixels.size > 0, name
