"""PNG, JPEG, TIFF, BMP and WebP files become scans whose pixels are those of the picture."""

import numpy as np
import pytest
import tifffile
from PIL import Image
from scan_files import gradient, write_png

from fmclip.scans import FLAT_NOTE, Scan, read_scan

COLOUR = np.stack([gradient(), gradient()[::-1], np.full((40, 60), 90, np.uint8)], axis=2)


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "webp"])
@pytest.mark.parametrize("picture", [gradient(), COLOUR], ids=["grey", "colour"])
def test_eight_bit_pictures_keep_every_value(tmp_path, ending, picture):
    Image.fromarray(picture).save(tmp_path / f"a.{ending}", **({"lossless": True} if ending == "webp" else {}))
    scan = read_scan(tmp_path / f"a.{ending}")
    np.testing.assert_array_equal(scan.pixels, picture / np.float32(255))
    assert scan.pixels.dtype == np.float32
    assert scan.notes == ()


@pytest.mark.parametrize("picture", [gradient(), COLOUR], ids=["grey", "colour"])
def test_jpeg_keeps_the_picture_up_to_its_compression(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "a.jpg", quality=95, subsampling=0)
    np.testing.assert_allclose(read_scan(tmp_path / "a.jpg").pixels, picture / 255, atol=0.03)


def test_the_content_tells_the_format_not_the_ending(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.dcm")
    assert read_scan(tmp_path / "a.dcm").pixels.shape == (40, 60)


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_three_equal_channels_become_grey(tmp_path, ending):
    grey = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(np.repeat(grey[:, :, None], 3, axis=2)).save(tmp_path / f"a.{ending}")
    assert read_scan(tmp_path / f"a.{ending}").pixels.shape == (64, 64)


def test_a_small_coloured_mark_keeps_the_picture_in_colour(tmp_path):
    marked = np.repeat(gradient()[:, :, None], 3, axis=2)
    marked[3:6, 3:6] = (255, 200, 0)
    Image.fromarray(marked).save(tmp_path / "a.png")
    assert read_scan(tmp_path / "a.png").pixels.shape == (40, 60, 3)


def sixteen_bit_files(path):
    """Write one 12-bit picture in 16-bit containers of every sort; yields (name, file)."""
    values = gradient(top=4095, dtype=np.uint16)
    Image.fromarray(values).save(path / "pillow.png")
    yield "PNG", path / "pillow.png"
    colour = np.repeat(values[:, :, None], 3, axis=2).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in colour)
    yield "colour PNG", write_png(path / "rgb.png", 60, 40, 16, 2, rows)
    for name, options in {
        "TIFF": {},
        "tiled TIFF": {"tile": (16, 16)},
        "deflated TIFF": {"compression": "zlib", "predictor": True},
        "big-endian TIFF": {"byteorder": ">"},
        "BigTIFF": {"bigtiff": True},
    }.items():
        tifffile.imwrite(path / f"{name}.tif", values, photometric="minisblack", **options)
        yield name, path / f"{name}.tif"
    Image.fromarray(values).save(path / "lzw.tif", compression="tiff_lzw")
    yield "LZW TIFF", path / "lzw.tif"
    tifffile.imwrite(path / "float.tif", values.astype(np.float32) - 1024.0)
    yield "float TIFF", path / "float.tif"
    tifffile.imwrite(path / "signed.tif", values.astype(np.int16) - 1024)
    yield "signed TIFF", path / "signed.tif"
    tifffile.imwrite(path / "white.tif", 4095 - values, photometric="miniswhite")
    yield "white-is-zero TIFF", path / "white.tif"
    for config in ("contig", "separate"):
        samples = np.repeat(values[:, :, None], 3, axis=2)
        samples = np.moveaxis(samples, 2, 0) if config == "separate" else samples
        tifffile.imwrite(path / f"{config}.tif", samples, photometric="rgb", planarconfig=config)
        yield f"{config} colour TIFF", path / f"{config}.tif"


def test_sixteen_bit_pictures_keep_their_depth_in_every_container(tmp_path):
    for name, file in sixteen_bit_files(tmp_path):
        scan = read_scan(file)
        assert scan.pixels.shape == (40, 60), name
        np.testing.assert_allclose(scan.pixels, gradient(top=4095, dtype=np.uint16) / 4095, atol=0.03, err_msg=name)
        assert len(np.unique(scan.pixels)) > 1000, f"{name} was cut to 8 bits"


def test_a_single_hot_pixel_does_not_darken_a_sixteen_bit_picture(tmp_path):
    values = gradient(top=1000, dtype=np.uint16)
    values[5, 5] = 65535
    tifffile.imwrite(tmp_path / "a.tif", values)
    assert read_scan(tmp_path / "a.tif").pixels.mean() == pytest.approx(0.5, abs=0.02)


