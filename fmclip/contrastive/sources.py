"""Layouts of image-text data: CSV or JSONL, ROCO, OpenI (Hugging Face), WebDataset shards. Each lists `Pair`s.

| format | what is read |
|---|---|
| csv | a .csv or .jsonl with columns for image path, text and patient |
| roco | {train,validation,test}/{radiology,...}/captions.txt + images/ (2018), or *_captions.csv + folders (v2) |
| openi | a data set of the hub such as `ykumards/open-i`, or its copy on disk; views of a study share a report |
| webdataset | .tar shards with NAME.jpg + NAME.txt or NAME.json; read in place at random, never unpacked |
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fmclip.contrastive.config import PairsConfig
from fmclip.contrastive.pairs import ImageBytes, ImageFile, Pair, tidy
from fmclip.errors import PairError
from fmclip.scans.shards import IMAGES, TEXTS, UnclearSample, image_of, iterate_samples, read_facts, read_member

REPORT_FIELDS = ("findings", "impression", "report", "text")
"""Text of an OpenI study: the first of these that says something (radiology-clip-mini's priority)."""
VIEWS = ("img_frontal", "img_lateral", "frontal", "lateral", "image", "images")
STUDY_FIELDS = ("patient_id", "patientid", "subject_id", "uid", "study_id", "id")
ARTICLE_FIELDS = ("pmcid", "pmc_id", "pmc", "article")
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def list_pairs(config: PairsConfig) -> Iterator[Pair]:
    """List the pairs of a source, without decoding an image.

    Args:
        config: Where they are.

    Returns:
        Pairs in the order of the source; texts may be empty, images missing.

    Raises:
        PairError: The source is not there or has another layout.
    """
    if not config.path:
        raise PairError("No pairs are named: give pairs.path=FILE_OR_FOLDER.")
    readers: dict[str, Callable[[PairsConfig], Iterator[Pair]]] = {
        "csv": _table,
        "roco": _roco,
        "openi": _openi,
        "webdataset": _shards,
    }
    return readers[config.format](config)


def _table(config: PairsConfig) -> Iterator[Pair]:
    path = Path(config.path)
    if not path.is_file():
        raise PairError("The table of pairs is not there; pairs.path must name a .csv or .jsonl file.")
    root = Path(config.root) if config.root else path.parent
    for number, row in enumerate(_rows(path), start=1):
        missing = [one for one in (config.image_column, config.text_column) if one not in row]
        if missing:
            raise PairError(
                f"Row {number} of the table has no column {missing[0]!r}; see pairs.image_column and others."
            )
        if config.patient_column and config.patient_column not in row:
            raise PairError(
                f"Row {number} of the table has no column {config.patient_column!r}, so that one patient's pairs could "
                "be learned from and measured on. Set pairs.patient_column to the column that tells patients apart, or "
                "pairs.patient_column= if each row is another patient."
            )
        image, split = str(row[config.image_column] or ""), str(row.get("split") or "").lower()
        patient = _name(row.get(config.patient_column)) or f"row {number}"
        source = ImageFile(root / image)
        yield Pair(f"{number}:{image}", source, tidy(row[config.text_column]), patient, SPLIT_NAMES.get(split, ""))


def _name(value: object) -> str:
    """What a patient or article is called, 0 among the names; "" for none."""
    return "" if value is None else str(value).strip()


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            if path.suffix.lower() in (".jsonl", ".ndjson"):
                yield from (json.loads(line) for line in file if line.strip())
            else:
                yield from csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    except (csv.Error, UnicodeError, json.JSONDecodeError) as error:
        raise PairError("The table of pairs is not readable as UTF-8 CSV or JSON lines.") from error


def _roco(config: PairsConfig) -> Iterator[Pair]:
    root = Path(config.path)
    root = root / "data" if (root / "data").is_dir() else root
    captions = sorted(root.rglob("captions.txt")) or sorted(root.glob("*_captions.csv"))
    if not captions:
        raise PairError("No captions.txt or *_captions.csv lies in this folder; pairs.path must be ROCO's folder.")
    for file in captions:
        words = [*file.relative_to(root).parts[:-1], *re.split(r"[_.]", file.name)]
        split = next((SPLIT_NAMES[word.lower()] for word in words if word.lower() in SPLIT_NAMES), "")
        articles = _roco_articles(file, config.patient_column)
        if not articles and config.patient_column:
            raise PairError(
                "Nothing says which article each image of ROCO is from, so that one article's images could be learned "
                "from and measured on. Put dlinks.txt beside captions.txt, add a column pmcid to *_captions.csv, or "
                "set pairs.patient_column= to take each image as an article of its own."
            )
        folders = [file.parent / "images", file.parent / file.name.replace("_captions.csv", ""), file.parent]
        folder = next(one for one in folders if one.is_dir())
        for name, text in _roco_lines(file):
            # pictures of one article often show one patient, and their captions refer to each other
            yield Pair(f"{split}/{name}", ImageFile(_with_suffix(folder, name)), text, articles.get(name, name), split)


def _roco_lines(file: Path) -> Iterator[tuple[str, str]]:
    if file.suffix == ".csv":
        for row in _rows(file):
            lower = {key.lower(): value for key, value in row.items() if isinstance(key, str)}
            yield _roco_name(lower), tidy(lower.get("caption"))
        return
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, text = line.partition("\t")
            if name.strip():
                yield name.strip(), tidy(text)


def _roco_articles(captions: Path, column: str) -> dict[str, str]:
    """Read which article an image is from: a column of the captions, or the download link (PMC...) in dlinks.txt."""
    if captions.suffix == ".csv":
        rows = [{key.lower(): value for key, value in row.items() if isinstance(key, str)} for row in _rows(captions)]
        columns = [one for one in (column.lower(), *ARTICLE_FIELDS) if one]
        named = ((_roco_name(row), next(filter(None, (_name(row.get(one)) for one in columns)), "")) for row in rows)
        return {name: article for name, article in named if article}
    links = captions.parent / "dlinks.txt"
    if not links.is_file():
        return {}
    with links.open(encoding="utf-8", errors="replace") as lines:
        parts = [(line.partition("\t")[0].strip(), re.search(r"PMC\d+", line)) for line in lines]
    return {name: found[0] for name, found in parts if found}


def _roco_name(row: Mapping[str, Any]) -> str:
    return str(row.get("id") or row.get("image_id") or row.get("name") or "")


def _with_suffix(folder: Path, name: str) -> Path:
    return next((folder / f"{name}.{end}" for end in IMAGES if (folder / f"{name}.{end}").is_file()), folder / name)


def _openi(config: PairsConfig) -> Iterator[Pair]:
    table = _hub_table(config)
    columns = {name.lower(): name for name in table.column_names}
    views = [columns[name] for name in VIEWS if name in columns]
    texts = [columns[name] for name in REPORT_FIELDS if name in columns]
    if not views or not texts:
        raise PairError(
            f"This data set has no column for {'images' if not views else 'texts'}: known are "
            f"{', '.join(VIEWS if not views else REPORT_FIELDS)}."
        )
    study = next((columns[name] for name in STUDY_FIELDS if name in columns), None)
    reports = table.select_columns([*texts, *([study] if study else [])])  # no image is decoded for listing them
    for number, row in enumerate(reports):
        text = next((words for name in texts if (words := tidy(row[name]))), "")
        patient = (_name(row[study]) if study else "") or f"row {number}"
        images = [
            ImageBytes(partial(_hub_image, table, number, view, place)) for view, place in _views(table, number, views)
        ]
        for place, image in enumerate(images[:1] if config.view == "first" else images):
            yield Pair(f"{number}/{place}", image, text, patient)
        if not images:
            yield Pair(f"{number}/none", _Nothing(), text, patient)


class _Nothing:
    """A study without an image: counted as missing."""

    def exists(self) -> bool:
        return False

    def read(self, label: str, **reading: Any) -> Any:
        raise PairError(f"{label} has no image.")


def _hub_table(config: PairsConfig) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise PairError("This needs the package datasets: pip install 'fmclip[pairs]'.") from error
    path = Path(config.path)
    try:
        if (path / "state.json").is_file():
            table = datasets.load_from_disk(str(path))
        elif path.is_dir() and sorted(path.rglob("*.parquet")):
            files = [str(one) for one in sorted(path.rglob("*.parquet"))]
            table = datasets.load_dataset("parquet", data_files=files, split=config.hub_split)
        else:
            table = datasets.load_dataset(config.path, split=config.hub_split)
    except Exception as error:  # datasets raises many kinds, with paths in them
        raise PairError(
            "The data set could not be loaded: check its name and the network, or give the folder of a copy "
            "(Dataset.save_to_disk, or parquet files)."
        ) from error
    pictures = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    for name in pictures:
        table = table.cast_column(name, datasets.Image(decode=False))
    return table


def _views(table: Any, number: int, names: Sequence[str]) -> list[tuple[str, int]]:
    """List the images of one study: column, and place where a column holds several."""
    row = table.select_columns(list(names))[number]
    found = []
    for name in names:
        images = row[name] if isinstance(row[name], list) else [row[name]]
        found += [(name, place) for place, image in enumerate(images) if image]
    return found


def _hub_image(table: Any, number: int, name: str, place: int) -> bytes:
    value = table.select_columns([name])[number][name]
    value = value[place] if isinstance(value, list) else value
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") else value.get("path")
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if isinstance(value, str) and len(value) < 4096 and Path(value).is_file():
        return Path(value).read_bytes()
    if isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except binascii.Error as error:
            raise OSError("no image in this cell") from error
    if hasattr(value, "save"):  # already decoded
        encoded = io.BytesIO()
        value.save(encoded, format="PNG")
        return encoded.getvalue()
    raise OSError("no image in this cell")


def _shards(config: PairsConfig) -> Iterator[Pair]:
    path = Path(config.path)
    files = sorted(path.rglob("*.tar")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise PairError("No .tar shard is there; pairs.path must name one or a folder of them (local or mounted).")
    for shard, file in enumerate(files):
        split = next((SPLIT_NAMES[word] for word in re.split(r"\W|_", file.stem.lower()) if word in SPLIT_NAMES), "")
        try:
            for sample in iterate_samples(file):
                image = image_of(sample)
                facts = read_facts(file, sample)
                text = next((read_member(file, *sample.members[one]) for one in TEXTS if one in sample.members), b"")
                words = tidy(text.decode("utf-8", "replace"))
                if image is None and not words:
                    continue
                words = words or tidy(facts.get(config.text_column) or facts.get("caption"))
                patients = (_name(facts.get(column)) for column in (config.patient_column, "patient"))
                patient = next(filter(None, patients), f"{shard}/{sample.key}")
                source = _Nothing() if image is None else ImageBytes(partial(read_member, file, *image))
                yield Pair(f"{shard}/{sample.key}", source, words, patient, split)
        except tarfile.TarError as error:
            raise PairError(f"Shard {shard + 1} is damaged or compressed; shards must be plain .tar files.") from error
        except UnclearSample as error:
            raise PairError(f"In shard {shard + 1}, {error}.") from error
