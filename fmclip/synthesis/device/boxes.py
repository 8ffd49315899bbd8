"""The boxes of many anomalies, side by side on one canvas, and what every kind needs of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fmclip.synthesis.anomaly import closing_side
from fmclip.synthesis.density import MIN_CONTRAST
from fmclip.synthesis.device.drafts import Draft, Noise
from fmclip.synthesis.device.filters import box_blur, enlarge, sample
from fmclip.synthesis.device.morphology import close_with, fill_holes, label_parts, part_sizes


@dataclass(frozen=True, eq=False)
class Boxes:
    """B boxes of one batch; every map is [B, H, W], each box in its upper left.

    Attributes:
        drafts: What the CPU drew.
        start: [B, 2] first row and column in the picture.
        sizes: [B, 2] rows and columns.
        centre: [B, 2] row and column of the anomaly in the picture.
        radius: [B] pixels.
        inside: Bool, where there is a box.
        tissue: Bool, the foreground in the box.
        rho: Elliptic or rectangular radius, 1 on the geometric outline.
        offset: [B, 2, H, W] rows and columns from the centre.
        mask: Bool, the lesion.
    """

    drafts: Sequence[Draft]
    start: Tensor
    sizes: Tensor
    centre: Tensor
    radius: Tensor
    inside: Tensor
    tissue: Tensor
    rho: Tensor
    offset: Tensor
    mask: Tensor

    @classmethod
    def of(cls, drafts: Sequence[Draft], device: torch.device) -> Boxes:
        """Lay out the boxes of anomalies, at least one."""
        frames = [draft.frame for draft in drafts]
        start = torch.tensor([[part.start for part in frame.box] for frame in frames], device=device)
        sizes = torch.tensor([frame.size for frame in frames], device=device)
        numbers = [[*frame.centre, frame.radius, frame.long, frame.short] for frame in frames]
        centre, radius, axes = torch.tensor(numbers, device=device).split([2, 1, 2], dim=1)  # [B, 2], [B, 1], [B, 2]
        H, W = (max(frame.size[axis] for frame in frames) for axis in (0, 1))
        rows, columns = torch.arange(H, device=device), torch.arange(W, device=device)
        inside = (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None]  # [B, H, W]
        y = (start[:, :1] + rows - centre[:, :1])[:, :, None].expand(-1, H, W)
        x = (start[:, 1:] + columns - centre[:, 1:])[:, None].expand(-1, H, W)
        angle = [math.radians(draft.anomaly.mask.angle) for draft in drafts]
        turn = torch.tensor([[math.cos(one), math.sin(one)] for one in angle], device=device)
        cos, sin = turn[:, 0, None, None], turn[:, 1, None, None]
        along, across = (x * cos + y * sin) / axes[:, 0, None, None], (y * cos - x * sin) / axes[:, 1, None, None]
        square = torch.maximum(along.abs(), across.abs()) * (2 / math.sqrt(math.pi))
        is_square = flags(drafts, lambda draft: draft.anomaly.mask.shape == "rectangle", device)
        rho = torch.where(is_square, square, (along * along + across * across).sqrt())
        foreground = torch.from_numpy(np.stack([draft.foreground for draft in drafts])).to(device)  # [B, S, S]
        tissue = _cut(foreground[:, None], start, H, W)[:, 0] & inside
        mask = (rho <= 1) & tissue
        boxes = cls(drafts, start, sizes, centre, radius[:, 0], inside, tissue, rho, torch.stack([y, x], dim=1), mask)
        return boxes._with_perlin_masks()

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.start.device

    def numbers(self, of: Any) -> Tensor:
        """A number of each draft, [B, 1, 1]."""
        return torch.tensor([float(of(draft)) for draft in self.drafts], device=self.device).view(-1, 1, 1)

    def cut(self, pictures: Tensor) -> Tensor:
        """The boxes of pictures [B, C, S, S]: [B, C, H, W]; what lies beyond a box is of no account."""
        return _cut(pictures, self.start, *self.inside.shape[1:])

    def paste(self, pictures: Tensor, canvas: Tensor) -> Tensor:
        """Put boxes [B, C, H, W] back: pictures [B, C, S, S] with them, the rest as it was."""
        S, T = pictures.shape[-2:]
        rows = torch.arange(S, device=self.device) - self.start[:, :1]  # [B, S]
        columns = torch.arange(T, device=self.device) - self.start[:, 1:]  # [B, S]
        B = torch.arange(len(pictures), device=self.device)[:, None, None]
        H, W = canvas.shape[-2:]
        spread = canvas.permute(0, 2, 3, 1)[B, rows.clamp(0, H - 1)[:, :, None], columns.clamp(0, W - 1)[:, None]]
        row_here, column_here = ((one >= 0) & (one < self.sizes[:, [axis]]) for axis, one in enumerate((rows, columns)))
        here = row_here[:, :, None] & column_here[:, None]  # [B, S, S]
        return torch.where(here[:, None], spread.permute(0, 3, 1, 2), pictures)

    def read(self, pixels: Tensor, offset: Tensor) -> Tensor:
        """Read the boxes [B, C, H, W] at offsets [B, 2, H, W] from the centre, mirrored at their rims."""
        start = (self.start - self.centre)[..., None, None]
        rows, columns = (offset - start).unbind(dim=1)
        return sample(pixels, rows, columns, torch.zeros_like(self.start), self.sizes)

    def noise(self, noises: Sequence[Noise]) -> Tensor:
        """Enlarge noise drawn by the CPU, one for each box."""
        sizes = [noise.coarse.shape for noise in noises]
        g = max(max(size) for size in sizes)
        padded = np.stack(
            [np.pad(n.coarse, ((0, g - s[0]), (0, g - s[1]))) for n, s in zip(noises, sizes, strict=True)]
        )
        factor = torch.tensor([noise.factor for noise in noises], dtype=torch.float64).to(self.device)
        coarse_sizes = torch.tensor(sizes, device=self.device)
        canvas = (self.inside.shape[1], self.inside.shape[2])
        coarse = torch.from_numpy(padded).to(self.device)
        deviation = torch.tensor([noise.deviation for noise in noises], device=self.device)
        return enlarge(coarse, coarse_sizes, factor, self.sizes, canvas) / deviation.view(-1, 1, 1)

    def contrast(self, pixels: Tensor) -> Tensor:
        """Standard deviation of the tissue in each box, never below `MIN_CONTRAST`: [B, C, H, W] -> [B, 1, 1]."""
        grey = pixels.mean(dim=1)
        mean = masked_mean(grey, self.tissue)
        return masked_mean((grey - mean).square(), self.tissue).sqrt().clamp_min(MIN_CONTRAST)

    def visible_part(self, before: Tensor, after: Tensor) -> Tensor:
        """The part of the lesion where the picture visibly changed, without pinholes: bool [B, H, W]."""
        sides = [closing_side(draft.frame.radius) for draft in self.drafts]
        change = (after - before).abs().amax(dim=1)  # [B, H, W]
        blurred = box_blur(change * self.inside, self.sizes, torch.tensor(sides, device=self.device))
        seen = (blurred > self.numbers(lambda draft: draft.anomaly.visible)) & self.inside
        reach = max(sides)
        closed = close_with(F.pad(seen, (reach,) * 4), _spans(sides).to(self.device))
        return fill_holes(closed)[:, reach:-reach, reach:-reach] & self.mask

    def _with_perlin_masks(self) -> Boxes:
        chosen = flags(self.drafts, lambda draft: draft.anomaly.mask.shape == "perlin", self.device)
        if not bool(chosen.any()):
            return self
        noise = self.noise([draft.outline for draft in self.drafts])
        rough = self.numbers(lambda draft: 2.5 * draft.anomaly.mask.roughness)
        field = torch.where(self.tissue, rough * noise - self.rho * self.rho, -torch.inf).flatten(1)  # [B, H * W]
        wanted = self.numbers(lambda draft: round(math.pi * draft.frame.radius**2))[:, 0].long()  # [B, 1]
        area = torch.minimum(wanted, self.tissue.flatten(1).sum(dim=1, keepdim=True))
        limit = field.sort(dim=1, descending=True).values.gather(1, (area - 1).clamp_min(0))
        mask = ((field >= limit) & (area > 0)).view(self.mask.shape) & self.tissue
        sizes = part_sizes(label_parts(mask))
        largest = sizes.flatten(1).amax(dim=1).view(-1, 1, 1)
        mask &= sizes >= (0.08 * largest).clamp_min(6).minimum(largest)  # crumbs are noise, not satellites
        return Boxes(**{**self.__dict__, "mask": torch.where(chosen, mask, self.mask)})


def flags(drafts: Sequence[Draft], of: Any, device: torch.device) -> Tensor:
    """Whether something holds of each draft, bool [B, 1, 1]."""
    return torch.tensor([bool(of(draft)) for draft in drafts], device=device).view(-1, 1, 1)


def masked_mean(planes: Tensor, mask: Tensor) -> Tensor:
    """Mean of [B, H, W] where the mask is True, 0 where it never is: [B, 1, 1]."""
    return (planes * mask).sum(dim=(1, 2), keepdim=True) / mask.sum(dim=(1, 2), keepdim=True).clamp_min(1)


def _cut(pictures: Tensor, start: Tensor, H: int, W: int) -> Tensor:
    S, T = pictures.shape[-2:]
    rows = (start[:, :1] + torch.arange(H, device=start.device)).clamp_max(S - 1)  # [B, H]
    columns = (start[:, 1:] + torch.arange(W, device=start.device)).clamp_max(T - 1)  # [B, W]
    B = torch.arange(len(pictures), device=start.device)[:, None, None]
    return pictures.permute(0, 2, 3, 1)[B, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)  # [B, C, H, W]


def _spans(sides: Sequence[int]) -> Tensor:
    """Half widths of the rows of the elliptic elements that close gaps, see `close_with`."""
    reach = max(sides) - 1
    spans = np.full((len(sides), 2 * reach + 1), -1, np.int64)
    for place, side in enumerate(sides):
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * side - 1, 2 * side - 1))
        spans[place, reach - side + 1 : reach + side] = (disc.sum(axis=1) - 1) // 2
    return torch.from_numpy(spans)
