"""The list of steps that a run is, and cells of which everything else is an interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from closeness import assert_same
from jaxtyping import Float
from refusals import refused
from torch import Tensor, nn

from tl_looped import LoopedConfig, LoopedTransformer
from tl_looped.errors import ConfigError, InputError, InvalidDecompositionError
from tl_looped.interventions import ScaleInjection
from tl_looped.model.cells import CELLS, Site, StandardCell
from tl_looped.model.context import LoopRun, Sources
from tl_looped.model.geometry import LoopGeometry
from tl_looped.model.hook_points import LoopedHookPoint
from tl_looped.model.norms import rms_norm
from tl_looped.model.program import Do, Program

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
R = 3


# -- the list ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 4, 1), (0, 2, 3, 0), (1, 1, 0, 2), (0, 1, 1, 0)])
def test_every_layer_stands_once_in_order_and_parts_compose(shape: tuple[int, ...]) -> None:
    p, k, n, c = shape
    loop = LoopGeometry(p, k, c, n)
    program = Program.of(loop)
    assert [op.layer for op in program.ops if op.do is Do.LAYER] == list(range(loop.n_layers))
    count = [sum(op.do is do for op in program.ops) for do in Do]
    assert dict(zip(Do, count, strict=True)) == {
        Do.EMBED: 1, Do.LAYER: loop.n_layers, Do.ENTER: 1, Do.READ: n, Do.WRITE: n, Do.GATE: 0,
        Do.LEAVE: 1, Do.FINAL_NORM: 1, Do.UNEMBED: 1,
    }  # fmt: skip
    for i in range(loop.n_layers + 1):
        assert program.part(None, i) + program.part(i, None) == program.ops[1:]
    between = [op for i in range(loop.n_layers + 1) for op in program.before(i)]
    layers = [op for op in program.ops if op.do is Do.LAYER]
    assert len(between) + len(layers) == len(program.ops) - 3  # embedding, final norm, unembedding


def test_edits_are_of_a_copy_and_compose() -> None:
    loop = LoopGeometry(1, 2, 0, 3)
    program = Program.of(loop, has_gate=True, ends_in_norm=True)
    edited = program.repeating(2, 2).passing_by(0).scaling(2, 3.0).scaling(2, 0.5)
    assert Program.of(loop, has_gate=True, ends_in_norm=True) is program
    assert [program.passes(r) for r in range(3)] == [1, 1, 1]
    assert [edited.passes(r) for r in range(3)] == [1, 1, 3]
    assert (program.first, edited.first) == (0, 1)
    reads = [op for op in edited.ops if op.do is Do.READ]
    assert [(op.recurrence, op.first, op.factor) for op in reads] == [
        (0, False, 1.0), (1, True, 1.0), (2, False, 1.5), (2, False, 1.5), (2, False, 1.5),
    ]  # fmt: skip
    # The final norm ends the last pass alone.
    assert [op.joined for op in edited.ops if op.do is Do.WRITE] == [False] * 4 + [True]
    assert edited.passing_by(1).passing_by(2).first is None


# -- one cell, changed in one place --------------------------------------------------------------


class Doubled(StandardCell):
    """A write that doubles what the standard one gives."""

    def write(self, at: Site, state: Tensor | None, x: Tensor) -> Tensor:
        """Twice."""
        return 2 * super().write(at, state, x)


class Leaky(StandardCell):
    """A write that keeps a part of the state."""

    writes_from_state = True

    def write(self, at: Site, state: Tensor | None, x: Tensor) -> Tensor:
        """Half of what comes, a quarter of what was."""
        assert state is not None
        return 0.5 * super().write(at, state, x) + 0.25 * state


class Squared(StandardCell):
    """A write that is no linear map."""

    def write(self, at: Site, state: Tensor | None, x: Tensor) -> Tensor:
        """A bent stream."""
        return x + 0.1 * x.square()

    def why_not_linear(self) -> str | None:
        """Squares."""
        return "the write squares the stream"


class Mixed(StandardCell):
    """A matrix of its own stands behind the loop."""

    @staticmethod
    def make_modules(cfg: LoopedConfig) -> dict[str, nn.Module]:
        """Its matrix, and those of the standard cell."""
        mix = nn.Linear(cfg.d_model, cfg.d_model, bias=False, dtype=cfg.dtype)
        return {**StandardCell.make_modules(cfg), "mix": mix}

    def finish(self, at: Site, state: Tensor) -> Tensor:
        """The product."""
        return self._linear("mix")(super().finish(at, state))


class Adding(StandardCell):
    """The prelude's output is added to every state but the first."""

    def points_before(self) -> dict[str, nn.Module]:
        return {"hook_injected": LoopedHookPoint()}

    def reads_e(self, first: bool, state_given: bool) -> bool:
        return not first

    def read(self, at: Site, state: Tensor, e: Tensor | None) -> Tensor:
        return at.hook_injected(state if e is None else state + e)


