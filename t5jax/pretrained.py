"""A trained model on the devices: generates, scores and embeds texts, is evaluated and exported.

For example:

    model = t5jax.load("google/flan-t5-small")
    model.generate(["A step by step recipe to make bolognese pasta:"], max_tokens=64)
    model.score(["Is the sky blue?"] * 2, ["yes", "no"])
    t5jax.load("bert-base-uncased").embed(["One vector per text."])
    t5jax.load("runs/numbers").evaluate(split="validation")
    t5jax.load("runs/numbers").export("exported")
"""

import dataclasses
import functools
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from t5jax import batch as features
from t5jax import decoding, sharding, trees
from t5jax.adapters import lora
from t5jax.architectures import Architecture, Dtype
from t5jax.checks import check_at_least, check_characters, check_choice, check_names
from t5jax.config import AxisRules, MeshConfig
from t5jax.convert import export_model
from t5jax.evaluation import evaluate_model
from t5jax.models import api
from t5jax.source import Source, find, read_adapters
from t5jax.special_tokens import check_prompts, check_vocabulary, example_format
from t5jax.tokenizers import Tokenizer

Pooling = Literal["mean", "first", "max", "pooler"]
"""How the vectors of a text's tokens are combined."""


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model on the devices of a mesh, with its tokenizer."""

    model: Architecture
    params: api.Params
    """The parameters; with a decoder, as returned by `api.arrange_for_decoding`."""
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    rules: AxisRules = AxisRules()
    prefix_lm: bool = False
    """Use bidirectional attention in a decoder's prompt, as with data.prefix_lm."""
    source: Source | None = None
    """Where it was loaded from. `evaluate` and `export` read the parameters again from there, since
    those arranged for decoding may be less precise."""
    dtype: Dtype | None = None
    """The dtype passed to `load`."""
    adapters: tuple[str, ...] = ()
    """The names of the adapters among the parameters, of which each row of a batch has its own; see
    `api.with_adapters`. The methods here are those of the model without them."""

    @functools.cached_property
    def _own_params(self) -> api.Params:
        """The parameters without any of several adapters."""
        return self.with_adapter(0).params

    def with_adapter(self, number: int) -> "Pretrained":
        """Returns the model with one of its adapters; 0 is none.

        Args:
          number: of the adapter, from 1, in the order of `adapters`.
        """
        if not self.adapters:
            return self
        params = jax.tree_util.tree_map_with_path(
            lambda path, x: (
                jnp.take(x, number, axis=_adapter_axis(path)) if _is_adapters(path) else x
            ),
            self.params,
        )
        return dataclasses.replace(self, params=params, adapters=())

    def options(self, **given: Any) -> decoding.GenerationOptions:
        """Returns how answers are written, by default as generation_config.json says.

        Args:
          **given: fields of `decoding.GenerationOptions`; None is not set.
        Raises:
          ValueError: for an unknown option, a value out of range, or a contradiction.
        """
        check_names(given, decoding.GenerationOptions)
        generation = {} if self.source is None else self.source.generation()
        return decoding.options_of(generation, given)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_tokens: int | None = None,
        batch_size: int = 32,
        special_tokens: bool = False,
        **options: Any,
    ) -> list[str]:
        """Returns the answer to each prompt, the first one if several are asked for.

        Args:
          prompts: texts, which begin and end as the model's tokenizer begins and ends them. A
            decoder continues the text; an empty one has the start of a text for it to read. Or
            token ids, which the model reads as they are.
          max_tokens: the maximum length of an answer in tokens. None: as generation_config.json
            says, or 64.
          batch_size: the number of prompts per batch. Rows and lengths are padded to powers of two,
            so that few shapes are compiled.
          special_tokens: keep special tokens in the answers, such as T5's "<extra_id_0>", which
            separate the texts of gaps.
          **options: others of `decoding.GenerationOptions`, such as temperature or num_beams.
            Without any, answers are greedy, unless generation_config.json asks for more.
        Raises:
          ValueError: if the model does not generate text, or has too few positions, or for options
            that contradict each other.
        """
        answers = self.answers(
            prompts,
            self.options(max_tokens=max_tokens, **options),
            batch_size=batch_size,
            special_tokens=special_tokens,
        )
        return [one.text for one, *_ in answers]

    def answers(
        self,
        prompts: Sequence[str | Sequence[int]],
        options: decoding.GenerationOptions | None = None,
        *,
        batch_size: int = 32,
        special_tokens: bool = False,
        rows: int | None = None,
        first: int = 0,
    ) -> list[list[decoding.Answer]]:
        """Returns all answers to each prompt, with tokens, scores and log-probabilities.

        Args:
          prompts: as for `generate`.
          options: how answers are written; None: as generation_config.json says.
          batch_size: as for `generate`.
          special_tokens: as for `generate`.
          rows: as for `decoding.Generator.answers`.
          first: the number of the first prompt, on which drawn tokens depend.
        Raises:
          ValueError: as for `generate`.
        """
        self.check_writes()
        if isinstance(prompts, str) or any(isinstance(p, (int, np.integer)) for p in prompts):
            raise ValueError(
                f"prompts is {prompts!r:.60}; expected a list of texts, or of lists of token ids"
            )
        options = self.options() if options is None else options
        read = [self.prompt(text) if isinstance(text, str) else list(text) for text in prompts]
        return self._generator(special_tokens).answers_to_prompts(
            self._own_params, read, options, batch_size=batch_size, rows=rows, first=first
        )

    def prompt(self, text: str) -> list[int]:
        """Returns the ids that the model reads of a text, with those that begin and end it."""
        check_characters(text)
        ids = [*self.tokenizer.encode(text), self.tokenizer.eos_id]
        return [int(i) for i in example_format(self.model, self.tokenizer).prompt(ids)]

    def chat_prompt(self, text: str) -> list[int]:
        """Returns the same of what a chat template renders, which writes them all by itself."""
        nothing = example_format(self.model, self.tokenizer).nothing
        return list(self.tokenizer.encode(text)) or [nothing]

    def check_writes(self) -> None:
        """Raises ValueError if the model has no decoder, and so writes no text."""
        if self.model.kind == "encoder":
            raise ValueError(
                f"{self.model.family} is an encoder and writes no text; `t5jax embed` gives its "
                "embeddings, `t5jax eval` what it predicts"
            )

    def score(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        *,
        end: bool = False,
        num_top: int = 0,
        batch_size: int = 32,
    ) -> list[decoding.Score]:
        """Returns how probable each answer is after its prompt.

        The prompt and the answer are encoded apart. `Score.total` is the log-probability of the
        whole answer in nats.

        Args:
          prompts: N texts, read as by `generate`.
          answers: N texts.
          end: also score the token that ends a text, as T5's targets have it.
          num_top: the number of most probable tokens to return at each place.
          batch_size: the number of rows per batch. Rows and lengths are padded to powers of two.
        Raises:
          ValueError: if the numbers of prompts and answers differ, or the model writes no text, or
            has too few positions.
        """
        self.check_writes()
        if isinstance(prompts, str) or isinstance(answers, str) or len(prompts) != len(answers):
            raise ValueError(
                f"prompts and answers are {len(prompts)} and {len(answers)}; expected two lists of "
                "the same length"
            )
        for text in (*prompts, *answers):
            check_characters(text)
        encode, eos = self.tokenizer.encode, self.tokenizer.eos_id
        return self._generator(special_tokens=True).score(
            self._own_params,
            [[*encode(text), eos] for text in prompts],
            [[*encode(text), *([eos] if end else [])] for text in answers],
            batch_size=batch_size,
            num_top=num_top,
        )

    def embed(
        self,
        texts: Sequence[str],
        *,
        pooling: Pooling = "mean",
        max_length: int | None = None,
        batch_size: int = 32,
    ) -> np.ndarray:
        """Returns a vector for each text, from the encoder's last layer: float32 [N, D].

        A text is encoded as in training, including the tokens that begin and end it.

        Args:
          texts: N texts.
          pooling: "mean" or "max" over a text's tokens including special ones; the vector of the
            "first" token; or "pooler", the layer over the first token, if the head has one.
          max_length: the maximum length of a text in tokens; longer ones are truncated before their
            last token. None: no limit.
          batch_size: the number of texts per batch. Rows and lengths are padded to powers of two.
        Raises:
          ValueError: if the model is decoder-only, has no pooler for pooling "pooler", or has too
            few positions for a text.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts is {texts!r:.60}; expected a list of texts")
        if max_length is not None:
            check_at_least(max_length, 3, "max_length")
        ids = [self._encode(text, max_length) for text in texts]
        return self.embed_ids(ids, pooling=pooling, batch_size=batch_size)

    def embed_ids(
        self, ids: Sequence[Sequence[int]], *, pooling: Pooling = "mean", batch_size: int = 32
    ) -> np.ndarray:
        """Returns a vector for each of N texts, given as what the encoder reads: float32 [N, D].

        Arguments and errors are those of `embed`.
        """
        model = self.model
        if model.kind == "decoder":
            raise ValueError(
                f"{model.family} is a decoder alone and has no encoder; embed with a model that "
                "has one"
            )
        check_choice(pooling, typing.get_args(Pooling), "pooling")
        if pooling == "pooler" and not model.has_pooler:
            raise ValueError(
                f"pooling is pooler, but this {model.family}, whose head is {model.head}, has "
                "none; use mean, first or max"
            )
        check_prompts(model, self.tokenizer, ids)
        longest = model.longest_row
        for number, row in enumerate(ids):
            if longest is not None and len(row) > longest:
                raise ValueError(
                    f"text {number} has {len(row)} tokens, but this {model.family} has {longest} "
                    f"positions; cut texts with max_length={longest} (--max-length {longest})"
                )
        parts = sharding.batch_parts(self.mesh, self.rules)
        vectors = [np.empty((0, model.d_model), np.float32)]
        for chunk, rows, length in decoding.padded_batches(ids, batch_size, parts):
            length = min(length, longest or length)
            batch = features.prompt_batch(chunk, "encoder", rows, length)
            with sharding.use_mesh(self.mesh, self.rules):
                batch = sharding.shard_batch(batch, self.mesh, self.rules)
                x_BD = _embed(model, self._own_params, batch, pooling)
            vectors.append(jax.device_get(x_BD)[: len(chunk)])
        return np.concatenate(vectors)

    def evaluate(
        self, tasks: str | Sequence[str] = (), **options: Any
    ) -> dict[str, dict[str, Any]]:
        """Evaluates the model on tasks and mixtures, by default those it was trained on.

        Args:
          tasks: their names.
          **options: other arguments of `evaluation.evaluate_model`.
        Returns:
          For each task the scores of the model and of the baselines, and how they compare.
        """
        given = {"dtype": self.dtype, "mesh": self.mesh, "rules": self.rules, "show": False}
        options = given | options
        return evaluate_model(self._found(), tasks, **options)

    def export(self, output: str, **options: Any) -> None:
        """Writes the model as a Hugging Face folder.

        Args:
          output: the folder to write.
          **options: other arguments of `convert.export_model`.
        """
        export_model(self._found(), output, **options)

    def _generator(self, special_tokens: bool) -> decoding.Generator:
        return decoding.Generator(
            self.model,
            self.tokenizer,
            self.mesh,
            self.rules,
            self.prefix_lm,
            special_tokens,
            past_eos=True,
        )

    def _found(self) -> Source:
        if self.source is None:
            raise ValueError(
                "this model was not loaded from files, so there is nothing to read again; take one "
                "that t5jax.load returns"
            )
        return self.source

    def _encode(self, text: str, max_length: int | None) -> list[int]:
        """Returns the tokens of a text for the encoder."""
        form, ids = example_format(self.model, self.tokenizer), self.prompt(text)
        if max_length is not None and len(ids) > max_length:
            end = ids[len(ids) - len(form.prompt_end) :]
            ids = [*ids[: max_length - len(end)], *end]
        return ids


def _is_adapters(path: Any) -> bool:
    return getattr(path[-1], "key", None) in lora.LEAVES


def _adapter_axis(path: Any) -> int:
    """Returns the axis of the adapters: behind that of layers, if they are stacked."""
    keys = [getattr(key, "key", None) for key in path]
    # Layers that are arranged for decoding are a tuple, whose entries have an index.
    is_apart = any(isinstance(key, jax.tree_util.SequenceKey) for key in path)
    return int("layers" in keys and not is_apart)


@functools.partial(jax.jit, static_argnames=("model", "pooling"))
def _embed(
    model: Architecture, params: api.Params, batch: dict[str, jax.Array], pooling: Pooling
) -> jax.Array:
    """Returns float32 [B, D]; rows of padding have arbitrary values."""
    if pooling == "pooler":
        x_BD = api.hidden(model, params, batch)[:, 0]
    else:
        x_BSD = api.encode(model, params, batch).astype(jnp.float32)
        is_token_BS1 = (batch[features.ENCODER_SEGMENT_IDS] != 0)[..., None]
        if pooling == "first":
            x_BD = x_BSD[:, 0]
        elif pooling == "max":
            x_BD = jnp.max(jnp.where(is_token_BS1, x_BSD, -jnp.inf), axis=1)
        else:
            x_BD = jnp.mean(x_BSD, axis=1, where=is_token_BS1)
    # Replicated, so that every host can read it.
    return sharding.constrain(x_BD.astype(jnp.float32), None, None)


def load(
    name_or_path: str,
    *,
    dtype: Dtype | None = None,
    mesh: MeshConfig = MeshConfig(),
    rules: AxisRules | None = None,
    base: str = "",
    adapters: Mapping[str, str] | None = None,
    kv_cache: Literal["int8"] | None = None,
) -> Pretrained:
    """Loads a model and its tokenizer.

    Args:
      name_or_path: a Hub name, a Hugging Face folder, a run's folder, or one of its checkpoints.
      dtype: the dtype of computation and parameters, "float32" or "bfloat16". None: float32
        parameters, computation as in training.
      mesh: the devices; fsdp and model shard the parameters, data replicates them.
      rules: how arrays are sharded over the mesh; an axis that it does not divide stays whole.
        None: as in the run.
      base: of an adapter: where its base is now. Empty: where the adapter says.
      adapters: adapters by name, to serve several over one model: runs or PEFT's folders. To use
        one alone, load it by its own name.
      kv_cache: "int8" keeps the keys and values of decoding in int8. None: as the model says.
    Raises:
      ValueError: if the model cannot be found or read, or its tokenizer writes ids that have no
        embedding; if an adapter is of another base.
    """
    source, mesh = find(name_or_path, base=base), sharding.make_mesh(mesh)
    source.warn_if_unrounded()
    rules = source.rules(mesh, rules)
    tokenizer = source.tokenizer()
    check_vocabulary(source.model, tokenizer)
    model, params = source.read(dtype, mesh, rules)
    if adapters:
        leaves = read_adapters(source, model, params, adapters)
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        params = trees.unflatten({**trees.flatten(params), **jax.device_put(leaves, replicated)})
    # Unrolled layers decode faster: a scan would copy each layer's weights at every token.
    model = dataclasses.replace(model, scan_layers=False, kv_cache=kv_cache or model.kv_cache)
    if model.kind != "encoder":
        with sharding.use_mesh(mesh, rules):
            params = jax.jit(lambda params: api.arrange_for_decoding(model, params))(params)
    prefix_lm = source.config.data.prefix_lm
    return Pretrained(
        *(model, params, tokenizer, mesh, rules, prefix_lm, source, dtype),
        adapters=tuple(adapters or ()),
    )
