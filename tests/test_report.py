"""The report, the table, the maps and the zip: what stands in them, and what does not."""

import csv
import io
import json
import re
import zipfile
import zlib
from dataclasses import replace

import nibabel
import numpy as np
import pytest
from report_findings import CALIBRATION, describe, find_square, make_scan
from scan_files import PATIENT, dicom_sample, write_nifti

import fmclip.report.pdf
from fmclip.calibration import Calibration
from fmclip.detectors import DETECTORS
from fmclip.detectors.madclip import MadCLIPConfig
from fmclip.detectors.patch_memory import PatchMemoryConfig
from fmclip.detectors.published import PublishedConfig
from fmclip.errors import FmclipError
from fmclip.report import RunRecord, write_bundle, write_report
from fmclip.report.files import save_nifti, table
from fmclip.report.pdf import DISCLAIMER, limits
from fmclip.report.record import NOT_TRAINED, OWN_SETTINGS, preset_of
from fmclip.scans import read_scan
from fmclip.session import Session


@pytest.fixture
def pages(monkeypatch) -> list:
    """The figures of a report, as they are written."""
    kept: list = []
    save = fmclip.report.pdf.PdfPages.savefig
    monkeypatch.setattr(
        fmclip.report.pdf.PdfPages, "savefig", lambda pdf, figure: (kept.append(figure), save(pdf, figure))
    )
    return kept


def words(figure) -> str:
    axes = [text.get_text() for one in figure.axes for text in (*one.texts, one.title, one.get_xaxis().label)]
    return " ".join([*(text.get_text() for text in figure.texts), *axes]).replace("\n", " ")


def findings(count: int = 3) -> list:
    return [find_square(make_scan(seed, f"scan {seed + 1}"), 0.2 + 0.25 * seed) for seed in range(count)]


def test_a_page_for_each_scan_behind_a_summary_worst_first(tmp_path, pages):
    write_report(tmp_path / "r.pdf", findings(), describe(findings()))
    summary, *single = pages
    assert (tmp_path / "r.pdf").read_bytes().count(b"/Type /Page ") == 4
    assert "1 of 3 scans deviates from the references" in words(summary)
    assert all(f"Scan {number}:" in words(page) for page, number in zip(single, (3, 2, 1), strict=True))
    positions = [words(summary).index(f"scan {number}") for number in (3, 2, 1)]
    assert positions == sorted(positions)


def test_a_page_says_all_about_its_scan(tmp_path, pages):
    (finding,) = [find_square(make_scan(0, "scan 7"), 0.9)]
    write_report(tmp_path / "r.pdf", [finding], describe([finding]))
    (page,) = pages  # one scan needs no summary
    text = words(page)
    for part in ("Scan 7: ▲ deviates", "Higher than all 4 reference scans", "0.900", "0.500", "lung", "patch_memory"):
        assert part in text
    for part in ("Seed: 0", "tiny", "medical scan", "Training: none", "fmclip 0.1.0", DISCLAIMER, "60 x 40 pixels"):
        assert part in text
    assert "5.0 % of the picture" in text  # 120 of 2400


def test_words_of_a_person_are_no_formulas_and_fit_the_page(tmp_path, pages):
    shown = [find_square(replace(make_scan(seed, f"$\\foo$ {seed}"), notes=("$\\foo$",)), 0.4) for seed in range(2)]
    record = describe(shown)
    write_report(tmp_path / "r.pdf", shown, replace(record, config=replace(record.config, scan_type="$\\foo$ " * 30)))
    assert len(pages) == 3
    for page in pages:
        head = next(text for text in page.texts if record.date in text.get_text() and "Seed" not in text.get_text())
        assert head.get_text().startswith("$\\foo$")
        assert len(head.get_text()) < 80


def test_the_disclaimer_stands_on_each_page(tmp_path, pages):
    write_report(tmp_path / "r.pdf", findings(3), describe(findings(3)))
    assert len(pages) == 4
    assert all(DISCLAIMER in words(page) for page in pages)


def test_a_long_list_goes_over_several_pages(tmp_path, pages, monkeypatch):
    monkeypatch.setattr(fmclip.report.pdf, "_ROWS", 2)
    write_report(tmp_path / "r.pdf", findings(3), describe(findings(3)))
    assert len(pages) == 5
    assert "3.  scan 1" in words(pages[1])
    assert "Page 5 of 5" in words(pages[-1])