class Asking(StandardCell):
    """Queries of every core layer are made of the state (the Fully Looped Transformer's)."""

    shapes_layers = True

    def before_layer(self, at: Site, layer: int, x: Tensor, run: LoopRun) -> tuple[Tensor, Sources]:
        assert run.state is not None
        return x, Sources(q=run.state)


class Streams(StandardCell):
    """Three copies of the stream, read and written with numbers of each recurrence (Hyperloop)."""

    writes_from_state = True
    n = 3

    @staticmethod
    def make_modules(cfg: LoopedConfig) -> dict[str, nn.Module]:
        """``[recurrence, 3 kinds, n]``."""
        return {"weights": nn.Linear(3 * Streams.n, R, bias=False, dtype=cfg.dtype)}

    def _numbers(self, at: Site) -> Tensor:
        assert at.recurrence is not None
        return self._linear("weights").weight[at.recurrence].unflatten(0, (3, self.n))

    def state_like(self, x: Tensor) -> Tensor:
        return x.new_zeros((*x.shape[:-1], self.n, x.shape[-1]))

    def derive(self, e: Tensor) -> Tensor:
        return e[..., None, :].expand(*e.shape[:-1], self.n, e.shape[-1])

    def read(self, at: Site, state: Tensor, e: Tensor | None) -> Tensor:
        return (self._numbers(at)[0][:, None] * state).sum(-2)

    def write(self, at: Site, state: Tensor | None, x: Tensor) -> Tensor:
        keep, add = self._numbers(at)[1:, :, None]
        assert state is not None
        return keep * state + add * x[..., None, :]

    def finish(self, at: Site, state: Tensor) -> Tensor:
        return state.mean(-2)


class Remembering(StandardCell):
    """Keys and values of a layer are made of a mean over what passed it before (MELT's latent)."""

    shapes_layers = True

    def before_layer(self, at: Site, layer: int, x: Tensor, run: LoopRun) -> tuple[Tensor, Sources]:
        latent = run.memory.get(layer)
        run.memory[layer] = x if latent is None else (latent + x) / 2
        return x, Sources(kv=run.memory[layer])


@pytest.fixture(autouse=True)
def cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """More cells than there are."""
    for cell in (Doubled, Leaky, Squared, Mixed, Adding, Asking, Streams, Remembering):
        monkeypatch.setitem(CELLS, cell.__name__, cell)


SHAPES = {
    "injection": {"injection": "linear", "n_coda": 1, "initial_state": "random"},
    "loop norm": {"loop_norm": True, "n_coda": 1},
    "norm before the coda": {"pre_coda_norm": True, "n_coda": 1},
    "all loop": {"n_prelude": 0, "n_coda": 0},
    "residual": {"norm_layout": "residual", "injection": "linear", "n_coda": 0},
}


def model(cell: str, shape: str, **changes: object) -> LoopedTransformer:
    """Random weights in fp64; the same for every cell."""
    cfg = {
        "n_prelude": 1, "n_core": 2, "n_recurrences": R, "d_model": 16, "d_head": 8, "n_heads": 2,
        "d_mlp": 24, "d_vocab": 11, "n_ctx": 16, "init_mode": "fan_in", "dtype": "float64",
        "initial_state_std": 0.6, **SHAPES[shape], **changes,
    }  # fmt: skip
    made = LoopedTransformer.from_config(LoopedConfig.from_json({**cfg, "cell": cell}))
    with torch.no_grad():
        draw = torch.Generator().manual_seed(5)
        for name, parameter in made.named_parameters():
            if name.endswith(".w"):  # gains other than one
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=draw))
    return made


