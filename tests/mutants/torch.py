"""Faults in what runs on torch."""

from __future__ import annotations

from mutants import Mutant

GROUPS, AUTOGRAD, CONTEXT, ENGINE = (f"torch/{name}.py" for name in ("groups", "autograd", "checkpoint", "engine"))
EAGER, NATIVE, LAYER, KERAS = "torch/reference.py", "torch/cpu.py", "torch/module.py", "keras/layer.py"
ENGINE_TESTS, ALONE, RANKS, TRAINING = (
    f"torch/test_{name}.py" for name in ("engine_torch", "layer_torch", "layer_torch_ranks", "torch_training")
)

MESSAGE = "return torch.cat([n[None], *maths.raw_sums(n, k.to(wide), s.to(wide), q.to(wide))])"
SUM = "lanes.exchange_sums(message, how.link)"
RAGGED = "concatenated and ragged-step]"
MUTANTS = [
    Mutant("no collective", GROUPS, "    if link is not None:\n        dist.all_reduce", "    if False:\n        dist.all_reduce", ENGINE_TESTS, RAGGED),
    Mutant("mean of means", EAGER, MESSAGE, MESSAGE.replace("return", "m =") + "\n    return m / m[0].clamp_min(1)", ENGINE_TESTS, RAGGED),
    Mutant("E[x²] − E[x]² in float32", EAGER, MESSAGE, MESSAGE + ".float().double()", ENGINE_TESTS, "one_process and large"),
    Mutant("lo dropped from normalize", NATIVE, "norm.offset - lo * (norm.scale * rstd)", "norm.offset", ENGINE_TESTS, "one_process and large"),
    Mutant("x − hi not formed first", NATIVE, "if x.numel() > SMALL and (hi * rstd).abs().max().item() < NEAR:", "if True:", ENGINE_TESTS,
           "one_process and large"),
    Mutant("dropped term in the input gradient", NATIVE, "a / rstd, b)", "0 * a, b)", ENGINE_TESTS, "one_process and ragged"),
    Mutant("local count in the backward pass", AUTOGRAD, "input_gradient(dz, x, mask, norm, count, message) if needs_x",
           "input_gradient(dz, x, mask, norm, count / how.link.size, message) if needs_x", ENGINE_TESTS, RAGGED),
    Mutant("message times a local scale", AUTOGRAD, SUM, "message = lanes.exchange_sums(sums.clone(), how.link) * scale.repeat(2)",
           ENGINE_TESTS, "concatenated and differ-step]"),
    Mutant("moments are constants of the second derivative", AUTOGRAD, "centred = x - mean_of(x)", "centred = x - mean_of(x).detach()",
           ENGINE_TESTS, "gradgradcheck"),
    Mutant("mask forgotten in the count", EAGER, "return mask.sum() * each", "return size", ENGINE_TESTS, "one_process and masked"),
    Mutant("mask forgotten in the backward pass", EAGER, "through = torch.where(mask, through, 0)", "pass", ENGINE_TESTS, "one_process and masked"),
    Mutant("naive float32 sums", NATIVE, "BLOCK_ROWS = 4096", "BLOCK_ROWS = 10**9", ENGINE_TESTS, "million"),
    Mutant("groups ignored", GROUPS, "size = world // policy.groups(world, group)", "size = world", ENGINE_TESTS, "test_groups and ragged"),
    Mutant("the activation's other side", EAGER, "return torch.where(z > 0, dy,", "return torch.where(z < 0, dy,", ENGINE_TESTS, "activation and relu and eager"),
    Mutant("counts as floats", ENGINE, "payload = torch.cat([n.to(torch.int32)[None]", "payload = torch.cat([n.float()[None].view(torch.int32)",
           ENGINE_TESTS, "without_float64 and ragged"),
    Mutant("moving statistics from local moments", LAYER, "self._train(moments, *self._scale", "self._train(engine.moments(x, mask=mask, group=policy.ALONE), *self._scale",
           RANKS, "concatenated and ragged-None"),
    Mutant("statistics move at count 0", LAYER, "sound = count > 0", "sound = count > -1", ALONE, "nothing_moves"),
    Mutant("statistics that are not finite move", LAYER, "sound = sound & (mean + variance).isfinite().all()", "pass", RANKS, "says_nothing and nan"),
    Mutant("the running variance biased", LAYER, "variance * (count / (count - 1).clamp_min(1))", "variance", ALONE, "equals_torch and ours"),
    Mutant("momentum the wrong way round", LAYER, "maths.moving_average(old, batch, 1 - weight)", "maths.moving_average(old, batch, weight)",
           ALONE, "equals_torch and ours"),
    Mutant("a message in eval", LAYER, "group = self._group() if self.training else policy.ALONE", "group = self._group()", RANKS, "eval_and_local"),
    Mutant("a group that is gone taken for all", "torch/groups.py", "raise policy_torch.group_is_gone(self.name)", "pass", RANKS, "go_and_come"),
    Mutant("inputs not apart in a second derivative", "torch/autograd.py", "v.view_as(v) if v.requires_grad", "v if v.requires_grad", "torch/test_layer_torch.py", "share_a_history"),
    Mutant("a module as activation hidden", LAYER, "self._activation if module is None else module", "self._activation", "torch/test_layer_torch.py", "module_as_activation"),
    Mutant("r and d compiled anew", LAYER, "r, d = engine.realized(*context.found_once(lambda: self._renorm_correction(moments, weight.dtype)))", "r, d = self._renorm_correction(moments, weight.dtype)", "torch/test_layer_torch.py", "compiled_in_float64"),
    Mutant("Keras's r and d compiled anew", KERAS, "r, d = self._engine.materialize(*found)", "r, d = found", "keras/test_layer_keras_torch.py", "renorm_compiled"),
    Mutant("fake constants kept", "torch/cpu.py", "if type(x) is not Tensor:", "if False:", "torch/test_layer_torch.py", "fake_tensors"),
    Mutant("one tensor twice in a compiled function", "torch/compiled.py", "if residual is x:", "if False:", "torch/test_layer_torch.py", "compiled_in_float64"),
    Mutant("messages between taken for a change", "torch/compiled.py", "= torch.autograd._unsafe_preserve_version_counter(_state)",
           "= torch.no_grad()", TRAINING, "between_a_forward and aot_eager and last"),
    Mutant("a module as activation that stays", LAYER, "self._modules.pop(name, None)", "pass", ALONE, "can_be_changed"),
    Mutant("gradients that cannot be batched", EAGER, "return sums.reshape(-1),", "return sums.flatten(),", ALONE, "batched_gradients"),
    Mutant("a batch counted where nobody counts", LAYER, "if moves and self.num_batches_tracked is not None:", "if moves:", ALONE, "nobody_counts"),
    Mutant("statistics move where nobody counts", LAYER, "weight = 0.0 if tracked is None else", "weight = 1.0 if tracked is None else", ALONE, "nobody_counts"),
    Mutant("both backward passes called alike", "torch/desync.py", "if torch.is_grad_enabled() else", "if False else", RANKS, "create_graph"),
    Mutant("groups kept past their end", "torch/groups.py", "group.size(), process_group.group_name, weakref.ref(process_group))",
           "group.size(), process_group.group_name, lambda: process_group)", RANKS, "go_and_come"),
    Mutant("the backward pass of local statistics is not", ENGINE, "link = None if alone else link_of(group)", "link = link_of(group)", RANKS, "local_in_both"),
    Mutant("statistics move in the recomputation", CONTEXT, "return torch._C._current_graph_task_id() == -1", "return True", TRAINING, "one_process_moves"),
    Mutant("a recomputation that sends again", CONTEXT, "found = replayed[0] if replayed else find()", "found = find()", TRAINING, "test_checkpointing and one-recorded]"),
    Mutant("renorm recomputed", ENGINE, "if renorm and not first and not context.is_replayed():", "if False:", TRAINING, "without_a_record and one"),
    Mutant("r and d after the statistics moved", LAYER,
           "        r, d = engine.realized(*context.found_once(",
           "        self._move(moments)\n        r, d = engine.realized(*context.found_once(",
           ALONE, "renorm_by_formula"),
    Mutant("padding that is not finite spreads", LAYER, "input = torch.where(mask | input.isfinite(), input, 0)", "pass", ALONE, "test_mask"),
    Mutant("the group saved with the layer", LAYER, '{**self.__dict__, "process_group": None}', "self.__dict__", RANKS, "left_out_of_files"),
]  # fmt: skip

# Two processes tell as much as four.
OPTIONS = ("--replicas", "2")
