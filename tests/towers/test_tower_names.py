"""Names of towers: what can be loaded, and what is said when something can't."""

import json
import socket
import threading

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tower_models import VISION, make_tower, pixels_for

from fmclip.errors import TowerError
from fmclip.towers import get_tower, openclip, registry
from fmclip.towers.tiny import TINY_CONFIGS


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def files(tmp_path):
    """A small model as open_clip would save it: config and weights, whole and vision only."""
    _, model, _ = make_tower(VISION["vit"])
    state = {name: t.contiguous() for name, t in model.state_dict().items()}
    save_file(state, tmp_path / "whole.safetensors")
    save_file({n: t for n, t in state.items() if n.startswith("visual.")}, tmp_path / "vision.safetensors")
    save_file({"visual.conv1.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    config = TINY_CONFIGS["tiny"] | {"preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path, model


def test_one_tower_a_name_and_device(tiny_tower):
    assert get_tower("tiny") is tiny_tower
    assert get_tower("tiny", device=torch.device("cpu")) is tiny_tower
    found = []
    threads = [threading.Thread(target=lambda: found.append(get_tower("tiny-resnet"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(tower) for tower in found}) == 1


def test_a_device_that_is_not_there_is_said_so():
    with pytest.raises(TowerError, match="no such device"):
        get_tower("tiny", device="cuda:99")


def test_a_name_with_and_without_the_tag_is_one_tower_loaded_once(monkeypatch):
    asked = []

    def load_tag(architecture, tag):
        asked.append((architecture, tag))
        return make_tower(VISION["vit"])[0]

    monkeypatch.setattr(openclip, "load_tag", load_tag)
    monkeypatch.setattr(registry, "_towers", {})
    assert get_tower("ViT-L-14") is get_tower("ViT-L-14:openai")
    assert get_tower("ViT-L-14") is not get_tower("ViT-L-14:laion2b_s32b_b82k")
    assert asked == [("ViT-L-14", "openai"), ("ViT-L-14", "laion2b_s32b_b82k")]


@pytest.mark.parametrize("name", ["ViT-L14", "vit-l-14", "ViT-L-14x:openai"])
def test_an_unknown_name_gets_close_matches(name):
    with pytest.raises(TowerError, match=r"Unknown tower .*Did you mean .*ViT-L-14"):
        get_tower(name)


def test_a_name_like_nothing_known_says_what_there_is():
    with pytest.raises(TowerError, match="Known are mini"):
        get_tower("qqqqqqqqqqqq")


def test_an_unknown_tag_gets_the_known_ones():
    with pytest.raises(TowerError, match=r"No weights 'nope' for ViT-B-32.*ViT-B-32:openai"):
        get_tower("ViT-B-32:nope")


def test_a_model_without_published_weights_says_so():
    with pytest.raises(TowerError, match="No weights chosen for ViT-M-16"):
        get_tower("ViT-M-16")


@pytest.mark.parametrize("name", ["ViT-L-14", "ViT-L-14:openai", "hf-hub:microsoft/BiomedCLIP"])
def test_no_network_says_what_to_do(no_network, name):
    with pytest.raises(TowerError, match=r"one download.*local file.*mini needs no network"):
        get_tower(name)


@pytest.mark.parametrize(
    ("name", "tag", "expected"), [("ViT-B-32", "openai", True), ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", False)]
)
def test_the_activation_follows_the_weights(monkeypatch, name, tag, expected):
    """open_clip only warns when the weights were trained with another activation than its config names."""
    seen = {}

    def create_model(architecture, pretrained, **options):
        config = open_clip.get_model_config(architecture)
        seen["quick"] = options.get("quick_gelu", config.get("quick_gelu", False) or options["force_quick_gelu"])
        seen["tag"] = pretrained
        return make_tower(VISION["vit"])[1]

    monkeypatch.setattr(open_clip, "create_model", create_model)
    if tag != "openai":
        monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda _name: [tag])
        monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda _name, _tag: {"quick_gelu": False})
    assert openclip.load_tag(name, tag).paired
    assert seen == {"quick": expected, "tag": tag}


@pytest.fixture
def hub(files, monkeypatch):
    """A hub that serves one model from a folder; a file that is not there can't be fetched."""
    folder, _ = files
    parts = json.loads((folder / "config.json").read_text())
    preprocess = parts.pop("preprocess_cfg")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": parts, "preprocess_cfg": preprocess}))

    def fetch(_model, filename="whole.safetensors", **_options):
        if not (folder / filename).is_file():
            raise ConnectionError("connection lost")
        return str(folder / filename)

    monkeypatch.setattr(open_clip.factory, "download_pretrained_from_hf", fetch)
    return folder


def test_a_hub_model_comes_with_its_own_statistics_and_weights(hub, files):
    tower = get_tower("hf-hub:someone/model")
    assert (tower.name, tower.paired) == ("hf-hub:someone/model", True)
    pixels = pixels_for(tower)
    torch.testing.assert_close(tower.normalise(pixels)[:, 2], (pixels[:, 2] - 0.3) / 0.4)
    expected = files[1].encode_image(tower.normalise(pixels), normalize=True)
    torch.testing.assert_close(tower.embed_images(pixels), expected, atol=1e-5, rtol=0)


def test_a_hub_model_without_its_weights_is_refused_not_random(hub):
    """open_clip only logs it when the weights can't be fetched."""
    (hub / "whole.safetensors").unlink()
    with pytest.raises(TowerError, match="one download"):
        get_tower("hf-hub:someone/other")


def test_a_local_file_gives_its_own_outputs(files):
    folder, model = files
    tower = get_tower(f"{folder / 'config.json'}:{folder / 'whole.safetensors'}")
    assert tower.paired
    assert str(folder) not in tower.name
    pixels = pixels_for(tower)
    torch.testing.assert_close(
        tower.embed_images(pixels), model.encode_image(tower.normalise(pixels), normalize=True), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(tower.normalise(pixels)[:, 0], (pixels[:, 0] - 0.5) / 0.2)
    tokens = open_clip.SimpleTokenizer()(["a scan"])
    torch.testing.assert_close(tower.embed_text(["a scan"]), model.encode_text(tokens, normalize=True))


def test_a_vision_only_file_gets_a_random_text_tower(files):
    folder, model = files
    tower = get_tower(f"{folder / 'config.json'}:{folder / 'vision.safetensors'}")
    assert not tower.paired
    pixels = pixels_for(tower)
    expected = model.encode_image(tower.normalise(pixels), normalize=True)
    torch.testing.assert_close(tower.embed_images(pixels), expected, atol=1e-5, rtol=0)
    assert torch.isfinite(tower.embed_text(["a scan"])).all()


def test_files_that_cannot_be_used_are_refused(files):
    folder, _ = files
    config = folder / "config.json"
    (folder / "noise.safetensors").write_bytes(bytes(range(256)) * 4)
    (folder / "weights.pt").write_bytes(b"\x80\x04")
    (folder / "list.json").write_text("[1, 2]")
    (folder / "half.json").write_text('{"embed_dim": 32}')
    (folder / "strange.json").write_text(json.dumps(TINY_CONFIGS["tiny"] | {"unheard_of": 1}))
    whole = folder / "whole.safetensors"
    for name, reason in {
        f"{config}:{folder / 'weights.pt'}": "Only safetensors are loaded",
        f"ViT-B-32:{folder / 'weights.bin'}": "Only safetensors are loaded",
        f"{config}:{folder / 'gone.safetensors'}": "not there",
        f"{config}:{folder / 'noise.safetensors'}": "damaged",
        f"{config}:{folder / 'other.safetensors'}": "do not fit",
        f"{folder / 'gone.json'}:{whole}": "not a readable JSON",
        f"{folder / 'list.json'}:{whole}": "not a readable JSON",
        f"{folder / 'half.json'}:{whole}": "lacks text_cfg, vision_cfg",
        f"{folder / 'strange.json'}:{whole}": "does not know",
        f"Nothing-Like-It:{whole}": "Unknown tower",
        "tiny:random": "by that name alone",
    }.items():
        with pytest.raises(TowerError, match=reason) as caught:
            get_tower(name)
        assert str(folder) not in str(caught.value)  # no path in a message
