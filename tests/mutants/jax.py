"""Faults in what runs on JAX."""

from __future__ import annotations

from mutants import Mutant

MATHS = "maths.py"
ENGINE, MAPPED, AXES, XLA = "jax/engine.py", "jax/mapped.py", "jax/axes.py", "jax/xla.py"
LAYER, DISTRIBUTION, FUNCTIONAL = "keras/layer.py", "keras/distribution.py", "functional.py"
ENGINE_TESTS, LAYER_TESTS, FUNCTIONAL_TESTS = "jax/test_engine_jax.py", "jax/test_layer_jax.py", "jax/test_functional_jax.py"
MUTANTS = [
    Mutant("types are not read", "jax/_private.py", "return kind.manual_axis_type.varying", "return frozenset()", "jax/test_private_jax.py", "still_says"),
    Mutant("a former gather is not found", "jax/_private.py", 'if "to" in inspect.signature(lax.all_gather).parameters:', "if True:",
           "jax/test_private_jax.py", "typed_as_the_same and True"),
    Mutant("a former name of pcast is not found", "jax/_private.py", 'if hasattr(lax, "pcast"):', "if True:", "jax/test_private_jax.py", "becomes_varying and True"),
    Mutant("no collective", AXES, "return self.size == 1 and not self.checked", "return True", ENGINE_TESTS, "batch and ragged-unchecked"),
    Mutant("mean of means", MAPPED, "    counts = counts if members is True", "    counts = jnp.minimum(counts, 1)\n    counts = counts if members is True",
           ENGINE_TESTS, "batch and ragged-checked"),
    Mutant("E[x²] − E[x]² in float32", MAPPED, "    k = _pivot(x, layout) if sampled else rounded(layout.sum(_where(mask, x)) / at_least_one)\n",
           "    k = jnp.zeros(layout.sum(x).shape, wide)\n",
           ENGINE_TESTS, "batch and large and -checked"),
    Mutant("mean rounded before the merge", MAPPED, "    return n, k, r,", "    return n, k, 0 * r,",
           ENGINE_TESTS, "batch and large and -checked"),
    Mutant("the pivot not rounded", XLA, "    return jnp.maximum(v, jnp.finfo(v.dtype).min)", "    return v", ENGINE_TESTS, "batch and large and -checked"),
    Mutant("lo dropped from normalize", MATHS, "return a, offset - lo * a", "return a, offset", ENGINE_TESTS, "batch and large and -checked"),
    Mutant("dropped term in the input gradient", MAPPED, "layout.spread(a) * rest + layout.spread(b)", "layout.spread(b) + 0 * rest",
           ENGINE_TESTS, "batch and ragged-checked"),
    Mutant("moving statistics from local moments", "contract.py", "statistics = updated(statistics, measured,",
           "statistics = updated(statistics, moments(x, axes=axes, mask=mask),", LAYER_TESTS, "mapped_step and unchecked and masked"),
    Mutant("local count in the backward pass", MAPPED, "Measured(moments.count.astype(wide), hi", "Measured(moments.count.astype(wide) / replicas.size, hi",
           ENGINE_TESTS, "batch and ragged-checked"),
    Mutant("message times a local scale", MAPPED, "message = [scale * sum_dy, scale * dscale]", "message = [sum_dy, dscale]",
           ENGINE_TESTS, "batch and differ-checked"),
    Mutant("local sums for a replicated parameter", MAPPED, "all_dscale if plan.scale_is_total else dscale", "dscale",
           ENGINE_TESTS, "total_gradients"),
    Mutant("moments are constants of the second derivative", MAPPED, "    n, hi, lo, variance = _attach(plan, x, mask, measured)", "    n, hi, lo, variance = measured",
           ENGINE_TESTS, "second_order and None-checked-None"),
    Mutant("mask forgotten in the backward pass", MAPPED, "through = _where(mask, ", "through = _where(None, ", ENGINE_TESTS, "batch and masked-checked"),
    Mutant("mask forgotten in the second derivative", MAPPED, "dx = _where(mask, tangents[0]", "dx = _where(None, tangents[0]", ENGINE_TESTS, "second_order and rows-checked-None"),
    Mutant("members of other groups are summed", AXES, "jnp.where(mine, groups[own], jnp.zeros([], v.dtype)).sum(0)", "groups[own].sum(0)", ENGINE_TESTS, "uneven and equal and unchecked and gathered"),
    Mutant("groups averaged without their counts", MAPPED, "weights = counts.astype(hi.dtype) / jnp.maximum(total, 1).astype(hi.dtype)", "weights = jnp.ones_like(hi) / len(hi)",
           ENGINE_TESTS, "uneven and equal and unchecked and gathered"),
    Mutant("two sums about a rounded mean", MAPPED, "rest = (k - m[replicas.own_group()]) + r", "rest = rounded(k + r) - m[replicas.own_group()]", ENGINE_TESTS, "two_sums_on and large and -checked"),
    Mutant("a message a moment", MAPPED, "rows, members = replicas.by_group(replicas.gather(jnp.concatenate([n.astype(bits)[None], floats])))",
           "rows, members = replicas.by_group(jnp.concatenate([replicas.gather(n.astype(bits)[None]), *(replicas.gather(v) for v in jnp.split(floats, 3))], 1))",
           ENGINE_TESTS, "one_collective and None and unchecked"),
    Mutant("moments without their name", MAPPED, "checkpoint_name(v, MOMENTS)", "v", LAYER_TESTS, "checkpoint and saved"),
    Mutant("no shard_map over the distribution's mesh", DISTRIBUTION, "    if found is None or", "    if True or", LAYER_TESTS, "when_sharded and data"),
    Mutant("channels gathered under ModelParallel", DISTRIBUTION, "return None if len(axes) != 1 or axes[0] == found.batch_dim_name else axes[0]", "return None", LAYER_TESTS, "when_sharded and channels"),
    Mutant("the distribution wins over axis_name", LAYER, "if self.axis_name is None and keras", "if keras", LAYER_TESTS, "wins_over"),
    Mutant("statistics that are not finite move", "contract.py", "usable = usable & (finite if", "usable = usable | (finite if",
           LAYER_TESTS, "says_nothing and nan"),
    Mutant("padding that is not finite spreads", FUNCTIONAL, "x = dialect.operators.where(mask | dialect.isfinite(x), x, dialect.operators.zeros_like(x))", "pass",
           FUNCTIONAL_TESTS, "padding"),
]  # fmt: skip
