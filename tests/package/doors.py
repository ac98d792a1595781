"""One valid call of every public callable, and what becomes of it with one argument replaced.

A public callable is what a subpackage's ``__all__`` holds, and the public methods of those classes.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import cache, cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tl_looped
from tl_looped import LoopedTransformer, TLLoopedError, exits, metrics, viz
from tl_looped import interventions as iv
from tl_looped.adapters import Package
from tl_looped.adapters.raven import RAVEN_REFERENCE
from tl_looped.experiments import Experiment, PromptSet, Run
from tl_looped.metrics.clusters import FEATURES
from tl_looped.model.geometry import LayerLocation
from tl_looped.training import Constant, PoissonLogNormal, Shape, TrainSpec
from tl_looped.transformer.transformerlens import REFUSED as UNSUPPORTED
from tl_looped.verification import Certificate, Finding, Outcome

CERTIFICATE = Certificate("m", {"family": "f"}, (Finding("names", Outcome.EXACT, "all", "none"),))

SECONDS = 4
"""What a call may take: wrong input is refused, not worked through."""

INSIDE = {"cli", "decomposition", "paper", "plots", "report", "transformer"}

# Not called by users. What a subclass implements, for the package to call:
PROTOCOL = {"changes", "wants", "measure", "place"}
ADAPTER = {m for m in vars(tl_looped.Adapter) if not m.startswith("_")}
# What is called with what the package gives it: its errors are the caller's own.
FUNCTIONS = {"features", "hook", "name", "names_filter", "patching_metric", "step"}
FUNCTIONS |= {"stopping_criteria", "reshape_fn"}
# What the package makes, and hands out:
RESULTS = {
    *("Run", "AttentionLipschitz", "AttentionView", "BootstrapCI", "Changes", "ConvergenceResult"),
    *(
        "ConvergenceSeries",
        "ExitReadout",
        "ExitResult",
        "FixedPoint",
        "FloorPlan",
        "HierarchicalCI",
    ),
    *("Interval", "JacobianSpectrum", "KLBetweenRecurrences", "LabelPercentages", "LayerLocation"),
    *("LayerPlan", "LensReadout", "LensTrajectory", "LimitingBehaviors", "LoopedHookPoint"),
    *("MirroringInterval", "MirroringScore", "NeuronClasses", "PCATrajectory", "PathIndependence"),
    *("PermutedScore", "SettledTokens", "DepthClusters", "HeavyToken", "StepGeometry", "View"),
    *("Certificate", "Finding"),
}
# The runs of a model, for the package itself and for training loops:
INNER = {
    *("random_initial_state", "read_out", "start_run", "unroll", "view_at", "check_owner", "own"),
    *("belong_to", "note", "settle", "is_layer_norm_activation"),
    *("slot", "program_at", "register_parameter", "load_state_dict"),
}


@cache
def public() -> dict[str, Callable[..., Any]]:
    """Name -> function, class or method: ``metrics.sink_rate``, ``LoopedConfig.to_json``."""
    rooms = [tl_looped]
    for info in pkgutil.iter_modules(tl_looped.__path__):
        if info.name not in INSIDE and not info.name.startswith("_"):
            rooms.append(importlib.import_module(f"tl_looped.{info.name}"))
    found: dict[str, Callable[..., Any]] = {}
    for room in rooms:
        for name in getattr(room, "__all__", ()):
            thing = getattr(room, name)
            if thing in found.values() or not _is_door(thing):
                continue
            if inspect.isclass(thing):
                if name != "LoopedHookPoint":  # a module within the model
                    found |= {f"{name}.{m}": f for m, f in _methods(thing)}
                if name not in RESULTS and not inspect.isabstract(thing):
                    found[name] = thing
            else:
                found[f"{room.__name__}.{name}".removeprefix("tl_looped.")] = thing
    return found


def _is_door(thing: Any) -> bool:
    if inspect.isclass(thing):
        return not issubclass(thing, (Exception, Enum))
    return inspect.isfunction(thing)


def _methods(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    left_out = PROTOCOL | INNER | (ADAPTER if issubclass(cls, tl_looped.Adapter) else set())
    for name in dir(cls):
        member = inspect.getattr_static(cls, name)
        function = getattr(member, "__func__", member)
        ours = (getattr(function, "__module__", None) or "").startswith("tl_looped")
        if inspect.isfunction(function) and ours and name not in left_out and name[0] != "_":
            yield name, getattr(cls, name)


@dataclass
class Door:
    """A valid call.

    Args:
        call: What is called.
        arguments: By name; those of ``*args`` as a tuple.
        parameters: All that may be replaced.
    """

    call: Callable[..., Any]
    arguments: dict[str, Any]
    parameters: list[inspect.Parameter]

    def run(self, **replaced: Any) -> Any:
        arguments, positional = self.arguments | replaced, []
        for p in self.parameters:
            if p.kind is p.VAR_POSITIONAL and p.name in replaced and p.name not in self.arguments:
                return None  # would take the places of others
            if p.kind is p.VAR_POSITIONAL and p.name in arguments:
                several = arguments.pop(p.name)
                positional = list(several) if p.name not in replaced else [several]
            elif p.kind is p.VAR_KEYWORD and p.name in arguments:
                arguments["unheard_of"] = arguments.pop(p.name)
        return finished(self.call(*positional, **arguments))


def finished(result: Any) -> Any:
    """What is returned, after a context was entered and left and an iterator begun."""
    if isinstance(result, AbstractContextManager) and not isinstance(result, Path):
        with result:
            return None
    return list(islice(result, 2)) if isinstance(result, Iterator) else result


def _of(make: Callable[[], Any], method: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(make(), method)(*args, **kwargs)


class Dictionary(torch.nn.Module):
    """What an autoencoder is to a splice: twice as many features as dimensions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.W = torch.nn.Parameter(torch.eye(width).repeat(2, 1))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.W.T).relu()

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return features @ self.W


