"""The bodies of requests, as in OpenAI's API reference.

What is not listed here is refused, and so are options of OpenAI's that this server does not have:
an option without an effect would give answers that nobody asked for.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from t5jax.serving.slots import NUM_BIASED, NUM_FORCED, NUM_TOP

MAX_PROMPTS = 128
_MAX_INPUTS = 2048
_MAX_ANSWERS = 64
_MAX_BEAMS = 16

Text = Annotated[str, Field(max_length=2_000_000)]
Tokens = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=1_000_000)
]
Prompts = (
    Text
    | Tokens
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
)
_Inputs = (
    Text
    | Tokens
    | Annotated[list[Text], Field(min_length=1, max_length=_MAX_INPUTS)]
    | Annotated[list[Tokens], Field(min_length=1, max_length=_MAX_INPUTS)]
)
_Id = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_StopText = Annotated[str, Field(min_length=1, max_length=1000)]


class _Body(BaseModel):
    # Numbers are not made of texts, nor of true and false.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool | None = Field(None, description="Has no effect here.")


class JsonSchema(_Body):
    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class GenerationBody(_Body):
    """What completions and chats have in common."""

    model: str
    temperature: float | None = Field(
        None,
        ge=0,
        le=100,
        description="0: the most probable token. Without it as the model's generation_config.json "
        "says, which usually means 0; 1 if several answers are asked for.",
    )
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31, description="0: all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    no_repeat_ngram_size: int | None = Field(None, ge=0, le=1000)
    min_tokens: int | None = Field(
        None, ge=0, lt=2**31, description="Before them no id ends an answer; a stop text may."
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    n: int | None = Field(1, ge=1, le=_MAX_ANSWERS)
    stop: _StopText | Annotated[list[_StopText], Field(max_length=16)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    skip_special_tokens: bool = Field(
        True, description="Leave special tokens, such as T5's sentinels, out of the text."
    )
    user: str | None = Field(None, description="Has no effect here.")
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0
    logit_bias: (
        Annotated[dict[_Id, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=NUM_BIASED)]
        | None
    ) = Field(None, description="What is added to the logits of ids.")
    forced_tokens: Annotated[list[_TokenId], Field(max_length=NUM_FORCED)] | None = Field(
        None, description="Ids that every answer begins with."
    )
    num_beams: int | None = Field(
        None,
        ge=1,
        le=_MAX_BEAMS,
        description="Beam search, whose answers come as a whole. Without it as the model's "
        "generation_config.json says; 1: none.",
    )
    length_penalty: float | None = Field(None, ge=-10, le=10, description="Of beam search.")


class CompletionBody(GenerationBody):
    prompt: Prompts
    max_tokens: int | None = Field(16, ge=0, lt=2**31, description="0: the echo alone.")
    best_of: int | None = Field(None, ge=1, le=_MAX_ANSWERS)
    logprobs: int | None = Field(None, ge=0, le=NUM_TOP)
    echo: bool | None = False
    suffix: None = None


class ContentPart(_Body):
    type: Literal["text"]
    text: Text


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[ContentPart], Field(max_length=1000)]
    name: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatBody(GenerationBody):
    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=NUM_TOP)
    tools: Annotated[list[Any], Field(max_length=0)] | None = None


class EmbeddingBody(_Body):
    model: str
    input: _Inputs
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Literal["mean", "first", "max", "pooler"] = "mean"
    user: str | None = Field(None, description="Has no effect here.")


def each(given: Any) -> list[str | list[int]]:
    """Returns each of the texts, or of the lists of ids, of which a body has one or several."""
    is_one = isinstance(given, str) or isinstance(given[0], int)
    return [given] if is_one else list(given)


class TokenizeBody(_Body):
    prompt: Text
    model: str | None = Field(None, description="By default the first model.")
    add_special_tokens: bool = True


class DetokenizeBody(_Body):
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=1_000_000)]
    model: str | None = Field(None, description="By default the first model.")