def test_a_threshold_set_by_hand_is_told_beside_the_calibrated_one(tmp_path, pages):
    finding = find_square(make_scan(0, "scan 1"), 0.6).at(0.7)
    write_report(tmp_path / "r.pdf", [finding], describe([finding]))
    assert "Scan 1: ● within the references" in words(pages[0])
    assert "0.700, by hand (calibrated 0.500)" in words(pages[0])


def test_few_references_are_not_made_more_of_than_they_are():
    few = describe([find_square(make_scan(0), 0.9)])
    many = replace(few, calibration=Calibration(tuple(np.linspace(0.2, 0.4, 16)), 0.5))
    assert "what one in 5 normal scans would get by chance" in limits(few)
    assert "by chance" not in limits(many)
    assert "16 reference scans" in limits(many)


def test_notes_on_a_scan_are_in_the_report(tmp_path, pages):
    scan = replace(make_scan(0, "scan 1"), notes=("text is burned into the pixels",))
    finding = find_square(scan, 0.9)
    write_report(tmp_path / "r.pdf", [finding], describe([finding]))
    assert "text is burned into the pixels" in words(pages[0])


def test_the_file_itself_says_nothing_about_its_maker(tmp_path):
    folder = tmp_path / "home" / PATIENT
    folder.mkdir(parents=True)
    write_report(folder / "r.pdf", findings(1), describe(findings(1)))
    data = (folder / "r.pdf").read_bytes()
    information = re.search(rb"<< (/CreationDate|/Creator|/Subject|/Title).*?>>", data, re.DOTALL)[0]
    assert b"/Author" not in data
    assert b"fmclip report" in information
    assert PATIENT.encode() not in data
    assert str(tmp_path).encode() not in data


def test_the_table_is_worst_first():
    rows = list(csv.DictReader(io.StringIO(table(findings()))))
    assert [row["scan"] for row in rows] == ["scan 3", "scan 2", "scan 1"]
    assert rows[0]["verdict"] == "deviates"
    assert rows[-1]["rank"] == "lower than all 4 reference scans"
    assert float(rows[0]["score"]) == pytest.approx(0.7)
    assert float(rows[0]["threshold"]) == 0.5


@pytest.mark.parametrize("affine", [np.eye(4), np.diag([-2.0, 3.0, 4.0, 1.0])])
def test_a_map_of_a_nifti_slice_lies_on_its_volume(tmp_path, affine):
    volume = np.random.default_rng(0).random((20, 30, 6), np.float32)
    scan = read_scan(write_nifti(tmp_path / "v.nii", volume, affine), slice_index=4)
    anomaly_map = np.zeros((scan.height, scan.width), np.float32)
    anomaly_map[7, 3] = 1.0
    save_nifti(tmp_path / "map.nii.gz", scan, anomaly_map)
    saved = nibabel.load(tmp_path / "map.nii.gz")
    (hot,) = np.argwhere(saved.get_fdata() > 0.5)
    (brightest,) = np.argwhere(scan.pixels == scan.pixels[7, 3])
    np.testing.assert_array_equal(brightest, (7, 3))
    voxel = np.linalg.inv(affine) @ saved.affine @ [*hot, 1]
    x, y, z = np.rint(voxel[:3]).astype(int)
    low, high = np.percentile(volume, (0.5, 99.5))
    assert z == 4
    assert np.clip((volume[x, y, z] - low) / (high - low), 0, 1) == pytest.approx(scan.pixels[7, 3], abs=1e-5)
    assert int(saved.header["sform_code"]) == 1


def test_a_map_of_a_picture_has_no_place_but_stands_upright(tmp_path):
    finding = find_square(make_scan(0), 0.9)
    save_nifti(tmp_path / "map.nii.gz", finding.scan, finding.map)
    saved = nibabel.load(tmp_path / "map.nii.gz")
    assert saved.shape == (60, 40, 1)
    assert saved.get_fdata()[8, 5, 0] == pytest.approx(0.9)
    assert int(saved.header["sform_code"]) == int(saved.header["qform_code"]) == 0


def test_the_zip_holds_everything_and_names_nobody(tmp_path):
    scans = [read_scan(dicom_sample("CT_small.dcm"), label="scan 1"), make_scan(1, "scan 2")]
    found = [find_square(scan, 0.9) for scan in scans]
    write_bundle(tmp_path / "all.zip", found, describe(found))
    archive = zipfile.ZipFile(tmp_path / "all.zip")
    assert set(archive.namelist()) == {
        *("README.txt", "report.pdf", "scores.csv", "run.json"),
        *(f"overlays/scan-{number}.png" for number in (1, 2)),
        *(f"maps/scan-{number}.{suffix}" for number in (1, 2) for suffix in ("png", "nii.gz")),
        *("dicom/scan-1_seg.dcm", "dicom/scan-1_overlay.dcm"),
    }
    study = scans[0].source.dicom.study.encode()
    for name in archive.namelist():
        data = archive.read(name)
        unpacked = b"".join(map(_inflate, data.split(b"stream"))) if name.endswith(".pdf") else _inflate(data)
        assert (study in data + unpacked) == name.startswith("dicom/"), name


