"""A plan from fit to row, on a small random tower and simulated scans."""

import shutil
from dataclasses import asdict, replace

import cv2
import numpy as np
import pytest

import fmclip.evaluation.runner
from fmclip.detectors import PatchMemory
from fmclip.errors import ReferenceSetError, TowerError
from fmclip.evaluation import (
    Case,
    Dataset,
    Half,
    Plan,
    Protocol,
    Results,
    Run,
    Skipped,
    environment,
    load_datasets,
    run_plan,
)
from fmclip.scans import read_scan


@pytest.fixture
def root(make_folders, tmp_path):
    return make_folders(tmp_path)


@pytest.fixture
def plan(root) -> Plan:
    return Plan(load_datasets(root), ["patch_memory"], ks=[4], seeds=[0], preset="full")


@pytest.fixture
def register(monkeypatch):
    """Add a detector under its name for one test."""

    def add(detector_class):
        monkeypatch.setitem(fmclip.evaluation.runner.DETECTORS, detector_class.name, detector_class)
        return detector_class

    return add


def _rows(plan, tower, **options):
    return [result.row for result in run_plan(plan, tower, **options) if isinstance(result, Run)]


def _row(plan, tower, **options):
    (row,) = _rows(plan, tower, **options)
    return row


def test_each_combination_makes_a_row(plan, tiny_tower):
    shares: list[float] = []
    plan = replace(plan, ks=[3, 4], seeds=range(2))
    rows = _rows(plan, tiny_tower, on_progress=lambda share, text: shares.append(share))
    assert [(row.k, row.seed) for row in rows] == [(3, 0), (3, 1), (4, 0), (4, 1)]
    for row in rows:
        assert (row.dataset, row.fit_on, row.method, row.tower) == ("blobs", "blobs", "patch_memory", "tiny")
        assert (row.protocol, row.half, row.preset, row.abnormal_k) == ("unique", "all", "full", 0)
        assert (row.n_normal, row.n_abnormal, row.n_unreadable, row.n_twins) == (8 - row.k, 5, 0, 0)
        assert row.image_auroc > 0.9  # a bright blob is plain to see, even for a random tower
        assert row.pixel_auroc > 0.8
        assert row.aupro > 0.4
        assert 0 < row.threshold < 1
        assert row.fit_seconds > 0
        assert row.ms_per_scan > 0
        for name, (low, high) in row.intervals.items():
            assert low - 0.01 <= getattr(row, name) <= high + 0.01, name
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_rows_repeat(plan, tiny_tower):
    first, second = (asdict(_row(plan, tiny_tower)) for _ in range(2))
    for timed in ("fit_seconds", "ms_per_scan"):
        del first[timed], second[timed]
    assert first == second


def test_scores_are_those_of_the_detector(plan, tiny_tower):
    (run,) = run_plan(plan, tiny_tower)
    cases = plan.datasets[0].cases
    places = np.random.default_rng(0).permutation(8)[:4]
    detector = PatchMemory(tiny_tower).fit([read_scan(cases[place].path) for place in places])
    expected = detector.predict([read_scan(cases[place].path) for place in run.scores.case])
    assert list(run.scores.score) == pytest.approx([prediction.score for prediction in expected], abs=1e-5)
    assert set(run.scores.case) == set(range(13)) - set(places.tolist())


def test_no_pixel_metrics_without_masks(make_folders, tmp_path, tiny_tower):
    datasets = load_datasets(make_folders(tmp_path, masks=False))
    row = _row(Plan(datasets, ["patch_memory"], [4], [0], "full"), tiny_tower)
    assert (row.pixel_auroc, row.aupro, row.dice) == (None, None, None)
    assert "pixel_auroc" not in row.intervals


def test_masks_are_laid_on_the_right_pixels(root, plan, tiny_tower):
    straight = _row(plan, tiny_tower)
    for path in (root / "blobs/masks").iterdir():
        cv2.imwrite(str(path), 255 - cv2.imread(str(path), cv2.IMREAD_GRAYSCALE))
    inverted = _row(plan, tiny_tower)
    assert inverted.pixel_auroc < straight.pixel_auroc - 0.1
    assert inverted.image_auroc == straight.image_auroc


