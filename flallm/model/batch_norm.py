"""BatchNorm over the frames of one rank or of all ranks."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


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