def steps(looped: LoopedTransformer) -> Iterator[Float[Tensor, "batch pos d_model"]]:
    """States step by step, as in training."""
    x, run = looped.start_run(TOKENS, 0)
    yield from looped.unroll(x, run)


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("cell", ["Doubled", "Leaky"])
@torch.no_grad()
def test_a_cell_changed_in_one_place_changes_everything_alike(cell: str, shape: str) -> None:
    changed = model(cell, shape)
    logits, cache = changed.run_with_cache(TOKENS)
    assert (logits - model("standard", shape)(TOKENS)).abs().max() > 1e-3
    states = cache.stack_recurrences("state_out")
    # What the cell says, from the cache of the forward pass.
    left = cache.stack_recurrences("resid_post")[:, -1]
    if changed.cfg.loop_norm:
        scale = cache.stack_recurrences("ln_loop.hook_scale")
        left = left / scale * changed.final_norm.w
    kept = cache.stack_recurrences("state_in")
    assert_same(states, 2 * left if cell == "Doubled" else 0.5 * left + 0.25 * kept)
    # Step by step, as a map, through the lens, cut in two.
    assert_same(torch.stack(list(steps(changed))), states)
    assert_same(changed.loop_map(TOKENS).run(R), states)
    assert_same(changed.coda_lens(states, after_loop_norm=True)[-1], logits)
    if cell == "Doubled":
        assert_same(changed.coda_lens(cache["resid_post", (R - 1, 1)]), logits)
    # Cut in two within the loop.
    middle = changed.loop.index(1, 0)
    given: dict[str, Tensor] = {}
    if changed.cfg.injection.value != "none":
        given["prelude_output"] = cache["resid_post", 0]
    start = changed(TOKENS, stop_at_layer=middle)
    if cell == "Doubled":
        assert_same(changed(start, start_at_layer=middle, **given), logits)
    else:
        with pytest.raises(InputError, match="recurrence 1"):
            changed(start, start_at_layer=middle, **given)
    # Carried writes, and directions pulled back.
    behind = cache["resid_post", -1] if changed.loop.c else states[-1]
    ends = {middle: cache["resid_pre", middle], (R - 1, 1): cache["resid_pre", (R - 1, 1)]}
    for layer, stream in {**ends, None: behind}.items():
        assert_same(cache.decompose_resid(layer).sum(0), stream)
        onto = changed.W_U[:, :2]
        neurons = cache.stack_neuron_results(layer)
        assert_same(cache.stack_neuron_results(layer, project_output_onto=onto), neurons @ onto)


@pytest.mark.usefixtures("exact_bridges")
@pytest.mark.parametrize("shape", list(SHAPES))
def test_a_changed_cell_goes_into_a_bridge(shape: str) -> None:
    changed = model("Doubled", shape)
    with torch.no_grad():
        assert_same(changed.to_bridge()(TOKENS), changed(TOKENS))


def test_a_cell_that_is_not_linear_is_refused_by_name() -> None:
    _, cache = model("Squared", "injection").run_with_cache(TOKENS)
    with pytest.raises(InvalidDecompositionError, match="squares"):
        cache.decompose_resid()


def test_parameters_of_a_cell_are_the_models_own() -> None:
    looped = model("Mixed", "injection")
    assert looped.get_parameter("mix.weight").shape == (16, 16)
    logits, cache = looped.run_with_cache(TOKENS)
    assert_same(cache.decompose_resid(looped.loop.n_layers - 1).sum(0), cache["resid_pre", -1])
    logits.sum().backward()
    assert looped.get_parameter("mix.weight").grad is not None


@pytest.mark.usefixtures("exact_bridges")
@torch.no_grad()
def test_a_cell_that_adds_the_preludes_output() -> None:
    adding = model("Adding", "norm before the coda", initial_state="prelude")
    logits, cache = adding.run_with_cache(TOKENS)
    e = cache["resid_post", 0]
    assert_same(cache["resid_pre", (0, 0)], e)
    for r in range(1, R):
        assert_same(cache["resid_pre", (r, 0)], cache["resid_post", (r - 1, 1)] + e)
    for layer in ((1, 0), (R - 1, 1)):
        assert_same(cache.decompose_resid(layer).sum(0), cache["resid_pre", layer])
    states = cache.stack_recurrences("state_out")
    assert_same(adding.loop_map(TOKENS).run(R), states)
    assert_same(adding.to_bridge()(TOKENS), logits)
    # It injects, though not by the configuration's matrix.
    with adding.intervening(ScaleInjection(0.5, 2)):
        _, scaled = adding.run_with_cache(TOKENS)
    assert_same(scaled["resid_pre", (2, 0)], scaled["resid_post", (1, 1)] + e / 2)
    assert_same(adding.run_with_cache(TOKENS, initial_state="zeros")[1]["resid_pre", (0, 0)], 0 * e)


