"""The Keras layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import activations, ops

from syncbn import maths, validation
from syncbn.contract import Moments, Operators, Statistics, are_usable, updated
from syncbn.groups import LOCAL, Activation, Group, group_of_arguments
from syncbn.keras import _private, arguments, backend, distribution, dtypes, variables
from syncbn.keras.adjustment import Adjustment

# By identity, those that engines apply themselves, with Keras's slope. Any other, hashable or not, runs after them.
FUSED_ACTIVATIONS = {
    id(activations.linear): None,
    id(activations.relu): Activation("relu"),
    id(activations.silu): Activation("silu"),
    id(activations.leaky_relu): Activation("leaky_relu", 0.2),
}
OPERATORS = Operators(ops.where, ops.maximum, ops.isfinite, ops.all, ops.cast)


@keras.saving.register_keras_serializable(package="syncbn")
class SyncBatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization whose statistics come from all replicas that train the model.

    In training, with mean and variance over the batches of all replicas together,

        y = activation(gamma · (x − mean) / √(variance + epsilon) + beta)
        moving = moving · momentum + batch · (1 − momentum)

    and in inference (`training=False`, or `trainable=False`) the same with the moving mean and variance, without
    communication. Replicas may differ in batch size, mask and spatial size, and some may be empty. A batch that is empty, or
    masked, on every replica leaves the moving statistics as they were; so do, with more than one replica, statistics that are
    not finite. Where there is one replica, or no strategy, this is `keras.layers.BatchNormalization`.

    Call arguments: inputs, of any rank from 2 up and any real dtype; training, a Python bool or None; mask, of the inputs'
    shape without the channel axes (or 1 there), each other axis full or 1. The mask is bool or integer: True, or not 0, where a
    value counts. A masked element enters no statistic but is normalised like any other; where it is not finite it is read as 0.
    Inputs of integers and bools are cast to the compute dtype, or to float32 where that is narrower. The output has the inputs'
    shape, and the dtype of the layer's policy.

    Args:
        axis: the channel axis (int), or several (list). Parameters are [C] for one axis, also in a list, and shaped like the
            input with 1 in the reduced axes for several.
        momentum: weight of the old value in the moving averages, in [0, 1].
        epsilon: added to the variance; 0 or more.
        center, scale: whether there is a beta, a gamma.
        beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer: Keras initializers.
        beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint: Keras regularizers and constraints.
        renorm: batch renormalization: x_hat·r + d takes the place of x_hat, r = stddev / renorm_stddev and
            d = (mean − renorm_mean) / renorm_stddev without gradient, so that training uses what inference will.
        renorm_clipping: dict with any of rmin, rmax, dmax, which clip r to [rmin, rmax] and d to [−dmax, dmax]. A value is a
            number, a scalar tensor or variable (saved as its value), or a callable without arguments that returns one. A
            callable must be registered with Keras to be saved; a compiled step calls it once, when it is traced.
        renorm_momentum: momentum of renorm_mean and renorm_stddev, in [0, 1].
        trainable: if False, the layer always runs in inference mode.
        adjustment: callable that takes the input's shape (tuple; scalar tensors where unknown) and returns (scale, bias). In
            training only, y = ((x_hat·r + d)·scale + bias)·gamma + beta. Each of the two has any shape that broadcasts to the
            input's, or [C]: one value per channel, on whichever axis they are. Each replica draws its own. What is constant
            outside the channel axes costs nothing; anything else takes another pass over memory.
        name: the layer's name.
        group_size: synchronise among consecutive groups of that many replicas; must divide their number. The moving
            statistics are then the average over groups, weighted by count.
        axis_name: on JAX, the mapped axis, or a tuple of them, over which the replicas exchange statistics. It is the name that
            `jax.shard_map`, `pmap` or `vmap` has for it. It wins over a `keras.distribution`. Without either the layer is local
            there, and warns; () says that this is meant.
        activation: anything that `keras.activations.get` takes, applied last.
        **kwargs: `dtype`, `autocast`, `activity_regularizer`, `input_shape`, `input_dim`, as in every Keras layer;
            `synchronized=True` is accepted and dropped.

    Raises:
        TypeError: an axis that is no integer; an `adjustment` that cannot be called; complex or ragged inputs; a mask of floats;
            `training` not known when the layer is called.
        ValueError: any other argument, or shape, that does not fit.
        RuntimeError: training in cross-replica context, under ParameterServerStrategy, or of a layer made outside of its
            strategy's scope; a renorm layer made in a RematScope.
        NotImplementedError: forward-mode differentiation of a training step on TensorFlow.

    Source: TensorFlow 2.2, `tf.keras.layers.experimental.SyncBatchNormalization`; Ioffe and Szegedy 2015
    (arXiv:1502.03167); Ioffe 2017 (arXiv:1702.03275) for renorm.

    Example:
        >>> import numpy as np, syncbn
        >>> layer = syncbn.SyncBatchNormalization()
        >>> y = layer(np.array([[1.0, 10.0], [3.0, 30.0]], "float32"), training=True)
        >>> print(np.round(np.asarray(y), 2))
        [[-1. -1.]
         [ 1.  1.]]
        >>> print(np.round(np.asarray(layer.moving_mean), 2))
        [0.02 0.2 ]
    """

    def __init__(
        self,
        axis: Any = -1,
        momentum: float = 0.99,
        epsilon: float = 0.001,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        renorm: bool = False,
        renorm_clipping: dict[str, Any] | None = None,
        renorm_momentum: float = 0.99,
        trainable: bool = True,
        adjustment: Callable[..., Any] | None = None,
        name: str | None = None,
        *,
        group_size: int | None = None,
        axis_name: str | tuple[str, ...] | None = None,
        activation: Any = None,
        **kwargs: Any,
    ):
        arguments.warn_of_legacy_keras()
        # The base class takes one integer axis and numbers to clip with: it gets none of ours.
        super().__init__(
            momentum=arguments.check_momentum("momentum", momentum),
            epsilon=validation.check_epsilon(epsilon),
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            moving_mean_initializer=moving_mean_initializer,
            moving_variance_initializer=moving_variance_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            trainable=trainable,
            name=name,
            **arguments.check_keywords(type(self).__name__, kwargs),
        )
        self.axis = validation.check_axis(axis)
        # Set here, because Keras knows no renorm before 3.14.
        self.renorm = bool(renorm)
        self.renorm_momentum = arguments.check_momentum("renorm_momentum", renorm_momentum)
        self._clipping = variables.Untracked(validation.check_renorm_clipping(renorm_clipping))
        self.adjustment = arguments.check_adjustment(adjustment)
        self.group_size = validation.check_group_size(group_size)
        self.axis_name = validation.check_axis_name(axis_name)
        self.activation = activations.get(activation)
        self._engine = backend.engine()
        self.supports_jit = self._engine.supports_jit()
        self.moving_stddev = self.renorm_mean = self.renorm_stddev = None

    __repr__ = arguments.described

    @property
    def renorm_clipping(self) -> dict[str, Any] | None:
        """The bounds of r and d, as they were given."""
        return self._clipping.value

    @renorm_clipping.setter
    def renorm_clipping(self, value: dict[str, Any] | None) -> None:
        self._clipping = variables.Untracked(validation.check_renorm_clipping(value))

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Makes the weights, in the order that saved models depend on."""
        self._learn_shape(input_shape)
        if self.scale:
            self.gamma = self._weight("gamma", self.gamma_initializer, self.gamma_regularizer, self.gamma_constraint)
        if self.center:
            self.beta = self._weight("beta", self.beta_initializer, self.beta_regularizer, self.beta_constraint)
        self.moving_mean = self._statistic("moving_mean", self.moving_mean_initializer)
        self.moving_variance = self._statistic("moving_variance", self.moving_variance_initializer)
        if self.renorm:
            self._add_renorm_statistics()

    def _learn_shape(self, input_shape: tuple[int | None, ...]) -> None:
        self._channel_axes = validation.channel_axes(self.axis, input_shape)
        self._built_for = tuple(input_shape)
        self.supports_jit = self._engine.supports_jit()
        arguments.warn_of_half_weights(self)

    def load_own_variables(self, store: Any) -> None:
        """Loads what `save_own_variables` stored. Version 0.1.0 gave weights the input's rank for a list of one axis."""
        own: dict[str, Any] = {}
        self.save_own_variables(own)
        super().load_own_variables({key: variables.in_shape_of(own.get(key), store[key]) for key in store.keys()})  # noqa: SIM118

    def _add_renorm_statistics(self) -> None:
        self.moving_stddev = self._statistic("moving_stddev", self._initial_stddev)
        self.renorm_mean = self._statistic("renorm_mean", variables.again(self.moving_mean_initializer))
        self.renorm_stddev = self._statistic("renorm_stddev", self._initial_stddev)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """The input's shape."""
        if self.built:
            arguments.check_input_shape(input_shape, self._built_for, self._channel_axes)
        else:
            validation.channel_axes(self.axis, input_shape)
        return input_shape

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        """Normalises; see the class."""
        training = arguments.check_training(training) and self.trainable
        mask = arguments.given_or_propagated(mask, inputs, self._channel_axes, training)
        inputs = self._engine.ensure_channels(inputs, self._built_for, self._channel_axes)
        arguments.check_input_shape(inputs.shape, self._built_for, self._channel_axes)
        inputs = ops.cast(inputs, dtypes.of_inputs(inputs.dtype, self.compute_dtype))
        mask = self._full_rank(mask, inputs.shape)
        if mask is not None:
            # Else a NaN in the padding would spread: NaN · 0 is NaN.
            inputs = ops.where(ops.logical_or(mask, ops.isfinite(inputs)), inputs, ops.zeros([], inputs.dtype))
        gamma, beta = self._gamma_and_beta(dtypes.float32_or_wider(inputs.dtype))
        where = {"axes": self._channel_axes, "mask": mask, "group": self._group(), "layer": self.name}
        fused = {"epsilon": self.epsilon, "activation": FUSED_ACTIVATIONS.get(id(self.activation))}
        if training:
            self._engine.check_variables(self.name, self.moving_mean.value, self.moving_variance.value)
        if not training:
            mean, variance = (self._vector(v, gamma.dtype) for v in (self.moving_mean, self.moving_variance))
            y = self._engine.normalize(inputs, Moments(None, mean, variance), gamma, beta, **fused, **where)
        elif self.renorm or self.adjustment is not None:
            y = self._train_step_by_verbs(inputs, gamma, beta, fused, where)
        else:
            y, statistics = self._engine.train_step(inputs, gamma, beta, self._statistics(), **fused, **where)
            self._assign_statistics(statistics)
        if id(self.activation) not in FUSED_ACTIVATIONS:
            y = self.activation(y)
        return ops.cast(y, self.compute_dtype)

    def _statistics(self) -> Statistics:
        """The moving statistics that every layer has, as the engines take them."""
        mean, variance = (self._vector(v, v.dtype) for v in (self.moving_mean, self.moving_variance))
        return Statistics(mean, variance, 1 - self.momentum)

    def _assign_statistics(self, new: Statistics) -> None:
        if not new.assigned:
            self._assign(self.moving_mean, new.mean)
            self._assign(self.moving_variance, new.variance)

    def _train_step_by_verbs(self, inputs: Any, gamma: Any, beta: Any, fused: dict[str, Any], where: dict[str, Any]) -> Any:
        """The output of a training step with renorm or an adjustment: they change gamma and beta between the engine's verbs."""
        self._refuse_recomputed_renorm()
        scale, offset, plain = gamma, beta, None
        if self.adjustment is not None:
            adjustment = Adjustment.of(self.adjustment, inputs, self._channel_axes, gamma.dtype)
            scale, offset = adjustment.scale_and_offset(gamma, beta)
            plain = None if adjustment.per_channel else adjustment
        if plain is not None:
            # Rounded once, after the adjustment and the activation.
            inputs, fused = ops.cast(inputs, gamma.dtype), {**fused, "activation": None}
        moments = self._engine.moments(inputs, **where)
        scale, offset = self._renormed(moments, scale, offset)
        self._update_statistics(moments)
        y = self._engine.normalize(inputs, moments, scale, offset, **fused, **where)
        if plain is None:
            return y
        y = plain.applied(y, gamma, beta, self._channel_axes)
        return self.activation(y) if id(self.activation) in FUSED_ACTIVATIONS else y

    def _renormed(self, moments: Moments, scale: Any, offset: Any) -> tuple[Any, Any]:
        """Scale and offset with renorm's r and d."""
        if not self.renorm:
            return scale, offset
        found = self._engine.record_or_replay(lambda: self._renorm_correction(moments, scale.dtype))
        r, d = self._engine.materialize(*found)
        return r * scale, d * scale + offset

    def _group(self) -> Group:
        """Which replicas this layer meets."""
        if _private.in_symbolic_scope():
            # While Keras infers shapes no replica runs, so none may be waited for.
            return LOCAL
        if self.axis_name is None and keras.backend.backend() == "jax":
            return distribution.group_of(self.group_size, self.weights[0])
        return group_of_arguments(self.axis_name, self.group_size)

    def _renorm_correction(self, moments: Moments, result_dtype: Any) -> tuple[Any, Any]:
        """r and d, clipped, from the statistics before this step moves them."""
        dtype = moments.variance.dtype
        stddev = ops.sqrt(moments.variance + self.epsilon)
        current = self._vector(self.renorm_mean, dtype), self._vector(self.renorm_stddev, dtype)
        given = {"as_array": lambda v: ops.convert_to_tensor(v, dtype), "maximum": ops.maximum, "minimum": ops.minimum}
        r, d = maths.renorm_correction(moments.mean_hi, stddev, *current, self.epsilon**0.5, self.renorm_clipping, **given)
        return ops.cast(ops.stop_gradient(r), result_dtype), ops.cast(ops.stop_gradient(d), result_dtype)

    def _update_statistics(self, moments: Moments) -> None:
        """Moves the statistics towards this batch's, where it has any."""
        may_update = self._engine.should_update_statistics(moments.count, self.renorm)
        usable = are_usable(moments, may_update, OPERATORS)
        if not self.renorm:
            self._assign_statistics(updated(self._statistics(), moments, usable, OPERATORS))
        if not self.renorm or usable is False:
            return
        _, mean, variance = moments.average or (None, moments.mean_hi, moments.variance)
        stddev = ops.sqrt(variance + self.epsilon)

        def update(statistic: Any, batch: Any, momentum: float) -> Any:
            old = self._vector(statistic, statistic.dtype)
            new = ops.where(usable, maths.moving_average(old, ops.cast(batch, old.dtype), momentum), old)
            self._assign(statistic, new)
            return new

        update(self.moving_mean, mean, self.momentum)
        update(self.renorm_mean, mean, self.renorm_momentum)
        update(self.renorm_stddev, stddev, self.renorm_momentum)
        new_stddev = update(self.moving_stddev, stddev, self.momentum)
        new = maths.variance_of_stddev(new_stddev, self.epsilon, maximum=ops.maximum)
        self._assign(self.moving_variance, ops.where(usable, new, self._vector(self.moving_variance, new.dtype)))

    def _full_rank(self, mask: Any, shape: tuple[int | None, ...]) -> Any:
        """The mask as bools of the input's rank."""
        if mask is None:
            return None
        if validation.mask_omits_channels(mask.shape, shape, self._channel_axes):
            mask = ops.expand_dims(mask, self._channel_axes)
        return ops.cast(mask, "bool")

    def _refuse_recomputed_renorm(self) -> None:
        mode = _private.remat_mode(self) if self.renorm else None
        recomputed = mode is not None and (
            mode.mode in ("full", "larger_than") or (mode.mode == "list_of_layers" and self.name in mode.layer_names)
        )
        mend = "Make it outside the scope, or with renorm=False."
        validation.check_renorm_not_recomputed(recomputed, "a layer made in a keras.RematScope", mend)

    def _gamma_and_beta(self, dtype: Any) -> tuple[Any, Any]:
        """gamma and beta, flat, or what stands for them."""
        channels = math.prod(self.moving_mean.shape)
        gamma = ops.ones([channels], dtype) if self.gamma is None else self._vector(self.gamma, dtype)
        beta = ops.zeros([channels], dtype) if self.beta is None else self._vector(self.beta, dtype)
        return gamma, beta

    @staticmethod
    def _vector(weight: Any, dtype: Any) -> Any:
        """A weight as [C]: what the engines know."""
        vector = ops.cast(weight, dtype)
        return vector if len(weight.shape) == 1 else ops.reshape(vector, [-1])

    @staticmethod
    def _assign(weight: Any, vector: Any) -> None:
        weight.assign(vector if len(weight.shape) == 1 else ops.reshape(vector, weight.shape))

    def _weight(
        self, name: str, initializer: Any, regularizer: Any = None, constraint: Any = None, trainable: bool = True
    ) -> Any:
        shape = [size if i in self._channel_axes else 1 for i, size in enumerate(self._built_for)]
        return self.add_weight(
            shape=shape if isinstance(self.axis, tuple) else [shape[self._channel_axes[0]]],
            name=name,
            # Half precision would lose the small steps of moving averages.
            dtype=dtypes.float32_or_wider(self.variable_dtype),
            initializer=initializer,
            regularizer=regularizer,
            constraint=constraint,
            trainable=trainable,
            autocast=False,
        )

    def _statistic(self, name: str, initializer: Any) -> Any:
        return self._weight(name, initializer, trainable=False)

    def _initial_stddev(self, shape: Any, dtype: Any = None) -> Any:
        return ops.sqrt(variables.again(self.moving_variance_initializer)(shape, dtype=dtype))

    def get_config(self) -> dict[str, Any]:
        """Everything that `from_config` needs, as JSON can hold it."""
        config = super().get_config()
        del config["synchronized"]
        clipping = self.renorm_clipping
        return {
            **config,
            "axis": list(self.axis) if isinstance(self.axis, tuple) else self.axis,
            "renorm": self.renorm,
            "renorm_momentum": self.renorm_momentum,
            "renorm_clipping": clipping and {key: arguments.serialized_bound(key, v) for key, v in clipping.items()},
            "adjustment": self.adjustment and arguments.serialized("adjustment", self.adjustment),
            "group_size": self.group_size,
            "axis_name": list(self.axis_name) if isinstance(self.axis_name, tuple) else self.axis_name,
            "activation": activations.serialize(self.activation),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SyncBatchNormalization:
        """The layer that `get_config` describes; reads a plain `BatchNormalization`'s too."""
        config = {key: value for key, value in config.items() if key != "synchronized"}
        for key in ("adjustment", "renorm_clipping"):
            if config.get(key) is not None:
                config[key] = keras.saving.deserialize_keras_object(config[key])
        return super().from_config(config)
