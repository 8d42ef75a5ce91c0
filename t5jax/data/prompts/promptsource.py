"""The files of PromptSource (Bach et al. 2022, arXiv:2202.01279)."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from t5jax import storage
from t5jax.checks import reading
from t5jax.data.prompts.jinja import JinjaTemplate


class _PromptSourceLoader(yaml.SafeLoader):
    """Loads YAML with the tags !Template and !TemplateMetadata as plain mappings."""


for _tag in ("!Template", "!TemplateMetadata"):
    _PromptSourceLoader.add_constructor(_tag, _PromptSourceLoader.construct_yaml_map)


def promptsource(path: str | Path) -> list[JinjaTemplate]:
    """Returns the templates of a PromptSource file, in order.

    Many of them exclude rows by a condition; use `prompted_task(..., empty="drop")` for those.

    Args:
      path: a templates.yaml.
    Raises:
      ValueError: if the file cannot be read or parsed, or a template is invalid, with its name.
    """
    try:
        file = storage.local(storage.path(path, "a file of templates"))
        with reading(path):
            content = yaml.load(file.read_text(encoding="utf-8"), _PromptSourceLoader)
            return list(_read_promptsource(content))
    except OSError as error:
        raise ValueError(f"cannot read templates from {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _read_promptsource(content) -> Iterator[JinjaTemplate]:
    templates = content.get("templates") if isinstance(content, Mapping) else None
    if not isinstance(templates, Mapping) or not templates:
        raise ValueError("there are no templates; expected PromptSource's `templates:` mapping")
    for key, entry in templates.items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("jinja"), str):
            raise ValueError(f"template {key!r} has no text `jinja:`")
        # Not any other value: a few lines of YAML can stand for one of terabytes.
        texts = {name: entry.get(name) or "" for name in ("name", "answer_choices")}
        if not all(isinstance(text, (str, int)) for text in (key, *texts.values())):
            raise ValueError(f"template {key!r:.60} has a name or choices that are no text")
        yield JinjaTemplate(entry["jinja"], str(texts["name"] or key), str(texts["answer_choices"]))
