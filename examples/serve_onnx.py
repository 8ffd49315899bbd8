"""Ask an exported detector about a picture, without fmclip: serve_onnx.py DETECTOR.onnx PICTURE HEATMAP.png"""

import sys

import numpy as np
import onnxruntime
from PIL import Image


def resample(old: int, new: int) -> np.ndarray:
    """[new, old] weights of a resize: averages over areas when shrinking, bilinear when growing."""
    cells, edges = np.arange(old), np.arange(new + 1)[:, None] * old / new
    middle = ((edges[1:] + edges[:-1] - 1) / 2).clip(0, old - 1)
    return np.diff((edges - cells).clip(0, 1), axis=0) * new / old if new < old else (1 - abs(middle - cells)).clip(0)


session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map  # research use only, see about["research_use"]
picture, size, threshold = Image.open(sys.argv[2]), int(about["image_size"]), float(about["threshold"])
if about["window"] not in ("", "as stored") or picture.mode not in ("L", "RGB") or "16" in str(picture.tile[0][3]):
    sys.exit("This reads 8-bit grey or RGB pictures, for detectors that learned without a window: else ask fmclip.")
scan = np.asarray(picture.convert("RGB"), np.float32) / 255
sides = [max(1, round(side * size / max(scan.shape[:2]))) for side in scan.shape[:2]]
inside = (0, ..., *(slice((size - side) // 2, (size + side) // 2) for side in sides))
pixels, content = np.zeros((1, 3, size, size), np.float32), np.zeros((1, size, size), bool)
pixels[inside], content[inside] = np.einsum("yh,xw,hwc->cyx", *map(resample, scan.shape, sides), scan), True
maps, (score,) = session.run(["map", "score"], {"pixels": pixels, "content": content})
print(f"score {score:.4f}, threshold {threshold:.4f}: {'deviates' if score > threshold else 'within the references'}")
heat = np.asarray(Image.fromarray(maps[inside]).resize(picture.size, Image.Resampling.BILINEAR))[..., None]
Image.fromarray(np.uint8(255 * ((1 - heat) * scan + heat * np.array([1, 0.3, 0])) + 0.5)).save(sys.argv[3])
