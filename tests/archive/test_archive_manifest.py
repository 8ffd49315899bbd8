"""Tables and shards: every row is found again by the part that it is in, and what is wrong is told without a name."""

import datetime
import json
import os
import tarfile

import numpy as np
import pytest
from archive_scans import SECRET, draw, rows, table_of, write_manifest, write_shard

from fmclip.archive.manifest import KEY_COLUMN, Columns, Source
from fmclip.archive.scorer import describe, parse_day
from fmclip.errors import ArchiveError
from fmclip.scans import read_scan


def entries(source: Source, part_size: int) -> list:
    """Rows by parts, each part read on its own and the last one first."""
    parts, _ = source.plan(part_size)
    assert [part.number for part in parts] == list(range(len(parts)))
    return sorted((entry for part in reversed(parts) for entry in source.read(part)), key=lambda entry: entry.row)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("part_size", [1, 4, 100])
def test_each_row_of_a_table_is_in_one_part(tmp_path, suffix, part_size):
    listed = rows(10)
    found = entries(table_of(write_manifest(tmp_path / f"m{suffix}", listed)), part_size)
    assert [entry.row for entry in found] == list(range(10))
    assert [entry.image.path for entry in found] == [tmp_path / row["path"] for row in listed]
    assert [describe(entry, Columns())[2:] for entry in found] == [
        (row["scanner"], datetime.date.fromisoformat(row["date"])) for row in listed
    ]


def test_records_of_a_csv_may_have_line_breaks_blank_lines_and_a_byte_order_mark(tmp_path):
    text = '\ufeffpath,scanner\r\na.png,"one\r\ntwo"\r\n\r\n"b,1.png",ü\r\nc.png\r\n'
    (tmp_path / "m.csv").write_bytes(text.encode())
    found = entries(table_of(tmp_path / "m.csv"), 1)
    assert [entry.image.path.name for entry in found] == ["a.png", "b,1.png", "c.png"]
    assert [entry.facts.get("scanner") for entry in found] == ["one\r\ntwo", "ü", None]


def test_paths_may_be_relative_to_another_folder_and_columns_may_have_other_names(tmp_path):
    manifest = write_manifest(tmp_path / "m.csv", [{"file": "a/b.png", "path": "no", "on": "Z", "day": "20260203"}])
    columns = Columns("file", "on", "day", "path")
    (entry,) = entries(Source(manifest, columns, tmp_path / "mount"), 5)
    assert entry.image.path == tmp_path / "mount" / "a" / "b.png"
    assert describe(entry, columns) == (0, "no", "Z", datetime.date(2026, 2, 3))


def shards(tmp_path) -> list[np.ndarray]:
    """Five scans in two shards, with a text-only sample and a folder between them; returns their pixels."""
    pictures = [draw(tmp_path / f"{number}.png", number) for number in range(5)]
    sample = [
        [
            (f"d/{number}.png", file.read_bytes()),
            (f"d/{number}.json", json.dumps({"scanner": f"S{number}", "date": "2026-01-05T10:00:00"}).encode()),
        ]
        for number, file in enumerate(pictures)
    ]
    write_shard(tmp_path / "b-0.tar", [*sample[0], ("d/note.txt", b"no scan"), *sample[1][::-1], *sample[2]])
    write_shard(tmp_path / "b-1.tar", [*sample[3], *sample[4]])
    return [read_scan(file).pixels for file in pictures]


@pytest.mark.parametrize("part_size", [1, 2, 100])
def test_each_sample_of_the_shards_is_in_one_part(tmp_path, part_size):
    pictures = shards(tmp_path)
    found = entries(Source(tmp_path, Columns(id=KEY_COLUMN)), part_size)
    assert len(found) == len(pictures)
    for number, (entry, pixels) in enumerate(zip(found, pictures, strict=True)):
        assert np.array_equal(entry.image.read("scan").pixels, pixels)
        day = datetime.date(2026, 1, 5)
        assert describe(entry, Columns(id=KEY_COLUMN)) == (number, f"d/{number}", f"S{number}", day)


def test_a_shard_that_is_cut_short_is_no_shorter_archive(tmp_path):
    shards(tmp_path)
    whole = (tmp_path / "b-1.tar").read_bytes()
    with tarfile.open(tmp_path / "b-1.tar") as tar:
        ends = [member.offset_data + member.size for member in tar]
    for end in (ends[2] - 10, ends[1] + 700):  # within a scan, and within a header
        (tmp_path / "b-1.tar").write_bytes(whole[:end])
        with pytest.raises(ArchiveError, match="cut short"):
            Source(tmp_path, Columns()).plan(2)


