"""Looped models in plain torch, as the code that a checkpoint brings along; written for the tests.

Copied into a checkpoint's folder and run by ``--reference-python``. Its modules are called as the
authors' are, which the adapters declare. ``by_hand`` in config.json plants faults.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu
from transformers import PretrainedConfig, PreTrainedModel

assert "tl_looped" not in sys.modules
if os.environ.get("HF_TOKEN") or not os.environ.get("HF_HUB_OFFLINE"):
    raise RuntimeError("the environment was not cut down")


class RavenConfig(PretrainedConfig):
    model_type = "huginn_raven"

    def __init__(self, **values):
        values.setdefault("auto_map", None)  # transformers makes one without values, to compare
        tied = bool(values.get("tie_embeddings"))
        super().__init__(tie_word_embeddings=tied, auto_map=values["auto_map"])
        self.values = values
        self.hidden_size, self.total_ut_steps = 0, values.get("total_ut_steps")


class OuroConfig(RavenConfig):
    model_type = "ouro"

    def __init__(self, **values):  # without one, transformers 5 makes one of its own
        super().__init__(**values)


class Norm(nn.Module):
    def __init__(self, d, eps, called="eps"):
        super().__init__()
        setattr(self, called, eps)
        self.weight, self.called = nn.Parameter(torch.ones(d)), called

    def forward(self, x):
        return (
            x / (x.pow(2).mean(-1, keepdim=True) + getattr(self, self.called)).sqrt() * self.weight
        )


def frequencies(c, theta):
    out = 1.0 / theta ** (torch.arange(0, c.head_dim, 2).float() / c.head_dim)
    s = c.get("rope_scaling")
    if s:
        turns = s["original_max_position_embeddings"] * out / (2 * torch.pi)
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        share = ((turns - low) / (high - low)).clamp(0, 1)
        out = out * share + out / s["factor"] * (1 - share)
    return out


def turned(x, frequencies, interleaved):  # [batch, head, pos, d_head]
    angle = torch.arange(x.shape[2]).float()[:, None] * frequencies
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    pair = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)


def attention(c, q, k, v, frequencies, interleaved=False):
    q, k, v = (x.unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for x in (q, k, v))
    q, k = turned(q, frequencies, interleaved), turned(k, frequencies, interleaved)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Values(dict):
    __getattr__ = dict.__getitem__


class Attention(nn.Module):
    def __init__(self, c, style):
        super().__init__()
        kv = c.num_key_value_heads * c.head_dim
        self.c, self.style, self.sizes = c, style, (c.n_embd, kv, kv)
        self.Wqkv = nn.Linear(c.n_embd, c.n_embd + 2 * kv, bias=False)
        self.proj = nn.Linear(c.n_embd, c.n_embd, bias=False)
        if style == "huginn":
            self.qk_bias = nn.Parameter(torch.zeros(2, 1, c.n_heads, c.head_dim))
        if style == "olmo":
            self.q_norm, self.k_norm = Norm(c.n_embd, c.norm_eps), Norm(kv, c.norm_eps)

    def forward(self, x, frequencies):
        q, k, v = self.Wqkv(x).split(self.sizes, -1)
        if self.style == "huginn":
            q, k = q + self.qk_bias[0].flatten(), k + self.qk_bias[1].flatten()
        if self.style == "olmo":
            q, k = self.q_norm(q), self.k_norm(k)
        return self.proj(attention(self.c, q, k, v, frequencies, self.style == "huginn"))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc = nn.Linear(c.n_embd, 2 * c.intermediate_size, bias=False)
        self.proj = nn.Linear(c.intermediate_size, c.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.fc(x).chunk(2, -1)
        return self.proj(silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c, style):
        super().__init__()
        self.style, self.attn, self.mlp = style, Attention(c, style), MLP(c)
        for i in range(1, 5 if style == "huginn" else 3):
            setattr(self, f"norm_{i}", Norm(c.n_embd, c.norm_eps))

    def forward(self, x, frequencies):
        if self.style == "huginn":
            x = self.norm_2(x + self.attn(self.norm_1(x), frequencies))
            return self.norm_4(x + self.mlp(self.norm_3(x)))
        if self.style == "olmo":
            x = x + self.norm_1(self.attn(x, frequencies))
            return x + self.norm_2(self.mlp(x))
        x = x + self.attn(self.norm_1(x), frequencies)
        return x + self.mlp(self.norm_2(x))


class RavenModel(PreTrainedModel):
    config_class = RavenConfig
    _tied_weights_keys: ClassVar = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config):
        super().__init__(config)
        c = self.c = Values(config.values)
        style, self.fault = c.by_hand["style"], c.by_hand.get("fault")
        if "marker" in c.by_hand:
            with open(c.by_hand["marker"], "w") as file:
                file.write("ran")

        def stage(n):
            return nn.ModuleList(Block(c, style) for _ in range(n))

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(c.vocab_size, c.n_embd),
                "prelude": stage(c.n_layers_in_prelude),
                "adapter": nn.Linear(2 * c.n_embd, c.n_embd, bias=False),
                "core_block": stage(c.n_layers_in_recurrent_block),
                "coda": stage(c.n_layers_in_coda),
                "ln_f": Norm(c.n_embd, c.norm_eps),
            }
        )
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if style == "huginn":
            angles = torch.arange(c.block_size).float()[:, None] * frequencies(c, c.rope_base)
            table = torch.stack((angles.cos(), angles.sin()), -1)[None, :, None]
            self.register_buffer("freqs_cis", table)
        else:
            self.rotary_emb = nn.Module()
            self.rotary_emb.register_buffer("inv_freq", torch.empty(0), persistent=False)
        self.post_init()

    def _init_weights(self, module):
        pass

    def get_input_embeddings(self):
        return self.transformer.wte

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, input_states, num_steps):
        c, t = self.c, self.transformer
        huginn = c.by_hand["style"] == "huginn"
        turns = frequencies(c, c.rope_base if huginn else c.rope_theta)
        if not huginn:
            self.rotary_emb.inv_freq = turns
        if self.fault == "crash":
            raise ValueError("planted for the test")
        if self.fault == "hang":
            time.sleep(600)
        e = t.wte(input_ids) * c.init_values["embed_scale"]
        for block in t.prelude:
            e = block(e, turns)
        x = input_states
        for _ in range(num_steps - (self.fault == "calls")):
            x = t.adapter(torch.cat((x, e), -1))
            for block in t.core_block:
                x = block(x, turns)
        x = t.ln_f(x) if huginn else x
        for block in t.coda:
            x = block(x, turns)
        logits = self.lm_head(t.ln_f(x))
        if self.fault == "shape":
            logits = logits[..., :-1]
        if self.fault == "nan":
            logits[0, 0, 0] = float("nan")
        if self.fault in ("pipe", "link", "stderr"):
            name = "stderr" if self.fault == "stderr" else "results.json"
            if name == "stderr":
                os.unlink(name)
            if self.fault == "link":
                os.symlink("/etc/hostname", name)
            else:
                os.mkfifo(name)
            os._exit(0)
        if self.fault == "child":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            with open(c.by_hand["marker"], "w") as file:
                file.write(str(child.pid))
            self.fault = None
        if self.fault == "garbage":
            print("{garbage" * 1000)
            os._exit(0)
        return SimpleNamespace(logits=logits)


class OuroLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        d, q = c.hidden_size, c.num_attention_heads * c.head_dim
        kv = c.num_key_value_heads * c.head_dim
        self.c, self.self_attn, self.mlp = c, nn.Module(), nn.Module()
        for owner, name, rows, columns in (
            (self.self_attn, "q_proj", q, d), (self.self_attn, "k_proj", kv, d),
            (self.self_attn, "v_proj", kv, d), (self.self_attn, "o_proj", d, q),
            (self.mlp, "gate_proj", c.intermediate_size, d),
            (self.mlp, "up_proj", c.intermediate_size, d),
            (self.mlp, "down_proj", d, c.intermediate_size),
        ):  # fmt: skip
            setattr(owner, name, nn.Linear(columns, rows, bias=False))
        for name in ("input_layernorm", "post_attention_layernorm"):
            for end in ("", "_2"):
                setattr(self, name + end, Norm(d, c.rms_norm_eps, "variance_epsilon"))

    def forward(self, x, frequencies):
        a, m, h = self.self_attn, self.mlp, self.input_layernorm(x)
        heads = attention(self.c, a.q_proj(h), a.k_proj(h), a.v_proj(h), frequencies)
        x = x + self.input_layernorm_2(a.o_proj(heads))
        h = self.post_attention_layernorm(x)
        out = m.down_proj(silu(m.gate_proj(h)) * m.up_proj(h))
        return (x + self.post_attention_layernorm_2(out), "what old code returns beside it")


class OuroModel(PreTrainedModel):
    config_class = OuroConfig

    def __init__(self, config):
        super().__init__(config)
        c = self.c = Values(config.values)
        self.steps = config.total_ut_steps
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size),
                "layers": nn.ModuleList(OuroLayer(c) for _ in range(c.num_hidden_layers)),
                "norm": Norm(c.hidden_size, c.rms_norm_eps, "variance_epsilon"),
                "early_exit_gate": nn.Linear(c.hidden_size, 1),
                "rotary_emb": nn.Module(),
            }
        )
        self.model.rotary_emb.register_buffer("inv_freq", torch.empty(0), persistent=False)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, input_ids, use_cache):
        m = self.model
        m.rotary_emb.inv_freq = frequencies(self.c, self.c.rope_theta)
        x = m.embed_tokens(input_ids)
        for _ in range(self.steps):
            for layer in m.layers:
                x, _beside = layer(x, m.rotary_emb.inv_freq)
            x = m.norm(x)
        return (linear(x, self.lm_head.weight),)
