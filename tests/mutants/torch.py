"""Faults in what runs on torch."""

from __future__ import annotations

from mutants import Mutant

GROUPS, TRANSPORT, AUTOGRAD, CHECKPOINT, ENGINE = (
    f"torch/{name}.py" for name in ("groups", "transport", "autograd", "checkpoint", "engine")
)
REFERENCE, CPU, LAYER, KERAS, CONTRACT = "torch/reference.py", "torch/cpu.py", "torch/module.py", "keras/layer.py", "contract.py"
ENGINE_TESTS, ONE_PROCESS, RANKS, TRAINING = (
    f"torch/test_{name}.py" for name in ("engine_torch", "layer_torch", "layer_torch_ranks", "torch_training")
)

LOCAL, FAILURES = "torch/test_local_torch.py", "torch/test_failures_torch.py"
PRIVATE, COMPILED, STATE = (f"torch/{name}.py" for name in ("_private", "compiled", "local"))
# Threads' state that is held by other means.
IMPORTED = "from syncbn.torch._private import get_obj_in_tls, is_key_in_tls, remove_obj_from_tls, stash_obj_in_tls"
THREADS = """import threading
import types

_state = {kind}()
is_key_in_tls, get_obj_in_tls = (lambda key: hasattr(_state, "v")), (lambda key: True)
stash_obj_in_tls, remove_obj_from_tls = (lambda key, v: setattr(_state, "v", v)), (lambda key: delattr(_state, "v"))"""
DROP_IN, DROP_IN_RANKS = "torch/test_drop_in_torch.py", "torch/test_drop_in_ranks.py"