class World:
    """What valid calls are made of: a (1, 2 x 3, 1) model of 16 dimensions, and what it gives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tokenizer = LoopedTransformer.from_pretrained("demo-bare", device="cpu").tokenizer
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
        self.tokenizer, self.text = tokenizer, "Tom has 3 boxes"
        self.model = self.new()
        self.tokens = self.model.to_tokens(self.text)
        _, self.cache = self.model.run_with_cache(self.tokens)
        both = torch.cat((self.tokens, self.tokens.flip(1)))
        _, self.pair = self.model.run_with_cache(both)
        self.states = self.cache.stack_recurrences("resid_post")
        self.patterns = self.cache.stack_recurrences("pattern")
        self.layers = self.cache.stack_activation("resid_post")
        self.out = self.cache.stack_recurrences("state_out")
        self.logits = self.model.logit_lens(self.out)

    def new(self) -> LoopedTransformer:
        cfg = tl_looped.LoopedConfig(**self.sizes, n_coda=1, n_prelude=1, n_recurrences=3)
        cfg.injection = tl_looped.Injection.LINEAR
        return LoopedTransformer.from_config(cfg, self.tokenizer)

    def with_texts(self) -> LoopedTransformer:
        model = self.new()
        model.dataset = [{"text": self.text}]
        return model

    def gated(self) -> LoopedTransformer:
        cfg = tl_looped.LoopedConfig(**self.sizes, n_recurrences=3, exit_gate=True)
        return LoopedTransformer.from_config(cfg, self.tokenizer)

    @property
    def sizes(self) -> dict[str, Any]:
        small = {"d_model": 16, "d_head": 8, "n_heads": 2, "d_mlp": 16, "n_ctx": 32, "n_core": 2}
        return small | {"d_vocab": 2048, "device": "cpu", "init_mode": "fan_in", "seed": 1}

    @cached_property
    def data(self) -> Any:
        names = (*metrics.CONVERGENCE, *FEATURES, "token")
        return metrics.stream(self.model, [self.text], names, "depth")

    @cached_property
    def long(self) -> Any:
        return metrics.stream(self.model, [self.text], "token", n_recurrences=12)

    def within(self, name: str) -> Callable[..., Any]:
        """An intervention, or an exit rule, made and used in a run."""

        def use(*args: Any, **kwargs: Any) -> Any:
            made = public()[name](*args, **kwargs)
            if isinstance(made, exits.ExitRule):
                return self.model(self.tokens, exit_rule=made)
            with self.model.intervening(made):
                return self.model(torch.cat((self.tokens, self.tokens)))

        return use

    def doors(self) -> dict[str, Door]:
        """All of them by name."""
        calls, out = self.calls(), {}
        for name, thing in public().items():
            if name not in calls:
                continue
            arguments = dict(calls[name])
            cls, _, method = name.rpartition(".")
            call, receiver = arguments.pop("call", thing), arguments.pop("of", None)
            parameters = list(inspect.signature(thing).parameters.values())
            if receiver is None and cls in self.receivers and not inspect.ismethod(thing):
                receiver = self.receivers[cls]
            if receiver is not None:
                parameters, call = parameters[1:], partial(_of, receiver, method)
            out[name] = Door(call, arguments, parameters)
        return out

    @cached_property
    def receivers(self) -> dict[str, Callable[[], Any]]:
        """Objects whose methods are called."""
        view = viz.head_across_recurrences(self.cache, self.text, 0, 0)
        plan = viz.floor_plan(self.cache)
        settled = viz.settled_tokens(self.cache, self.text)
        layers = tl_looped.retrofitting.LayerPlan((0,), (1, 2), (3,), 4)
        readout = exits.ExitReadout(torch.zeros(*self.tokens.shape, 3), self.logits)
        return {
            "LoopedTransformer": lambda: self.model,
            "LoopedActivationCache": lambda: self.cache,
            "LoopedConfig": lambda: self.model.cfg,
            "LoopGeometry": lambda: self.model.loop,
            "LoopedKeyValueCache": tl_looped.LoopedKeyValueCache,
            "AttentionView": lambda: view,
            "FloorPlan": lambda: plan,
            "SettledTokens": lambda: settled,
            "View": lambda: plan,
            "Resampling": lambda: metrics.Resampling(5),
            "LayerPlan": lambda: layers,
            "Certificate": lambda: CERTIFICATE,
            "Reference": lambda: RAVEN_REFERENCE,
            "Constant": lambda: Constant(2),
            "PoissonLogNormal": PoissonLogNormal,
            "Shape": Shape,
            "TrainSpec": lambda: TrainSpec(1),
            "Experiment": lambda: Experiment("demo"),
            "Run": lambda: Run(self.folder, True, ""),
            "ExitReadout": lambda: readout,
        }

    def calls(self) -> dict[str, dict[str, Any]]:
        """Name -> arguments; ``call`` is another way to call it, ``of`` makes the receiver."""
        m, t, c, p, run = self.model, self.tokens, self.cache, self.patterns, self.within
        core = np.random.default_rng(0).normal(size=(3, 4, 2))
        flat = np.random.default_rng(1).normal(size=(9, 2))
        rules = {
            "ArgmaxStability": {},
            "ExitAt": {"recurrence": 1},
            **{
                name: {"threshold": 0.1}
                for name in (
                    "Acceleration",
                    "EntropyDifference",
                    "KLDivergence",
                    "LatentDifference",
                )
            },
        }
        changes: dict[str, dict[str, Any]] = {
            "AblateHeads": {"heads": {0: [0]}},
            "AblateMLP": {"layer": 0},
            "AblateNeurons": {"neurons": {0: [0]}},
            "AddNoise": {"std": 0.1},
            "FreezeAttention": {"recurrence": 0},
            "FreezeLoop": {"recurrence": 0},
            "ReorderLayers": {"order": [1, 0]},
            "RepeatRecurrence": {"recurrence": 0},
            "ReplaceInitialState": {"state": torch.zeros(2, t.shape[1], 16)},
            "ScaleInjection": {"factor": 0.5},
            "SkipLayers": {"layers": 0},
            "SkipRecurrences": {"recurrences": 1},
            "Splice": {"sae": Dictionary(16), "layers": 0},
            "SwapLayers": {"first": 0, "second": 1},
            "SwapStates": {"recurrences": 1},
        }
        patch = {
            "model": m,
            "corrupted_tokens": t,
            "clean_cache": c,
            "patching_metric": lambda logits: logits[0, -1, 3],
            "activation_name": "resid_post",
            "positions": [0],
            "layers": [1],
        }
        return {
            **{name: {"call": run(name), **given} for name, given in (rules | changes).items()},
            "GateExit": {"threshold": 0.5},
            "HubAlias": {"hub_id": "a/b"},
            "Source": {"names": ("a",)},
            "LoopGeometry": {"p": 1, "k": 2, "c": 1, "R": 3},
            "LoopGeometry.coda_index": {"l": 0},
            "LoopGeometry.index": {"r": 0, "l": 1},
            "LoopGeometry.labels": {},
            "LoopGeometry.locate": {"i": 1},
            "LoopGeometry.prelude_index": {"l": 0},
            "LoopGeometry.resolve": {"layer": (0, 1)},
            "LoopGeometry.resolve_or_end": {"layer": (0, 1)},
            "LoopGeometry.with_recurrences": {"R": 2},
            "LoopedConfig": dict(self.sizes),
            "LoopedConfig.from_dict": {"config_dict": m.cfg.to_dict()},
            "LoopedConfig.from_json": {"values": m.cfg.to_json()},
            "LoopedConfig.set_seed_everywhere": {"seed": 3},
            "LoopedConfig.to_dict": {},
            "LoopedConfig.to_json": {},
            "LoopedConfig.unwrap": {"config": m.cfg},
            "LoopedConfig.weights_of": {"place": LayerLocation("core", 0, 1)},
            "LoopedKeyValueCache": {},
            "LoopedKeyValueCache.freeze": {},
            "LoopedKeyValueCache.unfreeze": {},
            "LoopedKeyValueCache.init_cache": {},
            "ExitReadout.float": {},
            "ExitReadout.logits_at": {},
            "ExitReadout.recurrence": {},
            "exits.exit_distribution": {"gate_logits": torch.zeros(2, 3)},
            "exits.exit_recurrence": {"distribution": torch.full((2, 4), 0.25), "threshold": 0.6},
            "known_adapters": {},
            "register_adapter": {"adapter": tl_looped.OuroAdapter},  # refused: its name is taken
            "unregister_adapter": {"name": "none"},
            "HuginnAdapter": {},
            "OuroAdapter": {},
            "RetrofitLlamaAdapter": {},
            "RetrofitOlmoAdapter": {},
            "NativeAdapter": {},
            "adapters.all_aliases": {},
            "adapters.find_adapter": {"config": {"model_type": "x"}, "tensor_names": ["a"]},
            "adapters.get_adapter": {"name": "ouro"},
            **{f"LoopedTransformer.{k}": v for k, v in self.methods().items()},
            "LoopedTransformer": {"cfg": m.cfg, "tokenizer": self.tokenizer},
            "LoopedActivationCache": {"cache_dict": dict(c.items()), "model": m},
            "LoopedActivationCache.accumulated_resid": {"layer": 2, "apply_ln": True},
            "LoopedActivationCache.apply_ln_to_stack": {"residual_stack": self.layers, "layer": 2},
            "LoopedActivationCache.apply_slice_to_batch_dim": {"batch_slice": 0},
            "LoopedActivationCache.decompose_resid": {"layer": 2},
            "LoopedActivationCache.get_full_resid_decomposition": {"layer": 2},
            "LoopedActivationCache.get_neuron_results": {"layer": 2},
            "LoopedActivationCache.logit_attrs": {"residual_stack": self.layers, "tokens": " has"},
            "LoopedActivationCache.resolve": {"key": ("resid_post", 1)},
            "LoopedActivationCache.stack_head_results": {"layer": 2},
            "LoopedActivationCache.stack_neuron_results": {"layer": 2},
            "LoopedActivationCache.stack_recurrences": {"name": "resid_post"},
            "patching.patch_recurrences": patch | {"progress": False},
            "patching.attribute_recurrences": patch,
            "patching.normalised_effect": {"difference": core, "clean": 1.0, "corrupted": 0.0},
            "interventions.fixed_point": {
                "model": m,
                "input": t,
                "n_recurrences": 40,
                "tolerance": 1e9,
            },
            "retrofitting.parse_layers": {"text": "0-3"},
            "AttentionView.data": {},
            "LayerPlan.stages": {},
            "retrofit": {"model_or_id": "nowhere", "core": [1]},  # refused: there is no such model
            "viz.attention_view": {
                "patterns": p[0, 0, 0],
                "tokens": m.to_str_tokens(t),
                "labels": ["a", "b"],
                "title": "t",
            },
            "viz.difference": {"cache": c, "tokens": t, "layer": 0, "head": 0},
            "viz.floor_plan": {"cache": c},
            "viz.head_across_recurrences": {"cache": c, "tokens": t, "layer": 0, "head": 0},
            "viz.heads_at": {"cache": c, "tokens": t, "recurrence": 0, "layer": 0},
            "viz.settled_tokens": {"cache": c, "tokens": t},
            "viz.settling_recurrence": {"predictions": torch.zeros(3, 2, dtype=torch.long)},
            **{
                f"{view}.{method}": {"path": self.folder / "view.html"} if method == "save" else {}
                for view in ("AttentionView", "FloorPlan", "SettledTokens", "View")
                for method in ("page", "save")
            },
            "verification.verify": {"model_name": "nowhere"},  # refused: there is no such model
            "Certificate.from_json": {"text": CERTIFICATE.to_json()},
            "Certificate.to_json": {},
            "Certificate.to_markdown": {},
            "Certificate.write": {"path": self.folder / "certificate"},
            "Package": {"name": "torch", "tested": "2.13.0"},
            "Reference": {
                "packages": (Package("torch", "2.13.0"),),
                "activations": {"coda.{l}.hook_resid_post": "model.layers.{l}"},
                "rotary": "model.inv_freq",
            },
            "Reference.places": {"cfg": self.model.cfg, "n_recurrences": 2},
            "ReferenceOptions": {"source": "owner/name"},
            "Experiment": {"model": "demo"},
            "Experiment.from_dict": {"values": Experiment("demo").to_dict()},
            "Experiment.from_toml": {"text": Experiment("demo").to_toml()},
            "Experiment.read": {"path": Experiment("demo").write(self.folder / "spec.toml")},
            "Experiment.to_dict": {},
            "Experiment.to_toml": {},
            "Experiment.write": {"path": self.folder / "spec.toml"},
            "PromptSet": {},
            "PromptSet.parse": {"text": "bundled"},
            "Run.load": {},  # refused: nothing was run
            "experiments.compare_runs": {"runs": {"a": self.data}},  # refused: there is one run
            "experiments.load": {"folder": self.folder},  # refused: nothing was run
            "experiments.load_runs": {"folders": [self.folder]},  # refused: nothing was run
            "experiments.run": {
                "spec": Experiment("x", prompts=PromptSet("file", "none")),  # refused: no such file
                "out": self.folder / "run",
            },
            "Constant": {"n": 2},
            "Constant.at": {"seed": 0, "step": 1},
            "EveryRecurrence": {"weights": (0.5, 1.0)},
            "ExitWeighted": {},
            "LastState": {},
            "PoissonLogNormal": {},
            "PoissonLogNormal.at": {"seed": 0, "step": 1},
            "Shape": {},
            "Shape.config": {"d_vocab": 300, "seed": 0, "exit_gate": False, "device": "cpu"},
            "TrainSpec": {"steps": 1},
            "TrainSpec.check": {"cfg": m.cfg},
            "TrainSpec.rate": {"step": 0},
            "TrainSpec.sampler_of": {"cfg": m.cfg},
            "TrainSpec.to_json": {},
            "training.train": {  # refused: the rows are longer than the context
                "model": m,
                "rows": torch.zeros(2, 40, dtype=torch.long),
                "held_out": torch.zeros(2, 40, dtype=torch.long),
                "spec": TrainSpec(1),
                "out": self.folder / "train",
            },
            "training.train_on_texts": {  # refused: there is no such corpus
                "source": "none",
                "out": self.folder / "train",
                "shape": Shape(),
                "spec": TrainSpec(1),
            },
            "training.train_model_on_texts": {  # refused: there is no such corpus
                "model": m,
                "source": "none",
                "out": self.folder / "train",
                "spec": TrainSpec(1),
            },
            "experiments.save_figures": {"drawn": [], "folder": self.folder, "command": "x"},
            **self.measures(core, flat),
        }

    def methods(self) -> dict[str, dict[str, Any]]:
        """Arguments of the model's methods; those that change it get a model of their own."""
        m, t, fresh = self.model, self.tokens, self.new
        return {
            "accumulated_bias": {"layer": 1},
            "add_caching_hooks": {"of": fresh},
            "add_hook": {"of": fresh, "name": "hook_embed", "hook": lambda x, hook: None},
            "all_composition_scores": {"mode": "Q"},
            "all_hook_points": {},
            "blocks_with": {"submodule": "attn"},
            "chat_text": {"messages": [{"role": "user", "content": "Tom"}]},
            "clear_contexts": {"of": fresh},
            "coda_lens": {"resid": self.out},
            "cpu": {"of": fresh},
            "cuda": {"of": fresh, "device": 99},  # refused: there is none of that number
            "describe_bos": {},
            "enable_compatibility_mode": {"of": fresh},
            "estimate_cache_bytes": {},
            "exits": {"of": self.gated, "input": t},
            "forward": {"input": t},
            "from_config": {"cfg": m.cfg},
            "from_pretrained": {"model_name": "demo-bare", "device": "cpu"},
            "from_pretrained_no_processing": {"model_name": "demo-bare"},
            "generate": {"input": t, "max_new_tokens": 2, "verbose": False},
            "generate_stream": {"input": t, "max_new_tokens": 2, "verbose": False},
            "block_hooks": {"layer_idx": 1},
            "block_submodules": {"layer_idx": (1, 0)},
            "layer_types": {},
            "get_params": {},
            "composition_layer_indices": {},
            "QK_for_attn_layers": {},
            "OV_for_attn_layers": {},
            "stack_params_for": {"submodule": "attn", "attr_path": "attn.W_Q"},
            "get_caching_hooks": {},
            "get_hook_point": {"hook_name": "hook_embed"},
            "hook_points": {},
            "setup": {"of": fresh},
            "get_pos_offset": {"past_kv_cache": None, "batch_size": 2},
            "get_residual": {"embed": m.embed(t)},
            "get_token_position": {"single_token": " has", "input": self.text},
            "hf_generate": {"input": t, "max_new_tokens": 2},
            "hook_name": {"name": ("resid_post", 1)},
            "hooks": {"of": fresh, "fwd_hooks": [("hook_embed", lambda x, hook: None)]},
            "input_to_embed": {"input": t},
            "intervening": {"of": fresh, "interventions": (iv.SkipLayers(0),)},
            "logit_lens": {"resid": self.out},
            "loop_map": {"input": t},
            "loss_fn": {"logits": m(t), "tokens": t},
            "move_model_modules_to_device": {"of": fresh},
            "mps": {"of": fresh},  # refused: there is none
            "center_unembed": {"state_dict": m.tl_parameters()},
            "close": {},
            "fill_missing_keys": {"state_dict": {}},
            "fold_layer_norm": {"state_dict": m.tl_parameters()},
            "fold_value_biases": {"state_dict": m.tl_parameters()},
            "init_weights": {"of": fresh},
            "load_and_process_state_dict": {"of": fresh, "state_dict": m.state_dict()},
            "process_weights": {"of": fresh},
            "process_weights_": {"of": fresh},
            "sample_datapoint": {"of": self.with_texts},
            **{name: {} for name in UNSUPPORTED},
            "names_filter_set": {"names_filter": "residual"},
            "parameter_of": {"name": "blocks.1.attn.W_Q"},
            "readers": {"of": fresh, "readers": [("hook_embed", lambda x, hook: None)]},
            "with_recurrences": {"of": fresh, "n_recurrences": 2},
            "remove_all_hook_fns": {"of": fresh},
            "run_with_cache": {"model_args": (t,)},
            "run_with_hooks": {"of": fresh, "model_args": (t,)},
            "save_pretrained": {"folder": self.folder / "saved"},
            "set_recurrences": {"of": fresh, "n_recurrences": 2},
            "set_tokenizer": {"of": fresh, "tokenizer": self.tokenizer},
            "set_ungroup_grouped_query_attention": {
                "of": fresh,
                "ungroup_grouped_query_attention": True,
            },
            "set_use_attn_in": {"of": fresh, "use_attn_in": True},
            "set_use_attn_result": {"of": fresh, "use_attn_result": True},
            "set_use_hook_mlp_in": {"of": fresh, "use_hook_mlp_in": True},
            "set_use_split_qkv_input": {"of": fresh, "use_split_qkv_input": True},
            "stack_weights": {"name": "W_Q"},
            "stop_tokens": {},
            "tl_named_parameters": {},
            "tl_parameters": {},
            "to": {"of": fresh, "args": ("cpu",)},
            "to_bridge": {},
            "to_single_str_token": {"int_token": 5},
            "to_single_token": {"string": " has"},
            "to_str_tokens": {"input": self.text},
            "to_string": {"tokens": t},
            "to_tokens": {"input": self.text},
            "token_rows": {"prompts": [self.text]},
            "tokenize": {"text": self.text},
            "tokens_to_residual_directions": {"tokens": t},
            "train": {"of": fresh},
            "transformer_lens_names": {"name": "embed.W_E"},
            "unique_blocks": {},
            "unique_layer": {"layer": 1},
            "unique_weights": {"name": "W_Q"},
        }

    def measures(self, core: Any, flat: Any) -> dict[str, dict[str, Any]]:
        """Arguments of the metrics."""
        m, t, c, s, p = self.model, self.tokens, self.cache, self.states, self.patterns
        series = {"core": core[..., 0], "feedforward": flat[:, 0]}
        values = np.arange(6.0)
        step = m.loop_map(t)
        labels = torch.zeros(1, 3, 5, dtype=torch.long)
        heads = torch.ones(2, 16, 8)
        return {
            "metrics.a_posteriori_bound": {"rate": torch.rand(3), "last_step": torch.rand(3)},
            "metrics.angular_distance": {"states": self.layers},
            "metrics.attention_distance": {"a": p[0, 0], "b": p[1, 0]},
            "metrics.attention_lipschitz_bounds": {
                "x": s[1, 0],
                "x_before": s[0, 0],
                "W_Q": heads,
                "W_K": heads,
                "assume_plain": True,
            },
            "metrics.attention_lipschitz_from_cache": {
                "cache": c,
                "layer": 0,
                "recurrence": 1,
                "assume_plain": True,
            },
            "metrics.base_layer_cosine": {"states": s, "base": s},
            "metrics.bootstrap_ci": {"values": values, "n_resamples": 10},
            "metrics.by_recurrence": {"data": self.data},
            "metrics.classify_limiting_behavior": {"similarity": torch.rand(2, 80)},
            "metrics.cluster_table": {"data": self.data, "feedforward": self.data},
            "metrics.colsum_concentration": {"pattern": p},
            "metrics.convergence_series": {"states": s},
            "metrics.convergence_verdict": {"run": s},
            "metrics.cooccurrence": {"labels": labels},
            "metrics.cosine_similarity": {"states": s[:, 0]},
            "metrics.cyclicity_index": {"similarity": torch.rand(6, 6), "n_core": 2},
            "metrics.distance_similarity": {"states": s[:, 0]},
            "metrics.find_heavy_token": {"data": self.data},
            "metrics.fixed_point_distance": {"states": s},
            "metrics.fixed_point_residual": {"state": s[0, 0], "next_state": s[1, 0]},
            "metrics.half_life": {"rate": torch.rand(3)},
            "metrics.hierarchical_bootstrap_ci": {"values": flat, "n_resamples": 10},
            "metrics.join_batches": {"batches": [self.data]},
            "metrics.kl_between_recurrences": {"logits": self.logits},
            "metrics.kl_divergence": {"logits": self.logits[0], "reference": self.logits[1]},
            "metrics.label_percentages": {"labels": labels},
            "metrics.lenses_from_cache": {"cache": c},
            "metrics.lens_readout": {
                "logits": self.logits[0],
                "final_logits": self.logits[1],
                "token": t,
            },
            "metrics.lens_trajectory": {"cache": c},
            "metrics.limiting_behavior": {"run": self.long, "window": 8},
            "metrics.linear_cka": {"x": s[0, 0], "y": s[1, 0]},
            "metrics.loop_jacobian_spectrum": {
                "step": step,
                "state": self.out[-1],
                "n_iterations": 8,
            },
            "metrics.loop_starts": {"loop_map": step},
            "metrics.lowest_cosine_to_fixed_points": {"states": s},
            "metrics.matrix_entropy": {"x": s[0]},
            "metrics.mirroring_interval": {"core": core, "feedforward": flat},
            "metrics.mirroring_score": series | {"n_permutations": 9},
            "metrics.mixing_score": {"pattern": p},
            "metrics.from_cache": {"cache": c},
            "metrics.paired_contrast": {"first": values, "second": values + 1, "n_resamples": 10},
            "metrics.pairwise_attention_distance": {"patterns": p[:, 0]},
            "metrics.pairwise_from_cache": {"cache": c},
            "metrics.pairwise_residual_cosine": {"states": self.layers},
            "metrics.path_independence": {
                "step": step,
                "starts": {"a": self.out[0], "b": self.out[1]},
                "n_recurrences": 2,
            },
            "metrics.pca_trajectory": {"states": s},
            "metrics.permuted_mirroring": series | {"n_permutations": 9},
            "metrics.prediction_suppression": {"model": m, "n_vocab": 9},
            "metrics.prediction_suppression_fraction": {
                "w_out": torch.rand(4, 16),
                "unembed": torch.rand(16, 9),
            },
            "metrics.residual_magnitude": {"states": s},
            "metrics.sign_flip_p": {"values": values},
            "metrics.sink_rate": {"pattern": p},
            "metrics.sink_score": {"pattern": p},
            "metrics.loop_spectrum": {"model": m, "tokens": t, "n_iterations": 8},
            "metrics.depth_clusters": {"feedforward": flat, "core": core, "n_init": 1},
            "metrics.state_distance": {"x": s[0], "reference": s[1]},
            "metrics.step_geometry": {"states": s[:, 0]},
            "metrics.stream_batches": {"model": m, "rows": [t[0]], "metrics": "magnitude"},
            "metrics.stream": {"model": m, "prompts": [self.text], "metrics": "magnitude"},
            "metrics.successive_difference": {"states": s},
            "metrics.t_interval": {"values": values},
            "Resampling": {"n_resamples": 5},
            "Resampling.percentile": {"resampled": np.arange(5.0)},
            "StreamOptions": {},
        }


