"""Renders a checkpoint's chat template with the same result as transformers.

Templates are untrusted code, so they run in Jinja's sandbox, and their time and memory are bounded.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from models.errors import CheckpointError, import_extra, one_line
from models.text.template_limits import MOST_SOURCE, Meter
from models.text.template_sandbox import compile_counted, make_sandbox


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    special_tokens: Mapping[str, str],
    source: str,
    variables: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Renders a conversation, ending where the assistant's next turn starts.

    Args:
      template: Jinja source.
      messages: dicts with "role", "content" and any other key that the template reads
        ("thinking", ...).
      special_tokens: texts of the special tokens by role ("bos_token", "eos_token", ...); each is
        a variable of the template.
      source: the checkpoint, named in errors.
      variables: further variables of the template: "tools", "reasoning_effort", ...

    Raises:
      CheckpointError: the template is broken, refuses these messages, goes beyond a limit of
        `template_limits`, or does not read one of `variables`.
    """
    jinja2 = import_extra("jinja2")
    if len(template) > MOST_SOURCE:
        raise CheckpointError(
            f"{source}: chat template: {len(template)} characters must be at most {MOST_SOURCE}."
        )
    meter = Meter()
    environment = make_sandbox(
        meter,
        {"tojson": _to_json},
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _generation_extension()],
    )

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    defaults = {"tools": None, "documents": None, "add_generation_prompt": True}
    try:
        syntax = environment.parse(template)
        reads = import_extra("jinja2.meta").find_undeclared_variables(syntax)
        # transformers passes these to every template; None asks for nothing.
        usual = {name for name in defaults if variables.get(name) is None}
        ignored = sorted(set(variables) - reads - usual - {"add_generation_prompt"})
        if ignored:  # a misspelt name would otherwise be ignored in silence
            known = ", ".join(sorted(reads - set(environment.globals))) or "none"
            raise jinja2.TemplateError(f"does not read {', '.join(ignored)}, only {known}")
        values = {**defaults, **special_tokens, **variables, "messages": messages}
        return compile_counted(environment, syntax, meter).render(values)
    except Exception as error:  # code in a template can raise nearly any
        raise CheckpointError(f"{source}: chat template: {one_line(error)}.") from error


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """The filter `tojson`. Jinja's own escapes HTML, and models were not trained on that."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _generation_extension() -> type:
    """Supports `{% generation %}`, which marks the assistant's text for training.

    Here the text inside it is rendered like any other.
    """
    nodes = import_extra("jinja2.nodes")

    class Generation(import_extra("jinja2.ext").Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return Generation
