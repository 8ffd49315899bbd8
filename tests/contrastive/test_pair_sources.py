"""Layouts of image-text data, each made here as its owners lay it out."""

import io
import json
import os
import tarfile

import pytest
from pair_pictures import draw_picture, encoded

from fmclip.contrastive.config import PairsConfig
from fmclip.contrastive.pairs import ImageBytes, collect
from fmclip.contrastive.sources import list_pairs
from fmclip.errors import PairError


def listed(**settings):
    return list(list_pairs(PairsConfig(**settings)))


def test_jsonl_and_its_columns(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encoded(0))
    row = {"file": "a.png", "caption": "  two\n lines ", "who": 7, "split": "validation"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n\n")
    (pair,) = listed(
        path=str(tmp_path / "pairs.jsonl"),
        root=str(tmp_path / "images"),
        image_column="file",
        text_column="caption",
        patient_column="who",
    )
    assert (pair.text, pair.patient, pair.split) == ("two lines", "7", "val")
    assert pair.image.read("x").width == 56


def test_a_table_without_the_column_says_which(tmp_path):
    (tmp_path / "pairs.csv").write_text("path,words\na.png,hello\n")
    with pytest.raises(PairError, match="no column 'text'"):
        listed(path=str(tmp_path / "pairs.csv"))


def test_a_table_that_does_not_tell_patients_apart_is_refused_unless_asked_for(tmp_path):
    (tmp_path / "pairs.csv").write_text("path,text,patient_id\na.png,hello,1\nb.png,hello,1\n")
    path = str(tmp_path / "pairs.csv")
    with pytest.raises(PairError, match=r"no column 'patientid'.*pairs\.patient_column"):
        listed(path=path)
    assert [pair.patient for pair in listed(path=path, patient_column="patient_id")] == ["1", "1"]
    assert len({pair.patient for pair in listed(path=path, patient_column="")}) == 2


def test_the_patient_with_number_0_is_one_patient(tmp_path):
    rows = [{"path": f"{n}.png", "text": "a", "patientid": patient} for n, patient in enumerate((0, 0, None, " "))]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second, *own = (pair.patient for pair in listed(path=str(tmp_path / "pairs.jsonl")))
    assert first == second == "0"
    assert len({first, *own}) == 3
    facts = json.dumps({"caption": "a", "patientid": 0}).encode()
    write_shard(tmp_path / "a.tar", [("0.json", facts), ("0.jpg", b""), ("1.json", facts), ("1.jpg", b"")])
    assert {pair.patient for pair in listed(format="webdataset", path=str(tmp_path))} == {"0"}


def test_roco_captions_images_and_articles(tmp_path):
    for split, first in (("train", 0), ("validation", 10), ("test", 20)):
        folder = tmp_path / "data" / split / "radiology"
        (folder / "images").mkdir(parents=True)
        names = [f"ROCO_{first + n:05d}" for n in range(3)]
        (folder / "captions.txt").write_text("".join(f"{name}\t Chest CT of {name} \n" for name in names))
        links = [f"{names[0]}\twget ftp://x/PMC111.tar.gz a.jpg", f"{names[1]}\twget ftp://x/PMC111.tar.gz b.jpg"]
        (folder / "dlinks.txt").write_text("\n".join(links))
        for n, name in enumerate(names[:2]):  # the third was never downloaded
            (folder / "images" / f"{name}.jpg").write_bytes(encoded(first + n, "JPEG"))
    pairs = listed(format="roco", path=str(tmp_path))
    assert [pair.split for pair in pairs] == ["test"] * 3 + ["train"] * 3 + ["val"] * 3
    assert pairs[3].text == "Chest CT of ROCO_00000"
    assert pairs[3].patient == pairs[4].patient == "PMC111"
    found = collect(pairs)
    assert len(found.pairs) == 6
    assert found.skipped == {"image missing": 3}
    assert found.pairs[0].image.read("x").height == 48


def test_the_second_version_of_roco(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / f"{split}_captions.csv").write_text(f'ID,Caption\nROCOv2_{split}_1,"A scan, of the {split} part"\n')
        (tmp_path / split / f"ROCOv2_{split}_1.jpg").write_bytes(encoded(1, "JPEG"))
    with pytest.raises(PairError, match="which article"):
        listed(format="roco", path=str(tmp_path))
    pairs = listed(format="roco", path=str(tmp_path), patient_column="")
    assert {pair.split for pair in pairs} == {"train", "val", "test"}
    assert pairs[0].text == "A scan, of the test part"
    assert len(collect(pairs).pairs) == 3


def test_articles_may_stand_beside_the_captions(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train_captions.csv").write_text("ID,Caption,PMCID\na,A scan,PMC7\nb,Another,PMC7\nc,A third,\n")
    assert [pair.patient for pair in listed(format="roco", path=str(tmp_path))] == ["PMC7", "PMC7", "c"]


def write_shard(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_shards_are_read_in_place(tmp_path):
    facts = json.dumps({"caption": "from the JSON", "patientid": "p9"}).encode()
    write_shard(
        tmp_path / "train-000.tar",
        [("s/0.jpg", encoded(0, "JPEG")), ("s/0.txt", b"first text"), ("s/1.json", facts), ("s/1.png", encoded(1))],
    )
    write_shard(tmp_path / "train-001.tar", [("s/0.png", encoded(2)), ("s/0.txt", b""), ("s/1.txt", b"no image")])
    pairs = listed(format="webdataset", path=str(tmp_path))
    assert [pair.text for pair in pairs] == ["first text", "from the JSON", "", "no image"]
    assert pairs[1].patient == "p9"
    assert pairs[0].split == "train"
    assert pairs[1].image.read("x").digest == pairs[1].image.read("y").digest
    assert (pairs[1].image.read("x").pixels * 255).round().astype("uint8").tolist() == draw_picture(1).tolist()
    found = collect(pairs)
    assert found.skipped == {"empty text": 1, "image missing": 1}
    assert len({pair.key for pair in pairs}) == 4


def test_a_sample_with_two_scans_is_refused(tmp_path):
    write_shard(tmp_path / "a.tar", [("s.png", encoded(0)), ("s.jpg", encoded(1)), ("s.txt", b"text")])
    with pytest.raises(PairError, match="In shard 1, the sample at byte 0 has 2 members"):
        listed(format="webdataset", path=str(tmp_path))


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="elsewhere, images of shards lie in a temporary file")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
def test_images_of_shards_are_decoded_without_a_file_on_the_disk(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("tempfile.NamedTemporaryFile", None)
    assert ImageBytes(lambda: encoded(0, kind)).read("x").pixels.shape == draw_picture(0).shape


def test_a_compressed_shard_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(PairError, match=r"must be plain \.tar"):
        listed(format="webdataset", path=str(tmp_path))


@pytest.fixture
def openi(tmp_path):
    """Three studies as the hub keeps them, in a copy on disk."""
    datasets = pytest.importorskip("datasets")
    rows = {
        "uid": ["1", "2", "3"],
        "findings": ["Clear lungs.", "", None],
        "impression": ["No disease.", "Cardiomegaly.", ""],
        "img_frontal": [encoded(0), encoded(1), encoded(2)],
        "img_lateral": [encoded(4), None, None],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "copy"))
    return str(tmp_path / "copy")


def test_openi_takes_the_first_field_that_says_something(openi):
    pairs = listed(format="openi", path=openi)
    assert [(pair.patient, pair.text) for pair in pairs] == [
        ("1", "Clear lungs."),
        ("1", "Clear lungs."),  # the lateral view has the same report
        ("2", "Cardiomegaly."),
        ("3", ""),
    ]
    assert pairs[0].image.read("x").digest != pairs[1].image.read("x").digest
    assert collect(pairs).skipped == {"empty text": 1}
    assert [pair.patient for pair in listed(format="openi", path=openi, view="first")] == ["1", "2", "3"]


def test_a_hub_name_without_a_network_says_what_to_do(monkeypatch):
    pytest.importorskip("datasets")
    with pytest.raises(PairError, match="copy"):
        listed(format="openi", path="nobody/nothing-here")


@pytest.mark.parametrize("form", ["csv", "roco", "webdataset"])
def test_a_source_that_is_not_there_is_an_error(form, tmp_path):
    with pytest.raises(PairError):
        listed(format=form, path=str(tmp_path / "gone"))
    with pytest.raises(PairError, match=r"pairs\.path"):
        listed(format=form)
