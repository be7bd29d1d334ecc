"""Renders a checkpoint's chat template as transformers does; templates are untrusted code."""

import datetime
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from models.errors import CheckpointError, import_extra, one_line


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    special_tokens: Mapping[str, str],
    source: str,
    variables: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Renders a conversation up to where the assistant's next turn starts.

    Args:
      template: Jinja source; it runs in a sandbox.
      messages: dicts with "role", "content" and what else the template reads ("thinking", ...).
      special_tokens: "bos_token", "eos_token", ..., variables of the template.
      source: the checkpoint, for errors.
      variables: more of the template's variables: "tools", "reasoning_effort", ...

    Raises:
      CheckpointError: the template is broken, refuses these messages, or would ignore one of
        `variables`.
    """
    jinja2 = import_extra("jinja2")
    environment = import_extra("jinja2.sandbox").ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _generation_extension()],
    )

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    defaults = {"tools": None, "documents": None, "add_generation_prompt": True}
    try:
        syntax = environment.parse(template)
        reads = import_extra("jinja2.meta").find_undeclared_variables(syntax)
        ignored = sorted(set(variables) - reads)
        if ignored:  # a misspelt name would otherwise change nothing, without a word
            known = ", ".join(sorted(reads - set(environment.globals))) or "none"
            raise jinja2.TemplateError(f"does not read {', '.join(ignored)}, only {known}")
        values = {**defaults, **special_tokens, **variables, "messages": messages}
        return environment.from_string(syntax).render(values)
    except (
        jinja2.TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:  # what code in a template can raise
        raise CheckpointError(f"{source}: chat template: {one_line(error)}.") from error


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Jinja's own filter escapes HTML, which models were not trained on."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _generation_extension() -> type:
    """`{% generation %}` marks the assistant's text for training; here its body is plain."""
    nodes = import_extra("jinja2.nodes")

    class Generation(import_extra("jinja2.ext").Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return Generation
