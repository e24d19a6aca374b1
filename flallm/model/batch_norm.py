"""BatchNorm over the frames of one rank or of all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


def replace_batch_norms(module: nn.Module, kind: type[BatchNorm]) -> list[BatchNorm]:
    """Replaces each of torch's BatchNorms in the module by one of `kind`; returns the new ones."""
    norms = []
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            norm = kind(child.num_features, child.eps, child.momentum)
            norm.load_state_dict(child.state_dict())
            setattr(module, name, norm)
            norms.append(norm)
        else:
            norms += replace_batch_norms(child, kind)
    return norms


class BatchNorm(nn.BatchNorm1d):
    """torch's BatchNorm for inputs (F, C, …) of any number of dimensions.

    update_stats: false for placeholder frames, which are normalised with the moving statistics and
    do not change them. So is a single value a channel, which has no variance and which torch
    refuses in training.
    """

    update_stats = True

    def _check_input_dim(self, x: torch.Tensor) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        has_variance = x.numel() > x.shape[1]
        if self.training and not (self.update_stats and has_variance):
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


@dataclass
class _Statistics:
    """Mean (C) and variance (C) of channels, and the number () of values in each."""

    mean: torch.Tensor
    var: torch.Tensor
    count: torch.Tensor


class GlobalBatchNorm(BatchNorm):
    """BatchNorm with the statistics of all ranks' frames.

    torch's SyncBatchNorm refuses CPU tensors.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        many_ranks = dist.is_initialized() and dist.get_world_size() > 1
        if not (self.training and many_ranks):
            return super().forward(x)
        with torch.no_grad():
            stats = self._global_statistics(x)
        return _NormalizeOverRanks.apply(
            x, self.weight, self.bias, stats.mean, stats.var, stats.count, self.eps
        )

    def _global_statistics(self, x: torch.Tensor) -> _Statistics:
        """The statistics of all ranks' frames. Updates the moving statistics."""
        # Ranks hold different numbers of frames, so they add up sums, not means.
        rows = x.movedim(1, -1).reshape(-1, x.shape[1]).float()
        num_rows = rows.new_tensor([len(rows)])
        sums = torch.cat([rows.sum(0), (rows * rows).sum(0), num_rows]).double()
        sums *= self.update_stats
        dist.all_reduce(sums)
        count = sums[-1]
        mean, mean_square = (sums[:-1] / count).chunk(2)
        enough = count > 1
        mean = torch.where(enough, mean, self.running_mean)
        var = torch.where(enough, (mean_square - mean**2).clamp_min(0), self.running_var)
        unbiased = var * torch.where(enough, count / (count - 1), 1.0)
        self.running_mean.lerp_(mean.float(), self.momentum)
        self.running_var.lerp_(unbiased.float(), self.momentum)
        self.num_batches_tracked += 1
        # Statistics without a part of this rank's frames are constants for these frames: the
        # gradient is that of infinitely many values.
        infinite = torch.full_like(count, math.inf)
        count = torch.where(enough, count, infinite) if self.update_stats else infinite
        return _Statistics(mean.float(), var.float(), count.float())


class _NormalizeOverRanks(torch.autograd.Function):
    """Normalises with given statistics; gradients pass through them to the frames of every rank.

    With y = w x̂ + b, x̂ = (x - mean) / sqrt(var + eps) over n values (Ioffe & Szegedy 2015):
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
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([dweight, dbias]).float()
        dist.all_reduce(sums)
        factor = weight * torch.rsqrt(var + ctx.eps) / count
        dx -= F.batch_norm(x, mean, var, factor * sums[0], factor * sums[1], False, 0.0, ctx.eps)
        return dx, dweight, dbias, None, None, None, None
