"""Text half: prompts given as token embeddings are embedded as open_clip embeds their words."""

import pytest
import torch
from tower_models import CLIP_TEXT, VISION, hugging_face_text, make_tower

from fmclip.errors import TowerError

TEXTS = ["normal brain MRI", "a chest X-ray with cardiomegaly, pleural effusion and a left-sided device", "scan"]
LONG = "pleural effusion " * 60

CLIP_KINDS = {
    "plain": {},
    "eos pooling": {"pool_type": "eos", "eos_id": 49407},
    "bidirectional, last token": {"no_causal_mask": True, "pool_type": "last"},
    "first token": {"no_causal_mask": True, "pool_type": "first"},
    "class token": {"embed_cls": True, "context_length": 76},
    "projection with bias": {"proj_bias": True},
    "short context": {"context_length": 16},
}


@pytest.mark.parametrize("kind", CLIP_KINDS)
def test_clip_text_is_embedded_as_open_clip_does(kind):
    tower, model, tokenizer = make_tower(VISION["vit"], CLIP_TEXT | CLIP_KINDS[kind])
    texts = [*TEXTS, LONG]
    expected = model.encode_text(tokenizer(texts), normalize=True)
    torch.testing.assert_close(tower.embed_text(texts), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooler", ["mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler"])
@pytest.mark.parametrize("roberta", [False, True])
def test_hugging_face_text_is_embedded_as_open_clip_does(tmp_path, pooler, roberta):
    tower, model, tokenizer = make_tower(VISION["vit"], hugging_face_text(tmp_path, pooler, roberta=roberta))
    texts = [*TEXTS, LONG]
    expected = model.encode_text(tokenizer(texts), normalize=True)
    torch.testing.assert_close(tower.embed_text(texts), expected, atol=1e-5, rtol=0)


@pytest.fixture(params=["clip", "hugging face"])
def tower(request, tmp_path, tiny_tower):
    if request.param == "clip":
        return tiny_tower
    return make_tower(VISION["vit"], hugging_face_text(tmp_path, "mean_pooler"))[0]


def test_prompts_equal_the_text_that_they_come_from(tower):
    prompts = [tower.token_embeddings(text) for text in TEXTS]
    assert [p.shape[1] for p in prompts] == [tower.token_width] * 3
    torch.testing.assert_close(tower.embed_prompts(prompts), tower.embed_text(TEXTS), atol=1e-6, rtol=0)


def test_embeddings_have_unit_length_and_the_shared_width(tower):
    embedded = tower.embed_text(TEXTS)
    assert embedded.shape == (3, tower.text_width)
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(3))


def test_a_prompt_does_not_depend_on_the_others(tower):
    """The context ends after the longest prompt, which must not show in the shorter ones."""
    prompts = [tower.token_embeddings(text) for text in TEXTS]
    alone = torch.cat([tower.embed_prompts([prompt]) for prompt in prompts])
    torch.testing.assert_close(tower.embed_prompts(prompts), alone, atol=1e-6, rtol=0)


def test_token_embeddings_are_those_of_the_words_alone(tower):
    both, first, second = (tower.token_embeddings(t) for t in ("normal scan", "normal", "scan"))
    torch.testing.assert_close(both, torch.cat([first, second]))


def test_prompts_pass_gradients_to_every_token(tower):
    prompt = torch.randn(5, tower.token_width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tower.embed_prompts([prompt, tower.token_embeddings("scan")])[0, :3].sum().backward()
    assert prompt.grad is not None
    assert (prompt.grad.abs().sum(dim=1) > 0).all()


def test_texts_pass_no_gradient(tower):
    assert not tower.embed_text(TEXTS).requires_grad
    assert not tower.token_embeddings("scan").requires_grad


def test_prompts_that_do_not_fit_are_refused(tiny_tower):
    with pytest.raises(TowerError, match="has 76 tokens; this tower takes at most 75"):
        tiny_tower.embed_prompts([torch.zeros(76, tiny_tower.token_width)])
    with pytest.raises(TowerError, match=r"Prompt 2 has shape \[3, 7\]"):
        tiny_tower.embed_prompts([torch.zeros(3, tiny_tower.token_width), torch.zeros(3, 7)])
    with pytest.raises(TowerError, match="No prompt given"):
        tiny_tower.embed_prompts([])
    assert tiny_tower.embed_prompts([torch.zeros(75, tiny_tower.token_width)]).shape == (1, tiny_tower.text_width)
