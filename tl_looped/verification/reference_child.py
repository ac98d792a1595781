"""Runs the authors' code of a checkpoint, in an environment that need not hold tl_looped.

Started by path as ``python -I reference_child.py FOLDER``, never imported. It is one file and needs
Python 3.8, torch, transformers and safetensors of any age. With ``--versions PACKAGES`` it prints
their versions and runs nothing. ``FOLDER`` holds

- ``request.json``: the checkpoint's folder, its class, the runs with their arguments, the modules
  whose outputs are wanted, the attributes and buffers that are to be read;
- ``inputs.safetensors``: tokens, and the initial state where there is one.

It leaves ``outputs.safetensors`` and, last and in one step, ``results.json``. Nothing else is said
but on stderr.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import os
import platform
import sys
from typing import Any


def main(folder: str) -> None:
    """Answer the request in a folder."""
    with open(os.path.join(folder, "request.json"), encoding="utf-8") as file:
        request = json.load(file)
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_grad_enabled(False)
    if hasattr(torch, "set_float32_matmul_precision"):
        torch.set_float32_matmul_precision("highest")
    inputs = load_file(os.path.join(folder, "inputs.safetensors"))
    results: dict[str, Any] = {"calls": {}, "eps": {}}
    outputs: dict[str, Any] = {}
    model: Any = None
    made_for = None
    for run in request["runs"]:
        if model is None or run["config"] != made_for:
            model = None  # before the next one is made: never two in memory
            model, made_for = load(request, run["config"], results), run["config"]
            results["absent"] = absent(request, model)
            if results["absent"]:
                break
        outputs[run["name"]] = logits_of(request, model, run, inputs, results, outputs)
        if run["activations"]:
            outputs["greedy"] = greedy(request, model, run, inputs)
            read_numbers(request, model, results, outputs)
    save_file(
        {name: value.detach().cpu().contiguous().clone() for name, value in outputs.items()},
        os.path.join(folder, "outputs.safetensors"),
    )
    partial = os.path.join(folder, "results.partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(results, file)
    os.replace(partial, os.path.join(folder, "results.json"))


def versions(packages: list[str]) -> dict[str, Any]:
    """Versions of Python and of some packages; None for one that is not installed."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def load(request: dict[str, Any], changes: dict[str, Any], results: dict[str, Any]) -> Any:
    """The authors' model in fp32, with some fields of its config set."""
    import torch
    import transformers

    remote = {"trust_remote_code": request["trust_remote_code"]}
    config = transformers.AutoConfig.from_pretrained(request["folder"], **remote)
    for name, value in changes.items():
        setattr(config, name, value)
    major = int(transformers.__version__.split(".")[0])
    dtype = {"dtype" if major >= 5 else "torch_dtype": torch.float32}
    model, loading = getattr(transformers, request["auto_class"]).from_pretrained(
        request["folder"], config=config, output_loading_info=True, **dtype, **remote
    )
    results["class"] = type(model).__module__ + "." + type(model).__name__
    results["loading"] = {
        kind: sorted(str(name) for name in names) for kind, names in loading.items() if names
    }
    return model.float().eval()


def absent(request: dict[str, Any], model: Any) -> dict[str, list[str]]:
    """What the request names and the model lacks, each with the names there that are nearest."""
    modules = {name: module for name, module in model.named_modules() if name}
    wanted = [(path, "", list(modules)) for path in request["modules"]]
    for path, attribute in request["eps"].values():
        own = [path + "." + name for name in vars(modules.get(path, model)) if name[0] != "_"]
        wanted.append((path, attribute, own if path in modules else list(modules)))
    owner, _, leaf = request["rotary"].rpartition(".")
    wanted.append((owner, leaf, [name for name, _ in model.named_buffers()]))
    missing = {}
    for path, leaf, names in wanted:
        if not has(model, path, leaf):
            whole = ".".join(filter(None, (path, leaf)))
            missing[whole] = difflib.get_close_matches(whole, names, 3, 0)
    return missing


def has(model: Any, path: str, leaf: str) -> bool:
    """Whether there is a module, and an attribute of it if one is named."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    return not leaf or hasattr(module, leaf)


def forward(
    request: dict[str, Any], model: Any, run: dict[str, Any], tokens: Any, state: Any
) -> Any:
    """Logits of some tokens."""
    arguments = dict(request["arguments"], **run["arguments"])
    if request["state_argument"] and state is not None:
        arguments[request["state_argument"]] = state[:, : tokens.shape[1]]
    output = model(input_ids=tokens, **arguments)
    return output[0] if isinstance(output, tuple) else output.logits


def logits_of(
    request: dict[str, Any],
    model: Any,
    run: dict[str, Any],
    inputs: dict[str, Any],
    results: dict[str, Any],
    outputs: dict[str, Any],
) -> Any:
    """Logits of the run; where it is asked for, outputs of modules go to ``outputs``."""
    handles: list[Any] = []
    calls: dict[str, int] = {}

    def keep(path: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) else output
            n = calls[path] = calls.get(path, 0) + 1
            outputs[f"{path}#{n - 1}"] = first.detach().clone()

        return hook

    for path in request["modules"] if run["activations"] else ():
        calls[path] = 0
        handles.append(model.get_submodule(path).register_forward_hook(keep(path)))
    try:
        logits = forward(request, model, run, inputs["tokens"], inputs.get("state"))
    finally:
        for handle in handles:
            handle.remove()
    results["calls"].update(calls)
    return logits


def greedy(request: dict[str, Any], model: Any, run: dict[str, Any], inputs: dict[str, Any]) -> Any:
    """The prompt and the likeliest next tokens, each from a run over all tokens before it."""
    import torch

    tokens, state = inputs["prompt"], inputs.get("state")
    state = None if state is None else inputs["greedy_state"]
    for _ in range(run["n_greedy"]):
        logits = forward(request, model, run, tokens, state)
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1).to(tokens.dtype)), 1)
    return tokens


def read_numbers(
    request: dict[str, Any], model: Any, results: dict[str, Any], outputs: dict[str, Any]
) -> None:
    """Epsilon of the norms, and the rotary frequencies or tables."""
    for key, (path, attribute) in request["eps"].items():
        results["eps"][key] = float(getattr(model.get_submodule(path), attribute))
    owner, _, leaf = request["rotary"].rpartition(".")
    outputs["rotary"] = getattr(model.get_submodule(owner), leaf).detach().float()


if __name__ == "__main__":
    if sys.argv[1] == "--versions":
        print(json.dumps(versions(sys.argv[2:])))
    else:
        main(sys.argv[1])
