"""What JAX does not publish, or only as an experiment, and the engine needs."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

try:
    # Keeps a call from being inlined: only then does XLA on the CPU compute an array once for several readers. Without it the
    # engine is slower, and right.
    from jax.experimental.xla_metadata import set_xla_metadata
except ImportError:
    set_xla_metadata = None  # type: ignore[assignment]

try:
    # Operators of one's own. `lax.platform_dependent` is public, but it is a branch in the program: under vmap with a
    # spmd_axis_name JAX finds that its branches have different types.
    from jax.extend.core import Primitive
    from jax.interpreters import ad, batching, mlir
except ImportError:
    Primitive = None  # type: ignore[assignment, misc]


def identity_operator(name: str, cpu: Callable[[Any], Any], default: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """An operator that returns its argument, compiled as `cpu` on the CPU and as `default` on every other platform.

    The platform is known when a program is lowered, so a program that a CPU machine compiles for GPUs gets the GPU's form.
    Without the names that this needs it is `default` everywhere.
    """
    if Primitive is None:
        return default
    operator = Primitive(name)
    operator.def_impl(lambda v: v)
    operator.def_abstract_eval(lambda v: v)
    ad.deflinear2(operator, lambda ct, v: [operator.bind(ct)])
    batching.defvectorized(operator)
    mlir.register_lowering(operator, mlir.lower_fun(cpu, multiple_results=False), platform="cpu")
    mlir.register_lowering(operator, mlir.lower_fun(default, multiple_results=False))
    return operator.bind


def operator_for_cuda(name: str, default: Callable[..., Any], cuda: Callable[..., Any], results: int) -> Callable[..., Any]:
    """An operator of arrays, compiled as `cuda` on NVIDIA's GPUs and as `default` elsewhere. The two compute the same.

    Every result has the type of the last argument. Derivatives and batches are those of `default`. Without the names that
    this needs it is `default` everywhere.
    """
    if Primitive is None:
        return default
    operator = Primitive(name)
    operator.multiple_results = True
    operator.def_impl(default)
    operator.def_abstract_eval(lambda *avals, **static: [avals[-1]] * results)

    def differentiated(primals: Any, tangents: Any, **static: Any) -> Any:
        moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

        def of_moving(*values: Any) -> Any:
            replaced = dict(zip(moving, values, strict=True))
            return default(*[replaced.get(i, v) for i, v in enumerate(primals)], **static)

        return jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])

    def batched(arguments: Any, axes: Any, **static: Any) -> Any:
        return jax.vmap(lambda *v: default(*v, **static), axes)(*arguments), [0] * results

    ad.primitive_jvps[operator] = differentiated
    batching.primitive_batchers[operator] = batched
    mlir.register_lowering(operator, mlir.lower_fun(cuda, multiple_results=True), platform="cuda")
    mlir.register_lowering(operator, mlir.lower_fun(default, multiple_results=True))
    return operator.bind


def _typed_as_equal(aval: Any, *, axes: frozenset[str]) -> Any:
    with contextlib.suppress(AttributeError):
        kind = aval.manual_axis_type
        return aval.update(manual_axis_type=kind.update(varying=kind.varying - axes))
    return aval.update(vma=aval.vma - axes)


def _equal_along_operator() -> Any:
    operator = Primitive("syncbn_equal_along")
    operator.def_impl(lambda v, axes: v)
    operator.def_abstract_eval(_typed_as_equal)
    batching.defvectorized(operator)
    mlir.register_lowering(operator, mlir.lower_fun(lambda v, axes: v, multiple_results=False))
    return operator


_EQUAL_ALONG = None if Primitive is None else _equal_along_operator()


def equal_along(v: Any, axes: frozenset[str]) -> Any:
    """v, which is equal along these axes, typed so. JAX itself types a value so only after a message. Without gradient."""
    return v if not axes or _EQUAL_ALONG is None else _EQUAL_ALONG.bind(v, axes=axes)


def gather_invariant(v: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """[replicas, …] along typed axes, typed as the same on all replicas. Before JAX 0.10 no public function does that."""
    if "to" in inspect.signature(lax.all_gather).parameters:
        return lax.all_gather(v, names, to="invarying")
    try:
        from jax._src.lax.parallel import all_gather_invariant
    except ImportError as error:
        raise RuntimeError(
            'syncbn needs a gather whose result is typed as invariant: jax.lax.all_gather(…, to="invarying"), or JAX\'s own '
            f"`all_gather_invariant`. Received: JAX {jax.__version__}, which has neither. Install JAX 0.10, or use "
            "shard_map(…, check_vma=False)."
        ) from error
    return all_gather_invariant(v, names)


def to_varying(v: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """v, typed as varying along these axes, along which it was the same on all replicas."""
    if hasattr(lax, "pcast"):
        return lax.pcast(v, names, to="varying")
    former: Any = lax  # before JAX 0.8
    return former.pvary(v, names)


def varying_axes(v: Any) -> frozenset[str]:
    """The axes along which a typed value differs between replicas. The attribute has had two names."""
    kind = jax.typeof(v)
    with contextlib.suppress(AttributeError):
        return kind.manual_axis_type.varying
    try:
        return kind.vma
    except AttributeError as error:
        raise RuntimeError(
            "syncbn needs the axes along which an array varies: `jax.typeof(x).manual_axis_type` or `.vma`. Received: JAX "
            f"{jax.__version__}, which has neither. Install JAX 0.10, or a later version of syncbn."
        ) from error
