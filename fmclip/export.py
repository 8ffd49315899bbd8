"""An adapted detector as one graph that answers without fmclip: an ONNX file, or a program of `torch.export`.

The graph takes letterboxed squares and says where the scan lies in them; normalisation, tower, memory and prompts are
inside, the text tower is not: its prompts are embedded once, when the graph is recorded.

    pixels   [batch, 3, S, S] float32 in [0, 1]     ->  map    [batch, S, S] float32 in [0, 1]
    content  [batch, S, S] bool, False on the bars      score  [batch] float32 in [0, 1]

Files are written, never read back: a `torch.export` file holds pickles, and only its writer may trust it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fmclip import __version__
from fmclip.calibration import Calibration
from fmclip.detectors import Detector
from fmclip.detectors.base import to_pixels
from fmclip.errors import ExportError, FmclipError, NotFittedError
from fmclip.scans import Scan

Kind: TypeAlias = Literal["onnx", "torch"]
Answer: TypeAlias = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""pixels [B, 3, S, S], content [B, S, S] -> maps [B, S, S], scores [B]."""

OPSET = 20
_TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn", "fwd_source_fn_stack")
LARGEST_DIFFERENCE = 1e-3  # of a map or a score, between the file and the detector
CHECKED = 3  # scans; another number than the graph was recorded with
RECORDED = 2
MAX_ONNX_BYTES = 2**31 - 2**20  # one ONNX file is one protobuf message, which holds less than 2 GiB
RESEARCH_USE = "Research use only. Not a medical device; no score or map is a diagnosis."
INSTALL = "This needs onnx, onnxscript and onnxruntime: pip install 'fmclip[export]'."


class SquareDetector(nn.Module):
    """A detector as a module: squares in, maps and scores out.

    Args:
        detector: A fitted detector on the CPU.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self._detector = detector

    def forward(self, pixels: Tensor, content: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] and [B, S, S] bool -> maps [B, S, S] and scores [B], float32 in [0, 1]."""
        maps, scores = self._detector.map_squares(pixels, content)
        return maps.float(), scores.float()


def export_detector(
    path: str | os.PathLike[str],
    detector: Detector,
    calibration: Calibration,
    *,
    kind: Kind,
    window: str | None = None,
) -> float:
    """Write a detector as a graph and compare what the graph answers with what the detector answers.

    Args:
        path: Where to; the folder must exist. A file of that name stays until the new one has passed the comparison.
        detector: A fitted detector on the CPU.
        calibration: Its calibration.
        kind: "onnx", or "torch" for a program of `torch.export` (.pt2).
        window: Name of the window that the references were read with.

    Returns:
        Largest difference of a map or a score on scans of random texture, wider, taller and square.

    Raises:
        NotFittedError: The detector has learned nothing yet.
        ExportError: Its method or tower cannot be recorded, a package is missing, the file cannot be written, or it
            does not answer as the detector does.
    """
    if not detector.is_fitted:
        raise NotFittedError("There is nothing to export yet: adapt to normal scans first.")
    if kind == "onnx":
        _require_packages()  # before the recording, which takes its time
    metadata = describe(detector, calibration, window)
    program = _record(detector)
    target = Path(path)
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as folder:
            whole = Path(folder) / f"detector{target.suffix}"
            with _told_in_words():
                answer = (_write_onnx if kind == "onnx" else _write_torch)(whole, program, metadata)
                difference = _largest_difference(detector, answer)
            if not difference <= LARGEST_DIFFERENCE:  # also of NaN
                raise ExportError(
                    f"The file was dropped: its answers differ from the detector's by up to {difference:.1e}, and more "
                    f"than {LARGEST_DIFFERENCE:.0e} is not taken. Export to the other format, or use another method."
                )
            whole.replace(target)
    except OSError as error:
        raise ExportError(f"The file cannot be written: {error.strerror or 'the disk refused it'}.") from error
    return difference


def describe(detector: Detector, calibration: Calibration, window: str | None) -> dict[str, str]:
    """What stands in the file beside the graph: how to ask it, and what its numbers mean; nothing of any scan."""
    size = detector.tower.image_size
    return {
        "format": "fmclip-export",
        "research_use": RESEARCH_USE,
        "method": detector.name,
        "scan_type": detector.config.scan_type,
        "tower": detector.tower.name,
        "window": window or "",
        "image_size": str(size),
        "threshold": repr(calibration.threshold),
        "reference_scores": json.dumps(list(calibration.reference_scores)),
        "inputs": json.dumps(
            {
                "pixels": f"[batch, 3, {size}, {size}] float32, red green blue in 0 to 1, letterboxed with black bars",
                "content": f"[batch, {size}, {size}] bool, true where the scan lies, false on the bars",
            }
        ),
        "outputs": json.dumps(
            {
                "map": f"[batch, {size}, {size}] float32 in 0 to 1, higher is more unlike the reference scans",
                "score": "[batch] float32 in 0 to 1; above the threshold the scan deviates",
            }
        ),
        "fmclip_version": __version__,
        "torch_version": torch.__version__,
    }