def wrong_values(model: LoopedTransformer) -> dict[str, Any]:
    """What takes an argument's place, by what to call it."""
    return {
        "None": None,
        "text": "x",
        "empty text": "",
        "bytes": b"x",
        "-1": -1,
        "0": 0,
        "3": 3,
        "10**9": 10**9,
        "2**70": 2**70,
        "True": True,
        "1.5": 1.5,
        "nan": float("nan"),
        "inf": float("inf"),
        "complex": 1j,
        "[]": [],
        "[None]": [None],
        "list": ["a", 3],
        "rows": [[1, 2], [3]],
        "tuple": (1, 2, 3),
        "{}": {},
        "dict": {"a": 1},
        "set": {1, 2},
        "object": object(),
        "function": lambda: None,
        "class": int,
        "floats": torch.zeros(2, 3),
        "negative ints": -torch.ones(1, 3, dtype=torch.long),
        "no elements": torch.zeros(0),
        "no pos": torch.zeros(1, 0, 16),
        "bools": torch.ones(2, dtype=torch.bool),
        "0-d": torch.tensor(1.5),
        "5-d": torch.zeros(1, 1, 1, 1, 1),
        "NaN states": torch.full((3, 2, 1, 5, 16), torch.nan),
        "array": np.zeros((2, 3)),
        "array of text": np.array(["a", "b"]),
        "model": model,
    }