def test_a_source_has_another_digest_once_it_changes(tmp_path):
    manifest = write_manifest(tmp_path / "m.csv", rows(4))
    before = table_of(manifest).plan(2)[1]
    assert table_of(manifest).plan(3)[1] == before
    write_manifest(manifest, [*rows(3), {**rows(4)[3], "path": "another.png"}])
    assert table_of(manifest).plan(2)[1] != before
    shards(tmp_path)
    before = Source(tmp_path, Columns()).plan(2)[1]
    (tmp_path / "b-1.tar").rename(tmp_path / "a-1.tar")
    assert Source(tmp_path, Columns()).plan(2)[1] != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", b"file,scanner\na.png,A\n", "no column 'path'"),
        ("m.jsonl", b'{"path": "a"}\n{"file": "b"}\n', "byte 14 of the manifest has no column 'path'"),
        ("m.jsonl", b"[1]\n", "not readable"),
        ("m.csv", b"path\n\xff\xfe.png\n", "not readable"),
        ("m.csv", b"path\n", "names no scan"),
        ("m.csv", b"", "no column 'path'"),
        ("m.parquet", b"PAR1", "not readable"),
        ("m.tar", b"no tar at all", "plain .tar"),
        ("m.txt", b"a.png", "plain .tar"),
    ],
)
def test_what_is_wrong_with_a_source_is_told_without_its_name(tmp_path, name, content, message):
    file = tmp_path / f"{SECRET}{name}"
    file.write_bytes(content)
    with pytest.raises(ArchiveError) as caught:
        table_of(file).plan(2)
    assert message in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_source_that_is_not_there_is_told(tmp_path):
    for path in (tmp_path / "m.csv", tmp_path):  # the folder holds no shard
        with pytest.raises(ArchiveError, match="archive is not there"):
            table_of(path).plan(2)


def test_a_manifest_that_became_shorter_since_is_told(tmp_path):
    manifest = write_manifest(tmp_path / "m.csv", rows(4))
    parts, _ = table_of(manifest).plan(3)
    write_manifest(manifest, rows(2))
    with pytest.raises(ArchiveError, match="shorter"):
        list(table_of(manifest).read(parts[0]))


def test_rows_are_not_taken_from_a_manifest_or_shard_that_changed_since(tmp_path):
    manifest = write_manifest(tmp_path / "m.csv", rows(4))
    shards(tmp_path)
    for source, file in ((table_of(manifest), manifest), (Source(tmp_path, Columns()), tmp_path / "b-1.tar")):
        parts, _ = source.plan(2)
        list(source.read(parts[-1]))
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
        with pytest.raises(ArchiveError, match="changed since"):
            list(source.read(parts[-1]))
    assert len(list(source.read(parts[0]))) == 2, "the rows of the other shard are what they were"


@pytest.mark.parametrize("name", ["1.2.840.113.{}.dcm", "1.2.840.113.{}", "CT.1.2.840.{}.dcm"])
def test_members_that_are_named_by_a_uid_are_samples_of_their_own(tmp_path, name):
    members = [(name.format(number), draw(tmp_path / "x.png", number).read_bytes()) for number in range(5)]
    found = entries(Source(write_shard(tmp_path / "a.tar", members), Columns()), 2)
    assert [entry.facts[KEY_COLUMN] for entry in found] == [member.removesuffix(".dcm") for member, _ in members]
    assert len({entry.image.read("scan").digest for entry in found}) == 5


@pytest.mark.parametrize("sidecar", ["x.mask.png", "x.id", "x.csv", "x.seg.nii.gz", "x.npy"])
def test_a_sidecar_is_not_scored_in_place_of_the_scan(tmp_path, sidecar):
    scan, other = (draw(tmp_path / f"{seed}.png", seed) for seed in range(2))
    write_shard(tmp_path / "a.tar", [(sidecar, other.read_bytes()), ("x.png", scan.read_bytes())])
    (entry,) = entries(Source(tmp_path / "a.tar", Columns()), 2)
    assert np.array_equal(entry.image.read("scan").pixels, read_scan(scan).pixels)


@pytest.mark.parametrize("names", [("x.png", "x.png"), ("x.png", "x.PNG"), ("x.png", "x.dcm"), ("x.a.png", "x.b.png")])
def test_a_sample_in_which_several_members_may_be_the_scan_is_refused(tmp_path, names):
    shard = write_shard(tmp_path / "a.tar", [(f"{SECRET}{name}", b"scan") for name in names])
    with pytest.raises(ArchiveError, match="sample at byte 0 has") as caught:
        Source(shard, Columns()).plan(2)
    assert SECRET not in str(caught.value)


def test_facts_that_are_nested_too_deep_or_are_no_text_stop_nothing(tmp_path):
    deep = b"[" * 100_000 + b"]" * 100_000
    picture = draw(tmp_path / "0.png", 0).read_bytes()
    write_shard(tmp_path / "a.tar", [("a.png", picture), ("a.json", deep), ("b.png", picture), ("b.json", b"{}")])
    assert [set(entry.facts) for entry in entries(Source(tmp_path / "a.tar", Columns()), 2)] == [{KEY_COLUMN}] * 2
    (tmp_path / "m.jsonl").write_bytes(b'{"path": ' + deep + b"}")
    with pytest.raises(ArchiveError, match="not readable"):
        table_of(tmp_path / "m.jsonl").plan(2)
    (tmp_path / "m.jsonl").write_text('{"path": "a.png", "scanner": "S\\ud800", "id": "\\udc00"}\n')
    (entry,) = entries(table_of(tmp_path / "m.jsonl"), 2)
    assert describe(entry, Columns(id="id"))[:3] == (0, "?", "S?")


@pytest.mark.parametrize(
    ("value", "day"),
    [
        ("2026-03-04", (2026, 3, 4)),
        ("20260304", (2026, 3, 4)),
        (20260304, (2026, 3, 4)),
        ("2026-03-04T23:59:59+01:00", (2026, 3, 4)),
        ("20260304235959", (2026, 3, 4)),
        ("2026030423595", None),
        (datetime.datetime(2026, 3, 4, 5), (2026, 3, 4)),
        ("2026-02-30", None),
        ("yesterday", None),
        ("", None),
        (None, None),
    ],
)
def test_days(value, day):
    assert parse_day(value) == (None if day is None else datetime.date(*day))
