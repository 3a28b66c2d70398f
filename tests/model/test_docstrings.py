"""The examples in the docstrings of the models run and give what they show, without a network."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import mocov3_hf.model


MODELS = [value for name, value in vars(mocov3_hf.model).items() if name.startswith("MoCoV3")]


def documented():
    """Classes and functions of the model files, with their own methods, by qualified name."""
    found = {}
    for module in pkgutil.iter_modules(mocov3_hf.model.__path__, "mocov3_hf.model."):
        for value in vars(importlib.import_module(module.name)).values():
            if getattr(value, "__module__", None) != module.name:
                continue
            members = vars(value).values() if inspect.isclass(value) else ()
            for obj in (value, *(member for member in members if inspect.isfunction(member))):
                found[obj.__qualname__] = obj
    return found


EXAMPLES = {name: obj for name, obj in documented().items() if ">>>" in (obj.__doc__ or "")}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = "\n".join(line for line in EXAMPLES[name].__doc__.splitlines() if not line.strip().startswith("```"))
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    report = []
    result = doctest.DocTestRunner().run(example, out=report.append)
    assert result.failed == 0, "".join(report)
    assert result.attempted > 1


@pytest.mark.parametrize("model_class", [model for model in MODELS if "forward" in vars(model)])
def test_every_model_shows_its_forward_pass(model_class):
    assert f"{model_class.__name__}.forward" in EXAMPLES