def _require_packages() -> None:
    try:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            importlib.import_module(package)
    except ImportError as error:
        raise ExportError(INSTALL) from error


def _record(detector: Detector) -> torch.export.ExportedProgram:
    if detector.tower.device.type != "cpu":
        raise ExportError("Graphs are recorded on the CPU: load the adapter with --device cpu.")
    size = detector.tower.image_size
    batch = torch.export.Dim("batch", min=1, max=4096)
    sample = torch.rand(RECORDED, 3, size, size), torch.ones(RECORDED, size, size, dtype=torch.bool)
    detector.map_squares(*sample)  # what is embedded once and kept, such as prompts, is not recorded
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(
                SquareDetector(detector).eval(), sample, dynamic_shapes=({0: batch}, {0: batch}), strict=False
            )
    except ExportError:
        raise
    except Exception as error:  # torch.export raises many kinds, with pages of text for its developers
        raise ExportError(
            f"The method {detector.name} on the tower {detector.tower.name} cannot be recorded as a graph "
            f"({type(error).__name__}): it does other steps for other scans or numbers of scans. Choose another "
            "method, such as fusionmedclip."
        ) from error
    for node in program.graph.nodes:  # each tells from which file of this machine it came
        for note in _TRACES:
            node.meta.pop(note, None)
    return program


def _write_onnx(path: Path, program: torch.export.ExportedProgram, metadata: dict[str, str]) -> Answer:
    import onnxruntime

    try:
        with torch.no_grad(), _quiet():
            written: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=["pixels", "content"],
                output_names=["map", "score"],
                verbose=False,
            )
    except Exception as error:  # as of torch.export, see `_record`
        raise ExportError(
            f"ONNX has no word for a part of this detector ({type(error).__name__}). Export it with --to torch."
        ) from error
    _strip(written.model)
    written.model.metadata_props.update(metadata)
    if sum(value.const_value.nbytes for value in written.model.graph.initializers.values()) > MAX_ONNX_BYTES:
        raise ExportError("One ONNX file holds less than 2 GiB, and this tower is larger. Export it with --to torch.")
    written.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def answer(pixels: np.ndarray, content: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        maps, scores = session.run(["map", "score"], {"pixels": pixels, "content": content})
        return maps, scores

    return answer


def _strip(model: Any) -> None:
    """Leave out what the exporter notes for developers (files of this machine among it); call the free axis "batch"."""
    (name,) = {str(dimension) for dimension in model.graph.inputs[0].shape if not isinstance(dimension, int)}
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *_outputs(model.graph)):
        value.metadata_props.clear()
        for place, dimension in enumerate(value.shape or ()):
            if not isinstance(dimension, int):
                value.shape[place] = re.sub(rf"\b{name}\b", "batch", str(dimension))


def _outputs(graph: Any) -> Iterator[Any]:
    for node in graph.all_nodes():
        yield from node.outputs


def _write_torch(path: Path, program: torch.export.ExportedProgram, metadata: dict[str, str]) -> Answer:
    with _quiet():
        torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata)})
    module: Any = program.module()  # the file itself is not read back: it holds pickles

    def answer(pixels: np.ndarray, content: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            maps, scores = module(torch.from_numpy(pixels), torch.from_numpy(content))
        return maps.numpy(), scores.numpy()

    return answer


def _largest_difference(detector: Detector, answer: Answer) -> float:
    size = detector.tower.image_size
    generator = np.random.default_rng(0)
    shapes = [(size, size), (size, max(1, size // 2)), (max(1, 2 * size // 3), size)][:CHECKED]
    scans = [Scan(generator.random(shape, dtype=np.float32)) for shape in shapes]
    pixels, content, boxes = to_pixels(scans, detector.tower)
    maps, scores = answer(pixels.numpy(), content.numpy())
    apart = []
    for own, box, square, score in zip(detector.predict(scans), boxes, maps, scores, strict=True):
        apart += [np.abs(box.restore(square) - own.map).max(), abs(float(score) - own.score)]
    return float(np.max(apart))


@contextlib.contextmanager
def _told_in_words() -> Iterator[None]:
    """Turn what the packages raise while the file is written and asked, which is many kinds, into an `ExportError`."""
    try:
        yield
    except (FmclipError, OSError):  # in words already, or told by the caller
        raise
    except Exception as error:
        raise ExportError(
            f"The graph was recorded, but its file could not be written or does not run ({type(error).__name__}). "
            "Export to the other format, or use another method."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' notes for their developers off the screen; errors come through."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
