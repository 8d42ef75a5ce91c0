import json
from collections import Counter

import pytest
import tokenizers

from t5jax.data.prompts.chat import (
    INSTRUCTION,
    ChatTemplate,
    EachReply,
    as_messages,
    from_sharegpt,
)
from t5jax.data.prompts.fewshot import FewShot
from t5jax.tokenizers import load_tokenizer

# Written for these tests, each in the manner of a family of models.
CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
BRACKETS = """\
{{ bos_token }}{% for message in messages %}
    {% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}
        {% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
    {% else %}
        {{ raise_exception('only user and assistant, not ' + message.role) }}
    {% endif %}
{% endfor %}
"""
DATED = """\
{%- set ns = namespace(first=true) %}
{%- for m in messages %}
{%- if m.role == 'note' %}{% continue %}{% endif %}
{{- ('Today is ' ~ strftime_now('%Y-%m-%d') ~ '.\\n') if ns.first else '' }}
{%- set ns.first = false %}
{{- m.role ~ ' says ' ~ m.content | tojson ~ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}assistant says {% endif %}
"""
TOKENS = (("bos_token", "<s>"), ("eos_token", "<|im_end|>"))
CHAT = {
    "messages": [
        {"role": "user", "content": " Two and two? "},
        {"role": "assistant", "content": 'Four, "vier" & <4>.'},
        {"role": "user", "content": "Three more?"},
        {"role": "assistant", "content": "Seven."},
    ]
}


def test_the_answer_is_what_follows_the_generation_prompt():
    prompt = ChatTemplate(CHATML).render(CHAT)
    assert prompt.inputs.startswith("<|im_start|>user\nTwo and two?<|im_end|>\n<|im_start|>assist")
    assert prompt.inputs.endswith("Three more?<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.targets == "Seven.<|im_end|>"
    assert prompt.source == "Three more?"
    # The eos that the tokenization adds comes once.
    assert ChatTemplate(CHATML, special_tokens=TOKENS).render(CHAT).targets == "Seven."


@pytest.mark.hf
@pytest.mark.parametrize("text", [CHATML, BRACKETS, DATED])
def test_conversations_read_as_in_transformers(text):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    prompt = ChatTemplate(text, special_tokens=TOKENS).render(CHAT)

    def theirs(messages, **options):
        rendered = utils.render_jinja_template(
            [messages], chat_template=text, **dict(TOKENS), **options
        )[0][0]
        today = rendered.partition("Today is ")[2][:10]
        return rendered.replace(today, "2024-07-26") if today else rendered

    assert prompt.inputs == theirs(CHAT["messages"][:-1], add_generation_prompt=True)
    whole = theirs(CHAT["messages"])
    assert (prompt.inputs + prompt.targets).strip() == whole.strip().removesuffix("<|im_end|>")


LLAMA_3 = """\
{{- bos_token }}
{%- for m in messages %}
    {{- '<|start|>' + m.role + '<|end|>\n\n' + m.content | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\n\n' }}
{%- endif %}
"""


LLAMA_2 = """\
{{- bos_token }}
{%- for m in messages %}
    {{- '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + ' ' }}
    {{- eos_token if m.role == 'assistant' else '' }}
{%- endfor %}
"""


def byte_level():
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return bpe


def with_a_space_before():
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<|text|>"))
    steps = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    bpe.normalizer = tokenizers.normalizers.Sequence(steps)
    return bpe


@pytest.mark.hf
@pytest.mark.parametrize(
    ("make", "template", "eos"),
    [
        (byte_level, LLAMA_3, "<|eot|>"),
        (byte_level, LLAMA_3, "<|text_end|>"),
        (with_a_space_before, LLAMA_2, "<|eot|>"),
    ],
)
def test_tokens_are_those_of_transformers(make, template, eos, tmp_path):
    transformers = pytest.importorskip("transformers")
    specials = ["<|text|>", "<|start|>", "<|end|>", "<|eot|>", "<|text_end|>"]
    bpe, alphabet = make(), tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([json.dumps(CHAT, indent=1)], trainer)
    bpe.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    config |= {"bos_token": "<|text|>", "eos_token": eos}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)

    def apply(messages, **options):
        return theirs.apply_chat_template(messages, return_dict=False, **options)

    prompt = ChatTemplate().bind(tokenizer).render(CHAT)
    inputs = tokenizer.encode(prompt.inputs)
    assert inputs == apply(CHAT["messages"][:-1], add_generation_prompt=True)
    # Where turns do not end with eos, eos follows.
    ends = [tokenizer.eos_id] * (eos != "<|eot|>")
    tokens = [*inputs, *tokenizer.encode(prompt.targets), tokenizer.eos_id]
    assert tokens == [*apply(CHAT["messages"]), *ends]