def _inflate(data: bytes) -> bytes:
    try:
        return zlib.decompressobj(wbits=47).decompress(data.lstrip(b"\r\n"))  # zlib or gzip
    except zlib.error:
        return b""


def test_labels_that_are_alike_do_not_overwrite_each_other(tmp_path):
    found = [find_square(make_scan(seed, "scan/../1"), 0.9) for seed in range(2)]
    write_bundle(tmp_path / "all.zip", found, describe(found))
    names = zipfile.ZipFile(tmp_path / "all.zip").namelist()
    assert sum(name.startswith("overlays/") for name in names) == 2
    assert not any(".." in name for name in names)


@pytest.mark.parametrize("method", ["fusionmedclip", "patch_memory", "cosine", "two_layer"])
@pytest.mark.parametrize("preset", ["fast", "full", "paper"])
def test_the_preset_is_told_by_its_settings(method, preset):
    config_class = DETECTORS[method].config_class
    record = replace(describe([]), config=config_class.preset(preset, scan_type="knee", seed=3), method=method)
    if method in ("patch_memory", "cosine"):
        assert record.preset == NOT_TRAINED
    else:  # presets of one length have one name
        assert config_class.preset(record.preset, scan_type="knee", seed=3) == record.config
    assert RunRecord.from_json(record.to_json()) == record


def test_own_settings_are_called_so():
    config_class = DETECTORS["fusionmedclip"].config_class
    record = replace(describe([]), config=config_class(pool_size=3), method="fusionmedclip")
    assert record.preset == "own settings"


def test_a_session_describes_itself():
    session = Session("tiny", "cpu")
    normals = [make_scan(seed, f"scan {seed + 1}", 64) for seed in range(4)]
    list(session.adapt(normals, method="patch_memory", scan_type="knee", seed=5, window="bone"))
    found = session.query([make_scan(9, "scan 1", 64)])
    record = describe(found, session.references)
    assert [one.digest for one in record.references] == [scan.digest for scan in normals]
    assert record.queries[0].score == found[0].score


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"format_version": 2},
        {"method": "oracle"},
        {"config": {"seed": -1}},
        {"config": {"command": "rm"}},
        {"calibration": {"reference_scores": [0.1], "threshold": 0.5, "rule": "r"}},
        {"window": "everything"},
        {"queries": [{"label": "a", "digest": "../../etc", "slice_index": None, "score": 0.1}]},
        {"queries": [{"label": "a", "digest": "0" * 64, "slice_index": -4, "score": 0.1}]},
        {"queries": [{"label": "a", "digest": "0" * 64, "slice_index": None, "score": float("nan")}]},
        {"queries": "all"},
        {"versions": {}},
        {"extra": 1},
    ],
)
def test_a_damaged_run_is_refused_in_words(change):
    text = describe([find_square(make_scan(0), 0.9)]).to_json()
    assert RunRecord.from_json(text).calibration == CALIBRATION
    with pytest.raises(FmclipError, match=r"no run\.json of fmclip"):
        RunRecord.from_json(json.dumps(json.loads(text) | change))


@pytest.mark.parametrize("text", ["", "[]", "nonsense", "[" * 100_000, '{"format": "fmclip-run"}'])
def test_what_is_no_run_is_refused_in_words(text):
    with pytest.raises(FmclipError, match=r"no run\.json of fmclip"):
        RunRecord.from_json(text)


def test_a_row_of_table_8_is_named_as_such():
    assert preset_of(PublishedConfig.preset("row5", scan_type="brain MRI")) == "row5"


def test_a_variant_is_named_beside_its_preset():
    assert preset_of(replace(MadCLIPConfig.preset("fast"), heads="common")) == "fast, heads=common"
    assert preset_of(replace(MadCLIPConfig.preset("fast"), heads="common", lr=0.5)) == f"{OWN_SETTINGS}, heads=common"
    for reweighting in (0, 3):
        config = PatchMemoryConfig(over="patches", reweighting=reweighting)
        assert preset_of(config) == f"{NOT_TRAINED}, over=patches"
