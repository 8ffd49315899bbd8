"""The three configs that are shipped, from pairs to a searched index, in the layout of data that each is made for."""

import json
import shutil

import pytest
from pair_pictures import encoded
from typer.testing import CliRunner

from fmclip.contrastive.config import FOLDER
from fmclip.pretraining_cli import app

WORDS = ("round bright spot", "dark lower half", "stripes across", "empty field")
CONTENT = {"run.json", "metrics.json", "splits.json", "log.csv", "tower", "checkpoints", "index.safetensors", "figures"}
FIGURES = {"losses.png", "image_to_text.png", "text_to_image.png", "grad_cam.png"}
SMALL_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def roco(folder) -> list[str]:
    """ROCO's first version: three parts of captions, images and the articles they are from."""
    for part, first in (("train", 0), ("validation", 24), ("test", 32)):
        own = folder / part / "radiology"
        (own / "images").mkdir(parents=True)
        numbers = range(first, first + (24 if part == "train" else 8))
        (own / "captions.txt").write_text("".join(f"ROCO_{n:05d}\t {WORDS[n % 4]} \n" for n in numbers))
        links = "".join(f"ROCO_{n:05d}\twget ftp://x/PMC{n // 2}.tar.gz a.jpg\n" for n in numbers)
        (own / "dlinks.txt").write_text(links)
        for n in numbers:
            (own / "images" / f"ROCO_{n:05d}.jpg").write_bytes(encoded(n, "JPEG"))
    return [f"pairs.path={folder}", "start=tiny", "augment.size=0", "lr=2e-3", "min_lr=1e-5"]


def openi(folder) -> list[str]:
    """OpenI as the hub keeps it, and the config's halves with fewer and narrower layers in the text half."""
    datasets = pytest.importorskip("datasets")
    rows = {
        "uid": [str(n) for n in range(20)],
        "findings": [WORDS[n % 4] for n in range(20)],
        "img_frontal": [encoded(n) for n in range(20)],
        "img_lateral": [encoded(n + 20) for n in range(20)],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(str(folder / "copy"))
    shutil.copytree(FOLDER / "distilbert", folder / "distilbert")
    text = json.loads((folder / "distilbert" / "config.json").read_text()) | SMALL_BERT
    (folder / "distilbert" / "config.json").write_text(json.dumps(text))
    model = json.loads((FOLDER / "radiology-mini.json").read_text())
    tokenizer = (FOLDER / model["model_cfg"]["text_cfg"]["hf_tokenizer_name"]).resolve()
    model["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = str(tokenizer)
    (folder / "small.json").write_text(json.dumps(model))
    return [f"pairs.path={folder / 'copy'}", f"start={folder / 'small.json'}:random", "augment.size=64"]


def table(folder) -> list[str]:
    """A table of scans and notes."""
    lines = ["path,text,patientid"]
    for n in range(40):
        (folder / f"{n}.png").write_bytes(encoded(n))
        lines.append(f"{n}.png,{WORDS[n % 4]},{n // 2}")
    (folder / "pairs.csv").write_text("\n".join(lines))
    return [f"pairs.path={folder / 'pairs.csv'}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "layout"), [("roco-vit-l-14", roco), ("radiology-mini", openi), ("mini-align", table)]
)
def test_from_pairs_to_a_tower_metrics_and_a_searched_index(tmp_path, config, layout):
    (tmp_path / "data").mkdir()
    settings = [*layout(tmp_path / "data"), "epochs=2", "warmup_epochs=1", "batch_size=8", "workers=0"]
    settings += ["val_share=0.2", "test_share=0.2", f"results={tmp_path / 'results'}"]

    def command(*words: str) -> str:
        result = CliRunner().invoke(app, [*words, "--device", "cpu"])
        assert result.exit_code == 0, result.output
        return result.output

    assert "the tower is in" in command("pretrain", config, *settings)
    run = tmp_path / "results" / config
    assert "nDCG@10" in command("evaluate-retrieval", str(run))
    assert {path.name for path in run.iterdir()} == CONTENT
    assert {path.name for path in (run / "figures").iterdir()} == FIGURES
    metrics = json.loads((run / "metrics.json").read_text())
    facts = json.loads((run / "run.json").read_text())
    assert metrics["pairs"] == facts["pairs"]["test"] > 0
    assert facts["pairs"]["train"] + facts["pairs"]["val"] + facts["pairs"]["test"] == 40
    assert metrics["patients"] <= metrics["pairs"] / 2  # two pairs of each stay together
    found = command("retrieve", str(run), WORDS[2], "--k", "4")
    assert sorted(line.split("  ", 1)[1] for line in found.strip().splitlines()) == sorted(WORDS)
    assert found.splitlines()[0].endswith(WORDS[2])
