"""Searching in an index: the file, the commands, and the page's accordion."""

import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from pair_pictures import draw_picture
from safetensors.torch import save_file
from typer.testing import CliRunner

from fmclip.contrastive.index import load_index, make_index
from fmclip.errors import FmclipError, PairError
from fmclip.page import similar, uploads
from fmclip.page.visitors import Visitor
from fmclip.pretraining_cli import app
from fmclip.scans import Scan
from fmclip.session import Session
from fmclip.towers import get_tower


def scan_of(number: int, label: str = "scan 1") -> Scan:
    return Scan(draw_picture(number).astype(np.float32) / 255, label)


def test_equal_texts_are_found_once_and_counted(tmp_path):
    rows = torch.eye(3)[[0, 0, 1, 2]]
    index = make_index(rows.flip(1), rows, ["one", "one", "two", "three"], "a tower", "crop")
    index.save(tmp_path / "index.safetensors")
    again = load_index(tmp_path / "index.safetensors", tower="a tower")
    found = again.search(torch.tensor([0.9, 0.4, 0.0]), k=2)
    assert [(match.text, match.count) for match in found] == [("one", 1), ("two", 1)]
    assert found[0].cosine == pytest.approx(0.9, abs=1e-3)
    assert again.search(torch.tensor([1.0, 0.0, 0.0]), k=1, among="image")[0].text == "three"


def test_one_text_below_many_images_hides_no_other_text():
    rows = torch.eye(2)[[0] * 300 + [1, 1]]
    index = make_index(rows, rows, ["common"] * 300 + ["rare", "other"], "a tower", "crop")
    for among, common in (("text", 1), ("image", 300)):
        found = index.search(torch.tensor([1.0, 0.1]), k=3, among=among)
        assert {(match.text, match.count) for match in found} == {("common", common), ("rare", 1), ("other", 1)}


def test_captions_with_formulas_are_drawn_as_they_stand(tiny_tower, tmp_path):
    from fmclip.contrastive.figures import cam_figure, image_grid, text_grid
    from fmclip.contrastive.pairs import ImageFile, Pair
    from fmclip.contrastive.runs import Embedded

    cv2.imwrite(str(tmp_path / "a.png"), draw_picture(0))
    pairs = [Pair(str(n), ImageFile(tmp_path / "a.png"), f"a dose of $\\foo_{n}$ $", "p") for n in range(2)]
    embedded = Embedded(pairs, torch.eye(2, 32), torch.eye(2, 32))
    size = tiny_tower.image_size
    figures = text_grid(embedded, size, "crop"), image_grid(embedded, size, "crop")
    for figure in (*figures, cam_figure(tiny_tower, embedded, "crop")):
        figure.savefig(tmp_path / "figure.png")


def test_files_that_are_no_index_are_refused(tmp_path):
    (tmp_path / "text.safetensors").write_text("no tensors here")
    save_file({"image": torch.zeros(2, 3)}, tmp_path / "other.safetensors")
    facts = {"format": "fmclip index", "version": 1, "texts": ["a"], "tower": "t", "fit": "crop"}
    tensors = {"image": torch.zeros(2, 3), "text": torch.zeros(2, 3)}
    save_file(tensors, tmp_path / "short.safetensors", {"fmclip": json.dumps(facts)})
    save_file(tensors, tmp_path / "nan.safetensors", {"fmclip": json.dumps(facts | {"texts": [1, 2], "format": 3})})
    for name in ("text", "other", "short", "nan", "gone"):
        with pytest.raises(PairError, match="no index"):
            load_index(tmp_path / f"{name}.safetensors")
    make_index(torch.eye(2), torch.eye(2), ["a", "b"], "one tower", "crop").save(tmp_path / "index.safetensors")
    with pytest.raises(PairError, match="another tower"):
        load_index(tmp_path / "index.safetensors", tower="another one")


