import json
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch

from fmclip.synthesis import (
    KINDS,
    TASK_KINDS,
    TASKS,
    Anomaly,
    AnomalySampler,
    MaskSpec,
    SynthesisConfig,
    apply,
    estimate_foreground,
    scan_profile,
)
from fmclip.synthesis.anomaly import VISIBLE
from fmclip.synthesis.density import Density
from fmclip.synthesis.masks import draw_region
from fmclip.synthesis.sampler import MIN_PIXELS

TASK_OF = {kind: task for task, kinds in TASK_KINDS.items() for kind in kinds}
CONFINED = ("cutpaste", "poisson", "intensity", "source_warp")


def _seed(value):
    return torch.Generator().manual_seed(value)


def _only(kind, **settings):
    weights = {other: float(other == kind) for other in TASK_KINDS[TASK_OF[kind]]}
    return AnomalySampler(SynthesisConfig(weights=weights, **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_same_record_gives_the_same_picture_also_through_json(scan, phantoms, kind):
    image, content = scan
    sources = [image, phantoms["head"](5)[0]]
    before = image.copy()
    picture, mask, anomaly = _only(kind).synthesise(_seed(1), image, content, sources, TASK_OF[kind])
    again = Anomaly.from_dict(json.loads(json.dumps(anomaly.to_dict())))
    assert again == anomaly
    picture_again, mask_again = apply(again, image, content, sources)
    assert np.array_equal(picture, picture_again)
    assert np.array_equal(mask, mask_again)
    assert np.array_equal(image, before)


@pytest.mark.parametrize("kind", KINDS)
def test_anomaly_is_visible_tissue_and_nothing_else(scan, phantoms, kind):
    image, content = scan
    foreground = estimate_foreground(image, content)
    sources = [image, phantoms["head"](5)[0]]
    grey = bool((image == image[..., :1]).all())
    for seed in range(12):
        picture, mask, anomaly = _only(kind).synthesise(_seed(seed), image, content, sources, TASK_OF[kind])
        assert picture.dtype == np.float32
        assert picture.shape == image.shape
        assert picture.min() >= 0
        assert picture.max() <= 1
        assert mask.dtype == bool
        assert mask.sum() >= MIN_PIXELS
        assert mask.sum() <= 0.2 * foreground.sum()
        assert not (mask & ~(content & foreground)).any()
        change = np.abs(picture - image).max(axis=2)
        assert change[mask].mean() > VISIBLE / 2
        assert not change[~content].any()
        if grey:
            assert (picture == picture[..., :1]).all()
        near_change = cv2.dilate((change > VISIBLE).astype(np.uint8), np.ones((11, 11), np.uint8)) > 0
        assert not (mask & ~_filled(near_change)).any()
        if anomaly.kind in CONFINED:
            assert not change[~foreground].any()


def _filled(area):
    framed = cv2.copyMakeBorder(area.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    cv2.floodFill(framed, None, (0, 0), 2)
    return framed[1:-1, 1:-1] != 2


def test_confined_kinds_leave_everything_beyond_their_outline_alone(phantoms):
    image, content = phantoms["head"]()
    for kind in CONFINED:
        for seed in range(5):
            generator = _seed(seed)
            anomaly = _only(kind).sample(generator, image, content, 1, TASK_OF[kind])
            picture, _ = apply(anomaly, image, content, [phantoms["head"](3)[0]])
            outline = _outline(anomaly, image, content)
            assert np.array_equal(picture[~outline], image[~outline])


def _outline(anomaly, image, content):
    foreground = estimate_foreground(image, content)
    region = draw_region(anomaly.mask, foreground, np.random.default_rng(anomaly.seed), reach=anomaly.reach)
    outline = np.zeros_like(content)
    outline[region.box] = region.mask
    return outline


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("task", [task for task in TASKS if task != "identity"])
def test_flat_and_tiny_scans_get_a_visible_anomaly_too(phantoms, value, size, task):
    image, content = phantoms["flat"](value, size)
    for seed in range(3):
        picture, mask, anomaly = AnomalySampler().synthesise(_seed(seed), image, content, [image], task)
        assert mask.sum() >= MIN_PIXELS
        assert np.abs(picture - image)[mask].mean() > VISIBLE
        assert anomaly.describe()


def test_identity_gives_the_scan_itself(scan):
    image, content = scan
    picture, mask, anomaly = AnomalySampler().synthesise(_seed(0), image, content, [image], "identity")
    assert np.array_equal(picture, image)
    assert picture is not image
    assert not mask.any()
    assert anomaly is None


def test_tasks_have_equal_probability_and_every_kind_is_reached(phantoms):
    image, content = phantoms["head"]()
    sampler, generator = AnomalySampler(), _seed(0)
    drawn = [sampler.sample(generator, image, content, 3) for _ in range(800)]
    tasks = [anomaly.task if anomaly else "identity" for anomaly in drawn]
    for task in TASKS:
        assert tasks.count(task) == pytest.approx(200, abs=50)  # four standard deviations
    assert {anomaly.kind for anomaly in drawn if anomaly} == set(KINDS)
    assert {anomaly.patch.source for anomaly in drawn if anomaly and anomaly.patch} == {0, 1, 2}
    shares = [anomaly.mask.share for anomaly in drawn if anomaly]
    assert min(shares) < 0.005
    assert 0.08 < max(shares) <= 0.12
    levels = [anomaly.strength for anomaly in drawn if anomaly and anomaly.task == "density"]
    assert min(levels) < -1.5
    assert max(levels) > 1.5


def test_same_generator_seed_same_anomaly_and_threads_do_not_disturb_each_other(phantoms):
    image, content = phantoms["sonogram"]()
    sampler = AnomalySampler(SynthesisConfig(scan_type="breast ultrasound"))

    def make(seed):
        return sampler.synthesise(_seed(seed), image, content, [image])

    alone = [make(seed) for seed in range(24)]
    with ThreadPoolExecutor(4) as workers:
        together = list(workers.map(make, range(24)))
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one[0], other[0])
        assert one[2] == other[2]
    assert len({str(anomaly) for _, _, anomaly in alone}) > 12


@pytest.mark.parametrize(
    ("scan_type", "name"),
    [
        ("breast ultrasound", "ultrasound"),
        ("Brain MRI (T1)", "mri"),
        ("gradient-echo MR", "mri"),
        ("head CT", "ct"),
        ("retinal optical coherence tomography", "fundus"),
        ("chest X-rays", "x-ray"),
        ("retinal fundus photograph", "fundus"),
        ("histology, H&E", "histology"),
        ("", "generic"),
        ("my scans", "generic"),
    ],
)
def test_scan_type_chooses_its_profile(scan_type, name):
    assert scan_profile(scan_type)["name"] == name


def test_ultrasound_masses_are_mostly_dark_and_cast_shadows_but_mri_ones_do_not(phantoms):
    image, content = phantoms["sonogram"]()

    def lesions(scan_type):
        sampler, generator = AnomalySampler(SynthesisConfig(scan_type=scan_type)), _seed(0)
        drawn = [sampler.sample(generator, image, content, task="density") for _ in range(200)]
        return [anomaly for anomaly in drawn if anomaly.kind == "texture"]

    def share(anomalies, test):
        return np.mean([test(anomaly) for anomaly in anomalies])

    ultrasound, mri = lesions("breast ultrasound"), lesions("brain MRI")
    assert share(ultrasound, lambda a: a.density.level < 0) > share(mri, lambda a: a.density.level < 0) + 0.2
    assert share(ultrasound, lambda a: a.density.shadow != 0) > 0.4
    assert share(mri, lambda a: a.density.shadow != 0) == 0
    assert share(mri, lambda a: a.displace > 0) > 0.25


def test_weights_choose_among_the_kinds_of_a_task(phantoms):
    image, content = phantoms["head"]()
    sampler, generator = AnomalySampler(SynthesisConfig(weights={"cutpaste": 0.0})), _seed(0)
    assert {sampler.sample(generator, image, content, 1, "structural").kind for _ in range(30)} == {"poisson"}


def test_descriptions_name_kind_and_size():
    lesion = Density(-2.0, texture="speckle", shadow=-0.5)
    mask = MaskSpec("ellipse", 0.5, 0.5, 0.021)
    assert Anomaly("texture", mask, 0, density=lesion).describe() == (
        "dark speckled lesion with enhancement below, 2.1 % of the tissue"
    )


def test_bad_settings_and_records_are_named(phantoms):
    image, content = phantoms["head"]()
    mask = MaskSpec("ellipse", 0.5, 0.5, 0.02)
    with pytest.raises(ValueError, match="unknown anomaly kind 'melt'"):
        SynthesisConfig(weights={"melt": 1.0})
    with pytest.raises(ValueError, match="structural task needs"):
        SynthesisConfig(weights={"cutpaste": 0.0, "poisson": 0.0})
    with pytest.raises(ValueError, match="min_share"):
        SynthesisConfig(min_share=0.2, max_share=0.1)
    with pytest.raises(ValueError, match="visible"):
        SynthesisConfig(visible=0.5)
    with pytest.raises(ValueError, match="unknown synthesis task"):
        AnomalySampler().sample(_seed(0), image, content, task="melting")
    with pytest.raises(ValueError, match="needs its density"):
        Anomaly("texture", mask, 0)
    with pytest.raises(ValueError, match="not the record"):
        Anomaly.from_dict({"kind": "texture", "size": 3})
    anomaly = _only("cutpaste").sample(_seed(0), image, content, 3, "structural")
    with pytest.raises(ValueError, match="0 sources"):
        apply(anomaly, image, content)
