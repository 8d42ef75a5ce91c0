import re
import subprocess
import sys

import pytest

from t5jax.data.prompts.promptsource import promptsource

YAML = r"""
dataset: weather
templates:
  11111111-0000: !Template
    answer_choices: dry ||| wet
    id: 11111111-0000
    jinja: "Is it {{\"dry\"}} or {{\"wet\"}} when {{text}}?\n|||\n{{answer_choices[label]\
      \ }}"
    metadata: !TemplateMetadata
      choices_in_prompt: true
      languages:
      - en
      metrics:
      - Accuracy
      original_task: true
    name: GPT-3 style
    reference: ''
  22222222-0000: !Template
    answer_choices: null
    id: 22222222-0000
    jinja: '{% if label == 1 %} Why wet, {{ ["sir", "madam"] | choice }}?

      ||| {{ text }} {% endif %}'
    metadata: !TemplateMetadata {}
    name: why
    reference: ''
"""


def test_a_promptsource_file_loads_as_it_is(tmp_path):
    path = tmp_path / "templates.yaml"
    path.write_text(YAML)
    style, why = promptsource(path)
    assert (style.name, why.name) == ("GPT-3 style", "why")
    assert style.render({"text": "it rains", "label": 1}) == (
        "Is it dry or wet when it rains?",
        "wet",
        "it rains",
    )
    assert style.answer_choices({"text": "it rains", "label": 1}) == ["dry", "wet"]
    assert why.render({"text": "it rains", "label": 0}).is_empty
    asked = {why.render({"text": "it rains", "label": 1}, n).inputs for n in range(20)}
    assert asked == {"Why wet, sir?", "Why wet, madam?"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1\n", "there are no templates; expected PromptSource's `templates:` mapping"),
        ("templates: {}\n", "there are no templates"),
        ("templates:\n  x: !Template {name: n}\n", "template 'x' has no text `jinja:`"),
        ("templates:\n  x: {name: n, jinja: 'a'}\n", r"template 'n' has no '\|\|\|' between"),
        ("a: [\n", "templates.yaml: while parsing"),
        ("x: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)
def test_a_damaged_promptsource_file_is_named(content, message, tmp_path):
    path = tmp_path / "templates.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match="templates.yaml: ") as error:
        promptsource(path)
    assert re.search(message, str(error.value))


def test_a_missing_promptsource_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot read templates from .*/no.yaml: No such file"):
        promptsource(tmp_path / "no.yaml")


def test_rendering_needs_no_tensorflow():
    program = """
import sys
sys.modules |= dict.fromkeys(["tensorflow", "seqio", "tensorflow_datasets", "transformers"])
from t5jax.data.prompts import chat, fewshot, format_strings, promptsource
row = {"instruction": "Say", "input": "a", "output": "b"}
few = fewshot.FewShot(chat.INSTRUCTION, [(0, row)], 1, form="{inputs}={targets};", seed=0)
print(few.render(row | {"input": "c"}, 0, "test").inputs.replace("\\n", ""))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout == "Saya=b;Sayc\n"