@pytest.fixture(scope="module")
def trained(table, tmp_path_factory):
    """Folder of a run, trained from the shell."""
    results = tmp_path_factory.mktemp("results")
    settings = ["start=tiny", "train_image=all", "train_text=all", "epochs=10", "lr=2e-3", "batch_size=8", "workers=0"]
    where = [f"pairs.path={table}", "val_share=0.15", "test_share=0.15", f"results={results}", "name=run"]
    result = CliRunner().invoke(app, ["pretrain", "mini-align", *settings, *where, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "the tower is in" in result.output
    return results / "run"


def test_the_commands_measure_draw_and_retrieve(trained, table):
    result = CliRunner().invoke(app, ["evaluate-retrieval", str(trained), "--part", "all", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "40 pairs, 8 texts" in result.output
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["image_to_text"]["ndcg_10"] > metrics["chance"]["image_to_text"]["ndcg_10"]
    assert {path.name for path in (trained / "figures").iterdir()} == {
        "grad_cam.png",
        "image_to_text.png",
        "losses.png",
        "text_to_image.png",
    }
    found = CliRunner().invoke(
        app, ["retrieve", str(trained), str(table.parent / "1.png"), "--k", "3", "--device", "cpu"]
    )
    assert found.exit_code == 0, found.output
    assert len(found.output.strip().splitlines()) == 3
    words = CliRunner().invoke(
        app, ["retrieve", str(trained), "stripes across, series 2", "--k", "1", "--device", "cpu"]
    )
    assert "stripes across, series 2" in words.output


def test_the_commands_say_what_is_wrong(trained, tmp_path):
    for arguments, says in (
        (["retrieve", str(tmp_path), "x"], "holds no run"),
        (["pretrain", "nothing"], "no config of that name"),
        (["evaluate-retrieval", str(trained), "--part", "half"], "must be train, val, test or all"),
        (["pretrain", "mini-align"], "pairs.path"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1
        assert says in result.output
        assert "Traceback" not in result.output


@pytest.fixture
def visitor(trained, tmp_path, monkeypatch) -> Visitor:
    monkeypatch.setattr(uploads, "get_upload_folder", lambda: str(tmp_path / "cache"))
    return Visitor(Session(str(trained), "cpu"))


def uploaded(trained: Path, tmp_path: Path) -> Path:
    tower = get_tower(str(trained))
    texts = ["dark lower half", "stripes <b>across</b>"]
    file = tmp_path / "cache" / "a" / "index.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = tower.embed_text(texts)
    make_index(rows, rows, texts, tower.identity, "letterbox").save(file)
    return file


def test_a_visitor_compares_a_query_with_an_index_and_phrases(visitor, trained, tmp_path):
    file = uploaded(trained, tmp_path)
    assert "2 reports" in similar.take_index(visitor, str(file))
    assert not file.exists()  # reports do not stay in gradio's cache
    visitor.queries.extend([scan_of(1), scan_of(2, "scan 2")])
    shown = similar.find(visitor, "empty field; round bright spot\nempty field")
    assert "Scan 1" in shown
    assert "stripes &lt;b&gt;across" in shown
    assert shown.count("empty field") == 1
    visitor.selected = visitor.queries[1]
    assert "Scan 2" in similar.find(visitor, "")


def test_shares_of_phrases_add_up(trained):
    tower = get_tower(str(trained))
    shares = similar.score_phrases(tower, scan_of(1), ["a", "b", "c"], "crop")
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert len(similar.score_phrases(tower, scan_of(1), ["a"], "crop")) == 1


def test_what_is_missing_is_said(visitor, trained, tmp_path):
    with pytest.raises(FmclipError, match="no query scan"):
        similar.find(visitor, "a phrase")
    visitor.queries.append(scan_of(0))
    with pytest.raises(FmclipError, match=r"index\.safetensors"):
        similar.find(visitor, " ; ")
    with pytest.raises(FmclipError, match="At most 12"):
        similar.find(visitor, ";".join(map(str, range(13))))
    file = uploaded(trained, tmp_path)
    other = SimpleNamespace(session=Session("tiny", "cpu"), queries=[scan_of(0)], index=None)
    with pytest.raises(FmclipError, match="another tower"):
        similar.take_index(other, str(file))
    assert not file.exists()
    with pytest.raises(FmclipError, match="not trained together"):
        similar.find(other, "a phrase")