def test_an_unknown_cell_is_refused_with_those_there_are() -> None:
    with refused(ConfigError, "'gated'", "'standard'"):
        model("gated", "injection")


# -- weights of core layers ----------------------------------------------------------------------


@torch.no_grad()
def test_core_layers_that_share_weights_are_the_layers_written_out(tmp_path: Path) -> None:
    shared = model("standard", "injection", n_core=3, core_layers=(0, 1, 0))
    apart = model("standard", "injection", n_core=3)
    assert [name for name, _ in shared.named_parameters() if name.startswith("core.2")] == []
    for i, number in enumerate((0, 1, 0)):
        apart.core[i].load_state_dict(shared.core[number].state_dict())
    for stage in ("prelude", "coda", "embed", "final_norm", "injection", "unembed"):
        apart.get_submodule(stage).load_state_dict(shared.get_submodule(stage).state_dict())
    logits, cache = shared.run_with_cache(TOKENS)
    assert torch.equal(logits, apart.run_with_cache(TOKENS)[0])
    assert_same(cache.decompose_resid().sum(0), cache["resid_post", -1])
    assert torch.equal(shared.loop_map(TOKENS).run(2), apart.loop_map(TOKENS).run(2))
    assert [shared.unique_layer(i) for i in range(shared.cfg.n_layers)] == [
        0, 1, 2, 1, 1, 2, 1, 1, 2, 1, 3,
    ]  # fmt: skip
    assert torch.equal(shared.W_Q[3], shared.unique_weights("W_Q")[shared.unique_layer(3)])
    shared.save_pretrained(tmp_path)
    loaded = LoopedTransformer.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.cfg.core_layers == (0, 1, 0)
    assert torch.equal(loaded(TOKENS), shared(TOKENS))


@pytest.mark.parametrize("wrong", [(0, 1), (0, 2, 0), (0, -1, 0), (1, 1, 1), (), "010", 3])
def test_core_layers_name_every_set_of_weights(wrong: object) -> None:
    with refused(ConfigError, "core_layers"):
        model("standard", "injection", n_core=3, core_layers=wrong)


