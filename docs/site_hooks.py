"""Hooks of MkDocs and mkdocstrings, which read the sources without importing them."""

import ast
import re

import griffe


def on_page_markdown(markdown: str, **_) -> str:
    """Links to files outside docs/, which are not part of the site, become plain text."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)\s]*\)", r"\1", markdown)


class DecoratedDocstrings(griffe.Extension):
    """Models get their docstrings from `auto_docstring` of transformers at run time; here, from its `custom_intro`."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        for decorator in getattr(obj, "decorators", ()):
            call = ast.parse(str(decorator.value), mode="eval").body
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "auto_docstring":
                texts = [word.value for word in call.keywords if word.arg == "custom_intro"]
                own = "" if obj.docstring is None else obj.docstring.value
                if texts:
                    text = f"{ast.literal_eval(texts[0])}\n\n{own}"
                    obj.docstring = griffe.Docstring(text.strip(), parent=obj)
