"""Ask an exported detector about a picture, without fmclip: serve_onnx.py DETECTOR.onnx PICTURE HEATMAP.png"""

import sys

import numpy as np
import onnxruntime
from PIL import Image


def resample(old: int, new: int) -> np.ndarray:
    """[new, old] weights of a resize: averages over areas when shrinking, bilinear when growing."""
    cells, scale = np.arange(old), old / new
    edges, middle = np.arange(new + 1) * scale, ((np.arange(new) + 0.5) * scale - 0.5).clip(0, old - 1)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return overlap.clip(0) / scale if new < old else (1 - abs(middle[:, None] - cells)).clip(0)


session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
size, threshold = int(about["image_size"]), float(about["threshold"])  # research use only, see about["research_use"]
scan = np.asarray(Image.open(sys.argv[2]).convert("RGB"), np.float32) / 255
height, width = (max(1, round(side * size / max(scan.shape[:2]))) for side in scan.shape[:2])
down, across = resample(scan.shape[0], height), resample(scan.shape[1], width)
rows, columns = (slice((size - side) // 2, (size - side) // 2 + side) for side in (height, width))
pixels, content = np.zeros((1, 3, size, size), np.float32), np.zeros((1, size, size), bool)
pixels[0, :, rows, columns], content[0, rows, columns] = np.einsum("yh,hwc,xw->cyx", down, scan, across), True
heat, score = (answer[0] for answer in session.run(["map", "score"], {"pixels": pixels, "content": content}))
print(f"score {score:.4f}, threshold {threshold:.4f}: {'deviates' if score > threshold else 'within the references'}")
heat = np.asarray(Image.fromarray(heat[rows, columns]).resize(scan.shape[1::-1], Image.Resampling.BILINEAR))[..., None]
Image.fromarray(np.uint8(255 * ((1 - heat) * scan + heat * np.array([1, 0.3, 0])) + 0.5)).save(sys.argv[3])
