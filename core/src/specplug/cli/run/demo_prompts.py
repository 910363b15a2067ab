"""The prompts of `specplug demo`: tasks that a model as small as the embedded one does well."""

from __future__ import annotations

import attrs


@attrs.frozen
class DemoPrompt:
    """A prompt with a title.

    Attributes:
        title: the task.
        text: the prompt.
        max_tokens: the maximum number of generated tokens.
        is_shown: whether the prompt is shown before the output.
    """

    title: str
    text: str
    max_tokens: int
    is_shown: bool = False


def _rename(function: str, old: str, new: str) -> DemoPrompt:
    """Returns a rename task in the form that the embedded model was trained on."""
    name = function.removeprefix("def ").partition("(")[0]
    return DemoPrompt(
        title=f"repeat the function {name} with {old} renamed to {new}",
        text=f"# Before:\n{function}\n# After renaming {old} to {new}:\n",
        max_tokens=96,
    )


_COUNT_WORDS = """\
def count_words(text, minimum):
    counts = {}
    for word in text.split():
        if len(word) >= minimum:
            counts[word] = counts.get(word, 0) + 1
    return counts
"""

_ADD_USER = """\
def add_user(self, name, password=None):
    if name in self.users:
        raise ValueError("user already exists: %r" % name)
    self.users[name] = User(name, password)
    self.log.info("added user %s", name)
    return self.users[name]
"""

_SHAPE = """\
class Shape:
    def __init__(self, width, height):
        self.width = width
        self.height = height

    def __eq__(self, other):"""

PROMPTS = (
    _rename(_COUNT_WORDS, "counts", "totals"),
    _rename(_ADD_USER, "password", "secret"),
    DemoPrompt(title="continue this class", text=_SHAPE, max_tokens=73, is_shown=True),
)
