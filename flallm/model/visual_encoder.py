"""Visual encoder: ResNet18 frame by frame, then one temporal convolution."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ResNetConfig, ResNetModel

from flallm.config import Encoder
from flallm.model.batch_norm import BatchNorm, GlobalBatchNorm, replace_batch_norms
from flallm.utils import UserError, first_line

# Of red, green and blue, where white is 1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class VisualEncoder(nn.Module):
    """uint8 frames (F, H, W, 3) of clips with `lengths` frames -> sign-wise features (F, C)."""

    def __init__(self, config: Encoder):
        super().__init__()
        self.frozen = "nothing"
        resnet = ResNetConfig(
            embedding_size=config.stem,
            hidden_sizes=list(config.widths),
            depths=list(config.depths),
            layer_type="basic",
        )
        self.backbone = ResNetModel(resnet)
        if config.weights:
            load_torchvision(self.backbone, config.weights)
        self.temporal = nn.Conv1d(config.widths[-1], config.channels, config.kernel)
        self.norm = nn.BatchNorm1d(config.channels)
        mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1) * 255
        std = torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        batch_norm = GlobalBatchNorm if config.global_batch_norm else BatchNorm
        self.norms = replace_batch_norms(self, batch_norm)

    def frame_wise(self, frames: torch.Tensor, update_stats: bool = True) -> torch.Tensor:
        """The backbone's features (F, C); C is 512 for ResNet18.

        update_stats: false for placeholder frames, in place of clips that cannot be read. They do
        not change BatchNorm's statistics.
        """
        for norm in self.norms:
            norm.update_stats = update_stats
        images = (frames.permute(0, 3, 1, 2) - self.mean) / self.std  # (F, 3, H, W), channels last
        return self.backbone(images).pooler_output.flatten(1)

    def forward(
        self, frames: torch.Tensor, lengths: torch.Tensor, update_stats: bool = True
    ) -> torch.Tensor:
        x = self.frame_wise(frames, update_stats)
        # One convolution over all clips. Zeros between them, as many as the kernel reaches, are
        # each clip's own padding.
        pad = self.temporal.kernel_size[0] // 2
        clip_of_frame = torch.repeat_interleave(
            torch.arange(len(lengths)), lengths, output_size=len(x)
        ).to(x.device)
        position = torch.arange(len(x), device=x.device) + pad * (clip_of_frame + 1)
        padded = x.new_zeros(len(x) + pad * (len(lengths) + 1), x.shape[1])
        padded = padded.index_copy(0, position, x)
        x = self.temporal(padded.T[None])[0].T[position - pad]  # (F, C)
        return F.relu(self.norm(x))

    def sha256(self) -> str:
        """The SHA-256 of all that the features depend on."""
        digest = hashlib.sha256()
        for name, tensor in self.state_dict().items():
            digest.update(name.encode() + np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
        return digest.hexdigest()

    def freeze(self, part: str) -> None:
        """Freezes a part for good: nothing, backbone or encoder.

        It has no gradients, and its BatchNorms stay in eval mode whatever calls `train()`.
        """
        self.frozen = part
        if part == "backbone":
            self.backbone.requires_grad_(False)
        elif part == "encoder":
            self.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> VisualEncoder:
        super().train(mode and self.frozen != "encoder")
        self.backbone.train(mode and self.frozen == "nothing")
        return self


def load_torchvision(backbone: ResNetModel, path: str) -> None:
    """Puts torchvision's ResNet18 weights into the backbone.

    path: resnet18-f37072fd.pth or a safetensors copy. Nothing is unpickled but tensors. Raises
    UserError for another file.
    """
    from safetensors.torch import load_file

    try:
        if path.endswith(".safetensors"):
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        renamed = {}
        for name, tensor in weights.items():
            if not name.startswith("fc."):  # the classifier
                renamed[_from_torchvision(name)] = tensor
        backbone.load_state_dict(renamed)
    except Exception as error:
        problem = f"{path} is no ResNet18 checkpoint of torchvision: {first_line(error)}"
        raise UserError(f"encoder.weights: {problem}") from None


def _from_torchvision(name: str) -> str:
    """`layer2.0.conv1.weight` -> `encoder.stages.1.layers.0.layer.0.convolution.weight`"""
    layer, *parts = name.split(".")
    if not layer.startswith("layer"):  # conv1.weight
        kind = "convolution" if layer == "conv1" else "normalization"
        return f"embedder.embedder.{kind}.{parts[-1]}"
    block, module, leaf = parts[0], parts[1], parts[-1]
    prefix = f"encoder.stages.{int(layer[5:]) - 1}.layers.{block}"
    if module == "downsample":  # layer2.0.downsample.0.weight
        kind = "convolution" if parts[2] == "0" else "normalization"
        return f"{prefix}.shortcut.{kind}.{leaf}"
    kind = "convolution" if module.startswith("conv") else "normalization"
    return f"{prefix}.layer.{int(module[-1]) - 1}.{kind}.{leaf}"
