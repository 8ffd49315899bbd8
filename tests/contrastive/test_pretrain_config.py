"""Configs of contrastive training: what is shipped, overrides, and what is refused."""

import pytest

from fmclip.contrastive.config import PretrainConfig, config_from, config_names, load_config
from fmclip.contrastive.models import PairModel
from fmclip.contrastive.optimisation import EarlyStopping, layer_depths, learning_rate, parameter_groups
from fmclip.errors import PairError


def test_the_shipped_configs_are_whole():
    assert config_names() == ["mini-align", "radiology-mini", "roco-vit-l-14"]
    for name in config_names():
        config = load_config(name)
        assert config.name == name
        assert config_from(config.to_dict()) == config


def test_stage_1_is_table_a2():
    config = load_config("roco-vit-l-14")
    own = config.optimisation
    assert (own.epochs, own.batch_size, own.lr, own.weight_decay) == (50, 32, 3e-6, 0.05)
    assert (own.beta1, own.beta2, own.eps) == (0.9, 0.999, 1e-8)
    assert (own.warmup_epochs, own.min_lr, own.layer_decay, own.label_smoothing) == (5, 1e-7, 0.8, 0.1)
    assert (own.mixup_alpha, own.text_mixup, own.patience, own.min_delta) == (0.2, True, 5, 1e-4)
    assert (config.model.dropout, config.augment.size, config.model.start) == (0.1, 224, "ViT-L-14:openai")
    assert (config.model.train_image, config.model.train_text) == ("all", "none")


def test_overrides_find_their_section_and_type():
    config = load_config("mini-align", ["epochs=3", "optimisation.lr=1e-4", "seed=5", "precision=no", "fit=crop"])
    assert (config.optimisation.epochs, config.optimisation.lr, config.seed) == (3, 1e-4, 5)
    assert (config.optimisation.precision, config.augment.fit) == ("no", "crop")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("epoch=3", "No setting is called 'epoch'"),
        ("optimisation.epoch=3", "No setting is called optimisation.epoch"),
        ("epochs", "KEY=VALUE"),
        ("epochs=many", "must be int"),
        ("loss=triplet", "one of infonce, siglip"),
        ("lr=[1", "value of 'lr' is not readable"),
        ("pairs=foo", "pairs must be a mapping"),
        ("lr=-1", "lr must be above 0"),
        ("batch_size=1", "at least 2"),
        ("name=../elsewhere", "plain folder name"),
        ("test_share=0.95", "together below 1"),
    ],
)
def test_what_cannot_be_is_refused(override, says):
    with pytest.raises(PairError, match=says.replace(".", r"\.")):
        load_config("mini-align", [override])


def test_a_config_that_is_not_there_or_no_yaml(tmp_path):
    with pytest.raises(PairError, match="roco-vit-l-14"):
        load_config("nothing")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(PairError, match="YAML"):
        load_config(str(tmp_path / "bad.yaml"))


def test_the_rate_warms_up_and_falls_along_a_cosine():
    config = load_config("roco-vit-l-14").optimisation
    rates = [learning_rate(config, step, 10) for step in range(500)]
    assert rates[0] == pytest.approx(3e-6 / 50)
    assert rates[49] == rates[50] == pytest.approx(3e-6)
    assert rates[-1] == pytest.approx(1e-7)
    assert rates[50 + 225] == pytest.approx((3e-6 + 1e-7) / 2, rel=0.01)
    assert sorted(rates[50:], reverse=True) == rates[50:]


def test_each_block_learns_slower_than_the_next():
    config = load_config("roco-vit-l-14", ["start=tiny", "train_text=none", "dropout=0"])
    model = PairModel(config.model, config.optimisation)
    shares = {}
    names = {id(weight): name for name, weight in model.named_parameters()}
    for group in parameter_groups(model, config.optimisation):
        for weight in group["params"]:
            shares[names[id(weight)]] = (group["share"], group["weight_decay"])
    assert shares["model.visual.proj"] == (1.0, 0.05)
    assert shares["model.visual.ln_post.weight"] == (1.0, 0.0)  # no decay on norms
    for block in range(4):
        share, decay = shares[f"model.visual.transformer.resblocks.{block}.mlp.c_fc.weight"]
        assert share == pytest.approx(0.8 ** (4 - block))
        assert decay == 0.05
    assert shares["model.visual.conv1.weight"][0] == pytest.approx(0.8**5)
    assert not any("model.token_embedding" in name for name in shares)
    assert shares["logit_scale"] == (1.0, 0.0)


def test_depths_of_a_cnn_follow_its_stages():
    names = [
        "visual.trunk.conv_stem.weight",
        "visual.trunk.blocks.0.0.conv.weight",
        "visual.trunk.blocks.1.0.conv.weight",
    ]
    names += ["visual.trunk.bn2.weight", "visual.head.proj.weight"]
    assert list(layer_depths(names).values()) == [0, 1, 2, 3, 3]


def test_a_section_that_is_no_mapping_takes_no_setting():
    with pytest.raises(PairError, match="pairs must be a mapping"):
        load_config("mini-align", ["pairs=foo", "pairs.path=a.csv"])


def test_embeddings_declared_after_the_blocks_are_the_first_layer():
    names = ["positional_embedding", "transformer.resblocks.0.ln_1.weight", "transformer.resblocks.1.ln_1.weight"]
    names += ["token_embedding.weight", "ln_final.weight"]  # the order of open_clip's CLIP
    assert list(layer_depths(names).values()) == [0, 1, 2, 0, 3]


def test_early_stopping_wants_a_real_gain():
    stopping = EarlyStopping(patience=2, min_delta=0.1)
    assert stopping.better(1.0)
    assert not stopping.better(0.95)
    assert not stopping.is_over
    assert stopping.better(0.85)
    assert not stopping.better(0.9)
    assert not stopping.better(0.9)
    assert stopping.is_over
    assert not EarlyStopping(patience=0, min_delta=0, stale=9).is_over


def test_defaults_are_a_valid_config():
    assert config_from({}) == PretrainConfig()