def test_a_nearly_empty_sixteen_bit_picture_still_shows_its_spot(tmp_path):
    values = np.zeros((200, 200), np.uint16)
    values[100, 100] = 700
    tifffile.imwrite(tmp_path / "a.tif", values)
    pixels = read_scan(tmp_path / "a.tif").pixels
    assert pixels[100, 100] == 1
    assert pixels.sum() == 1


def test_only_the_first_page_of_a_tiff_is_read_and_it_says_so(tmp_path):
    pages = np.stack([gradient(), gradient()[::-1]])
    for name, dtype in (("eight.tif", np.uint8), ("sixteen.tif", np.uint16)):
        tifffile.imwrite(tmp_path / name, pages.astype(dtype), photometric="minisblack")
        scan = read_scan(tmp_path / name)
        np.testing.assert_allclose(scan.pixels, gradient() / 255, atol=0.03)
        assert "more than one picture" in " ".join(scan.notes)


def test_transparency_is_laid_on_black(tmp_path):
    rgba = np.dstack([COLOUR, np.full((40, 60), 255, np.uint8)])
    rgba[:, :30, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    pixels = read_scan(tmp_path / "a.png").pixels
    assert pixels[:, :30].max() == 0
    np.testing.assert_array_equal(pixels[:, 30:], COLOUR[:, 30:] / np.float32(255))


def test_sixteen_bit_transparency_is_laid_on_black(tmp_path):
    grey = np.repeat(gradient(top=60000, dtype=np.uint16)[:, :, None], 3, axis=2)
    rgba = np.dstack([grey, np.full((40, 60), 65535, np.uint16)])
    rgba[:, :30, 3] = 0
    tifffile.imwrite(tmp_path / "a.tif", rgba, photometric="rgb", extrasamples=["unassalpha"])
    rows = b"".join(b"\0" + row.tobytes() for row in rgba.astype(">u2"))
    write_png(tmp_path / "a.png", 60, 40, 16, 6, rows)
    for name in ("a.tif", "a.png"):
        pixels = read_scan(tmp_path / name).pixels
        assert pixels[:, :30].max() == 0
        assert pixels[:, 30:].max() > 0.9


def test_palette_bilevel_and_cmyk_pictures_are_read(tmp_path):
    Image.fromarray(COLOUR).quantize(16).save(tmp_path / "palette.png")
    Image.fromarray(gradient() > 99).save(tmp_path / "bilevel.png")
    Image.fromarray(COLOUR).convert("CMYK").save(tmp_path / "cmyk.jpg")
    assert read_scan(tmp_path / "palette.png").pixels.shape == (40, 60, 3)
    assert set(np.unique(read_scan(tmp_path / "bilevel.png").pixels)) == {0.0, 1.0}
    assert read_scan(tmp_path / "cmyk.jpg").pixels.shape == (40, 60, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "wide.tif"])
def test_the_stored_orientation_is_undone(tmp_path, orientation, name):
    upright = gradient()
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    turned = np.ascontiguousarray(turned)
    if name == "wide.tif":
        tifffile.imwrite(tmp_path / name, turned.astype(np.uint16), extratags=[(274, 3, 1, orientation, True)])
    else:
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(turned).save(tmp_path / name, exif=exif)
    np.testing.assert_allclose(read_scan(tmp_path / name).pixels, upright / 255, atol=0.03)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_constant_picture_is_read_with_a_note(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "a.tif", np.full((20, 30), 77, dtype))
    assert FLAT_NOTE in read_scan(tmp_path / "a.tif").notes


def test_missing_values_of_a_float_tiff_are_filled_and_noted(tmp_path):
    values = gradient().astype(np.float32)
    values[:4] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", values)
    scan = read_scan(tmp_path / "a.tif")
    assert scan.pixels[:4].max() <= 0.01
    assert "10% of the pixels held no number" in scan.notes[0]


def test_the_digest_depends_on_the_pixels_alone(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    Image.fromarray(np.repeat(gradient()[:, :, None], 3, axis=2)).save(tmp_path / "b.bmp")
    Image.fromarray(gradient()[::-1]).save(tmp_path / "c.png")
    a, b, c = (read_scan(tmp_path / name, label=name) for name in ("a.png", "b.bmp", "c.png"))
    assert a.digest == b.digest
    assert a.digest != c.digest
    assert Scan(np.zeros((2, 8))).digest != Scan(np.zeros((4, 4))).digest


def test_a_scan_cannot_be_changed_after_its_digest_was_taken():
    mine = np.zeros((4, 4), np.float32)
    scan = Scan(mine)
    mine[0, 0] = 1.0
    assert scan.pixels[0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        scan.pixels[0, 0] = 1.0


@pytest.mark.parametrize("pixels", [np.zeros(4), np.zeros((4, 4, 2)), np.zeros((0, 4)), [[2.0]], [[np.nan]]])
def test_pixels_that_are_no_scan_are_refused(pixels):
    with pytest.raises(ValueError, match="scan pixels must"):
        Scan(np.asarray(pixels))
