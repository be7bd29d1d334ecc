"""Jinja's sandbox with limits: every step that a template takes is counted by a `Meter`.

Jinja offers to intercept operators and calls. Loops, texts put together and written out, and lists
built from variables pass through filters of our own, which are put into the parsed template.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from models.errors import import_extra
from models.text.template_limits import Meter

# Names of our filters; a template can't call them, since these are no names in its language.
ITEMS, JOINED, WRITTEN, DATA, CHECKED = "(items)", "(joined)", "(written)", "(data)", "(checked)"


def make_sandbox(meter: Meter, filters: Mapping[str, Callable], **options: Any) -> Any:
    """An `ImmutableSandboxedEnvironment` whose templates are counted.

    Compile templates with `compile_counted`. `filters` come beside jinja2's own or in their place,
    `options` are jinja2's.
    """
    sandbox = import_extra("jinja2.sandbox")

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(sandbox.SandboxedEnvironment.default_binop_table)

        def call_binop(self, context, operator, left, right):
            meter.operator(operator, left, right)
            return meter.checked(super().call_binop(context, operator, left, right))

        def call(*arguments, **named):  # as jinja's: names of a template's arguments are free
            self, context, function, *args = arguments
            if type(owner := getattr(function, "__self__", None)) in (str, bytes, int):
                args = [_whole(arg) for arg in args]
                meter.call(function.__name__, owner, args, named)
            elif (wrapped := getattr(function, "__wrapped__", None)) is not None:
                # str.format comes wrapped by the sandbox.
                owner = getattr(wrapped, "__self__", None)
                meter.call(getattr(wrapped, "__name__", ""), owner, args, named)
            else:
                meter.step()
            sandboxed = sandbox.ImmutableSandboxedEnvironment.call
            return meter.checked(sandboxed(self, context, function, *args, **named))

    environment = Sandbox(**options)
    del environment.globals["lipsum"]  # endless text, for designers
    environment.filters |= filters
    # Before anything is parsed: constant filters are evaluated by whatever looks at a template.
    for name, function in list(environment.filters.items()):
        environment.filters[name] = _counted_filter(name, function, meter)
    return environment


def compile_counted(environment: Any, syntax: Any, meter: Meter) -> Any:
    """Compiles a parsed template of a sandbox. The template's nodes are changed."""
    pass_context = import_extra("jinja2").pass_context
    markup = import_extra("markupsafe").Markup

    def written(context, value):
        text = value if isinstance(value, str) else str(meter.checked(value))
        meter.write(text)
        return text

    def joined(context, values):
        meter.step()
        texts = [str(value) for value in meter.checked(values)]
        return "".join(meter.checked(texts))

    # A filter that takes the context is not evaluated while the template is compiled.
    environment.filters |= {
        ITEMS: pass_context(lambda context, items: meter.counted(items)),
        JOINED: pass_context(joined),
        WRITTEN: pass_context(written),
        DATA: pass_context(lambda context, data: markup(written(context, data))),
        CHECKED: pass_context(lambda context, value: meter.checked(value)),
    }
    return environment.from_string(_make_counter().visit(syntax))


def _counted_filter(name: str, function: Any, meter: Meter) -> Any:
    """`function`, a filter, with its calls counted and its results checked."""
    passes = int(getattr(function, "jinja_pass_arg", None) is not None)

    @functools.wraps(function)
    def counted(*args, **named):
        given = [_whole(arg) for arg in args]
        value = given[passes] if len(given) > passes else None
        meter.call(name, value, given[passes + 1 :], named)
        return meter.checked(function(*given, **named))

    return counted


def _whole(value: Any) -> Any:
    """`value`, as a list if it is an iterator: a filter that is measured must not use it up."""
    return list(value) if hasattr(value, "__next__") else value


def _make_counter() -> Any:
    """The transformer that puts our filters into a parsed template."""
    nodes = import_extra("jinja2.nodes")

    def through(name: str, node: Any) -> Any:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def literal(self, node: Any) -> Any:
        node = self.generic_visit(node)
        stored = getattr(node, "ctx", "load") != "load"
        return node if stored or node.find(nodes.Name) is None else through(CHECKED, node)

    class Counter(import_extra("jinja2.visitor").NodeTransformer):
        visit_List = visit_Tuple = visit_Dict = literal

        def visit_For(self, node):
            node = self.generic_visit(node)
            node.iter = through(ITEMS, node.iter)
            return node

        def visit_Concat(self, node):
            node = self.generic_visit(node)
            return through(JOINED, nodes.List(node.nodes, lineno=node.lineno))

        def visit_Output(self, node):
            node = self.generic_visit(node)
            node.nodes = [
                through(DATA, nodes.Const(child.data, lineno=child.lineno))
                if isinstance(child, nodes.TemplateData)
                else through(WRITTEN, child)
                for child in node.nodes
            ]
            return node

    return Counter()
