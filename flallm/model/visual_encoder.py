"""Frames -> sign-wise features: ResNet18 on every frame, then one temporal convolution per clip (paper, section 3.2).

Clips are concatenated, never padded, so nothing that is not a frame reaches a convolution or a BatchNorm.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import ResNetConfig, ResNetModel

from flallm import UserError, first_line
from flallm.config import Encoder

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


def replace_batch_norms(module: nn.Module, kind: type[BatchNorm]) -> list[BatchNorm]:
    """Puts one of ours in the place of each of torch's; returns them."""
    found = []
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            new = kind(child.num_features, child.eps, child.momentum)
            new.load_state_dict(child.state_dict())
            setattr(module, name, new)
            found.append(new)
        else:
            found += replace_batch_norms(child, kind)
    return found


class BatchNorm(nn.BatchNorm1d):
    """torch's, of any number of dimensions, for frames that count. It refuses a single frame in training, for that has no variance: such a one is
    seen with the moving statistics here."""

    counts = True

    def _check_input_dim(self, x: torch.Tensor) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (F, C, ...)
        if self.training and not (self.counts and x.numel() > x.shape[1]):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class GlobalBatchNorm(BatchNorm):
    """BatchNorm with the statistics of all ranks' frames. torch's SyncBatchNorm refuses CPU tensors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (F, C, ...)
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        with torch.no_grad():
            # Ranks hold different numbers of frames, so sums are added up, not means.
            rows = x.movedim(1, -1).reshape(-1, x.shape[1]).float()
            sums = torch.cat([rows.sum(0), (rows * rows).sum(0), rows.new_tensor([len(rows)])]).double()
            sums *= self.counts
            dist.all_reduce(sums)
            mean, square, count = (*(sums[:-1] / sums[-1]).chunk(2), sums[-1])
            enough = count > 1
            mean, var = torch.where(enough, mean, self.running_mean), torch.where(enough, (square - mean**2).clamp_min(0), self.running_var)
            self.running_mean.lerp_(mean.float(), self.momentum)
            self.running_var.lerp_((var * torch.where(enough, count / (count - 1), 1.0)).float(), self.momentum)
            self.num_batches_tracked += 1
            # Statistics that this rank's frames have no part in are constants to them: their gradient is that of infinitely many frames.
            count = torch.where(enough, count, math.inf) if self.counts else torch.full_like(count, math.inf)
        return _NormalizeOverRanks.apply(x, self.weight, self.bias, mean.float(), var.float(), count.float(), self.eps)


class _NormalizeOverRanks(torch.autograd.Function):
    """Normalises with given statistics; the gradient goes through these statistics to the frames of every rank.

    With y = w x̂ + b, x̂ = (x - mean) / sqrt(var + eps) over n frames (Ioffe & Szegedy 2015):
    dx = w / sqrt(var + eps) (dy - Σdy / n - x̂ Σ(dy x̂) / n), both sums over all ranks.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, count, eps):
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, var, count = ctx.saved_tensors
        # The kernel for fixed statistics gives w / sqrt(var + eps) dy and this rank's two sums.
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(dy, x, weight, mean, var, None, None, False, ctx.eps, [True] * 3)
        sums = torch.stack([dweight, dbias]).float()
        dist.all_reduce(sums)
        factor = weight * torch.rsqrt(var + ctx.eps) / count
        dx -= F.batch_norm(x, mean, var, factor * sums[0], factor * sums[1], False, 0.0, ctx.eps)
        return dx, dweight, dbias, None, None, None, None


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
