"""The halves that are trained: exact text trimming, DistilBERT in BERT's layers, mini's projections, Grad-CAM."""

import pytest
import torch
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

from fmclip.contrastive.augmentation import Change, apply_change, draw_change, fit_image, generator_for
from fmclip.contrastive.config import AugmentConfig, load_config
from fmclip.contrastive.gradcam import grad_cam
from fmclip.contrastive.models import PairModel, encode_text, pack_attention, put_distilbert, save_tower, seeded
from fmclip.errors import PairError
from fmclip.scans import Scan
from fmclip.towers import get_tower
from fmclip.towers.registry import new_tower


def model_of(*overrides: str, name: str = "mini-align") -> PairModel:
    config = load_config(name, overrides)
    return PairModel(config.model, config.optimisation, config.augment.size)


def test_texts_cut_after_the_longest_embed_the_same():
    model = model_of("start=tiny", "train_image=all", "train_text=all").eval()
    texts = ["a scan", "a much longer sentence about a scan with a finding"]
    whole = model.tokenizer(texts)
    cut = model.tokens(texts)
    assert cut.shape[1] < whole.shape[1] == 77
    assert torch.allclose(encode_text(model.model, cut), model.model.encode_text(whole), atol=1e-6)


def test_six_layers_of_bert_compute_what_distilbert_does():
    sizes = {"vocab_size": 50, "max_position_embeddings": 20}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        distil = DistilBertModel(DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, **sizes)).eval()
        layers = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        bert = BertModel(BertConfig(**layers, **sizes), add_pooling_layer=False).eval()
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = (tokens != 0).long()
    put_distilbert(distil.state_dict(), bert)
    wanted = distil(tokens, attention_mask=mask).last_hidden_state[mask.bool()]
    assert torch.allclose(bert(tokens, attention_mask=mask).last_hidden_state[mask.bool()], wanted, atol=1e-5)
    with pytest.raises(PairError, match="not DistilBERT"):
        put_distilbert(distil.state_dict() | {"strange.weight": torch.zeros(1)}, bert)


def test_norms_of_several_processes_keep_their_activations():
    from timm.layers import BatchNormAct2d

    from fmclip.contrastive.models import synchronise_batch_norms

    model = model_of("start=tiny-resnet", "train_image=all", "train_text=all").eval()
    model.model.visual = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), BatchNormAct2d(4), torch.nn.Flatten())
    model.eval()
    pixels = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        before = model.encode_images(pixels)
        synchronised = synchronise_batch_norms(model)
        assert isinstance(synchronised.model.visual[1], torch.nn.SyncBatchNorm)
        assert torch.allclose(synchronised.encode_images(pixels), before, atol=1e-6)


def test_attention_is_packed_again_as_open_clip_stores_it():
    split, packed = new_tower("tiny").model.state_dict(), pack_attention(new_tower("tiny").model.state_dict())
    assert packed["visual.transformer.resblocks.0.attn.in_proj_weight"].shape == (96, 32)
    assert not any("q_proj" in name for name in packed)
    rows = packed["visual.transformer.resblocks.0.attn.in_proj_weight"][32:64]
    assert torch.equal(rows, split["visual.transformer.resblocks.0.attn.k_proj.weight"])


@pytest.mark.slow
def test_minis_projections_start_as_the_tower_and_come_back_as_one(tmp_path):
    model = model_of().eval()
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {"logit_scale", "model.visual.head.proj.weight", "model.text.proj.weight"}
    mini, pixels = get_tower("mini"), torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        features = model.text_features(model.tokens(["clear lungs"]))
        assert torch.allclose(model.encode_texts(features), mini.embed_text(["clear lungs"]), atol=1e-5)
        assert torch.allclose(model.encode_images(model.image_features(pixels)), mini.embed_images(pixels), atol=1e-5)
        model.model.text.proj.weight.mul_(2).add_(0.01)
    save_tower(model, tmp_path / "tower")
    again = get_tower(str(tmp_path))
    assert again.paired
    assert torch.allclose(again.embed_text(["clear lungs"]), model.encode_texts(features), atol=1e-5)
    assert (tmp_path / "tower" / "tokenizer.json").is_file()


