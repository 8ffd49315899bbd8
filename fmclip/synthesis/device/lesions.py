"""The six kinds of anomalies, each for a batch of boxes; the CPU path in `structural`, `density` and `deformation`
says what they mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fmclip.synthesis.density import MAX_CHANGE, MIN_CHANGE, Density
from fmclip.synthesis.device.boxes import Boxes, flags, masked_mean
from fmclip.synthesis.device.drafts import Draft
from fmclip.synthesis.device.filters import box_blur, gaussian_blur, sample
from fmclip.synthesis.device.morphology import distance_to_false
from fmclip.synthesis.device.poisson import poisson_blend

_NONE = Density(0.0)


def paint(boxes: Boxes, pixels: Tensor, donors: Tensor, coloured: Tensor) -> Tensor:
    """Paint anomalies of one kind.

    Args:
        boxes: Of one kind.
        pixels: [B, C, H, W], the boxes of the scans.
        donors: [B, C, S, S], the scan from which each takes its patch; left alone by other kinds.
        coloured: [B] bool, whether each scan has real colour.

    Returns:
        [B, C, H, W].
    """
    kind = boxes.drafts[0].anomaly.kind
    same = (pixels == pixels[:, :1]).all(dim=1)
    grey = (same | ~boxes.inside).flatten(1).all(dim=1)  # [B]: a black or grey box of a coloured scan stays grey
    tint = _tint(boxes, coloured & ~grey, pixels.shape[1])
    if kind in ("cutpaste", "poisson"):
        return _structural(boxes, pixels, _fetch(boxes, donors, grey), kind == "poisson")
    contrast = boxes.contrast(pixels)
    if kind == "intensity":
        return _intensity(boxes, pixels, contrast, tint, boxes.noise([draft.fields[0] for draft in boxes.drafts]))
    if kind == "texture":
        around = _halo(boxes, _displace(boxes, pixels), contrast, tint)
        return _texture(boxes, around, contrast, tint)
    moved = _source_warp(boxes, pixels) if kind == "source_warp" else _guided_warp(boxes, pixels)
    noise = boxes.noise([draft.tint for draft in boxes.drafts])
    changed = flags(boxes.drafts, lambda draft: draft.anomaly.density, boxes.device)[:, None]
    return torch.where(changed, _intensity(boxes, moved, contrast, tint, noise), moved)


def cast_shadows(pictures: Tensor, boxes: Boxes) -> Tensor:
    """Darken or brighten the tissue below lesions: pictures [B, C, S, S] with the lesions already in them."""
    shadow = boxes.numbers(lambda draft: _density(draft).shadow)
    if not bool(shadow.any()):
        return pictures
    S = pictures.shape[-2]
    start, sizes = boxes.start, boxes.sizes
    below = torch.zeros(len(pictures), S, boxes.inside.shape[2], device=boxes.device)  # from the box to the bottom
    below[:, : boxes.inside.shape[1]] = boxes.mask
    hit = below.cummax(dim=1).values
    depth = (hit - below).cumsum(dim=1)  # rows below the lesion
    length = 5 * boxes.radius.view(-1, 1, 1)
    fade = hit * torch.exp(-depth / length) * (depth / 2).clamp_max(1)
    strips = torch.stack([S - start[:, 0], sizes[:, 1]], dim=1)  # [B, 2]
    fade = gaussian_blur(fade, strips, (0.2 * boxes.radius).clamp_min(0.8), torch.full_like(boxes.radius, 0.6))
    foreground = torch.from_numpy(np.stack([draft.foreground for draft in boxes.drafts])).to(boxes.device)
    strip = Boxes(**{**boxes.__dict__, "sizes": strips, "inside": torch.ones_like(below, dtype=torch.bool)})
    fade = fade * ((below == 0) & strip.cut(foreground[:, None])[:, 0])
    part = strip.cut(pictures)
    return strip.paste(pictures, (part * (1 - (shadow * fade)[:, None])).clamp(0, 1))


def _density(draft: Draft) -> Density:
    return draft.anomaly.density or _NONE


def _tint(boxes: Boxes, coloured: Tensor, channels: int) -> Tensor:
    """Factor on the change of each channel, [B, C, 1, 1]; 1 where there is no colour."""
    if channels == 1:
        return torch.ones(len(boxes.drafts), 1, 1, 1, device=boxes.device)
    tint = torch.tensor([_density(draft).tint for draft in boxes.drafts], device=boxes.device)
    return torch.where(coloured[:, None], tint, 1.0)[..., None, None]


def _fetch(boxes: Boxes, donors: Tensor, grey: Tensor) -> Tensor:
    """The tissue that lands on each box: donors [B, C, S, S] -> [B, C, H, W]."""
    matrix = torch.tensor(np.stack([draft.matrix for draft in boxes.drafts]), device=boxes.device)  # [B, 2, 3]
    matrix = matrix.float()[..., None, None]
    H, W = boxes.inside.shape[1:]
    y = torch.arange(H, device=boxes.device, dtype=torch.float32)[:, None]
    x = torch.arange(W, device=boxes.device, dtype=torch.float32)
    columns, rows = ((matrix[:, axis, 0] * x + matrix[:, axis, 1] * y + matrix[:, axis, 2]) for axis in (0, 1))
    donors = torch.where(grey.view(-1, 1, 1, 1), donors.mean(dim=1, keepdim=True), donors)
    sizes = torch.tensor([donors.shape[-2:]], device=boxes.device).expand(len(donors), 2)
    return sample(donors, rows, columns, torch.zeros_like(sizes), sizes)


def _structural(boxes: Boxes, pixels: Tensor, patch: Tensor, blended: bool) -> Tensor:
    gain = boxes.numbers(lambda draft: draft.anomaly.patch.gain)
    if not blended:
        return torch.where(boxes.mask[:, None], (patch * gain[:, None]).clamp(0, 1), pixels)
    mixed = flags(boxes.drafts, lambda draft: draft.anomaly.patch.mixed, boxes.device)
    return poisson_blend(pixels, patch, boxes.mask, boxes.sizes, gain.flatten(), mixed.flatten())


def _change(boxes: Boxes, pixels: Tensor, contrast: Tensor, tint: Tensor) -> Tensor:
    """Signed mean change of each channel, [B, C, 1, 1]."""
    level = boxes.numbers(lambda draft: _density(draft).level)
    mean = masked_mean(pixels.mean(dim=1), boxes.mask)
    mean = torch.where(boxes.mask.flatten(1).any(dim=1).view(-1, 1, 1), mean, 0.5)
    room = torch.where(level > 0, 1 - mean, mean)
    amount = torch.minimum(level.abs() * contrast, 0.85 * room).clamp(max=MAX_CHANGE).clamp_min(MIN_CHANGE)
    return (amount * torch.where(level > 0, 1.0, -1.0))[:, None] * tint


def _intensity(boxes: Boxes, pixels: Tensor, contrast: Tensor, tint: Tensor, noise: Tensor) -> Tensor:
    grain = boxes.numbers(lambda draft: _density(draft).grain)
    width = (0.12 * boxes.radius).clamp_min(0.7).view(-1, 1, 1)
    edge = (distance_to_false(boxes.mask, boxes.inside) / (1 + width)).clamp(0, 1)
    field = (1 + grain * noise).clamp(0.1, 2.0) * edge
    changed = (pixels + field[:, None] * _change(boxes, pixels, contrast, tint)).clamp(0, 1)
    return torch.where(boxes.mask[:, None], changed, pixels)


def _displace(boxes: Boxes, pixels: Tensor) -> Tensor:
    amount = boxes.numbers(lambda draft: draft.anomaly.displace)
    fade = torch.exp(-0.5 * ((boxes.rho - 0.6).clamp_min(0) / 0.55) ** 2) * ((2.1 - boxes.rho) / 0.4).clamp(0, 1)
    scale = 1 - amount * fade / boxes.rho.clamp_min(0.8)
    return torch.where((amount > 0)[:, None], boxes.read(pixels, boxes.offset * scale[:, None]), pixels)


def _halo(boxes: Boxes, pixels: Tensor, contrast: Tensor, tint: Tensor) -> Tensor:
    halo = boxes.numbers(lambda draft: _density(draft).halo)
    radius = (boxes.numbers(lambda draft: _density(draft).halo_width) * boxes.radius.view(-1, 1, 1)).clamp_min(1.0)
    distance = distance_to_false(~boxes.mask, boxes.inside)  # pixels beyond the outline
    fade = torch.exp(-((distance / radius) ** 2)) * boxes.tissue
    painted = (pixels + (fade * halo)[:, None] * _change(boxes, pixels, contrast, tint)).clamp(0, 1)
    return torch.where((halo != 0)[:, None], painted, pixels)


def _texture(boxes: Boxes, pixels: Tensor, contrast: Tensor, tint: Tensor) -> Tensor:
    blur = boxes.numbers(lambda draft: _density(draft).blur).flatten()
    blurred = gaussian_blur(boxes.mask.float(), boxes.sizes, (blur * boxes.radius).clamp_min(0.6))
    blurred = (blurred * boxes.tissue)[:, None]  # a lesion does not glow into the air
    widths = [2 * max(1, round(0.6 * draft.frame.radius)) + 1 for draft in boxes.drafts]
    width = torch.tensor(widths, device=boxes.device)
    base = box_blur(box_blur(pixels * boxes.inside[:, None], boxes.sizes, width), boxes.sizes, width)
    change = _change(boxes, pixels, contrast, tint)
    beta = boxes.numbers(lambda draft: _density(draft).beta)[:, None]
    inside = pixels * (1 - beta) + beta * _textured(boxes, base, change)
    inside = inside + (1 - beta) * change  # Eq. 13 alone would weaken the change by beta
    return (pixels * (1 - blurred) + inside * blurred).clamp(0, 1)


def _textured(boxes: Boxes, base: Tensor, change: Tensor) -> Tensor:
    """The lesions' textures T of Eq. 13 before mixing, [B, C, H, W]."""
    names = [_density(draft).texture for draft in boxes.drafts]
    is_mottled, is_ring, is_smooth, is_speckled = (
        torch.tensor([name == wanted for name in names], device=boxes.device).view(-1, 1, 1)
        for wanted in ("mottled", "ring", "smooth", "speckle")
    )
    grain = boxes.numbers(lambda draft: _density(draft).grain)
    first, second = (boxes.noise([draft.fields[place] for draft in boxes.drafts]) for place in (0, 1))
    noise = torch.where(is_mottled, 0.7 * first + 0.7 * second, first)
    field = 1 + torch.where(is_smooth, 0.25, 1.0) * grain * noise
    depth = distance_to_false(boxes.mask, boxes.inside) * boxes.inside
    depth = depth / depth.flatten(1).amax(dim=1).clamp_min(1.0).view(-1, 1, 1)  # 0 on the outline, 1 in the core
    rim = torch.exp(-(((depth - 0.22) / 0.2) ** 2))
    field = torch.where(is_ring, field * rim - 0.6 * (1 - rim) * (depth > 0.22), field)
    texture = base + field[:, None] * change
    if bool(is_speckled.any()):
        level = (base + change).clamp(0.02, 1)
        speckled = level * (1 + (0.6 * grain * _speckle(boxes))[:, None]).clamp(0, 2)
        texture = torch.where(is_speckled[:, None], speckled, texture)
    return texture


