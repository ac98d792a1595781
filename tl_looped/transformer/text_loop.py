"""The storey of text: strings to tokens and back, and generation, with TransformerLens's names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.checks import Seed, checked
from tl_looped.model.exit_rules import ExitRule
from tl_looped.model.kv_cache import LoopedKeyValueCache
from tl_looped.transformer import generation, tokenizing
from tl_looped.transformer.generation_options import OPTIONS, GenerationOptions
from tl_looped.transformer.hooked_loop import HookedLoop
from tl_looped.transformer.prompt import token_rows
from tl_looped.transformer.turns import in_turn
from tl_looped.transformer.unsupported import refuse_others
from tl_looped.transformer.vocabulary import refuse_larger


@checked
class TextLoop(HookedLoop):
    """Text in, text out; :class:`~tl_looped.LoopedTransformer` adds the runs between them."""

    generation_config: dict[str, Any]
    _tokenizer: Any

    # -- text and tokens ----------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """A Hugging Face tokenizer, or None for a model of token ids only.

        Raises:
            TokenizerError: when one is set that gives ids without an embedding.
        """
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        refuse_larger(tokenizer, self.cfg.d_vocab)
        self._tokenizer = tokenizer

    @checked
    def set_tokenizer(self, tokenizer: Any, default_padding_side: str | None = None) -> None:
        """Use this tokenizer from now on.

        Args:
            tokenizer: A Hugging Face tokenizer.
            default_padding_side: ``"left"`` or ``"right"``; the tokenizer's own if None.

        Raises:
            TokenizerError: if it gives ids for which the model has no embedding.
        """
        tokenizing.set_tokenizer(self, tokenizer, default_padding_side)

    @checked
    def describe_bos(self, prepend_bos: bool | None = None) -> str:
        """A sentence: whether text gets a BOS token, and who decided it.

        Args:
            prepend_bos: What the call that is described says, if it says anything.
        """
        return tokenizing.describe_bos(self, prepend_bos)

    @checked
    def tokenize(
        self,
        text: Any,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        truncate: bool = False,
    ) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
        """Tokens of one or more texts, and the mask of the real ones.

        Args:
            text: One text or several, padded to the longest, or conversations: see
                ``tl_looped.transformer.reading``. A conversation is written by :meth:`chat_text`,
                with the opening of the model's reply, and gets no BOS but the template's own.
            prepend_bos: Overrides ``cfg.default_prepend_bos``. A text that begins with BOS gets
                no second one either way.
            padding_side: ``"left"`` or ``"right"``; the tokenizer's own side if None.
            truncate: Cut rows to the context length instead of raising.

        Raises:
            TokenizerError: without a tokenizer, or if a text gives no token at all.
            InputError: if a text is longer than the context, for what is not text, or an unknown
                padding_side.
        """
        return tokenizing.tokenize(self, text, prepend_bos, padding_side, truncate)

    @checked
    def to_tokens(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = False,
    ) -> Int[Tensor, "batch pos"]:
        """Tokens of texts or conversations, padded to the longest; see :meth:`tokenize`."""
        return tokenizing.to_tokens(
            self, input, prepend_bos, padding_side, move_to_device, truncate
        )

    @checked
    def chat_text(self, messages: Any, add_generation_prompt: bool = True) -> str:
        """A conversation as the tokenizer's chat template writes it, special tokens included.

        Args:
            messages: ``{"role": ..., "content": ...}`` each.
            add_generation_prompt: End with the opening of the model's reply.

        Raises:
            TokenizerError: without a tokenizer, or if it has no chat template, or one that refuses
                the messages.
            InputError: if they are not messages.
        """
        return tokenizing.chat_text(self, messages, add_generation_prompt)

    @checked
    def token_rows(
        self, prompts: Any, attention_mask: Any = None, prepend_bos: bool | None = None
    ) -> list[Int[Tensor, " pos"]]:
        """The real tokens of every prompt, without padding.

        Args:
            prompts: Whatever the model takes (``tl_looped.transformer.reading``); or a list of
                token sequences of any lengths, which are taken as they are.
            attention_mask: ``[batch, pos]`` of tokens, zero at padding; read off the pad tokens, as
                in a run, if None.
            prepend_bos: See :meth:`to_tokens`.

        Raises:
            InputError: without any prompt or token, or beyond the context; the prompt's number is
                given.
        """
        return token_rows(self, prompts, attention_mask, prepend_bos)

    @checked
    def to_string(self, tokens: Any) -> str | list[str]:
        """Text of one token, of a sequence, or a list of texts of several, of any lengths."""
        return tokenizing.to_string(self, tokens)

    @checked
    def to_str_tokens(
        self, input: Any, prepend_bos: bool | None = None, padding_side: str | None = None
    ) -> list[str] | list[list[str]]:
        """Each token as a string; a list of texts, conversations or token sequences gives a list of
        such lists, unpadded.
        """
        return tokenizing.to_str_tokens(self, input, prepend_bos)

    @checked
    def to_single_token(self, string: str) -> int:
        """The id of a text that is exactly one token.

        Raises:
            SingleTokenError: if it is none or several; the message lists them.
        """
        return tokenizing.to_single_token(self, string)

    @checked
    def to_single_str_token(self, int_token: int) -> str:
        """The text of one token id."""
        return tokenizing.to_single_str_token(self, int_token)

    @checked
    def get_token_position(
        self,
        single_token: str | int | Tensor,
        input: Any,
        mode: str = "first",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> int:
        """Position of a token in a text, a conversation or tokens ``[pos]`` or ``[1, pos]``.

        Raises:
            SingleTokenError: if it does not occur, or if there is more than one sequence.
            InputError: if ``mode`` is neither ``"first"`` nor ``"last"``.
        """
        return tokenizing.get_token_position(self, single_token, input, mode, prepend_bos)

    @checked
    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, "..."]
    ) -> Float[Tensor, "... d_model"]:
        """Columns of W_U of the given tokens, as rows.

        As in TransformerLens, a single token gives ``[d_model]``. The final norm's gain is folded
        in only in compatibility mode; the exact direction of a logit is always
        ``ln_final.w * W_U[:, token]``.
        """
        return tokenizing.tokens_to_residual_directions(self, tokens)

    # -- generation ---------------------------------------------------------------------------

    @in_turn
    @torch.no_grad()
    @checked
    def generate(
        self,
        input: Any = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        *,
        repetition_penalty: float = 1.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        return_type: str = "input",
        verbose: bool = True,
        attention_mask: Any = None,
        stop_strings: Any = None,
        stopping_criteria: Any = None,
        output_logits: bool = False,
        return_dict_in_generate: bool = False,
        return_cache: bool = False,
        return_input_tokens: bool = False,
        names_filter: Any = None,
        device: Any = None,
        n_recurrences: int | None = None,
        initial_state: Any = None,
        state_seed: Seed | None = None,
        seed: int | None = None,
        past_kv_cache: LoopedKeyValueCache | None = None,
        exit_rule: ExitRule | None = None,
        **others: Any,
    ) -> Any:
        """Continue one or more prompts.

        The positions are those that HookedTransformer and TransformerBridge share.

        Args:
            input: As for the model itself: text, several texts (padded on the left), tokens, or a
                conversation, or several, for the tokenizer's chat template. ``""`` begins with BOS.
                Or an embedding ``[batch, pos, d_model]``, as ``model.embed`` gives it.
            max_new_tokens: Most new tokens per row.
            stop_at_eos: End a row at a stop token. It is filled up with that token; where several
                were asked for, with the tokenizer's EOS.
            eos_token_id: Stop token or tokens, in place of :meth:`stop_tokens`.
            do_sample: Sample; otherwise take the most likely token.
            top_k, top_p, temperature, freq_penalty, repetition_penalty: As in TransformerLens; the
                penalties count real tokens only.
            use_past_kv_cache: Keep keys and values of earlier tokens.
            prepend_bos: Overrides ``cfg.default_prepend_bos`` for text. A chat template brings its
                own.
            padding_side: Of tokens, the side on which pad tokens are padding; off either side if
                None. Texts are padded on the left whatever it says, as in TransformerLens.
            return_type: ``"input"`` (as the input was), ``"str"``, ``"tokens"`` or ``"embeds"``
                (the embedding of prompt and reply). Of an embedding, text and tokens are of the
                reply alone.
            verbose: Show progress, and the cache's memory.
            attention_mask: Mask of a left-padded prompt.
            stop_strings: Text or texts that end a row once its reply contains one; the token that
                completes it stays. It is filled up as after a stop token, or with padding.
            stopping_criteria: One of transformers' ``StoppingCriteria`` or several; each is called
                with the tokens up to the newest and the newest logits after every step, and says
                which rows end.
            output_logits: Return transformers' ``GenerateDecoderOnlyOutput``: ``sequences``, the
                tokens of prompt and reply, and ``logits``, ``[batch, d_vocab]`` of each step,
                before penalties and temperature.
            return_dict_in_generate: No effect, as in TransformerLens: ``output_logits`` decides.
            return_cache: Return also the activations of a run of prompt and reply,
                :meth:`run_with_cache` of them, with ``names_filter`` and ``device`` for it.
            return_input_tokens: Return also the prompt's tokens, last.
            names_filter, device: See ``return_cache``.
            n_recurrences: Recurrences of every step.
            initial_state: ``"zeros"``, or a state for every position up to the last generated.
            state_seed: Seed of the random initial state.
            seed: Seed of the sampling; the global generator is left alone if given.
            past_kv_cache: A cache to use, for instance one that shares slots,
                ``LoopedKeyValueCache(recurrence_slots=1)``, or one that holds a prefix already.
            exit_rule: When tokens leave the loop.
            **others: Arguments of TransformerLens and transformers that have no meaning here.

        Returns:
            Prompt and continuation, as text or as tokens ``[batch, pos]``; of a conversation the
            reply alone. In text, special tokens of the prompt and the one that ends a row are left
            out; others of the reply are written, so that no marker vanishes from a text that goes
            on after it. With ``exit_rule`` an :class:`ExitResult` of that and the recurrence after
            which each new token's prediction left the loop ``[batch, new]``. With ``return_cache``
            or ``return_input_tokens`` a tuple that begins with it.
        """
        given = locals()
        options = GenerationOptions.of(given)
        refuse_others("generate", others, given)
        return generation.generate(self, input, max_new_tokens, options)

    @in_turn
    @checked
    def generate_stream(
        self,
        input: Any = "",
        max_new_tokens: int = 10,
        max_tokens_per_yield: int = 25,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        **options: Any,
    ) -> Iterator[Any]:
        """As :meth:`generate`, piece by piece, in TransformerLens's way.

        Args:
            input, max_new_tokens: As in :meth:`generate`.
            max_tokens_per_yield: Tokens in a piece; those of the prompt count in the first, which
                is given out with the first new token if they are as many.
            stop_at_eos, eos_token_id, do_sample, top_k, top_p, temperature, freq_penalty: As in
                :meth:`generate`.
            **options: As in :meth:`generate`; of an ``exit_rule`` the steps are not returned.

        Yields:
            Tokens ``[batch, n]``, or texts. The first piece includes the prompt (but for a
            conversation), later ones hold new tokens only. A text ends with a whole character, and
            all pieces together are what :meth:`generate` returns. The model may be used between
            them.
        """
        given = {name: value for name, value in locals().items() if name in OPTIONS}
        asked = GenerationOptions.given("generate_stream", {**given, **options})
        return generation.generate_stream(self, input, max_new_tokens, max_tokens_per_yield, asked)

    @in_turn
    @torch.no_grad()
    @checked
    def hf_generate(
        self,
        input: Any = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        use_past_kv_cache: bool = True,
        return_type: str | None = "input",
        **options: Any,
    ) -> Any:
        """As :meth:`generate`, by the names and habits of transformers, as in TransformerLens 4.

        Text gets the special tokens that the tokenizer adds by itself, whatever
        ``cfg.default_prepend_bos`` says. Rows are filled up with ``pad_token_id``, the tokenizer's
        EOS if that is not given. There are no defaults beside those written here: transformers' own
        (``top_k=50``) and those of the checkpoint's ``generation_config.json`` do not count, but
        for stop tokens.

        Args:
            input, max_new_tokens, stop_at_eos, eos_token_id, do_sample, top_k, top_p, temperature,
                use_past_kv_cache: As in :meth:`generate`.
            return_type: ``"input"``, ``"str"`` or ``"tokens"``.
            **options: As in :meth:`generate`, and ``use_cache``, ``past_key_values`` and
                ``pad_token_id``. With ``output_logits`` or ``return_dict_in_generate`` tokens come
                back as transformers' ``GenerateDecoderOnlyOutput``; text is text even then, as in
                TransformerLens.

        Returns:
            Text, a list of texts, tokens ``[batch, pos]``, or transformers' output of them.

        Raises:
            ArgumentTypeError: for arguments of transformers that cannot be had, by name.
        """
        given = {name: value for name, value in locals().items() if name in OPTIONS}
        return generation.hf_generate(self, input, max_new_tokens, {**given, **options})

    def stop_tokens(self) -> list[int]:
        """Tokens that end a generated text, unless ``eos_token_id`` says otherwise.

        The tokenizer's EOS; those of the checkpoint's ``generation_config.json``; and the special
        token that the chat template writes after a reply, the end of a turn.
        """
        return generation.stop_tokens(self)
