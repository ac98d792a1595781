"""Looped models as TransformerLens bridges, for tools that insist on a ``TransformerBridge``.

- ``tied``: layers without parameters of their own, which read those of a looped model.
- ``unrolled``: the looped model at a fixed number of recurrences, as a plain stack of layers.
- ``adapter``: how TransformerLens wraps that stack, and the entry point that announces it.
- ``build``: from a looped model to a bridge.

Nothing is imported here: TransformerLens's bridge is large, and is loaded when one is built.
"""

ARCHITECTURE = "LoopedForCausalLM"  # what TransformerLens knows the adapter by