def test_a_start_that_the_tokenizer_has_and_the_template_lacks_is_said_once(caplog):
    class Starting(FakeTokenizer):
        prompt_affixes = ((7,), ())

        def encode(self, text):
            return [7] * text.startswith("<s>") + [8]

    for template, said in (("{{ bos_token }}", 0), ("", 1)):
        chat = ChatTemplate().bind(Starting(template + CHATML))
        for _ in range(2):
            chat.render(CHAT)
        assert len(caplog.messages) == said
    assert "the chat template does not begin with '<s>'" in caplog.messages[0]


class FakeTokenizer:
    def __init__(self, chat_template):
        self.chat_template, self.special_tokens = chat_template, dict(TOKENS)

    def __repr__(self):
        return "FakeTokenizer"


def test_the_chat_template_comes_from_the_runs_tokenizer():
    template = ChatTemplate().bind(FakeTokenizer(BRACKETS))
    assert template.render({"messages": CHAT["messages"][:2]}) == (
        "<s>[INST]  Two and two?  [/INST]",
        ' Four, "vier" & <4>.',
        " Two and two? ",
    )
    own = ChatTemplate(CHATML)
    assert own.bind(FakeTokenizer(BRACKETS)) == own
    with pytest.raises(ValueError, match="but FakeTokenizer has none; take a vocabulary"):
        ChatTemplate().bind(FakeTokenizer(None))
    with pytest.raises(ValueError, match="there is no tokenizer; set data.vocabulary, or give"):
        ChatTemplate().render(CHAT)


def test_every_reply_becomes_a_row():
    step, dropped = EachReply(), Counter()
    rows = [CHAT | {"id": 1}, {"messages": CHAT["messages"][:1]}, {"messages": []}]
    replies = list(step(iter(rows), dropped))
    assert [len(row["messages"]) for row in replies] == [2, 4]
    assert [row["id"] for row in replies] == [1, 1]
    assert dropped == {step.name: 2}


