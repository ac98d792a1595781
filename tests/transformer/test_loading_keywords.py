"""Every keyword of from_pretrained: what it does, or that it is refused by name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from closeness import assert_same
from conftest import CASES, GOLDEN, Golden, exact_config, with_gains
from pretend import pretended_devices
from refusals import refused
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tl_looped import (
    ArgumentTypeError,
    CheckpointError,
    ConfigError,
    InputError,
    LoopedTransformer,
    TokenizerError,
    UnknownArchitectureError,
    checkpoints,
)
from tl_looped.transformer import load_options, processing, spreading

pytestmark = pytest.mark.usefixtures("without_gradients")
load = LoopedTransformer.from_pretrained
TEXT = "Tom has 3 boxes."


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process says once is said in each test."""
    monkeypatch.setattr(processing, "_SAID", set())


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert all((r.name, r.levelno) == ("tl_looped", logging.WARNING) for r in caplog.records)
    return [record.getMessage() for record in caplog.records]


# -- the name, and nothing else by position -------------------------------------------------------


def test_the_name_is_called_model_name() -> None:
    folder = checkpoints.BUNDLED["demo-bare"]
    ids = torch.arange(3, 9)[None]
    expected = load("demo-bare", device="cpu")(ids)
    for name in ("demo-bare", str(folder), folder):
        assert torch.equal(load(model_name=name, device="cpu")(ids), expected)


@pytest.mark.parametrize("method", ["from_pretrained", "from_pretrained_no_processing"])
@pytest.mark.parametrize("value", [False, True, 4, None])
def test_what_follows_the_name_is_given_by_keyword(method: str, value: Any) -> None:
    with refused(ArgumentTypeError, "by keyword", "fold_ln=", "n_recurrences=", repr(value)):
        getattr(LoopedTransformer, method)("demo", value, device="cpu")


# -- processing -----------------------------------------------------------------------------------


