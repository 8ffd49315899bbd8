"""The small adapters against their equations, written out."""

import torch
import torch.nn.functional as F

from fmclip.adapters import AlignmentAdapter


def test_the_alignment_adapter_follows_equations_4_to_6_with_its_gradients():
    generator = torch.Generator().manual_seed(0)
    adapter = AlignmentAdapter(6, 10, generator)
    torch.nn.init.normal_(adapter.projection.bias, generator=generator)
    features = torch.randn(3, 6, 4, 5, generator=generator)
    prompts = F.normalize(torch.randn(2, 10, generator=generator), dim=1).requires_grad_()
    learned = [*adapter.parameters(), prompts]

    aligned = F.normalize(adapter.projection(features), dim=1)  # Eq. 4 and 5
    cosines = torch.einsum("bdhw,cd->bchw", aligned, prompts)
    expected = (cosines / 0.07).softmax(dim=1)[:, 1]  # Eq. 6
    found = adapter(features, prompts, 0.07)

    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    weights = torch.randn(expected.shape, generator=generator)
    for own, other in zip(
        torch.autograd.grad((found * weights).sum(), learned),
        torch.autograd.grad((expected * weights).sum(), learned),
        strict=True,
    ):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-3)
