"""The torch module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn import maths, policy, policy_torch
from syncbn.contract import Moments
from syncbn.torch import checkpoint as context
from syncbn.torch import desync as debug
from syncbn.torch import engine

RENORM_BUFFERS = ("moving_stddev", "renorm_mean", "renorm_stddev")


class SyncBatchNorm(_BatchNorm):
    """A drop-in for `torch.nn.SyncBatchNorm` on any device, whose statistics come from all replicas that train the model.

    In training, with mean and (biased) variance over the batches of all replicas together,

        y = activation(weight · (x − mean) / √(variance + eps) + bias + residual)
        running = running · (1 − momentum) + batch · momentum        (the variance unbiased, times n / max(n − 1, 1))

    and in eval the same with the running mean and variance, without communication. Replicas may differ in batch size, mask and
    spatial size, and some may be empty. A batch that is empty, or masked, on every replica leaves the running statistics and
    `num_batches_tracked` as they were; so do, with more than one replica, statistics that are not finite (an overflow under loss
    scaling). Without torch.distributed, or with one replica, this is plain batch norm and never communicates.

    Call arguments: input [N, C, …], any float dtype; mask, bool, of the input's shape without the channels (or 1 there), each
    other axis full or 1, True where a value counts: a masked element enters no statistic but is normalised like any other, and
    is read as 0 where it is not finite; residual, of the input's shape. The output has the input's shape, dtype and memory
    format.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of the new value in the running averages; None for a cumulative average.
        affine: whether there are a weight and a bias.
        track_running_stats: whether there are running statistics; without them eval uses this replica's own batch.
        process_group: the replicas that meet; None for all of them, over a group of the library's own.
        device, dtype: of parameters and buffers.
        bias: False for a weight alone.
        renorm: batch renormalization: x_hat·r + d takes the place of x_hat, r = stddev / renorm_stddev and
            d = (mean − renorm_mean) / renorm_stddev without gradient, so that training uses what eval will. Its running variance
            is biased: max(moving_stddev² − eps, 0).
        renorm_clipping: dict with any of rmin, rmax, dmax, which clip r to [rmin, rmax] and d to [−dmax, dmax]; numbers, tensors
            or callables without arguments.
        renorm_momentum: weight of the new value in renorm_mean and renorm_stddev.
        activation: "relu", "silu", "leaky_relu" (slope 0.01), or any callable, applied last.
        group_size: synchronise among consecutive groups of that many ranks; must divide their number.

    Raises:
        TypeError: an input that is not of a float dtype.
        ValueError: any argument, or shape, that does not fit; one value per channel in training of one process alone.

    Source: `torch.nn.SyncBatchNorm`; Ioffe and Szegedy 2015 (arXiv:1502.03167); Ioffe 2017 (arXiv:1702.03275) for renorm.

    Example:
        >>> import torch, syncbn
        >>> layer = syncbn.SyncBatchNorm(2)
        >>> layer(torch.tensor([[1.0, 10.0], [3.0, 30.0]])).round(decimals=2)
        tensor([[-1., -1.],
                [ 1.,  1.]], grad_fn=<RoundBackward1>)
        >>> layer.running_mean
        tensor([0.2000, 2.0000])
    """

    # On the class, so that a batch norm whose class is swapped for this one has them.
    process_group: Any = None
    renorm: bool = False
    renorm_clipping: dict[str, Any] | None = None
    renorm_momentum: float = 0.01
    group_size: int | None = None
    _activation: str | Callable[[Tensor], Tensor] | None = None
    _name_in_model: str | None = None

    running_mean: Any
    running_var: Any
    moving_stddev: Any
    renorm_mean: Any
    renorm_stddev: Any
    bias: Any

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        renorm: bool = False,
        renorm_clipping: dict[str, Any] | None = None,
        renorm_momentum: float = 0.01,
        activation: str | Callable[[Tensor], Tensor] | None = None,
        group_size: int | None = None,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if affine and not bias:
            self.bias = None
        policy_torch.one_way_to_group(process_group, policy.group_size(group_size))
        self.process_group, self.group_size = process_group, policy.group_size(group_size)
        self.renorm, self.renorm_clipping = bool(renorm), policy.clipping(renorm_clipping)
        self.renorm_momentum = policy_torch.new_value_weight("renorm_momentum", renorm_momentum)
        self.activation = activation
        if self.renorm:
            if not track_running_stats:
                raise policy_torch.renorm_needs_statistics()
            for name in RENORM_BUFFERS:
                self.register_buffer(name, torch.empty_like(self.running_mean))
            self.reset_running_stats()

    @property
    def activation(self) -> Any:
        """What is applied last. A plain attribute of the class would hide a module, which torch keeps among the children."""
        module = self._modules.get("activation")
        return self._activation if module is None else module

    @activation.setter
    def activation(self, value: Any) -> None:
        self._activation = value

    def __setattr__(self, name: str, value: Any) -> None:
        """As torch does, which takes a module past the property; of a module before nothing stays."""
        if name == "activation":
            policy_torch.activation(value)
            self._modules.pop(name, None)
        super().__setattr__(name, value)

    def reset_running_stats(self) -> None:
        """The initial statistics: mean 0, variance 1, no batches."""
        super().reset_running_stats()
        if self.renorm and "renorm_mean" in self._buffers:
            stddev = torch.sqrt(self.running_var + self.eps)
            self.moving_stddev.copy_(stddev)
            self.renorm_stddev.copy_(stddev)
            self.renorm_mean.zero_()

    def reset_parameters(self) -> None:
        """The initial statistics, weight 1 and bias 0."""
        self.reset_running_stats()
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, mask: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Normalises; see the class."""
        if input.is_cuda and self.training and not torch.compiler.is_compiling():
            y = self._in_whole(input, mask, residual)
            if y is not None:
                return self._activated(y)
        if not torch.jit.is_tracing():
            policy_torch.input_shape(input.shape, self.num_features)
        if not input.is_floating_point():
            policy.floating(str(input.dtype), False)
        if residual is not None:
            policy_torch.residual_shape(residual.shape, input.shape)
        if mask is not None:
            mask = _full_rank(mask, input.shape)
            # Else a NaN in the padding would spread: NaN · 0 is NaN.
            input = torch.where(mask | input.isfinite(), input, 0)
        fused = policy_torch.activation(self.activation)
        y = self._normalize(input, mask, residual, fused)
        return self._activated(y)

    def _activated(self, y: Tensor) -> Tensor:
        """What the kernels do not apply, applied."""
        activation = self.activation
        return activation(y) if callable(activation) else y

    def _normalize(self, x: Tensor, mask: Tensor | None, residual: Tensor | None, fused: policy.Activation | None) -> Tensor:
        # Statistics of this batch: in eval, of this replica's own.
        group = self._group() if self.training else policy.ALONE
        uses_batch = self.training or self.running_mean is None
        if uses_batch and mask is None and engine.replicas(group) == 1:
            if x.numel() == x.shape[1] and engine.is_alone():
                raise policy_torch.one_value_per_channel(x.shape)
            if residual is None and fused is None and self._suits_torchs_own(x):
                return self._torchs_own(x)
        extra: dict[str, Any] = {"epsilon": self.eps, "mask": mask, "activation": fused, "residual": residual}
        if not uses_batch:
            scale, offset = self._scale_and_offset(x)
            return engine.normalize(x, Moments(None, self.running_mean, self.running_var), scale, offset, **extra)
        debug.speak_as(self._name_in_model)
        moments = engine.moments(x, mask=mask, group=group)
        scale, offset = self._train(moments, *self._scale_and_offset(x)) if self.training else self._scale_and_offset(x)
        return engine.normalize(x, moments, scale, offset, group=group, **extra)

    def _in_whole(self, x: Tensor, mask: Tensor | None, residual: Tensor | None) -> Tensor | None:
        """A whole training step's forward pass in the fewest launches, with as little host work as there can be.

        None where the engine has no such path, and where something is amiss, which the longer way says.
        """
        shape = x.shape
        if self.renorm or len(shape) < 2 or shape[1] != self.num_features:
            return None
        if (residual is not None and residual.shape != shape) or not x.is_floating_point():
            return None
        if mask is not None:
            mask = _full_rank(mask, shape)
        # Past nn.Module's __getattr__, which costs as much as a launch. A parametrized weight is not there.
        parameters, buffers = self._parameters, self._buffers
        plain = "weight" in parameters and "bias" in parameters
        weight: Tensor | None = parameters["weight"] if plain else self.weight
        bias: Tensor | None = parameters["bias"] if plain else self.bias
        if (weight is None) != (bias is None):
            weight, bias = self._scale_and_offset(x)
        moving = None
        if buffers["running_mean"] is not None and self.track_running_stats and not context.is_local():
            moving = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"], self.momentum
        # The kernels take addresses.
        if not _alike(x, weight, bias) or (moving and (moving[2] is None or not _alike(x, *moving[:2]))):
            return None
        engine.speak_as(self._name_in_model)
        activation = self.activation
        fused = policy_torch.ACTIVATIONS[activation] if isinstance(activation, str) else None
        return engine.whole(x, weight, bias, mask, residual, fused, self.eps, self._group(), moving)

    def _group(self) -> Any:
        if self.process_group is None:
            return self.group_size
        # The compiler's constants are simple: a name.
        return self.process_group.group_name if torch.compiler.is_compiling() else self.process_group

    def _scale_and_offset(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias in the arithmetic's dtype, or what stands for them."""
        dtype = engine.arithmetic_dtype(x)
        new: dict[str, Any] = {"dtype": dtype, "device": x.device}
        scale = torch.ones(self.num_features, **new) if self.weight is None else self.weight.to(dtype)
        return scale, torch.zeros(self.num_features, **new) if self.bias is None else self.bias.to(dtype)

    def _suits_torchs_own(self, x: Tensor) -> bool:
        """Whether torch's own operator does all that is asked for."""
        if self.renorm or x.numel() <= x.shape[1] or torch.compiler.is_compiling():
            return False
        # Torch itself takes no other mixtures of dtypes. (Past nn.Module's __getattr__, which is slow.)
        dtype, parameters = x.dtype, self._parameters
        weight = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401 (parametrized, it is not there)
        for v in (weight, parameters.get("bias"), self._buffers["running_mean"]):
            if v is not None and v.dtype is not dtype:
                return False
        return True

    def _torchs_own(self, x: Tensor) -> Tensor:
        """Torch's operator, which moves the statistics itself."""
        keeps = self.training and self.running_mean is not None and self.track_running_stats and not context.is_local()
        moves = keeps and context.is_first_pass()
        weight = 0.0 if self.momentum is None else self.momentum
        if moves and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                weight = 1.0 / float(self.num_batches_tracked)
        mean, variance = (self.running_mean, self.running_var) if keeps else (None, None)
        if keeps and not moves:
            # A recomputation must save as many tensors as the first pass.
            mean, variance = self.running_mean.clone(), self.running_var.clone()
        return torch.nn.functional.batch_norm(x, mean, variance, self.weight, self.bias, True, weight, self.eps)

    def _train(self, moments: Moments, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and offset of this step; moves the statistics."""
        if not self.renorm:
            self._move(moments)
            return weight, bias
        # Compilers would work them out anew in the backward pass, from statistics that have moved.
        r, d = engine.realized(*context.found_once(lambda: self._renorm_correction(moments, weight.dtype)))
        self._move(moments)
        return r * weight, d * weight + bias

    @torch.no_grad()
    def _renorm_correction(self, moments: Moments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """r and d, clipped, from the statistics before this step moves them."""
        wide = moments.variance.dtype
        r, d = maths.renorm_correction(
            _rounded(moments.mean),
            torch.sqrt(moments.variance + self.eps),
            self.renorm_mean.to(wide),
            self.renorm_stddev.to(wide),
            self.eps**0.5,
            maximum=torch.clamp_min,
        )
        given = {key: v() if callable(v) else v for key, v in (self.renorm_clipping or {}).items()}
        bounds = {key: torch.as_tensor(v, dtype=wide, device=r.device) for key, v in given.items() if v is not None}
        if "rmin" in bounds:
            r = torch.maximum(r, bounds["rmin"])
        if "rmax" in bounds:
            r = torch.minimum(r, bounds["rmax"])
        if "dmax" in bounds:
            d = torch.maximum(torch.minimum(d, bounds["dmax"]), -bounds["dmax"])
        return r.to(dtype), d.to(dtype)

    @torch.no_grad()
    def _move(self, moments: Moments) -> None:
        """Moves the statistics towards this batch's, where it has any."""
        # track_running_stats may be switched off later: torch's own layers read it at every call.
        if self.running_mean is None or not self.track_running_stats:
            return
        # Asked about a tensor that lies in memory: compiled code would write the count there first.
        tracked = self.num_batches_tracked
        may_move = engine.may_move(self.running_mean if tracked is None else tracked, self.renorm)
        if may_move is False:
            return
        count, mean, variance = moments.count, _rounded(moments.mean), moments.variance
        sound = count > 0
        if moments.replicas > 1:
            # Every replica sees the same statistics, so all skip the same steps. One replica does as torch does.
            sound = sound & (mean + variance).isfinite().all()
        if may_move is not True:
            sound = sound & may_move
        weight: Any = self.momentum
        if tracked is not None:
            tracked.add_(sound)
        if weight is None:
            # As torch does, nothing moves where nobody counts.
            weight = 0.0 if tracked is None else 1 / tracked.clamp_min(1).to(variance.dtype)

        def move(statistic: Any, batch: Tensor, weight: Any) -> Tensor:
            old = statistic.to(variance.dtype)
            new = torch.where(sound, maths.moving_average(old, batch, 1 - weight), old)
            statistic.copy_(new)
            return new

        move(self.running_mean, mean, weight)
        if not self.renorm:
            move(self.running_var, variance * (count / (count - 1).clamp_min(1)), weight)
            return
        stddev = torch.sqrt(variance + self.eps)
        move(self.renorm_mean, mean, self.renorm_momentum)
        move(self.renorm_stddev, stddev, self.renorm_momentum)
        moved = move(self.moving_stddev, stddev, weight)
        biased = maths.variance_of_stddev(moved, self.eps, maximum=torch.clamp_min)
        self.running_var.copy_(torch.where(sound, biased.to(self.running_var.dtype), self.running_var))

    def extra_repr(self) -> str:
        """Torch's, and of ours what is not the default."""
        text = (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}"
        )
        for name in ("renorm", "renorm_clipping", "renorm_momentum", "activation", "group_size"):
            value = getattr(self, name)
            # A module shows itself.
            default = None if name == "activation" else getattr(SyncBatchNorm, name)
            if value != default and not isinstance(value, torch.nn.Module):
                text += f", {name}={value!r}"
        return text

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        """A copy in the same process group."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        memo[id(self.process_group)] = self.process_group
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __copy__(self) -> SyncBatchNorm:
        """In the same process group, which `__getstate__` leaves out."""
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __getstate__(self) -> dict[str, Any]:
        """All but the process group, which no file can hold."""
        return {**self.__dict__, "process_group": None}


def _full_rank(mask: Tensor, shape: Any) -> Tensor:
    """The mask as bools of the input's rank."""
    if policy.mask_omits_channels(mask.shape, shape, (1,)):
        mask = mask.unsqueeze(1)
    return mask.to(torch.bool)


def _alike(x: Tensor, a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two vectors, or neither, lie close packed, in one dtype, on the device of x."""
    if a is None or b is None:
        return a is b
    # get_device(): a number, where two devices take longer to compare.
    return a.is_contiguous() and b.is_contiguous() and a.dtype is b.dtype and a.get_device() == b.get_device() == x.get_device()


def _rounded(mean: Any) -> Tensor:
    return mean[0] + mean[1] if isinstance(mean, tuple) else mean