def test_the_default_is_unprocessed(golden: Golden) -> None:
    plain = golden.load()
    bare = LoopedTransformer.from_pretrained_no_processing(golden.folder, device="cpu")
    for model in (plain, bare):
        cfg = model.cfg
        assert (cfg.normalization_type, cfg.center_unembed) == ("RMS", False)
        assert cfg.skipped_processing == ()
    same = zip(plain.state_dict().values(), bare.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


@pytest.mark.parametrize("fold_ln", [False, True])
@pytest.mark.parametrize("center_unembed", [False, True])
@pytest.mark.parametrize("method", ["from_pretrained", "from_pretrained_no_processing"])
def test_processing_is_that_of_the_methods(
    golden: Golden, fold_ln: bool, center_unembed: bool, method: str
) -> None:
    asked = {"fold_ln": fold_ln, "center_unembed": center_unembed}
    at = {"device": "cpu", "dtype": torch.float64}
    model = getattr(LoopedTransformer, method)(golden.folder, **at, **asked)
    other = golden.load(dtype=torch.float64)
    before = other(golden.tokens, **golden.run)
    other.process_weights(**asked)
    assert model.cfg == other.cfg
    shown, expected = model.tl_parameters(), other.tl_parameters()
    assert shown.keys() == expected.keys()
    assert all(torch.equal(shown[name], value) for name, value in expected.items())
    logits = model(golden.tokens, **golden.run)
    mean = before.mean(-1, keepdim=True) if center_unembed else 0.0
    assert_same(logits, before - mean, float(before.abs().max()))
    if not center_unembed:
        assert torch.equal(logits, before)


def test_what_hooked_transformer_skips_is_taken_noted_and_said_once(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    for _ in range(2):
        model = load("demo", device="cpu", center_writing_weights=True, fold_value_biases=True)
        assert model.cfg.skipped_processing == ("center_writing_weights",)
    (said,) = warnings_of(caplog)
    assert "center_writing_weights=True" in said
    assert torch.equal(model.W_E, load("demo", device="cpu").W_E)
    model.save_pretrained(tmp_path)
    assert load(tmp_path, device="cpu").cfg.skipped_processing == ()
    assert LoopedTransformer(model.cfg).cfg.skipped_processing == ()


def test_what_cannot_be_processed_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    with refused(InputError, "refactor_factored_attn_matrices", "rotary"):
        load("demo", refactor_factored_attn_matrices=True)
    cfg = exact_config(v_bias=True, qk_bias=True)
    with_gains(LoopedTransformer.from_config(cfg)).save_pretrained(tmp_path)
    with refused(InputError, "fold_value_biases=False", "b_V"):
        load(tmp_path, fold_value_biases=True)
    assert load(tmp_path, device="cpu").b_V.count_nonzero() > 0


# -- tokenizer and text ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load("demo", device="meta").tokenizer


def test_another_tokenizer_takes_the_checkpoints_place(tokenizer: Any) -> None:
    own = deepcopy(tokenizer)
    model = load("demo", device="cpu", tokenizer=own, default_padding_side="left")
    assert model.tokenizer is own
    assert own.padding_side == "left"
    rows = model.to_tokens([TEXT, "Tom"])
    assert bool((rows[1, :2] == own.pad_token_id).all())
    with_none = load(GOLDEN / "retrofit_llama", device="cpu")
    assert with_none.tokenizer is None
    with refused(TokenizerError, "would have no embedding"):
        load(GOLDEN / "retrofit_llama", device="cpu", tokenizer=tokenizer)
    for what in ("gpt2", 3, object()):
        with refused(TokenizerError, "tokenizer must be Hugging Face's"):
            load("demo", device="cpu", tokenizer=what)


def test_the_side_of_padding(caplog: pytest.LogCaptureFixture) -> None:
    for side in ("left", "right"):
        model = load("demo", device="cpu", default_padding_side=side)
        assert model.tokenizer.padding_side == side
        rows = model.to_tokens([TEXT, "Tom"])
        assert bool(rows[1, 0] == model.tokenizer.pad_token_id) == (side == "left")
    with refused(InputError, "default_padding_side", "'left'", "'middle'"):
        load("demo", default_padding_side="middle")
    assert warnings_of(caplog) == []
    load(GOLDEN / "ouro", device="cpu", default_padding_side="left")  # without a tokenizer
    (said,) = warnings_of(caplog)
    assert "default_padding_side='left'" in said


@pytest.mark.parametrize("prepend", [True, False, None])
def test_bos_as_transformerlens_has_it(prepend: bool | None) -> None:
    model = load("demo", device="cpu", default_prepend_bos=prepend)
    as_trained = load("demo", device="cpu").cfg.default_prepend_bos
    assert model.cfg.default_prepend_bos == (as_trained if prepend is None else prepend)
    starts = int(model.to_tokens(TEXT)[0, 0]) == model.tokenizer.bos_token_id
    assert starts == model.cfg.default_prepend_bos


def test_another_context_length(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    shorter = load("demo", device="cpu", n_ctx=4)
    with refused(InputError, "4"):
        shorter(TEXT)
    assert warnings_of(caplog) == []
    longer = load("demo", device="cpu", n_ctx=300, dtype=torch.float64)
    (said,) = warnings_of(caplog)
    assert all(part in said for part in ("n_ctx=300", "256"))
    plain = load("demo", device="cpu", dtype=torch.float64)
    tokens = torch.arange(3, 303)[None]
    with refused(InputError, "256"):
        plain(tokens)
    assert torch.equal(longer(tokens[:, :200]), plain(tokens[:, :200]))
    assert_same(longer(tokens)[:, :256], plain(tokens[:, :256]))
    longer.save_pretrained(tmp_path)
    assert load(tmp_path, device="meta").cfg.n_ctx == 300
    for wrong in (0, -1):
        with refused(InputError, "n_ctx", str(wrong)):
            load("demo", n_ctx=wrong)


# -- devices and dtypes ---------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_dtypes(word: str, dtype: Any) -> None:
    model = load("demo", device="cpu", **{word: dtype})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.cfg.dtype == torch.bfloat16


def test_two_words_for_the_dtype() -> None:
    assert load("demo", device="meta", dtype="float64", torch_dtype=torch.float64).cfg.dtype
    with refused(InputError, "dtype='float32'", "torch_dtype=torch.float64"):
        load("demo", dtype="float32", torch_dtype=torch.float64)
    with refused(ConfigError, "'auto'"):
        load("demo", torch_dtype="auto")


def test_weights_that_stay_where_they_are_loaded() -> None:
    model = load("demo", device="cpu", move_to_device=False)
    assert (model.cfg.device, str(model.home_device)) == ("cpu", "cpu")
    model.home_device = torch.device("meta")  # the other device that every machine has
    model.move_model_modules_to_device()
    assert (model.cfg.device, model.home_device) == ("meta", None)
    model = LoopedTransformer(exact_config(device="meta"), move_to_device=False)
    assert (model.cfg.device, str(model.home_device)) == ("cpu", "meta")
    assert {str(p.device) for p in model.parameters()} == {"cpu"}
    assert model.cpu().home_device is None
    for stays in (
        load("demo", device="cpu"),
        load("demo", device_map="cpu"),
        LoopedTransformer.from_config(exact_config()),
    ):
        assert stays.move_model_modules_to_device() is None
        assert stays.cfg.device == str(stays.W_E.device) == "cpu"


def test_weights_go_where_they_were_asked_for_when_they_are_moved() -> None:
    with pretended_devices():
        model = load("demo-bare", device="lazy:0", move_to_device=False)
        assert {str(p.device) for p in model.parameters()} == {"cpu"}
        assert model.cfg.device == "cpu"
        model.move_model_modules_to_device()
        assert {str(p.device) for p in model.parameters()} == {"lazy:0"}
        assert model.cfg.device == "lazy:0"


def test_a_new_models_side_of_padding(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    own = deepcopy(tokenizer)
    cfg = exact_config(d_vocab=2048)
    LoopedTransformer(cfg, own, default_padding_side="left")
    assert own.padding_side == "left"
    assert warnings_of(caplog) == []
    LoopedTransformer(cfg, default_padding_side="left")
    assert "default_padding_side='left'" in warnings_of(caplog)[0]
    with refused(InputError, "default_padding_side", "'middle'"):
        LoopedTransformer(cfg, own, default_padding_side="middle")


N_DEVICES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "too many": ({"n_devices": 99}, ("n_devices=99", "device_map=")),
    "none": ({"n_devices": 0}, ("n_devices", "at least 1")),
    "and a map": ({"n_devices": 2, "device_map": "auto"}, ("n_devices=2", "device_map='auto'")),
    "and another device": ({"n_devices": 2, "device": "cpu"}, ("n_devices=2", "'cpu'")),
    "and no device": ({"n_devices": 2, "device": "nowhere"}, ("n_devices=2", "'nowhere'")),
    "and no move": ({"n_devices": 2, "move_to_device": False}, ("move_to_device=False",)),
    "a map and no move": (
        {"device_map": "cpu", "move_to_device": False},
        ("move_to_device=False",),
    ),
}


@pytest.mark.parametrize("what", N_DEVICES)
def test_refused_numbers_of_devices(what: str) -> None:
    keywords, parts = N_DEVICES[what]
    with refused(InputError, *parts):
        load("demo", **keywords)


def test_the_first_gpus_share_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a machine with eight GPUs; placing weights on them is what device_map does."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (10**9 + i, 2 * 10**9))
    memory = spreading.memory_of_gpus(3)
    assert memory == {0: 10**9, 1: 10**9 + 1, 2: 10**9 + 2}
    model = load("demo", device="meta")
    plan = spreading.plan_devices(model, "balanced", memory)
    assert {str(device) for device in plan.values()} == {"cuda:0", "cuda:1", "cuda:2"}
    options = load_options.LoadOptions(
        model_name="demo",
        processing=processing.Processing(),
        hub=checkpoints.HubOptions(),
        n_devices=3,
    )
    assert options.spread
    assert options.plan == ("balanced", memory)


@pytest.mark.parametrize("device", ["cuda:99", torch.device("cuda", 99)])
def test_a_device_that_is_not_there(device: Any) -> None:
    with refused(InputError, "cuda:99"):
        load("demo", device=device)
    model = load("demo", device="cpu")
    for move in (lambda: model.to(device), lambda: model.cuda(99), lambda: model.cuda(device)):
        with refused(InputError, "cuda:99"):
            move()
    for what in (True, -1):
        with refused(ArgumentTypeError, f"cuda:{what}"):
            model.cuda(what)
    if not torch.backends.mps.is_available():
        with refused(InputError, "Apple"):
            model.mps()
    assert model.cfg.device == "cpu"


def test_to_says_what_it_does_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    model = load("demo", device="cpu")
    assert model.to("cpu") is model.cpu() is model
    assert capsys.readouterr().out == ""
    for call in (
        lambda: model.to("cpu", print_details=True),
        lambda: model.to(torch.device("cpu"), True),
    ):
        assert call() is model
        assert "cpu" in capsys.readouterr().out
    model.to(torch.float64, print_details=True)
    assert "torch.float64" in capsys.readouterr().out
    assert model.cfg.dtype == torch.float64
    model.to("cpu", torch.float32, False)
    assert (model.cfg.dtype, capsys.readouterr().out) == (torch.float32, "")
    model.to(torch.zeros(1, dtype=torch.float64))
    assert model.cfg.dtype == torch.float64
    model.to("cpu", print_details=False, dtype=torch.bfloat16)
    assert model.cfg.dtype == torch.bfloat16


@pytest.mark.parametrize("what", [("nowhere",), ([],), ("cpu", "cpu"), (None, 3)])
def test_what_is_no_place_and_no_dtype(what: tuple[Any, ...]) -> None:
    with refused(ArgumentTypeError, "to()", "device"):
        load("demo", device="cpu").to(*what)
    with refused(InputError, "torch.int64"):
        load("demo", device="cpu").to(torch.int64)


# -- transformers' keywords -----------------------------------------------------------------------


@pytest.mark.parametrize("name", load_options.REFUSED)
def test_a_refused_keyword_is_named_and_its_neutral_values_pass(name: str) -> None:
    neutral, _ = load_options.REFUSED[name]
    for value in neutral:
        assert load("demo", device="meta", **{name: value}).loop.R == 4
    for value in (7, "anything", 0):
        with refused(InputError, name, repr(value)):
            load("demo", device="meta", **{name: value})


def test_a_keyword_that_nobody_has() -> None:
    for wrong in ({"recurrences": 4}, {"path_or_hub_id": "demo"}):
        with refused(ArgumentTypeError, repr(next(iter(wrong))), "cache_dir"):
            load("demo", **wrong)


def test_no_code_is_run_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    load("demo", device="meta", trust_remote_code=False)
    assert warnings_of(caplog) == []
    for _ in range(2):
        load("demo", device="meta", trust_remote_code=True)
    (said,) = warnings_of(caplog)
    assert "trust_remote_code" in said


def test_the_hubs_keywords_reach_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def snapshot(hub_id: str, **how: Any) -> str:
        asked.append(how)
        return str(GOLDEN / "ouro")

    monkeypatch.setattr(checkpoints, "snapshot_download", snapshot)
    how = {"cache_dir": tmp_path, "token": "hf_x", "local_files_only": True, "force_download": True}
    load("owner/name", device="meta", revision="v2", **how)
    (found,) = asked
    assert {name: found[name] for name in how} == how
    assert found["revision"] == "v2"
    with refused(ArgumentTypeError, "local_files_only must be bool", "'yes'"):
        load("owner/name", local_files_only="yes")
    with pytest.raises(InputError) as caught:
        load("owner/name", token=["hf_secret"])
    assert "hf_secret" not in str(caught.value)
    assert "hf_x" not in repr(checkpoints.HubOptions(token="hf_x"))


# -- a model in memory ----------------------------------------------------------------------------


class Held(nn.Module):
    """A checkpoint as the authors' classes hold it: transformers' config, the stored tensors."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        super().__init__()
        raw = checkpoints.read_config(folder) | changes
        self.config = SimpleNamespace(to_dict=lambda: dict(raw))
        for name, tensor in load_file(folder / "model.safetensors").items():
            self.register_buffer(name.replace(".", "/"), tensor)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        stored = super().state_dict(*args, **kwargs)
        return {name.replace("/", "."): tensor for name, tensor in stored.items()}


@pytest.mark.parametrize("case", CASES)
def test_a_model_in_memory_gives_its_weights(case: str) -> None:
    held = Held(GOLDEN / case)
    before = {name: tensor.clone() for name, tensor in held.state_dict().items()}
    model = load("mine", hf_model=held, device="cpu", n_recurrences=3)
    stored = load(GOLDEN / case, device="cpu", n_recurrences=3)
    assert (model.cfg.model_name, model.tokenizer) == ("mine", None)
    tokens = torch.arange(3, 11)[None]
    assert torch.equal(model(tokens), stored(tokens))
    for parameter in model.parameters():  # copies
        parameter.zero_()
    after = held.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_its_tokenizer_is_that_of_the_name(tokenizer: Any) -> None:
    held = Held(checkpoints.BUNDLED["demo"])
    held.generation_config = GenerationConfig(eos_token_id=[5, 7], temperature=0.5)  # type: ignore
    for name in ("demo", checkpoints.BUNDLED["demo"]):
        model = load(name, hf_model=held, device="cpu")
        assert model.tokenizer.get_vocab() == tokenizer.get_vocab()
        assert model.cfg.model_name == "demo"
    assert model.generation_config["eos_token_id"] == [5, 7]
    other = load("mine", hf_model=held, device="cpu", tokenizer=tokenizer)
    assert other.tokenizer is tokenizer
    assert torch.equal(other(TEXT), load("demo", device="cpu")(TEXT))


def test_a_name_of_the_hub_is_asked_for_its_tokenizer_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def snapshot(hub_id: str, allow_patterns: Any, **how: Any) -> str:
        asked.append((hub_id, allow_patterns))
        return str(checkpoints.BUNDLED["demo"])

    monkeypatch.setattr(checkpoints, "snapshot_download", snapshot)
    for name, hub_id in (("owner/name", "owner/name"), ("ouro-1.4b", "ByteDance/Ouro-1.4B")):
        held = Held(checkpoints.BUNDLED["demo"])
        assert load(name, hf_model=held, device="cpu").tokenizer is not None
        found, patterns = asked.pop()
        assert found == hub_id
        assert "*.safetensors" not in patterns
        assert "*.json" in patterns


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 20}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))


def meta() -> nn.Module:
    return Held(GOLDEN / "ouro").to("meta")


def bridged() -> nn.Module:
    held = Held(GOLDEN / "ouro")
    held.register_buffer("model/norm/_original_component/weight", torch.ones(3))
    return held


def without_a_tensor() -> nn.Module:
    held = Held(GOLDEN / "ouro")
    del held._buffers["model/norm/weight"]
    return held


HELD: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "feedforward": (llama, UnknownArchitectureError, ("'llama'", "tl_looped.retrofit")),
    "ours": (lambda: load("demo", device="cpu"), InputError, ("LoopedTransformer",)),
    "a name": (lambda: "gpt2", InputError, ("'gpt2'", "hf_model")),
    "no values": (meta, InputError, ("meta",)),
    "bridged": (bridged, InputError, ("TransformerBridge",)),
    "a tensor less": (without_a_tensor, CheckpointError, ("missing: model.norm.weight",)),
    "quantised": (
        lambda: Held(GOLDEN / "ouro", quantization_config={"quant_method": "gptq"}),
        ConfigError,
        ("quantised", "gptq"),
    ),
}


@pytest.mark.parametrize("what", HELD)
def test_what_is_no_model_of_a_looped_family(what: str) -> None:
    make, kind, parts = HELD[what]
    with refused(kind, *parts):  # type: ignore[arg-type]
        load("mine", hf_model=make(), device="cpu")


def test_a_revision_of_a_model_in_memory() -> None:
    with refused(InputError, "revision='v2'", "hf_model"):
        load("mine", hf_model=Held(GOLDEN / "ouro"), revision="v2")


# -- small things ---------------------------------------------------------------------------------


@pytest.fixture
def model() -> LoopedTransformer:
    return load("demo", device="cpu")


def test_texts_are_sampled(model: LoopedTransformer) -> None:
    import numpy as np

    with refused(InputError, "model.dataset"):
        model.sample_datapoint()
    texts = [f"Tom has {n} boxes." for n in range(9)]
    model.dataset = [{"text": text, "number": i} for i, text in enumerate(texts)]
    np.random.seed(3)
    drawn = [model.sample_datapoint() for _ in range(6)]
    np.random.seed(3)
    assert drawn == [texts[np.random.randint(0, 9)] for _ in range(6)]
    assert len(set(drawn)) > 1
    np.random.seed(3)
    tokens = model.sample_datapoint(tokenize=True, prepend_bos=False)
    assert torch.equal(tokens, model.to_tokens(drawn[0], prepend_bos=False))
    model.dataset = [{"text": "box " * 400}]
    assert model.sample_datapoint(tokenize=True).shape == (1, model.cfg.n_ctx)
    for wrong in ([], [{"body": "x"}], ["a text"]):
        model.dataset = wrong
        with refused(InputError, "model.dataset"):
            model.sample_datapoint()


def test_weights_are_drawn_anew_as_a_new_models_are(tokens: Tensor) -> None:
    cfg = exact_config(trained_recurrences=4, seed=5)
    new = LoopedTransformer.from_config(cfg)
    changed = with_gains(LoopedTransformer.from_config(cfg))
    changed.cfg.trained_recurrences = 4
    assert not torch.equal(changed(tokens), new(tokens))
    state = torch.get_rng_state()
    changed.init_weights()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(changed(tokens), new(tokens))
    assert changed.cfg.trained_recurrences is None


def test_parameters_are_counted_once(model: LoopedTransformer) -> None:
    before = model.n_params_total
    stored = load_file(checkpoints.BUNDLED["demo"] / "model.safetensors")
    assert before == sum(tensor.numel() for tensor in stored.values())
    model.set_recurrences(9)
    assert model.n_params_total == before
    assert model.close() is None
