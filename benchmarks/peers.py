"""The peers as they are: anomalib's PatchCore, PaDiM, AnomalyDINO and WinCLIP on the weights of our towers.

    pip install -e '.[peers]'
    python -m benchmarks.peers evaluate ROOT --method anomalib_patchcore --method patch_memory --k 16

The command is `python -m fmclip` with four more methods, so that protocol and metrics are the same. Memory, Gaussian,
distances, windows and scores are anomalib's own code; only its feature extractor is replaced by the tower, with the
tower's own input statistics. A peer that cannot take a tower says why:

    PatchCore, PaDiM   any tower; a CNN is read at its two finest levels (strides 8 and 16, as published)
    AnomalyDINO        vision transformers: it reads their patch tokens, here those of the last level without final norm
    WinCLIP            open_clip's own vision transformers whose halves were trained together: it masks tokens and asks
                       with words
"""

from __future__ import annotations

import contextlib
import importlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from fmclip.detectors import DETECTORS, Detector, DetectorConfig, OnEvent, Prediction, Ready
from fmclip.detectors.base import forward_passes, to_pixels
from fmclip.detectors.log_odds import log_odds_predictions, to_probability
from fmclip.errors import CheckpointError, FmclipError
from fmclip.scans import Scan
from fmclip.towers import Tower
from fmclip.towers.vision import share

CORESET_RATIO = 0.1  # PatchCore's own
PADIM_FEATURES = 100  # PaDiM's own for a small backbone
EPS = 1e-9


@dataclass(frozen=True)
class PeerConfig(DetectorConfig):
    """Peers run with their own defaults."""

    @classmethod
    def preset(cls, name: str = "full", **overrides: Any) -> PeerConfig:
        """All presets are the same."""
        return cls(**overrides)


class Peer(Detector):
    """One of anomalib's models behind the protocol of our detectors.

    Scores are distances d >= 0; they and the maps are shown as d / (1 + d), which keeps every order.
    """

    config_class = PeerConfig

    @abstractmethod
    def _learn(self, pixels: Tensor) -> nn.Module:
        """Fit a model of anomalib's on references [k, 3, S, S] in [0, 1]."""

    def _input(self, pixels: Tensor) -> Tensor:
        """What the model is shown: [B, 3, S, S] in [0, 1], since the tower normalises by itself."""
        return pixels

    def fit(
        self,
        normals: Sequence[Scan],
        abnormals: Sequence[Scan] | None = None,
        *,
        abnormal_masks: Sequence[np.ndarray | None] | None = None,
        on_event: OnEvent | None = None,
    ) -> Peer:
        """Fit on the references, and once more without each of them for its score; abnormal scans are not used."""
        normals, on_event = self._begin(normals, on_event)
        pixels = self.fit_uncalibrated(normals)
        scores = []
        for place in range(len(pixels)):
            others = torch.cat([pixels[:place], pixels[place + 1 :]])
            scores.append(self._answer(self._learn(others), pixels[place : place + 1])[1])
        self.reference_scores_ = to_probability(torch.cat(scores))
        on_event(Ready(self.name, self))
        return self

    def fit_uncalibrated(self, normals: Sequence[Scan]) -> Tensor:
        """Fit on the references as anomalib does, without any score of theirs; their pixels [k, 3, S, S]."""
        pixels, _, _ = to_pixels(normals, self.tower)
        self.model_ = self._learn(pixels)
        self.reference_scores_ = ()
        return pixels

    def predict(self, scans: Sequence[Scan]) -> list[Prediction]:
        """Map each scan by anomalib's model."""
        found: list[Prediction] = []
        for pixels, _, boxes in self._batches(scans):
            found += log_odds_predictions(*self._answer(self.model_, pixels), boxes, self.tower.image_size)
        return found

    def state(self) -> dict[str, Tensor]:
        """Peers are measured, not kept."""
        raise CheckpointError(f"{self.name} is a peer for comparison; it cannot be saved.")

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Peers are measured, not kept."""
        raise CheckpointError(f"{self.name} is a peer for comparison; it cannot be loaded.")

    @torch.no_grad()
    def _answer(self, model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of distance maps [B, S, S] and of image scores [B]."""
        out = model.eval()(self._input(pixels))
        maps = out.anomaly_map.reshape(len(pixels), *out.anomaly_map.shape[-2:])
        return maps.clamp_min(EPS).log(), out.pred_score.reshape(-1).double().clamp_min(EPS).log()


class _FeaturePeer(Peer):
    """A peer that needs no more of its backbone than features: the tower takes the place of anomalib's extractor."""

    def _build(self, module: str, kind: str, extractor: nn.Module, **settings: Any) -> Any:
        models = anomalib_models(module)
        with mock.patch.object(models, "TimmFeatureExtractor", return_value=extractor):
            return getattr(models, kind)(**settings).to(self.tower.device)

    @torch.no_grad()
    def _remember(self, model: nn.Module, pixels: Tensor) -> None:
        """Show references to a model, which keeps them while in training mode."""
        model.train()
        for some in forward_passes(len(pixels), pixels.device):
            model(self._input(pixels[some]))


