"""Keeps secrets out of what is printed and saved: passwords in URLs, keys, values of variables.

Nothing here finds every secret. It hides what is known to be one by its form or its name, wherever
text that a user or a library has made leaves the process.
"""

import logging
import os
import re

HIDDEN = "***"
_WORDS = r"(?:token|secret|password|passwd|credentials?|api[_-]?key|access[_-]?key|signature)"
_NAMES = re.compile(rf"(^|_){_WORDS}s?($|_)", re.IGNORECASE)
_LEAST = 8
"""Characters of a variable's value that is taken for a secret; shorter ones are words."""

_FORMS = (
    # A password in a URL, and one that stands alone there, as a token of a service does.
    (re.compile(r"([a-zA-Z][\w+.-]*://?[^\s/:@'\"]*):[^\s/@'\"]+@"), rf"\1:{HIDDEN}@"),
    (re.compile(r"(https?://?)[^\s/:@'\"]{8,}@"), rf"\1{HIDDEN}@"),
    # A parameter of a URL, an option, a variable.
    (
        re.compile(
            rf"((?:[?&](?:[\w.-]*[_.-])?{_WORDS}=|--(?:[\w.-]*[_.-])?{_WORDS}(?:=|\s+)"
            rf"|\b(?:[A-Z0-9_]*_)?(?-i:TOKEN|SECRET|PASSWORD|API_KEY)=))[^\s&'\"]{{4,}}",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    # Keys of Hugging Face, OpenAI, GitHub, Google and Amazon.
    (re.compile(r"\b(hf_|sk-|gh[pousr]_|github_pat_|ya29\.|AIza|AKIA)[\w.-]{12,}"), rf"\1{HIDDEN}"),
    (re.compile(r"(Bearer\s+)[\w.~+/-]{8,}=*"), rf"\1{HIDDEN}"),
)


def redact(text: str) -> str:
    """Returns a text in which *** stands for each secret."""
    for name, value in os.environ.items():
        # The place of a file with a key is no secret.
        if len(value) >= _LEAST and _NAMES.search(name) and not os.path.exists(value):
            text = text.replace(value, HIDDEN)
    for form, shown in _FORMS:
        text = form.sub(shown, text)
    return text


class Formatter(logging.Formatter):
    """Formats what is logged without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
