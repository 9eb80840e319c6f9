"""The torch module."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from syncbn import contract, maths
from syncbn.contract import Moments, Statistics
from syncbn.groups import LOCAL, Activation
from syncbn.torch import desync, dtensor, engine
from syncbn.torch._private import _BatchNorm, tracing_state
from syncbn.torch.arguments import check_activation, check_input, check_mask, check_weight, refuse_epsilon
from syncbn.torch.failures import name_on_the_stack
from syncbn.torch.groups import GroupMoments, check_one_group
from syncbn.torch.replaced import warn_if_replaced
from syncbn.validation import check_epsilon, check_float_dtype, check_group_size, check_renorm_clipping

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

    Call arguments:
        input: [N, C, …], of float16, bfloat16, float32 or float64. A DTensor that is replicated, or sharded along the batch,
            gives a DTensor.
        mask: bool or integer, of the input's shape without the channels (or 1 there), each other axis full or 1. True, or not
            0, marks what counts. A masked element enters no statistic but is normalised like any other. It is read as 0 where
            it is not finite.
        residual: of the input's shape.
    The output has the input's shape, dtype and memory format.

    Args:
        num_features: C.
        eps: added to the variance. With 0 a constant channel is normalised to 0.
        momentum: weight of the new value in the running averages, in [0, 1]; None for a cumulative average.
        affine: whether there are a weight and a bias.
        track_running_stats: whether there are running statistics; without them eval uses this replica's own batch.
        process_group: the replicas that communicate; None for all of them, over a group of the library's own. Not together
            with group_size.
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
        TypeError: an input that is not of a float dtype; a mask of a float dtype; `epsilon`, which is called eps here.
        ValueError: any argument, or shape, that does not fit; one value per channel in training of one process, or of a group
            of one.
        RuntimeError: training under torch.jit.trace, forward-mode differentiation or a transform of torch.func, where torch's
            own operator does not serve; torch.jit.script; a message between ranks that failed; renorm in a checkpointed block
            without `checkpoint_contexts`.

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

    @refuse_epsilon
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
        check_epsilon(eps, "eps")
        if momentum is not None:
            check_weight("momentum", momentum)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if affine and not bias:
            self.bias = None
        self.process_group, self.group_size = process_group, check_group_size(group_size)
        check_one_group(process_group, self.group_size)
        self.renorm, self.renorm_clipping = bool(renorm), check_renorm_clipping(renorm_clipping)
        self.renorm_momentum = check_weight("renorm_momentum", renorm_momentum)
        self.activation = activation
        if self.renorm:
            if not track_running_stats:
                raise ValueError(
                    "renorm=True corrects towards the moving statistics, so they must be kept. Received: track_running_stats="
                    "False. Set it to True, or renorm=False."
                )
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
            check_activation(value)
            self._modules.pop(name, None)
        super().__setattr__(name, value)

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """`syncbn.convert(module, process_group=process_group)`, by the name that torch's own class has for it."""
        # Not at the top: the conversion imports this module.
        return importlib.import_module("syncbn.conversion").convert(module, process_group=process_group)

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
        if type(input) is not Tensor and dtensor.is_dtensor(input):
            return dtensor.forward(self, input, mask, residual)
        activation, uses_batch = self.activation, self.training or self.running_mean is None
        fused = None if activation is None else check_activation(activation)
        mask = self._checked(input, mask, residual, uses_batch)
        if not uses_batch:
            y = self._evaluate(input, mask, fused, residual)
        elif self.renorm and self.training:
            y = self._renorm_step(input, mask, fused, residual)
        else:
            y = self._train_step(input, mask, fused, residual)
        return activation(y) if callable(activation) else y

    def _checked(self, x: Tensor, mask: Tensor | None, residual: Tensor | None, uses_batch: bool) -> Tensor | None:
        """The mask, of the input's rank; raises where an argument does not fit."""
        shape, channels = x.shape, self.num_features
        # While tracing, sizes are not numbers to compare.
        if tracing_state() is None and (
            len(shape) < 2 or shape[1] != channels or not channels or (uses_batch and x.numel() <= channels)
        ):
            check_input(x, channels, uses_batch and mask is None and self._is_alone())
        if not x.is_floating_point():
            check_float_dtype(str(x.dtype), False)
        if residual is not None and residual.shape != shape:
            raise ValueError(
                f"`residual` must have the input's shape. Received: residual of shape {tuple(residual.shape)} for an input of "
                f"shape {tuple(shape)}. Expand or reshape it."
            )
        return None if mask is None else check_mask(mask, shape)

    def _evaluate(self, x: Tensor, mask: Tensor | None, activation: Activation | None, residual: Tensor | None) -> Tensor:
        """With the running statistics."""
        scale, offset = engine.scale_and_offset(x, self.weight, self.bias)
        constants = Moments(None, self.running_mean, self.running_var)
        given: dict[str, Any] = {"epsilon": self.eps, "activation": activation, "residual": residual}
        return engine.normalize(engine.readable(x, mask), constants, scale, offset, mask=mask, **given)

    def _train_step(self, x: Tensor, mask: Tensor | None, activation: Activation | None, residual: Tensor | None) -> Tensor:
        """With this batch's statistics; in eval, for want of running ones, of this replica's own batch."""
        # Past nn.Module's __getattr__, which costs as much as a launch. A parametrized weight is not there.
        parameters, buffers = self._parameters, self._buffers
        whole = "weight" in parameters and "bias" in parameters
        weight, bias = (parameters["weight"], parameters["bias"]) if whole else (self.weight, self.bias)
        statistics, mean = None, buffers["running_mean"]
        if mean is not None and self.training and self.track_running_stats:
            statistics = Statistics(mean, buffers["running_var"], self.momentum, True, buffers["num_batches_tracked"])
        y, new = engine.train_step(
            x,
            weight,
            bias,
            statistics,
            epsilon=self.eps,
            mask=mask,
            group=self._group() if self.training else LOCAL,
            activation=activation,
            residual=residual,
            layer=self._name(),
        )
        if new is not None and not new.assigned:
            self._assign(running_mean=new.mean, running_var=new.variance, num_batches_tracked=new.batches)
        return y

    def _renorm_step(self, x: Tensor, mask: Tensor | None, activation: Activation | None, residual: Tensor | None) -> Tensor:
        """With r and d, from the statistics before this step updates them."""
        x, where = engine.readable(x, mask), {"mask": mask, "group": self._group(), "layer": self._name()}
        moments = engine.moments(x, **where)
        scale, offset = engine.scale_and_offset(x, self.weight, self.bias)
        # Compilers would work them out anew in the backward pass, from statistics that have changed.
        r, d = engine.materialize(*engine.record_or_replay(lambda: self._renorm_correction(moments, scale.dtype)))
        self._update_renorm_statistics(moments)
        given: dict[str, Any] = {"epsilon": self.eps, "activation": activation, "residual": residual}
        return engine.normalize(x, moments, r * scale, d * scale + offset, **given, **where)

    def _name(self) -> str | None:
        """Its name for messages. In the debug mode it gets one at its first call."""
        if desync.enabled() and self._name_in_model is None and not torch.compiler.is_compiling():
            self._name_in_model = name_on_the_stack() or f"{type(self).__name__}({self.num_features})"
        return self._name_in_model

    def _is_alone(self) -> bool:
        """Whether no other process shares the statistics of this pass, as far as the arguments tell."""
        if not self.training or self.group_size == 1 or engine.is_single_process():
            return True
        size = getattr(self.process_group, "size", None)
        return size is not None and not torch.compiler.is_compiling() and size() == 1

    def _group(self) -> Any:
        if self.process_group is None:
            return self.group_size
        # The compiler's constants are simple: a name.
        return self.process_group.group_name if torch.compiler.is_compiling() else self.process_group

    @torch.no_grad()
    def _renorm_correction(self, moments: GroupMoments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """r and d, clipped."""
        wide = moments.variance.dtype
        stddev = torch.sqrt(moments.variance + self.eps)
        current = self.renorm_mean.to(wide), self.renorm_stddev.to(wide)
        given = {
            "as_array": lambda v: torch.as_tensor(v, dtype=wide, device=stddev.device),
            "maximum": torch.maximum,
            "minimum": torch.minimum,
        }
        r, d = maths.renorm_correction(moments.mean, stddev, *current, self.eps**0.5, self.renorm_clipping, **given)
        return r.to(dtype), d.to(dtype)

    @torch.no_grad()
    def _update_renorm_statistics(self, moments: GroupMoments) -> None:
        """Updates the statistics towards this batch's, where it has any."""
        # track_running_stats may be switched off later: torch's own layers read it at every call.
        if not self.track_running_stats:
            return
        batches = self.num_batches_tracked
        # Asked about a tensor that lies in memory: compiled code would write the count there first.
        may_update = engine.should_update_statistics(self.running_mean if batches is None else batches, True)
        stddev = torch.sqrt(moments.variance + self.eps)
        usable = contract.are_usable(moments, may_update, engine.OPERATORS)
        if usable is False:
            return
        of_stddev = GroupMoments(moments.count, moments.mean, stddev, moments.replicas)
        moving = Statistics(self.running_mean, self.moving_stddev, self.momentum, batches=batches)
        renorm = Statistics(self.renorm_mean, self.renorm_stddev, self.renorm_momentum)
        moving, renorm = (contract.updated(v, of_stddev, usable, engine.OPERATORS) for v in (moving, renorm))
        biased = maths.variance_of_stddev(moving.variance.to(stddev.dtype), self.eps, maximum=torch.clamp_min)
        self._assign(
            running_mean=moving.mean,
            moving_stddev=moving.variance,
            num_batches_tracked=moving.batches,
            renorm_mean=renorm.mean,
            renorm_stddev=renorm.variance,
            running_var=torch.where(usable, biased.to(self.running_var.dtype), self.running_var),
        )

    @torch.no_grad()
    def _assign(self, **values: Tensor | None) -> None:
        """Writes new values into buffers of these names."""
        for name, value in values.items():
            if value is not None:
                getattr(self, name).copy_(value)

    def extra_repr(self) -> str:
        """Torch's, and of ours what is not the default."""
        text = super().extra_repr()
        for name in ("renorm", "renorm_clipping", "renorm_momentum", "activation", "group_size"):
            value = getattr(self, name)
            # A module shows itself.
            default = None if name == "activation" else getattr(SyncBatchNorm, name)
            if value != default and not isinstance(value, torch.nn.Module):
                text += f", {name}={value!r}"
        return text

    def named_children(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """Torch's; warns where a converter of torch or timm asks, which replaces this layer."""
        warn_if_replaced(self)
        return super().named_children()

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script asks of each module before it compiles it."""
        raise RuntimeError(
            "torch.jit.script cannot compile a synchronised layer. Received: a SyncBatchNorm, or a model that holds one. Use "
            "torch.jit.trace or torch.export in eval mode, or script the model that syncbn.revert gives."
        )

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