class TooLong(BaseException):
    """A call that went on."""


@contextmanager
def watchdog() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fault(door: Door, **replaced: Any) -> str | None:
    """What is wrong with how a call ends; None if it works or is refused in our words."""
    try:
        with watchdog(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            door.run(**replaced)
    except TLLoopedError:
        return None
    except TypeError as error:
        if "unexpected keyword argument 'unheard_of'" in str(error):
            return None  # Python's own words
        return _foreign(error)
    except TooLong:
        return f"still running after {SECONDS} s"
    except Exception as error:
        return _foreign(error)
    return None


def _foreign(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:100]


def faults(world: World, start: int = 0, every: int = 1) -> tuple[list[str], int]:
    """Calls with one argument replaced that end in a foreign error, and how many were made.

    Args:
        world: What valid calls are made of.
        start: First replacement.
        every: Take each ``every``-th from there.
    """
    wrong = wrong_values(world.model)
    cases = (
        (name, door, parameter.name, what)
        for name, door in world.doors().items()
        for parameter in door.parameters
        for what in wrong
        if not (callable(wrong[what]) and parameter.name in FUNCTIONS)
    )
    found, made = [], 0
    for name, door, parameter, what in islice(cases, start, None, every):
        problem, made = fault(door, **{parameter: wrong[what]}), made + 1
        if problem is not None:
            found.append(f"{name}({parameter}={what}): {problem}")
    return found, made
