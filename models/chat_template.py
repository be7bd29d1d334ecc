"""Renders a checkpoint's chat template as transformers does; templates are untrusted code."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from models.checkpoints.errors import CheckpointError, import_extra, one_line


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    special_tokens: Mapping[str, str],
    source: str,
) -> str:
    """Renders a conversation up to where the assistant's next turn starts.

    Args:
      template: Jinja source; it runs in a sandbox.
      messages: dicts with "role" and "content".
      special_tokens: "bos_token", "eos_token", ..., variables of the template.
      source: the checkpoint, for errors.

    Raises:
      CheckpointError: the template is broken or refuses these messages.
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
    variables = {"tools": None, "documents": None, "add_generation_prompt": True}
    try:
        compiled = environment.from_string(template)
        return compiled.render(messages=messages, **variables, **special_tokens)
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