def test_abnormal_scans_without_a_mask_say_nothing_about_pixels(root, plan, tiny_tower):
    for number in range(3):
        (root / f"blobs/masks/{number}.png").unlink()
    plan = replace(plan, datasets=load_datasets(root))
    some = _row(plan, tiny_tower)
    kept = [case for case in plan.datasets[0].cases if case.masks or not case.is_abnormal]
    masked_only = _row(replace(plan, datasets=[replace(plan.datasets[0], cases=tuple(kept))]), tiny_tower)
    assert (some.n_abnormal, masked_only.n_abnormal) == (5, 2)
    assert (some.pixel_auroc, some.dice) == pytest.approx((masked_only.pixel_auroc, masked_only.dice))


def test_a_k_beyond_the_dataset_is_skipped_and_the_others_go_on(plan, tiny_tower):
    results = list(run_plan(replace(plan, ks=[30, 4]), tiny_tower))
    assert isinstance(results[0], Skipped)
    assert results[0].reason.startswith("k = 30 is too many")
    assert results[1].row.k == 4


@pytest.mark.parametrize("error", [TowerError("needs a transformer tower"), ReferenceSetError("needs abnormal scans")])
@pytest.mark.parametrize("place", ["__init__", "fit"])
def test_a_method_that_refuses_is_skipped_with_its_reason(plan, tiny_tower, register, error, place):
    def refuse(*arguments, **options):
        raise error

    register(type("Picky", (PatchMemory,), {"name": "picky", place: refuse}))
    skipped, run = run_plan(replace(plan, methods=["picky", "patch_memory"]), tiny_tower)
    assert skipped == Skipped("blobs", "picky", "tiny", 4, 0, str(error))
    assert run.row.method == "patch_memory"


def test_scans_that_cannot_be_read_are_counted_and_the_others_go_on(root, plan, tiny_tower):
    (run,) = run_plan(plan, tiny_tower)
    cases = plan.datasets[0].cases
    learned = [place for place in range(8) if place not in run.scores.case]
    for place in (learned[0], run.scores.case[0], 12):  # a reference, a normal and an abnormal test scan
        cases[place].path.write_text("no picture")
    row = _row(plan, tiny_tower)
    assert row.n_unreadable == 3
    assert (row.k, row.n_normal, row.n_abnormal) == (4, 2, 4)  # another normal scan became a reference


def test_a_mask_that_cannot_be_read_leaves_its_scan_in_the_image_metrics(root, plan, tiny_tower):
    (root / "blobs/masks/0.png").write_text("no picture")
    results = Results()
    for result in run_plan(plan, tiny_tower):
        results.add(result)
    assert results.runs[0].row.n_abnormal == 5
    assert results.notes() == ["blobs: the masks of 1 scans cannot be read and were left out."]


def test_copies_of_a_reference_are_not_tested_whatever_the_groups_say(root, plan, tiny_tower):
    for number in range(8):
        shutil.copy(root / f"blobs/normal/{number}.png", root / f"blobs/normal/copy{number}.png")
    cases = [Case(case.path, case.is_abnormal, case.masks, str(case.path)) for case in load_datasets(root)[0].cases]
    plan = replace(plan, datasets=[Dataset("blobs", tuple(cases), "blob")], seeds=[1])
    (run,) = run_plan(plan, tiny_tower)
    places = np.random.default_rng(1).permutation(16)[:4]
    tested = {read_scan(cases[place].path).digest for place in run.scores.case}
    assert not tested & {read_scan(cases[place].path).digest for place in places}
    assert (run.row.n_twins, run.row.n_normal) == (4, 8)
    assert _row(replace(plan, protocol=Protocol.RAW), tiny_tower).n_twins == 0