def said(*contents, **fields):
    """Returns a conversation of OpenAI's form, the user first."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": [*messages[:-1], messages[-1] | fields]}


def test_replies_of_weight_0_are_context_alone():
    row = said("a", "b", "c", "d", "e", "f")
    for place, weight in ((1, 0), (3, 1), (5, 0)):
        row["messages"][place]["weight"] = weight
    dropped = Counter()
    (kept,) = EachReply()(iter([row]), dropped)
    assert dropped.total() == 0
    prompt = ChatTemplate(CHATML).render(kept)
    assert prompt.targets == "d<|im_end|>"
    assert "assistant\nb<|im_end|>" in prompt.inputs
    with pytest.raises(ValueError, match=r"has the weight 0, .*clean\(EachReply\(\)\) leaves"):
        ChatTemplate(CHATML).render(row)
    assert list(EachReply()(iter([said("a", "b", weight=0)]), dropped)) == []
    assert dropped.total() == 1
    # A column of a table has a weight in every row.
    assert ChatTemplate(CHATML).render(said("a", "b", weight=None)).targets == "b<|im_end|>"


def test_contents_in_parts_are_their_texts():
    parts = [{"type": "text", "text": "Two "}, {"type": "text", "text": "and two?", "x": None}]
    row = said(parts, "Four.", tool_calls=None, refusal=None, annotations=[])
    assert ChatTemplate(CHATML).render(row) == ChatTemplate(CHATML).render(
        said("Two and two?", "Four.")
    )
    row["messages"].insert(0, {"role": "developer", "content": "Be brief."})
    assert "<|im_start|>system\nBe brief." in ChatTemplate(CHATML).render(row).inputs


CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (said("a", None, tool_calls=[CALL]), "message 1 .* has tool_calls, .*weather.*calls of to"),
        (said("a", None, function_call={"name": "w"}), "message 1 .* has function_call, {'name'"),
        (said("a", "b", role="tool"), "message 1 of field 'messages' is of the role 'tool'; calls"),
        (said("a", "b") | {"tools": [CALL]}, "the row has tools, .*calls of tools are not support"),
        (
            said([{"type": "image_url", "image_url": {"url": "x.png"}}], "b"),
            "message 0 .* has a part .* of the type 'image_url'; expected .*only text is supported",
        ),
        (said("a", None, refusal="I can't."), "message 1 .* has refusal, .*only text is supported"),
        (said("a", None), "message 1 .*expected the texts `role`"),
        (
            said("a", "b", weight=0.5),
            "message 1 of field 'messages' has the weight 0.5; expected 0",
        ),
    ],
)
def test_what_is_not_text_is_refused_by_name(row, message):
    with pytest.raises(ValueError, match=message):
        ChatTemplate(CHATML).render(row)
    with pytest.raises(ValueError, match=message):
        list(EachReply()(iter([row]), Counter()))


def test_rows_of_sharegpt():
    turns = [("human", "Hi."), ("gpt", "Hello."), ("human", "Bye."), ("chatgpt", "Bye!")]
    row = {"conversations": [{"from": f, "value": v} for f, v in turns], "id": 7}
    read = from_sharegpt(row)
    assert read["id"] == 7
    assert read["messages"] == said("Hi.", "Hello.", "Bye.", "Bye!")["messages"]
    instructed = from_sharegpt(row | {"system": "Be kind."})["messages"]
    assert instructed[0] == {"role": "system", "content": "Be kind."}
    row["conversations"].insert(0, {"from": "system", "value": "Be kind."})
    assert from_sharegpt(row)["messages"] == instructed


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"conversations": [{"from": "observation", "value": "{}"}]},
            "turn 0 of field 'conversations' is from 'observation'; expected human, .*of tools are",
        ),
        ({"conversations": [{"role": "user", "content": "x"}]}, "turn 0 .*the texts `from` and"),
        ({"conversations": "x"}, "field 'conversations' is 'x', a str; expected a list of"),
        ({"messages": []}, "there is no field 'conversations'; the row has messages"),
    ],
)
def test_bad_rows_of_sharegpt_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        from_sharegpt(row)


def test_a_row_of_sharegpt_says_how_it_is_read():
    with pytest.raises(ValueError, match=r"no field 'messages'; .*Source.map\(from_sharegpt\)"):
        ChatTemplate(CHATML).render({"conversations": []})


def test_the_spaces_of_a_reply_are_kept():
    template = ChatTemplate(BRACKETS.replace("eos_token", "'<|im_end|>'"), special_tokens=TOKENS)
    assert template.render(said("a", "b \n")).targets == " b \n"


def test_exemplars_are_earlier_turns_after_the_systems_message():
    pool = [
        {"messages": [{"role": "system", "content": "S0"}, *as_messages(row)["messages"]]}
        for row in ({"instruction": f"I{i}", "output": f"O{i}"} for i in range(2))
    ]
    few = FewShot(ChatTemplate(CHATML), list(enumerate(pool)), 1, form="{inputs}{targets}", seed=0)
    prompt = few.render(pool[0], 0, "train")
    turns = [turn.split("<|im_end|>")[0] for turn in prompt.inputs.split("<|im_start|>")[1:]]
    assert turns == ["system\nS0", "user\nI1", "assistant\nO1", "user\nI0", "assistant\n"]
    assert prompt.targets == "O0<|im_end|>"


def test_an_instruction_row_reads_with_and_without_input():
    row = {"instruction": "Add.", "input": "", "output": "x"}
    assert INSTRUCTION.render(row)[:2] == ("Add.", "x")
    assert INSTRUCTION.render({"instruction": "Add.", "output": "x"})[:2] == ("Add.", "x")
    assert INSTRUCTION.render(row | {"input": "1 and 2"}) == (
        "Add.\n\n1 and 2",
        "x",
        "Add. 1 and 2",
    )
    with pytest.raises(ValueError, match="'output' is undefined; the row has instruction"):
        INSTRUCTION.render({"instruction": "Add."})
    assert as_messages(row | {"input": "1"})["messages"] == [
        {"role": "user", "content": "Add.\n\n1"},
        {"role": "assistant", "content": "x"},
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "there is no field 'messages'; the row has text"),
        ({"messages": "hi"}, "field 'messages' is 'hi', a str; expected a list"),
        ({"messages": [{"role": "user"}]}, "message 0 of field 'messages' is .*expected the texts"),
        ({"messages": ["hi"]}, "message 0 of field 'messages' is 'hi'"),
        ({"messages": []}, "does not end with a reply of the role 'assistant'; cut"),
        ({"messages": CHAT["messages"][:1]}, "does not end with a reply"),
        (
            {"messages": [{"role": "system", "content": "s"}, *CHAT["messages"]]},
            "the chat template fails: only user and assistant, not system",
        ),
    ],
)
def test_a_bad_conversation_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        ChatTemplate(BRACKETS, special_tokens=TOKENS).render(row)


def test_bad_chat_templates_are_refused():
    with pytest.raises(ValueError, match="chat template, line 2: Unexpected end of template"):
        ChatTemplate("x\n{% if x %}")
    counting = "{{ messages | length }} messages{% for m in messages %} {{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"otherwise once it is answered \('1 m.*' becomes '2 m"):
        ChatTemplate(counting).render({"messages": CHAT["messages"][:2]})
    text = json.dumps(CHAT)
    with pytest.raises(ValueError, match="the chat template fails: .*append"):
        ChatTemplate("{{ messages.append(1) }}").render(CHAT)
    assert json.dumps(CHAT) == text
