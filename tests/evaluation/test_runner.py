"""A plan from fit to row, on a small random tower and simulated scans."""

import shutil
from dataclasses import replace

import cv2
import pytest

from fmclip.evaluation import (
    Half,
    PixelAUROC,
    Plan,
    Protocol,
    environment,
    load_datasets,
    run_plan,
    summarise,
    to_markdown,
)


@pytest.fixture
def plan(make_folders, tmp_path) -> Plan:
    datasets = load_datasets(make_folders(tmp_path))
    return Plan(datasets, ["patch_memory"], ks=[3, 4], seeds=range(2), preset="full")


def test_each_combination_makes_a_row(plan, tiny_tower):
    shares: list[float] = []
    rows = list(run_plan(plan, tiny_tower, on_progress=lambda share, text: shares.append(share)))
    assert [(row.k, row.seed) for row in rows] == [(3, 0), (3, 1), (4, 0), (4, 1)]
    for row in rows:
        assert (row.dataset, row.method, row.tower) == ("blobs", "patch_memory", "tiny")
        assert (row.protocol, row.half, row.preset) == ("unique", "all", "full")
        assert (row.n_normal, row.n_abnormal) == (8 - row.k, 5)
        assert row.image_auroc > 0.9  # a bright blob is plain to see, even for a random tower
        assert row.pixel_auroc > 0.8
        assert row.fit_seconds > 0
        assert row.ms_per_scan > 0
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_rows_repeat(plan, tiny_tower):
    plan = replace(plan, ks=[4], seeds=[0])
    first, second = next(run_plan(plan, tiny_tower)), next(run_plan(plan, tiny_tower))
    assert first.image_auroc == second.image_auroc
    assert first.pixel_auroc == second.pixel_auroc


def test_no_pixel_auroc_without_masks(make_folders, tmp_path, tiny_tower):
    datasets = load_datasets(make_folders(tmp_path, masks=False))
    (row,) = run_plan(Plan(datasets, ["patch_memory"], [4], [0], "full"), tiny_tower)
    assert row.pixel_auroc is None


def test_masks_are_laid_on_the_right_pixels(make_folders, tmp_path, tiny_tower):
    root = make_folders(tmp_path)
    plan = Plan(load_datasets(root), ["patch_memory"], [4], [0], "full")
    (straight,) = run_plan(plan, tiny_tower)
    for path in (root / "blobs/masks").iterdir():
        cv2.imwrite(str(path), 255 - cv2.imread(str(path), cv2.IMREAD_GRAYSCALE))
    (inverted,) = run_plan(plan, tiny_tower)
    assert inverted.pixel_auroc < straight.pixel_auroc - 0.1
    assert inverted.image_auroc == straight.image_auroc


def test_abnormal_scans_without_a_mask_say_nothing_about_pixels(make_folders, tmp_path, tiny_tower, monkeypatch):
    root = make_folders(tmp_path, normal=8, abnormal=5)
    for number in range(3):
        (root / f"blobs/masks/{number}.png").unlink()
    counted: list[bool] = []
    monkeypatch.setattr(PixelAUROC, "update", lambda self, anomaly_map, mask: counted.append(bool(mask.any())))
    list(run_plan(Plan(load_datasets(root), ["patch_memory"], [4], [0], "full"), tiny_tower))
    assert sorted(counted) == [False] * 4 + [True] * 2


def test_a_k_beyond_the_dataset_is_skipped_and_told_once(plan, tiny_tower):
    skipped: list[str] = []
    shares: list[float] = []
    rows = list(
        run_plan(
            replace(plan, ks=[4, 30], seeds=[0, 1]),
            tiny_tower,
            on_skip=skipped.append,
            on_progress=lambda share, text: shares.append(share),
        )
    )
    assert [row.k for row in rows] == [4, 4]
    assert shares[-1] == 1.0
    assert len(skipped) == 1
    assert skipped[0].startswith("blobs: k = 30")


def test_protocol_and_half_are_obeyed_and_recorded(make_folders, tmp_path, tiny_tower):
    root = make_folders(tmp_path)
    shutil.copy(root / "blobs/abnormal/0.png", root / "blobs/abnormal/copy.png")
    plan = Plan(load_datasets(root), ["patch_memory"], [2], [0], "full")
    (unique,) = run_plan(plan, tiny_tower)
    (raw,) = run_plan(replace(plan, protocol=Protocol.RAW), tiny_tower)
    (half,) = run_plan(replace(plan, half=Half.REPORT), tiny_tower)
    assert (unique.protocol, unique.half, unique.n_abnormal) == ("unique", "all", 5)
    assert (raw.protocol, raw.half, raw.n_abnormal) == ("raw", "all", 6)
    assert half.half == "report"
    assert half.n_normal + half.n_abnormal < unique.n_normal + unique.n_abnormal


def test_seeds_are_summed_up(plan, tiny_tower):
    (row,) = run_plan(replace(plan, ks=[4], seeds=[0]), tiny_tower)
    rows = [replace(row, seed=seed, image_auroc=value) for seed, value in enumerate((0.90, 0.92, 0.94))]
    rows.append(replace(row, k=8, image_auroc=0.95, pixel_auroc=None))
    first, second = summarise(rows)
    assert first.seeds == 3
    assert first.image_auroc == pytest.approx((0.92, 0.02))
    assert second.pixel_auroc is None
    table = to_markdown([first, second]).splitlines()
    assert "| 92.0 ± 2.0 |" in table[2]
    assert "| 95.0 | – |" in table[3]


def test_the_environment_names_what_figures_depend_on():
    found = environment()
    for key in ("machine", "cpu_count", "torch", "timm", "open_clip_torch", "date"):
        assert found[key]