def _speckle(boxes: Boxes) -> Tensor:
    """Grains of sound interference, [B, H, W] with deviation 1: fine, wider than high."""
    drawn = np.zeros(boxes.inside.shape, np.float32)
    for place, draft in enumerate(boxes.drafts):
        height, width = draft.speckle.shape
        drawn[place, :height, :width] = draft.speckle
    sigma = torch.full_like(boxes.radius, 1.1)
    grains = gaussian_blur(torch.from_numpy(drawn).to(boxes.device), boxes.sizes, sigma, torch.full_like(sigma, 0.6))
    mean = masked_mean(grains, boxes.inside)
    return grains / masked_mean((grains - mean).square(), boxes.inside).sqrt().clamp_min(1e-6)


def _source_warp(boxes: Boxes, pixels: Tensor) -> Tensor:
    factor = boxes.numbers(lambda draft: draft.anomaly.warp.factor)
    scale = (boxes.rho.clamp(1e-3, 1) ** factor).clamp(0, 6)
    warped = boxes.read(pixels, boxes.offset * scale[:, None])
    return torch.where(boxes.mask[:, None], warped, pixels)


def _guided_warp(boxes: Boxes, pixels: Tensor) -> Tensor:
    factor, sway, shift = (
        boxes.numbers(lambda draft, name=name: getattr(draft.anomaly.warp, name))[:, None]
        for name in ("factor", "sway", "shift")
    )
    radius = boxes.radius.view(-1, 1, 1)
    window = gaussian_blur(boxes.mask.float(), boxes.sizes, (0.35 * boxes.radius).clamp_min(1.0))
    depth = distance_to_false(boxes.tissue, boxes.inside)  # pixels to the organ's outline
    guard = (depth / (0.6 * radius).clamp_min(2.0)).clamp(0, 1)
    inward = torch.tensor([draft.inward for draft in boxes.drafts], device=boxes.device)[
        ..., None, None
    ]  # [B, 2, 1, 1]
    irregular = torch.stack([boxes.noise([one.fields[axis] for one in boxes.drafts]) for axis in (0, 1)], dim=1)
    outward = boxes.offset * torch.exp(-0.5 * boxes.rho**2)[:, None]
    move = factor * outward + radius[:, None] * (sway * 0.6 * irregular + shift * inward)
    return boxes.read(pixels, boxes.offset - (window * guard)[:, None] * move)


def paint_kind(
    drafts: Sequence[Draft], pictures: Tensor, contents: Tensor, donors: Tensor, coloured: Tensor
) -> tuple[Tensor, Tensor]:
    """Put anomalies of one kind into pictures.

    Args:
        drafts: B anomalies of one kind.
        pictures: [B, C, S, S].
        contents: [B, S, S] bool.
        donors: [B, C, S, S].
        coloured: [B] bool.

    Returns:
        Pictures [B, C, S, S], and masks [B, S, S] bool: the lesions where something visibly changed.
    """
    boxes = Boxes.of(drafts, pictures.device)
    pixels, content = boxes.cut(pictures), boxes.cut(contents[:, None])
    changed = paint(boxes, pixels, donors, coloured)
    seen = boxes.visible_part(pixels, changed) & content[:, 0]
    masks = boxes.paste(torch.zeros_like(contents[:, None]), seen[:, None])[:, 0]
    painted = boxes.paste(pictures, torch.where(content, changed, pixels))
    return cast_shadows(painted, boxes), masks
