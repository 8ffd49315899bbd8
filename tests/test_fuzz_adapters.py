"""Mutated adapter files: only the project's own errors come out, quickly, and never a file name."""

import json
import struct

import pytest
from detectors.detector_scans import normal_scan
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st

from fmclip.checkpoint import describe_adapter, load_adapter, read_window, save_adapter
from fmclip.detectors import FusionMedCLIP, FusionMedCLIPConfig
from fmclip.errors import CheckpointError

NAME = "Mustermann-4711"
SETTINGS = fuzz(400)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def sound(tiny_tower, tmp_path_factory) -> bytes:
    """An adapter with a memory and a network."""
    config = FusionMedCLIPConfig(stage2_epochs=1, stage3_epochs=0, pool_size=8, batch_size=4)
    detector = FusionMedCLIP(tiny_tower, config).fit([normal_scan(seed) for seed in range(3)])
    path = tmp_path_factory.mktemp("adapter") / "sound"
    save_adapter(path, detector, detector.calibration(), window="lung", name="mine")
    return path.read_bytes()


def header_of(content: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def read_all(path, tower) -> str:
    """Everything that reads an adapter; the refusals in words. Any other exception fails the test."""
    told = ""
    for read in (describe_adapter, read_window, lambda file: load_adapter(file, tower=tower)):
        try:
            read(path)
        except CheckpointError as error:
            told += str(error)
    return told


@SETTINGS
@given(
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=6),
    in_header=st.booleans(),
    keep=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_changed_bytes_are_refused_or_harmless(sound, tiny_tower, tmp_path, edits, in_header, keep):
    content = bytearray(sound)
    reach = min(len(content), 4000) if in_header else len(content)
    for place, patch in edits:
        start = int(place * reach)
        content[start : start + len(patch)] = patch
    path = tmp_path / NAME
    path.write_bytes(content[: int(keep * len(content))])
    assert NAME not in read_all(path, tiny_tower)


@SETTINGS
@given(
    key=st.sampled_from(
        ["format", "format_version", "method", "config", "calibration", "tower", "tower_identity", "window", "name"]
    ),
    value=st.one_of(JSON, JSON.map(json.dumps)),
)
def test_changed_descriptions_are_refused_or_harmless(sound, tiny_tower, tmp_path, key, value):
    header, data = header_of(sound)
    header["__metadata__"][key] = value
    path = tmp_path / NAME
    path.write_bytes(with_header(header, data))
    assert NAME not in read_all(path, tiny_tower)


@SETTINGS
@given(data=st.data())
def test_changed_settings_are_refused_or_harmless(sound, tiny_tower, tmp_path, data):
    header, tensors = header_of(sound)
    for name in ("config", "calibration"):
        values = json.loads(header["__metadata__"][name])
        values[data.draw(st.sampled_from(sorted(values)))] = data.draw(JSON)
        header["__metadata__"][name] = json.dumps(values)
    path = tmp_path / NAME
    path.write_bytes(with_header(header, tensors))
    assert NAME not in read_all(path, tiny_tower)


@SETTINGS
@given(data=st.data())
def test_changed_tensor_tables_are_refused_or_harmless(sound, tiny_tower, tmp_path, data):
    header, tensors = header_of(sound)
    name = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    change = data.draw(st.sampled_from(["drop", "dtype", "shape", "data_offsets", "all"]))
    if change == "drop":
        del header[name]
    elif change == "all":
        header[name] = data.draw(JSON)
    else:
        header[name][change] = data.draw(JSON | st.lists(st.integers(0, 2**40), max_size=3))
    path = tmp_path / NAME
    path.write_bytes(with_header(header, tensors))
    assert NAME not in read_all(path, tiny_tower)


def test_the_file_that_is_changed_is_sound(sound, tiny_tower, tmp_path):
    (tmp_path / NAME).write_bytes(sound)
    assert read_all(tmp_path / NAME, tiny_tower) == ""


def test_a_pickle_named_safetensors_is_refused_unread(tiny_tower, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return exit, (1,)

    (tmp_path / NAME).write_bytes(pickle.dumps(Evil()))
    assert read_all(tmp_path / NAME, tiny_tower).count("not an adapter file") == 3