MESSAGE = "return torch.cat([n[None], *maths.raw_sums(n, k.to(wide), s.to(wide), q.to(wide))])"
SUM = "global_sums(partial_sums, config.communicator)"
RAGGED = "concatenated and ragged-step]"
MUTANTS = [
    Mutant("strides of axes of length 1 go to torch", ENGINE, "restrides = _may_have_wrong_gradient(x, weight, bias)", "restrides = False", ONE_PROCESS, "any_number and plain and eval"),
    Mutant("sizes are compared in an export", ENGINE, "and not torch.compiler.is_compiling()\n        and tracing_state() is None\n        and not count_dispatch_modes()", "and tracing_state() is None", "torch/test_export_torch.py", "depends_on_data and 4"),
    Mutant("an output with an axis of length 1 is a view", ENGINE, "        y.register_hook(_restrided_gradient)\n", "        y = _restrided(y)\n", ONE_PROCESS, "no_view"),
    Mutant("a hook takes every gradient", ENGINE, "return None if dy is None or is_legacy_batchedtensor(dy) else", "return", ONE_PROCESS, "second_derivatives_with"),
    Mutant("a trace shows the strides", ENGINE, "        and not count_dispatch_modes()\n        and not are", "        and not are", ONE_PROCESS, "trace_at_batch_1"),
    Mutant("the gradient's strides go to torch", ENGINE, "        y.register_hook(_restrided_gradient)\n", "        pass\n", ONE_PROCESS, "any_number and plain and training"),
    Mutant("messages of a former world are counted", "torch/failures.py", "    _numbers.clear()", "    pass", RANKS, "go_and_come"),
    Mutant("one value a channel is looked for in eval", LAYER, "(uses_batch and x.numel() <= channels)", "x.numel() <= channels", "torch/test_export_torch.py", "depends_on_data"),
    Mutant("no collective", TRANSPORT, "    if communicator is not None:\n        group = communicator", "    if False:\n        group = communicator", ENGINE_TESTS, RAGGED),
    Mutant("mean of means", REFERENCE, MESSAGE, MESSAGE.replace("return", "m =") + "\n    return m / m[0].clamp_min(1)", ENGINE_TESTS, RAGGED),
    Mutant("E[x²] − E[x]² in float32", REFERENCE, MESSAGE, MESSAGE + ".float().double()", ENGINE_TESTS, "one_process and large"),
    Mutant("lo dropped from normalize", CPU, "norm.offset - lo * (norm.scale * rstd)", "norm.offset", ENGINE_TESTS, "one_process and large"),
    Mutant("x − hi not formed first", CPU, "if readable and norm.epsilon and x.numel() > SMALL and (hi * rstd).abs().max().item() < NEAR:", "if norm.epsilon:", ENGINE_TESTS,
           "one_process and large"),
    Mutant("dropped term in the input gradient", CPU, "a / rstd, b)", "0 * a, b)", ENGINE_TESTS, "one_process and ragged"),
    Mutant("local count in the backward pass", AUTOGRAD, "input_gradient(dz, x, mask, norm, count, reduced_sums) if needs_x",
           "input_gradient(dz, x, mask, norm, count / config.communicator.size, reduced_sums) if needs_x", ENGINE_TESTS, RAGGED),
    Mutant("message times a local scale", AUTOGRAD, SUM, "global_sums(sums.clone(), config.communicator) * scale.repeat(2)",
           ENGINE_TESTS, "concatenated and differ-step]"),
    Mutant("moments are constants of the second derivative", AUTOGRAD, "centred = x - mean\n", "centred = x - mean.detach()\n",
           ENGINE_TESTS, "gradgradcheck"),
    Mutant("mask forgotten in the count", REFERENCE, "return mask.sum() * each", "return size", ENGINE_TESTS, "one_process and masked"),
    Mutant("mask forgotten in the backward pass", REFERENCE, "through = torch.where(mask, through, 0)", "pass", ENGINE_TESTS, "one_process and masked"),
    Mutant("naive float32 sums", CPU, "BLOCK_ROWS = 4096", "BLOCK_ROWS = 10**9", ENGINE_TESTS, "million"),
    Mutant("groups ignored", GROUPS, "size = world // number_of_groups(world, group)", "size = world", ENGINE_TESTS, "test_groups and ragged"),
    Mutant("the activation's other side", REFERENCE, "return torch.where(z > 0, dy,", "return torch.where(z < 0, dy,", ENGINE_TESTS, "activation and relu and eager"),
    Mutant("counts as floats", ENGINE, "payload = torch.cat([n.to(torch.int32)[None]", "payload = torch.cat([n.float()[None].view(torch.int32)",
           ENGINE_TESTS, "without_float64 and ragged"),
    Mutant("moving statistics from local moments", CONTRACT, "statistics = updated(statistics, measured,",
           "statistics = updated(statistics, moments(x, axes=axes, mask=mask, group=1, **own),", RANKS, "concatenated and ragged-None"),
    Mutant("statistics move at count 0", CONTRACT, "usable = count > 0", "usable = count > -1", ONE_PROCESS, "nothing_moves"),
    Mutant("statistics that are not finite move", CONTRACT, "usable = usable & (finite if", "usable = usable | (finite if", RANKS, "says_nothing and nan"),
    Mutant("the running variance biased", CONTRACT, "    if statistics.unbiased:", "    if False:", ONE_PROCESS, "equals_torch and ours"),
    Mutant("momentum the wrong way round", CONTRACT, "batch, 1 - weight)", "batch, weight)",
           ONE_PROCESS, "equals_torch and ours"),
    Mutant("a message in eval", LAYER, "group=self._group() if self.training else LOCAL", "group=self._group()", RANKS, "eval_and_local"),
    Mutant("a group that is gone taken for all", GROUPS, "        if found is None:", "        if False:", RANKS, "go_and_come"),
    Mutant("inputs with a history in a second derivative", "torch/autograd.py", "v.view_as(v) if v.requires_grad", "v if v.requires_grad", "torch/test_layer_torch.py", "share_a_history"),
    Mutant("a module as activation hidden", LAYER, "self._activation if module is None else module", "self._activation", "torch/test_layer_torch.py", "module_as_activation"),
    Mutant("the state may be an inference tensor", "torch/compiled.py", "with torch.inference_mode(False):", "if True:", ONE_PROCESS, "imported_in_inference"),
    Mutant("the functional form breaks the graph", "functional.py", "        from syncbn.torch import engine as of_torch\n",
           "        of_torch = __import__('importlib').import_module('syncbn.torch.engine')\n", "torch/test_functional_torch.py", "without_a_graph_break"),
    Mutant("compiled about a rounded mean", "torch/compiled.py", "mean, mean_lo = about or (moments.mean, moments.mean_lo)", "mean, mean_lo = moments.mean, moments.mean_lo",
           "torch/test_torch_training.py", "alone_on_a_gpu and first and 10000"),
    Mutant("channels last compiled about nothing", "torch/compiled.py", "batch_norm(_deviation(x, about[0]),", "batch_norm(x.float(),",
           "torch/test_torch_training.py", "alone_on_a_gpu and last and 10000"),
    Mutant("r and d compiled anew", LAYER, "r, d = engine.materialize(*engine.record_or_replay(lambda: self._renorm_correction(moments, scale.dtype)))", "r, d = self._renorm_correction(moments, scale.dtype)", "torch/test_layer_torch.py", "compiled_in_float64"),
    Mutant("a biased variance by torch's operator", "torch/engine.py", "(statistics.unbiased and statistics.mean.dtype is dtype)", "statistics.mean.dtype is dtype",
           ENGINE_TESTS, "biased_moving"),
    Mutant("Keras's r and d compiled anew", KERAS, "r, d = self._engine.materialize(*found)", "r, d = found", "keras/test_layer_keras_torch.py", "renorm_compiled"),
    Mutant("fake constants kept", "torch/cpu.py", "if type(x) is not Tensor:", "if False:", "torch/test_layer_torch.py", "fake_tensors"),
    Mutant("one tensor twice in a compiled function", "torch/compiled.py", "if residual is x:", "if False:", "torch/test_layer_torch.py", "compiled_in_float64"),
    Mutant("messages between taken for a change", COMPILED, "return _versions[state][argument.data_ptr() == state.data_ptr()]",
           "return torch.no_grad()", TRAINING, "between_a_forward and aot_eager-last"),
    Mutant("a local backward pass counts as a change", COMPILED, "    with _changed_by_nothing(_backward_state, state):\n        if was_local:\n            return\n",
           "    if was_local:\n        return\n    with _changed_by_nothing(_backward_state, state):\n", TRAINING, "between_a_forward and aot_eager-last"),
    Mutant("a state that is written back counts as changed", COMPILED, "[argument.data_ptr() == state.data_ptr()]", "[True]",
           TRAINING, "between_a_forward and aot_eager and inductor and last"),
    Mutant("a module as activation that stays", LAYER, "self._modules.pop(name, None)", "pass", ONE_PROCESS, "can_be_changed"),
    Mutant("gradients that cannot be batched", REFERENCE, "return sums.reshape(-1),", "return sums.flatten(),", ONE_PROCESS, "batched_gradients"),
    Mutant("a batch counted where nobody counts", ENGINE, "elif batches is not None:", "else:", ONE_PROCESS, "nobody_counts"),
    Mutant("statistics move where nobody counts", CONTRACT, "weight = 0.0 if batches is None else", "weight = 1.0 if batches is None else", ONE_PROCESS, "nobody_counts"),
    Mutant("both backward passes called alike", "torch/desync.py", "if torch.is_grad_enabled() else", "if False else", RANKS, "create_graph"),
    Mutant("groups kept past their end", "torch/groups.py", "group.size(), process_group.group_name, weakref.ref(process_group))",
           "group.size(), process_group.group_name, lambda: process_group)", RANKS, "go_and_come"),
    Mutant("the backward pass of local statistics is not", ENGINE, "config = NormConfig(epsilon, activation, moments.communicator,", "config = NormConfig(epsilon, activation, communicator_of(group),", RANKS, "local_in_both"),
    Mutant("each pass taken for the first", CHECKPOINT, "if current_graph_task_id() == -1:", "if True:", TRAINING, "one_process_moves"),
    Mutant("statistics move in the recomputation", CHECKPOINT, "    return not recomputed", "    return True", TRAINING, "one_process_moves"),
    Mutant("a sum's failure unexplained", TRANSPORT, "            dist.all_reduce(v, group=group)\n        except RuntimeError as error:", "            dist.all_reduce(v, group=group)\n        except KeyError as error:", FAILURES, "left_alone and forward and not (compiled or renorm or without)"),
    Mutant("a gathering's failure unexplained", TRANSPORT, "        dist.all_gather(rows, v, group=group)\n    except RuntimeError as error:", "        dist.all_gather(rows, v, group=group)\n    except KeyError as error:", FAILURES, "left_alone and without"),
    Mutant("a message taken for the one before", "torch/desync.py", "    number = sends(direction, layer, shape, communicator.name)", "    number = 1", FAILURES, "left_alone and forward and not (compiled or renorm or without)"),
    Mutant("a derivative's message taken for the one before", TRANSPORT, 'sends("derivative of the backward pass", None, None, ctx.communicator.name)', "pass", FAILURES, "left_alone and double"),
    Mutant("a compiled message taken for the one before", COMPILED, 'sends("backward", COMPILED_LAYER, message.numel() // 2, group)', "pass", FAILURES, "left_alone and compiled"),
    Mutant("the name on the stack not asked for", "torch/failures.py", 'if direction == "forward" else None', "if False else None", FAILURES, "left_alone and forward and not (compiled or renorm or without)"),
    Mutant("messages counted from 0", "torch/failures.py", "_numbers.get(group, 0) + 1", "_numbers.get(group, -1) + 1", FAILURES, "left_alone and forward and not (compiled or renorm or without)"),
    Mutant("names that debug found are compared", "torch/desync.py", 'if _named or key != "layer"', "if True", RANKS, "names_that_debug_found"),
    Mutant("debug finds no name", LAYER, "if desync.enabled() and", "if False and", RANKS, "another_path and unnamed"),
    Mutant("debug has no name for a module that is called by itself", LAYER, 'name_on_the_stack() or f"{type(self).__name__}({self.num_features})"',
           "name_on_the_stack()", FAILURES, "without_its_store"),
    Mutant("a group that cannot be made unexplained", GROUPS, 'raise set_up_failed("make its process group", error) from error', "raise", FAILURES, "first_call"),
    Mutant("mailboxes that nobody agrees on unexplained", "torch/peer_memory.py", 'raise set_up_failed("agree on its mailboxes", error) from error', "raise", FAILURES, "first_call"),
    Mutant("a store that is gone unexplained", "torch/desync.py", "    with contextlib.suppress(Exception):\n        return [other", "    with contextlib.suppress(ValueError):\n        return [other", FAILURES, "without_its_store"),
    Mutant("a recomputation that sends again", CHECKPOINT, "found = replayed[0] if replayed else find()", "found = find()", TRAINING, "test_checkpointing and one-recorded]"),
    Mutant("renorm recomputed", CHECKPOINT, "renorm and recomputed", "False", TRAINING, "without_a_record and one"),
    Mutant("a hook taken for a recomputation", PRIVATE, "if None in _REPEATS or None in _STARTS:", "if True:", LOCAL, "hook_calls and plain"),
    Mutant("a hook of a recomputed block taken for the block", PRIVATE, "while frame is not None and frame.f_code not in _STARTS:",
           "while frame is not None:", LOCAL, "checkpointed_block_sets"),
    Mutant("only torch's checkpoint is a recomputation", PRIVATE, "_REPEATS = frozenset([*_codes(_function_backward),", "_REPEATS = frozenset([",
           LOCAL, "function_that_recomputes"),
    Mutant("local statistics of the process", STATE, IMPORTED, THREADS.format(kind="types.SimpleNamespace"), LOCAL, "makes_nobody_local or starts_inside"),
    Mutant("local statistics that autograd's threads miss", STATE, IMPORTED, THREADS.format(kind="threading.local"), LOCAL, "thread_of_autograd"),
    Mutant("local statistics that never end", STATE, "if not was_local:", "if False:", LOCAL, "outermost"),
    Mutant("compiled moments never local", COMPILED, "    local = is_local()\n    if not local:\n        sends(\"forward\", COMPILED_LAYER, x.shape, group)", "    local = False\n    if not local:\n        sends(\"forward\", COMPILED_LAYER, x.shape, group)",
           LOCAL, "compiled_in_both and around"),
    Mutant("a compiled backward pass never local", COMPILED, "        if was_local:\n            return", "        if False:\n            return", LOCAL, "compiled_in_both and around"),
    Mutant("a graph without its own local statistics", COMPILED, "isinstance(group, Local) or is_local_in_graph()", "isinstance(group, Local)", LOCAL, "compiled_in_both and inside"),
    Mutant("compiled for ever alone", COMPILED, "if not AVAILABLE or dist.GroupMember.WORLD is None:", "if not AVAILABLE:", LOCAL, "older_than"),
    Mutant("ranks alone in silence", GROUPS, "    if ranks > 1:", "    if False:", LOCAL, "no_process_group_joins"),
    Mutant("a warning where each rank is to be alone", GROUPS, "or group == 1 or", "or", LOCAL, "no_process_group_joins"),
    Mutant("r and d after the statistics moved", LAYER,
           "        r, d = engine.materialize(*engine.record_or_replay(",
           "        self._update_renorm_statistics(moments)\n        r, d = engine.materialize(*engine.record_or_replay(",
           ONE_PROCESS, "renorm_by_formula"),
    Mutant("padding that is not finite spreads", ENGINE, "return x if mask is None else torch.where(mask | x.isfinite(), x, 0)", "return x", ONE_PROCESS, "test_mask"),
    Mutant("the group saved with the layer", LAYER, '{**self.__dict__, "process_group": None}', "self.__dict__", RANKS, "left_out_of_files"),
    Mutant("what a rank says raises", "torch/peer_memory.py", "    except Exception as error:\n        facts[", "    except ZeroDivisionError as error:\n        facts[",
           "torch/test_private_torch.py", "raises_nothing"),
    Mutant("a private name that vanishes unnoticed", "torch/_private.py", "MISSING.append(path", "[].append(path", "torch/test_private_torch.py", "vanished_is_listed"),
    Mutant("native where dtypes are mixed", ENGINE, "    dtype = x.dtype\n    return (", "    dtype = x.dtype\n    return True or (", ONE_PROCESS, "combination_of_dtypes"),
    Mutant("a momentum that the constructor takes", LAYER, 'check_weight("momentum", momentum)', "pass", ONE_PROCESS, "bad_arguments"),
    Mutant("an eps that the constructor takes", LAYER, 'check_epsilon(eps, "eps")', "pass", ONE_PROCESS, "bad_arguments"),
    Mutant("a mask of floats", "validation.py", 'if not any(kind in dtype for kind in ("bool", "int")):', "if False:", ONE_PROCESS, "bad_calls"),
    Mutant("channels last get the wrong mend", "torch/arguments.py", "if len(shape) > 2 and shape[-1] == channels:", "if False:", ONE_PROCESS, "bad_calls"),
    Mutant("a constant channel is divided by 0", ENGINE, "if epsilon == 0 and moments.count is not None:", "if False:", ONE_PROCESS, "epsilon_0"),
    Mutant("rounding taken for a variance", REFERENCE, "ROUNDING = 2.0**-48", "ROUNDING = 0.0", ONE_PROCESS, "many_constants"),
    Mutant("a constant channel's second derivative", AUTOGRAD, "    if config.epsilon == 0:\n", "    if False:\n", ONE_PROCESS, "epsilon_0"),
    Mutant("torch's function trains with an epsilon of 0", ENGINE, "plain = epsilon and communicator", "plain = communicator", ONE_PROCESS, "epsilon_0"),
    Mutant("convert_sync_batchnorm forgets the group", LAYER, "return importlib.import_module(\"syncbn.conversion\").convert(module, process_group=process_group)", "return importlib.import_module(\"syncbn.conversion\").convert(module)", DROP_IN, "is_convert"),
    Mutant("Keras's epsilon passes", "torch/arguments.py", 'if "epsilon" in named:', "if False:", DROP_IN, "name_in_keras"),
    Mutant("another converter passes unsaid", "torch/replaced.py", 'if not converter.startswith("convert_sync"):', "if True:", DROP_IN, "that_replaces_ours"),
    Mutant("the warning names torch's line", "torch/replaced.py", "level, frame = 3, sys._getframe(2)", "level, frame = 2, sys._getframe(2)", DROP_IN, "that_replaces_ours"),
    Mutant("scripting goes on", LAYER, "def __prepare_scriptable__(", "def _prepare_scriptable(", DROP_IN, "scripting"),
    Mutant("a trace is recorded", AUTOGRAD, "    if tracing_state() is not None:\n", "    if False:\n", DROP_IN_RANKS, "transforms_of and trace"),
    Mutant("a transform goes on", AUTOGRAD, "if are_functorch_transforms_active() or", "if False or", DROP_IN_RANKS, "transforms_of and grad"),
    Mutant("forward mode goes on", AUTOGRAD, "or unpack_dual(x).tangent is not None", "", DROP_IN_RANKS, "transforms_of and forward"),
    Mutant("a tangent of the parameters", AUTOGRAD, "        raise no_transform()\n\n\ndef differentiable(", "        return None\n\n\ndef differentiable(", DROP_IN, "parameters_alone"),
    Mutant("one value in a group of one", LAYER, "or self.group_size == 1 or", "or", DROP_IN_RANKS, "one_value and size"),
    Mutant("one value in a process group of one", LAYER, "and size() == 1", "and False", DROP_IN_RANKS, "one_value and group"),
    Mutant("a DTensor's gradient is one rank's", "torch/dtensor.py", "Partial() if i in sharded else Replicate()", "Replicate()", DROP_IN_RANKS, "whole_batch and sharded"),
    Mutant("a DTensor's statistics are one rank's", "torch/dtensor.py", "x.device_mesh.get_group(sharded[0]) if sharded else None\n    attributes[\"group_size\"] = None if sharded else 1",
           "None\n    attributes[\"group_size\"] = 1", DROP_IN_RANKS, "whole_batch and sharded"),
    Mutant("a replicated DTensor counts twice", "torch/dtensor.py", "None if sharded else 1", "None", DROP_IN_RANKS, "whole_batch and replicated"),
    Mutant("a selective checkpoint sees the operators of a layer", ENGINE, "and count_dispatch_modes() and is_in_selective_checkpoint()", "and False", ONE_PROCESS, "selective"),
    Mutant("a selective checkpoint sees those of the function", CHECKPOINT, "or not is_in_selective_checkpoint()", "or True", TRAINING, "function_in_a_selective"),
    Mutant("a value is read where there is none", CPU, "if readable and norm.epsilon and x.numel()", "if norm.epsilon and x.numel()", ONE_PROCESS, "large_inputs"),
    Mutant("a class taken for a function", "torch/arguments.py", "if isinstance(value, type):", "if False:", ONE_PROCESS, "ReLU"),
    Mutant("a batch of gradients taken for a rank that is late", TRANSPORT, 'if "Batching rule" in str(error):', "if False:", RANKS, "batched"),
    Mutant("a size that may change compared as a list", "functional.py", "if tuple(value.shape) != (channels,) and tuple(value.shape) != tuple(parameters):",
           "if list(value.shape) not in ([channels], parameters):", "torch/test_functional_torch.py", "graph_break"),
    Mutant("any bound of renorm is taken", "validation.py", "if isinstance(bound, str | list | tuple | dict):", "if False:", ONE_PROCESS, "bad or rmax or Each"),
]  # fmt: skip

# Two processes tell as much as four.
OPTIONS = ("--replicas", "2")