# -- what attention is made of ---------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["pre", "post"])
@pytest.mark.parametrize("split", [False, True])
@torch.no_grad()
def test_queries_of_another_stream(layout: str, split: bool) -> None:
    asking = model("Asking", "norm before the coda", norm_layout=layout, n_key_value_heads=1)
    asking.set_use_split_qkv_input(split)
    logits, cache = asking.run_with_cache(TOKENS)
    place = (1, 1)
    block = asking.blocks[asking.loop.index(*place)]

    def normed(x: Tensor) -> Tensor:
        return x if layout == "post" else rms_norm(x, block.weights.ln1)

    state = normed(cache["recurrence.1.hook_state_in"])
    stream = normed(cache["resid_pre", place])
    for name, source, W in (("q", state, "W_Q"), ("k", stream, "W_K"), ("v", stream, "W_V")):
        heads = cache[name, place]
        weights = getattr(block.attn, W)[:: 2 // heads.shape[2]]
        assert_same(heads, torch.einsum("btd,hdk->bthk", source, weights))
    state = cache[f"recurrence.{R - 1}.hook_state_out"]
    assert_same(asking.coda_lens(state, after_loop_norm=True), logits)
    assert_same(asking.loop_map(TOKENS).run(R)[-1], state)


# -- states of another shape -----------------------------------------------------------------------


@torch.no_grad()
def test_a_state_of_several_streams() -> None:
    looped = model("Streams", "norm before the coda", pre_coda_norm=False)
    _, cache = looped.run_with_cache(TOKENS)
    numbers = looped.get_parameter("weights.weight").unflatten(1, (3, 3))
    state = cache["resid_post", 0][:, :, None].expand(-1, -1, 3, -1)
    for r in range(R):
        assert torch.equal(cache[f"recurrence.{r}.hook_state_in"], state)
        read, keep, add = numbers[r, :, :, None]
        assert_same(cache["resid_pre", (r, 0)], (read * state).sum(-2))
        state = keep * state + add * cache["resid_post", (r, 1)][:, :, None]
        assert_same(cache[f"recurrence.{r}.hook_state_out"], state)
        state = cache[f"recurrence.{r}.hook_state_out"]
    assert_same(cache["resid_pre", looped.cfg.n_layers - 1], state.mean(-2))
    for layer in (1, (1, 1), (R - 1, 0), looped.cfg.n_layers - 1):
        assert_same(cache.decompose_resid(layer).sum(0), cache["resid_pre", layer])
        onto = looped.W_U[:, :2]
        neurons = cache.stack_neuron_results(layer)
        assert_same(cache.stack_neuron_results(layer, project_output_onto=onto), neurons @ onto)
    assert_same(list(steps(looped))[-1], state)
    assert looped.loop_map(TOKENS)(state).shape == state.shape
    assert cache.stack_recurrences("state_out").shape == (R, 2, 6, 3, 16)


@torch.no_grad()
def test_a_memory_of_each_layer() -> None:
    looped = model("Remembering", "norm before the coda")
    _, cache = looped.run_with_cache(TOKENS)
    for layer in range(2):
        block, latent = looped.blocks[looped.loop.index(0, layer)], None
        for r in range(R):
            x = cache["resid_pre", (r, layer)]
            latent = x if latent is None else (latent + x) / 2
            normed = rms_norm(latent, block.weights.ln1)
            assert_same(
                cache["v", (r, layer)], torch.einsum("btd,hdk->bthk", normed, block.attn.W_V)
            )
            own = rms_norm(x, block.weights.ln1)
            assert_same(cache["q", (r, layer)], torch.einsum("btd,hdk->bthk", own, block.attn.W_Q))


# -- a run of another number of recurrences ------------------------------------------------------


@torch.no_grad()
def test_a_run_of_another_number_leaves_the_model_as_it_is() -> None:
    looped = model("standard", "injection")
    before, names = dict(vars(looped)), list(looped.hook_dict)
    blocks = list(looped.blocks)
    seen: list[tuple[str, int, int]] = []

    def look(x: Tensor, hook: LoopedHookPoint) -> None:
        assert hook.name is not None
        seen.append((hook.name, looped.loop.R, looped.cfg.n_layers))

    last = looped.loop.with_recurrences(R + 2).n_layers - 1
    hook = (f"blocks.{last}.hook_resid_post", look)
    looped.run_with_hooks(TOKENS, n_recurrences=R + 2, fwd_hooks=[hook])
    assert seen == [(f"blocks.{last}.hook_resid_post", R, looped.loop.n_layers)]
    assert vars(looped).keys() == before.keys()
    assert [name for name, value in vars(looped).items() if value is not before[name]] == []
    assert list(looped.hook_dict) == names
    assert all(a is b for a, b in zip(looped.blocks, blocks, strict=True))
    _, cache = looped.run_with_cache(TOKENS, n_recurrences=1)
    view = cache.model
    assert isinstance(view, LoopedTransformer)
    assert (view.loop.R, view.cfg.n_layers, len(view.W_Q)) == (1, 4, 4)
    assert view.blocks[1] is looped.blocks[1]
    assert torch.equal(view(TOKENS), looped(TOKENS, n_recurrences=1))
    with refused(InputError):
        view.set_recurrences(2)
    # A hook that stays on a coda layer fires at every number of recurrences, under its name there.
    seen.clear()
    looped.add_hook("coda.0.hook_resid_post", look)
    for n in (1, R, R + 2):
        looped(TOKENS, n_recurrences=n)
    assert [name for name, *_ in seen] == [
        f"blocks.{looped.loop.with_recurrences(n).n_layers - 1}.hook_resid_post"
        for n in (1, R, R + 2)
    ]


@pytest.mark.parametrize("cell", ["Asking", "Remembering"])
def test_a_core_layer_that_gets_more_than_the_stream_is_not_called_alone(cell: str) -> None:
    looped = model(cell, "injection")
    stream = looped.run_with_cache(TOKENS)[1]["resid_pre", (0, 1)]
    with pytest.raises(InputError, match=cell):
        looped.blocks[looped.loop.index(0, 1)](stream)
    first, cache = looped.blocks[0], looped.run_with_cache(TOKENS)[1]
    assert_same(first(cache["resid_pre", 0]), cache["resid_post", 0])