def test_frozen_layers_stay_in_evaluation_mode():
    model = model_of("start=tiny-resnet", "train_image=projection", "train_text=all", "dropout=0.1")
    norms = [one for one in model.model.visual.modules() if isinstance(one, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert model.model.transformer.training


def test_dropout_belongs_to_the_numbers_given():
    with seeded(1, 2):
        first = torch.rand(3)
    state = torch.random.get_rng_state()
    with seeded(1, 2):
        again = torch.rand(3)
    assert torch.equal(first, again)
    assert torch.equal(state, torch.random.get_rng_state())  # the process's own draws are not touched
    model = model_of("start=tiny", "train_image=all", "train_text=all", "dropout=0.5")
    pixels = torch.rand(1, 3, 64, 64)
    assert not torch.allclose(model.encode_images(pixels), model.encode_images(pixels))
    assert torch.allclose(model.eval().encode_images(pixels), model.encode_images(pixels))


def test_a_transformer_keeps_its_input_size():
    with pytest.raises(PairError, match="64 pixels"):
        model_of("start=tiny", "train_image=all", "train_text=all", "size=96")


@pytest.mark.parametrize("name", ["tiny", "tiny-resnet"])
def test_grad_cam_tells_for_from_against_and_leaves_the_tower_alone(name):
    tower = get_tower(name)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    target = tower.embed_text(["a bright spot"])[0]
    before = {key: value.clone() for key, value in tower.model.state_dict().items()}
    found = grad_cam(tower, pixels, target)
    assert found.shape == (64, 64)
    assert found.min() >= 0
    against = grad_cam(tower, pixels, -target)
    assert max(found.max(), against.max()) == pytest.approx(1)
    assert not torch.allclose(found, against)  # what speaks for it does not speak against it
    assert all(torch.equal(value, before[key]) for key, value in tower.model.state_dict().items())
    assert not any(module._forward_hooks for module in tower.model.visual.modules())


SCAN = Scan(torch.linspace(0, 1, 40 * 60).reshape(40, 60).numpy())


def test_a_change_is_drawn_once_and_can_be_applied_again():
    config = AugmentConfig()
    changes = [draw_change(config, 40, 60, generator_for(1, 2, place)) for place in range(30)]
    assert changes[4] == draw_change(config, 40, 60, generator_for(1, 2, 4))
    assert len(set(changes)) == 30
    for change in changes:
        assert change.crop[2] * change.crop[3] >= 0.6  # of 0.8, where a wide crop is cut at the edges
        image = apply_change(SCAN, change, 32)
        assert image.shape == (32, 32, 3)
        assert 0 <= image.min() <= image.max() <= 1


def test_a_flip_is_a_mirror_and_contrast_keeps_the_mean():
    plain = Change((0.0, 0.0, 1.0, 1.0), False, 0.0, 1.0, 1.0, False)
    image = apply_change(SCAN, plain, 32)
    flipped = apply_change(SCAN, Change((0.0, 0.0, 1.0, 1.0), True, 0.0, 1.0, 1.0, False), 32)
    assert torch.equal(torch.from_numpy(image[:, ::-1].copy()), torch.from_numpy(flipped))
    dull = apply_change(SCAN, Change((0.0, 0.0, 1.0, 1.0), False, 0.0, 1.0, 0.5, False), 32)
    assert dull.mean() == pytest.approx(image.mean(), abs=1e-5)
    assert dull.std() == pytest.approx(image.std() / 2, rel=1e-4)


def test_test_images_are_cropped_or_boxed():
    cropped, boxed = fit_image(SCAN, 32, "crop"), fit_image(SCAN, 32, "letterbox")
    assert cropped.min() > 0 or cropped[0].max() > 0
    assert boxed[0].max() == 0  # bars above and below
    assert cropped[:, 16].mean() == pytest.approx(SCAN.pixels[:, 30].mean(), abs=0.02)


def test_grad_cam_of_a_pooled_cnn_is_its_class_activation_map():
    """Average pooling and a linear head: the map is known in closed form (Zhou et al. 2016), but for its scale."""
    tower = get_tower("mini")
    pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(3))
    target = tower.embed_text(["a radiograph of the chest"])[0]
    visual = tower.model.visual
    features = visual.trunk.forward_features(tower.normalise(pixels))  # [1, C, 7, 7]
    pooled = features.mean(dim=(2, 3)).requires_grad_()
    image = torch.nn.functional.normalize(visual.head(pooled), dim=-1)[0]
    (weights,) = torch.autograd.grad(image @ target, pooled)
    wanted = (weights[..., None, None] * features).sum(dim=1, keepdim=True).clamp_min(0)
    wanted = torch.nn.functional.interpolate(wanted, size=(224, 224), mode="bilinear")[0, 0]
    assert torch.allclose(grad_cam(tower, pixels, target), (wanted / wanted.max()).detach(), atol=1e-4)
