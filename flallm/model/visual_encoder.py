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

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VisualEncoder(nn.Module):
    """uint8 frames (F, H, W, 3) of clips with `lengths` frames -> sign-wise features (F, C)."""

    def __init__(self, config: Encoder):
        super().__init__()
        self.frozen = "nothing"
        resnet = ResNetConfig(embedding_size=config.stem, hidden_sizes=list(config.widths), depths=list(config.depths), layer_type="basic")
        self.backbone = ResNetModel(resnet)
        if config.weights:
            load_torchvision(self.backbone, config.weights)
        self.temporal = nn.Conv1d(config.widths[-1], config.channels, config.kernel)
        self.norm = nn.BatchNorm1d(config.channels)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255, persistent=False)
        self.norms = replace_batch_norms(self, GlobalBatchNorm if config.global_batch_norm else BatchNorm)

    def frame_wise(self, frames: torch.Tensor, counts: bool = True) -> torch.Tensor:
        """The backbone's features (F, C), 512 of ResNet18's. counts: false where the frames stand in for clips that could not be read: no statistics are
        taken of them."""
        for norm in self.norms:
            norm.counts = counts
        images = (frames.permute(0, 3, 1, 2) - self.mean) / self.std  # (F, 3, H, W), channels last in memory
        return self.backbone(images).pooler_output.flatten(1)

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor, counts: bool = True) -> torch.Tensor:
        x = self.frame_wise(frames, counts)
        # One convolution over all clips: zeros between them, as many as the kernel reaches, are each clip's own padding.
        pad = self.temporal.kernel_size[0] // 2
        clip = torch.repeat_interleave(torch.arange(len(lengths)), lengths, output_size=len(x)).to(x.device)
        place = torch.arange(len(x), device=x.device) + pad * (clip + 1)
        row = x.new_zeros(len(x) + pad * (len(lengths) + 1), x.shape[1]).index_copy(0, place, x)
        x = self.temporal(row.T[None])[0].T[place - pad]  # (F, C)
        return F.relu(self.norm(x))

    def sha256(self) -> str:
        """Of all that the features depend on."""
        digest = hashlib.sha256()
        for name, tensor in self.state_dict().items():
            digest.update(name.encode() + np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
        return digest.hexdigest()

    def freeze(self, what: str) -> None:
        """Frozen for good, nothing, backbone or encoder: no gradients, and BatchNorms stay in eval mode whatever calls `train()`."""
        self.frozen = what
        if what != "nothing":
            (self.backbone if what == "backbone" else self).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> VisualEncoder:
        super().train(mode and self.frozen != "encoder")
        self.backbone.train(mode and self.frozen == "nothing")
        return self


def load_torchvision(backbone: ResNetModel, path: str) -> None:
    """Puts torchvision's ResNet18 weights (resnet18-f37072fd.pth or a safetensors copy) into the backbone. Nothing is unpickled but tensors."""
    from safetensors.torch import load_file

    try:
        weights = load_file(path) if path.endswith(".safetensors") else torch.load(path, map_location="cpu", weights_only=True)
        backbone.load_state_dict({_torchvision_name(k): v for k, v in weights.items() if not k.startswith("fc.")})
    except Exception as error:
        raise UserError(f"encoder.weights: {path} is no ResNet18 checkpoint of torchvision: {first_line(error)}") from None


def _torchvision_name(name: str) -> str:
    """`layer2.0.conv1.weight` -> `encoder.stages.1.layers.0.layer.0.convolution.weight`"""
    parts = name.split(".")
    if not parts[0].startswith("layer"):
        return f"embedder.embedder.{'convolution' if parts[0] == 'conv1' else 'normalization'}.{parts[-1]}"
    block = f"encoder.stages.{int(parts[0][5:]) - 1}.layers.{parts[1]}"
    if parts[2] == "downsample":
        return f"{block}.shortcut.{'convolution' if parts[3] == '0' else 'normalization'}.{parts[-1]}"
    return f"{block}.layer.{int(parts[2][-1]) - 1}.{'convolution' if parts[2].startswith('conv') else 'normalization'}.{parts[-1]}"