class PatchCore(_FeaturePeer):
    """Coreset memory of locally pooled features (Roth et al. 2022)."""

    name = "anomalib_patchcore"

    def _learn(self, pixels: Tensor) -> nn.Module:
        extractor = TowerFeatures(self.tower)
        model = self._build("patchcore", "PatchcoreModel", extractor, layers=extractor.layers, backbone="tower")
        self._remember(model, pixels)
        with _seeded(self.config.seed):
            model.subsample_embedding(CORESET_RATIO)
        return model


class PaDiM(_FeaturePeer):
    """A Gaussian of features at each place (Defard et al. 2021)."""

    name = "anomalib_padim"

    def _learn(self, pixels: Tensor) -> nn.Module:
        extractor = TowerFeatures(self.tower)
        count = min(PADIM_FEATURES, sum(extractor.out_dims))
        with _seeded(self.config.seed):
            model = self._build(
                "padim", "PadimModel", extractor, layers=extractor.layers, backbone="tower", n_features=count
            )
        self._remember(model, pixels)
        model.fit()
        return model


class AnomalyDINO(_FeaturePeer):
    """Nearest neighbour of patch tokens by cosine (Damm et al. 2025)."""

    name = "anomalib_anomalydino"
    needs_transformer = True

    def _learn(self, pixels: Tensor) -> nn.Module:
        extractor = TowerTokens(self.tower)
        model = self._build("anomaly_dino", "AnomalyDINOModel", extractor)
        extractor.layer = model.last_layer
        self._remember(model, pixels)
        model.fit()
        return model


class WinCLIP(Peer):
    """Windows of tokens against words and against the references (Jeong et al. 2023)."""

    name = "anomalib_winclip"
    needs_alignment = True
    needs_transformer = True

    @classmethod
    def refusal(cls, tower: Tower) -> str | None:
        """Say why WinCLIP cannot work on a tower."""
        reason = super().refusal(tower)
        if reason is None and not hasattr(tower._visual, "patch_dropout"):
            return f"{cls.name} masks tokens inside open_clip's own vision transformer; {tower.name} is another one."
        return reason

    def _input(self, pixels: Tensor) -> Tensor:
        return self.tower.normalise(pixels)

    @torch.no_grad()
    def _learn(self, pixels: Tensor) -> nn.Module:
        models = anomalib_models("winclip")
        model = share(self.tower._model)  # anomalib writes a flag into it
        with mock.patch.object(models.open_clip, "create_model_and_transforms", return_value=(model, None, None)):
            peer = models.WinClipModel().to(self.tower.device)
        peer.setup(self.config.scan_type, self._input(pixels))
        return peer.eval()


class TowerFeatures(nn.Module):
    """The tower in the place of anomalib's extractor: a dictionary of feature maps, the finest first.

    Attributes:
        layers: Names of the levels.
        out_dims: Their widths.
    """

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        count = 2 if tower.kind == "cnn" else len(tower.layers)
        self._tower = tower.with_layers(tower.layers[:count])
        self.layers = list(self._tower.layers)
        self.out_dims = list(self._tower.widths)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """[B, 3, S, S] in [0, 1] -> [B, C_j, H_j, W_j] by level."""
        return dict(zip(self.layers, self._tower.features(pixels), strict=True))


class TowerTokens(nn.Module):
    """The tower in the place of anomalib's token extractor.

    Attributes:
        patch_size: Side of a patch in pixels.
        layer: What anomalib calls the last block.
    """

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self._tower = tower
        self.patch_size = tower.image_size // tower.grids[-1][0]
        self.layer = ""

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """[B, 3, S, S] in [0, 1] -> tokens [B, N, C] of the last level."""
        return {self.layer: self._tower.features(pixels)[-1].flatten(2).mT}


def anomalib_models(model: str) -> Any:
    """Import one of anomalib's models, which takes seconds the first time; raises FmclipError if it is missing."""
    try:
        return importlib.import_module(f"anomalib.models.image.{model}.torch_model")
    except ImportError as error:
        raise FmclipError("The peers need anomalib: pip install -e '.[peers]'") from error


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of torch and NumPy, from which anomalib draws, for a while."""
    before = np.random.get_state()  # noqa: NPY002  (scikit-learn, inside anomalib, draws from this one)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(before)  # noqa: NPY002


PEERS: dict[str, type[Detector]] = {peer.name: peer for peer in (PatchCore, PaDiM, AnomalyDINO, WinCLIP)}


def main() -> None:
    """Run the command line of fmclip with the peers among its methods."""
    from fmclip.cli import main as command_line

    DETECTORS.update(PEERS)
    command_line()


if __name__ == "__main__":
    main()
