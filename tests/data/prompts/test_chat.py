import json
from collections import Counter

import pytest

from t5jax.data.prompts.chat import INSTRUCTION, ChatTemplate, EachReply, as_messages
from t5jax.data.prompts.fewshot import FewShot

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
    with pytest.raises(ValueError, match="but FakeTokenizer has none; set data.vocabulary"):
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
