"""The embedded tower: small, offline, and equal to its original weights within a stated bound."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from open_clip.tokenizer import HFTokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fmclip.errors import TowerError
from fmclip.towers import Tower, get_tower
from fmclip.towers.mini import FOLDER, load_mini, unpack_rows

ROOT = Path(__file__).resolve().parents[2]
MAX_FEATURE_ERROR = 0.005  # relative, Euclidean; stated in the model card
MIN_COSINE = 0.999
MAX_MEGABYTES = 45


@pytest.fixture(scope="module")
def mini() -> Tower:
    return get_tower("mini")


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "reference_outputs.safetensors")


def test_the_folder_is_small_and_has_its_card_and_licence():
    files = list(FOLDER.iterdir())
    assert sum(file.stat().st_size for file in files) < MAX_MEGABYTES * 1e6
    assert {"README.md", "LICENSE", "NOTICE", "open_clip_config.json"} <= {file.name for file in files}
    assert not [file.name for file in files if file.suffix in {".bin", ".pt", ".pth", ".pkl"}]


@pytest.mark.slow
def test_features_equal_those_of_the_original_weights(mini, reference):
    maps = mini.features(reference["pixels"].float() / 255)
    for name, ours in zip(mini.layers, maps, strict=True):
        theirs = reference[f"features.{name}"]
        assert (ours - theirs).norm() < MAX_FEATURE_ERROR * theirs.norm()


@pytest.mark.slow
def test_embeddings_equal_those_of_the_original_weights(mini, reference):
    with safe_open(FOLDER / "reference_outputs.safetensors", "pt") as stored:
        sentences = json.loads(stored.metadata()["sentences"])
    assert (mini.embed_text(sentences) * reference["text"]).sum(1).min() > MIN_COSINE
    image = mini.embed_images(reference["pixels"].float() / 255)
    assert (image * reference["image"]).sum() > MIN_COSINE


@pytest.mark.slow
def test_it_is_what_it_says(mini):
    assert (mini.name, mini.kind, mini.image_size, mini.paired) == ("mini", "cnn", 224, False)
    assert mini.layers == ("stride 8", "stride 16", "stride 32")
    assert mini.grids == ((28, 28), (14, 14), (7, 7))
    assert mini.text_width == mini.token_width == 384


@pytest.mark.slow
def test_it_loads_without_reaching_for_any_network(mini):
    script = """
import socket
calls = []
def refuse(*args, **kwargs):
    calls.append(args)
    raise OSError("no network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from fmclip.towers import get_tower
print(get_tower("mini").identity, len(calls))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(  # a fresh process: in this one the hub is switched off already
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment, cwd=ROOT
    )
    assert done.stdout.split() == [mini.identity, "0"]


@pytest.mark.slow
def test_text_means_what_it_should(mini):
    heart, heart_too, brain = mini.embed_text(["an enlarged heart", "cardiomegaly", "a brain tumour"])
    assert heart @ heart_too > heart @ brain


@pytest.mark.slow
def test_prompts_equal_text_and_truncation_changes_nothing(mini):
    texts = ["normal brain MRI", "an abnormal breast ultrasound with a mass"]
    prompts = [mini.token_embeddings(text) for text in texts]
    torch.testing.assert_close(mini.embed_prompts(prompts), mini.embed_text(texts), atol=1e-6, rtol=0)
    tokens = HFTokenizer(str(FOLDER), context_length=128, local_files_only=True)(texts)
    expected = mini._model.encode_text(tokens, normalize=True)  # open_clip's own way, over the whole context
    torch.testing.assert_close(mini.embed_text(texts), expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_lora_reaches_every_layer_that_features_run_through(mini, reference):
    pixels = reference["pixels"].float() / 255
    adapted = mini.with_lora(generator=torch.Generator().manual_seed(0))
    start = [m.detach() for m in adapted.features(pixels)]
    for ours, plain in zip(start, mini.features(pixels), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3)  # batch norms are folded into the plain one
    with torch.no_grad():
        for parameter in adapted.lora_parameters():
            parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    maps = adapted.features(pixels)
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.lora_parameters())
    for ours, theirs in zip(adapted.merged().features(pixels), maps, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_missing_or_damaged_files_are_said_so(tmp_path):
    with pytest.raises(TowerError, match="full checkout"):
        load_mini(tmp_path)
    (tmp_path / "open_clip_config.json").write_text((FOLDER / "open_clip_config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(TowerError, match="damaged"):
        load_mini(tmp_path)
    (tmp_path / "config.json").write_text((FOLDER / "config.json").read_text())
    save_file({"visual.head.proj.weight": torch.zeros(384, 1280)}, tmp_path / "model.safetensors")  # most is missing
    with pytest.raises(TowerError, match="damaged"):
        load_mini(tmp_path)


def test_packed_weights_come_back_within_their_rounding(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delitem(sys.modules, "convert_mini", raising=False)
    from convert_mini import pack

    generator = torch.Generator().manual_seed(0)
    matrix, kernel, norm = (torch.randn(*s, generator=generator) for s in ((400, 16), (8, 8, 1, 1), (8,)))
    tiny_norm = norm * 1e-9  # would vanish in half precision
    weights = {"text.linear.weight": matrix, "visual.conv.weight": kernel, "visual.bn.running_var": tiny_norm}
    stored = pack(weights | {"visual.bn.num_batches_tracked": torch.tensor(3)})
    assert stored["text.linear.weight::int8"].dtype == torch.int8
    assert stored["visual.conv.weight"].dtype == torch.float16
    back = unpack_rows(stored)
    assert back.keys() == weights.keys()
    assert ((back["text.linear.weight"] - matrix).abs() <= matrix.abs().amax(1, keepdim=True) / 253).all()
    torch.testing.assert_close(back["visual.conv.weight"], kernel, rtol=1e-3, atol=1e-4)
    assert torch.equal(back["visual.bn.running_var"], tiny_norm)
