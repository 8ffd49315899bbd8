"""A small set of pairs on disk, whose texts say what the pictures show, and settings that train on it in seconds."""

import csv
from pathlib import Path

import pytest
from pair_pictures import draw_picture
from PIL import Image

WORDS = ("round bright spot", "dark lower half", "stripes across", "empty field")
FAST = (
    "start=tiny",
    "train_image=all",
    "train_text=all",
    "batch_size=8",
    "workers=0",
    "epochs=2",
    "warmup_epochs=1",
    "val_share=0.15",
    "test_share=0.15",
)


@pytest.fixture(scope="session")
def table(tmp_path_factory) -> Path:
    """pairs.csv: 40 pairs of 20 patients; texts repeat."""
    folder = tmp_path_factory.mktemp("pairs")
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "text", "patientid"])
        for number in range(40):
            Image.fromarray(draw_picture(number)).save(folder / f"{number}.png")
            writer.writerow([f"{number}.png", f"{WORDS[number % 4]}, series {number % 8}", f"patient {number // 2}"])
    return folder / "pairs.csv"


@pytest.fixture
def settings(table, tmp_path):
    """Make a config that trains the tiny tower on the table."""
    from fmclip.contrastive.config import load_config

    def make(*overrides: str, config: str = "mini-align"):
        fixed = [f"pairs.path={table}", "pairs.format=csv", f"results={tmp_path / 'results'}", "name=run"]
        return load_config(config, [*fixed, *FAST, *overrides])

    return make