def test_intervals_draw_twins_together(root, plan, tiny_tower):
    cases = [replace(case, group=str(case.path), look=case.path.stem) for case in load_datasets(root)[0].cases]
    (run,) = run_plan(
        replace(plan, datasets=[Dataset("blobs", tuple(cases), "blob")], seeds=[1], protocol=Protocol.RAW), tiny_tower
    )
    tested = [cases[place] for place in run.scores.case]
    pairs = set(zip((case.look for case in tested), run.scores.group, strict=True))
    assert len(pairs) == len({look for look, _ in pairs}) == len(set(run.scores.group)) < len(tested)


def test_protocol_and_half_are_obeyed_and_recorded(root, plan, tiny_tower):
    shutil.copy(root / "blobs/abnormal/0.png", root / "blobs/abnormal/copy.png")
    plan = replace(plan, datasets=load_datasets(root), ks=[2])
    unique = _row(plan, tiny_tower)
    raw = _row(replace(plan, protocol=Protocol.RAW), tiny_tower)
    half = _row(replace(plan, half=Half.REPORT), tiny_tower)
    assert (unique.protocol, unique.half, unique.n_abnormal) == ("unique", "all", 5)
    assert (raw.protocol, raw.half, raw.n_abnormal) == ("raw", "all", 6)
    assert half.half == "report"
    assert half.n_normal + half.n_abnormal < unique.n_normal + unique.n_abnormal


def test_methods_that_can_learn_from_abnormal_scans_get_them_with_their_masks(plan, tiny_tower, register):
    seen = {}

    class Greedy(PatchMemory):
        name = "greedy"
        uses_abnormals = "optional"

        def fit(self, normals, abnormals=None, *, abnormal_masks=None, on_event=None):
            seen.update(abnormals=abnormals, masks=abnormal_masks)
            return super().fit(normals)

    register(Greedy)
    greedy, plain = _rows(replace(plan, methods=["greedy", "patch_memory"], abnormal_k=2), tiny_tower)
    assert len(seen["abnormals"]) == 2
    for scan, mask in zip(seen["abnormals"], seen["masks"], strict=True):
        assert scan.pixels[mask].mean() > 0.9  # the blob of this very scan
        assert scan.pixels[~mask].mean() < 0.5
    assert (greedy.abnormal_k, greedy.n_abnormal) == (2, 3)
    assert (plain.abnormal_k, plain.n_abnormal) == (0, 3)  # tested on the same scans, learned from normal ones only
    seen.clear()
    _rows(replace(plan, methods=["greedy"]), tiny_tower)
    assert seen == {"abnormals": None, "masks": None}


def test_learning_from_one_dataset_and_testing_on_another(make_folders, tmp_path, tiny_tower):
    make_folders(tmp_path, "first", normal=6)
    make_folders(tmp_path, "second", normal=7, seed=4)
    first, second = load_datasets(tmp_path)
    row = _row(Plan([second], ["patch_memory"], [4], [0], "full", fit_on=first), tiny_tower)
    assert (row.dataset, row.fit_on, row.n_normal, row.n_abnormal) == ("second", "first", 7, 5)


def test_examples_are_the_best_median_and_worst_of_either_kind(plan, tiny_tower):
    first, second = run_plan(replace(plan, seeds=[0, 1], examples=True), tiny_tower)
    assert second.examples == ()
    scores = {example.title: example.score for example in first.examples}
    abnormal = [s for s, answer in zip(first.scores.score, first.scores.is_abnormal, strict=True) if answer]
    normal = [s for s, answer in zip(first.scores.score, first.scores.is_abnormal, strict=True) if not answer]
    assert scores["abnormal, best"] == pytest.approx(max(abnormal), abs=1e-5)
    assert scores["abnormal, worst"] == pytest.approx(min(abnormal), abs=1e-5)
    assert scores["normal, best"] == pytest.approx(min(normal), abs=1e-5)
    assert scores["normal, worst"] == pytest.approx(max(normal), abs=1e-5)
    assert scores["abnormal, median"] == pytest.approx(np.median(abnormal), abs=1e-5)


def test_the_environment_names_what_figures_depend_on():
    found = environment()
    for key in ("machine", "cpu", "cpu_count", "torch", "timm", "open_clip_torch", "date", "code"):
        assert found[key]
