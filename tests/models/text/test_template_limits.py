"""Chat templates that would take all time or memory, or leave the sandbox, end in one line."""

import time

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.errors import CheckpointError
from models.text.chat_template import render_chat

GROW = "{% set box = namespace(x=START) %}{% for i in range(60) %}STEP{% endfor %}"
NEST = "{% for a in range(99999) %}{% for b in range(99999) %}BODY{% endfor %}{% endfor %}"


def grow(start: str, step: str, end: str = "{{ box.x | length }}") -> str:
    """A template that repeats `step` on `box.x`."""
    return GROW.replace("START", start).replace("STEP", step) + end


HOSTILE = {
    "loop": NEST.replace("BODY", ""),
    "loop that writes": NEST.replace("BODY", "x"),
    "loop that tests": NEST.replace("BODY", "{% if messages %}{% endif %}"),
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "endless text": "{{ lipsum(n=10**6) }}",
    "string times": "{{ 'a' * 10 ** 10 }}",
    "times string": "{{ 10 ** 10 * 'a' }}",
    "list times": "{{ ([0] * 10 ** 9) | length }}",
    "list of a variable times": "{{ ([messages] * 10 ** 9) | length }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "power of a variable": "{{ (messages | length + 9) ** (messages | length + 10 ** 9) }}",
    "doubled by +": grow("'abcdefgh'", "{% set box.x = box.x + box.x %}"),
    "doubled by ~": grow("'abcdefgh'", "{% set box.x = box.x ~ box.x %}"),
    "doubled by a block": grow(
        "'ab'", "{% set y %}{{ box.x }}{{ box.x }}{% endset %}{% set box.x = y %}"
    ),
    "doubled by format": grow("'ab'", "{% set box.x = '%s%s' % (box.x, box.x) %}"),
    "doubled by the filter format": grow("'ab'", "{% set box.x = '%s%s' | format(box.x, box.x) %}"),
    "doubled by str.format": grow("'ab'", "{% set box.x = '{0}{0}'.format(box.x) %}"),
    "doubled by join": grow("'ab'", "{% set box.x = [box.x, box.x] | join %}"),
    "doubled by str.join": grow("'ab'", "{% set box.x = box.x.join(['', box.x]) ~ box.x %}"),
    "doubled by replace": grow("'aa'", "{% set box.x = box.x | replace('a', 'aa') %}"),
    "squared by replace": grow("'aa'", "{% set box.x = box.x.replace('a', box.x) %}"),
    "nested lists": grow("[1]", "{% set box.x = [box.x, box.x] %}", "{{ box.x }}"),
    "nested dicts": grow(
        "[1]", "{% set box.x = {'a': box.x, 'b': box.x} %}", "{{ box.x | tojson }}"
    ),
    "nested by dict": grow("[1]", "{% set box.x = dict(a=box.x, b=box.x) %}", "{{ box.x }}"),
    "deep lists": "{% set box = namespace(x=[]) %}{% for i in range(9999) %}"
    "{% set box.x = [box.x] %}{% endfor %}{{ box.x }}",
    "center": "{{ 'a' | center(10 ** 10) }}",
    "map of center": "{{ ['a'] | map('center', 10 ** 10) | list }}",
    "str.center": "{{ 'a'.center(10 ** 10) }}",
    "ljust": "{{ 'a'.ljust(width) }}".replace("width", "10000000000"),
    "zfill": "{{ 'a'.zfill(10000000000) }}",
    "by attr": "{{ ('a' | attr('ljust'))(10000000000) }}",
    "expandtabs": "{{ ('\\t' * 10000).expandtabs(1000000) }}",
    "indent": "{{ ('\\n' * 100000) | indent(100000) }}",
    "batch": "{{ [1] | batch(10 ** 9, 'x') | list | length }}",
    "slice": "{{ [1] | slice(10 ** 9) | list | length }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "str.format": "{{ '{:1000000000}'.format(1) }}",
    "str.format of a width": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format_map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "translate": "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
    "join by a long text": "{{ range(100000) | join('a' * 100000) }}",
    "str.join by a long text": "{{ ('a' * 100000).join('b' * 100000) }}",
    "round": "{{ 1.5 | round(10 ** 9, 'ceil') }}",
    "to_bytes": "{{ (1).to_bytes(10 ** 10, 'big') | length }}",
    "tojson": "{{ range(99999) | list | tojson(indent=10 ** 6) }}",
    "long source": "a" * 300_000,
    "deep source": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested blocks": "{% if messages %}" * 500 + "{% endif %}" * 500,
    "not closed": "{% for x in messages %}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "file": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_is_one_line(name):
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        render_chat(
            HOSTILE[name],
            [{"role": "user", "content": "x"}],
            special_tokens={},
            source="m.gguf",
        )
    line = str(caught.value)
    assert line.startswith("m.gguf: chat template: ") and len(line) <= 300 and line.isprintable()
    assert time.perf_counter() - start < 12  # the limit, and a slow machine


def test_long_conversation_stays_within_the_limits():
    messages = [{"role": "user", "content": "word " * 100}] * 5000
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' ~ m['content'] | trim }}"
        "{% if loop.last %}{{ loop.length }}{% endif %}{% endfor %}{{ messages | tojson }}"
    )
    text = render_chat(template, messages, special_tokens={}, source="m.gguf")
    assert text.count("<|user|>word") == 5000 and text.count("5000") == 1


LEAKS = (
    "{{ '' | attr('__class__') }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{0.__class__}' | format(1) }}",
    "{{ raise_exception.__globals__ }}{{ raise_exception.__wrapped__ }}",
    "{{ range.__self__ }}{{ self.__init__ }}{{ self._TemplateReference__context }}",
    "{% macro f() %}{% endmacro %}{{ f.__init__.__globals__ }}",
    "{{ namespace.__init__ }}{{ joiner.__init__.__globals__.os }}",
)


@pytest.mark.parametrize("template", LEAKS)
def test_the_sandbox_holds(template):
    try:
        text = render_chat(template, [], special_tokens={}, source="m.gguf")
    except CheckpointError as error:
        text = str(error)
    assert not any(word in text for word in ("<class", "<function", "<module", "__builtins__"))


@pytest.mark.parametrize(
    "template",
    [
        "{% for x in (1, 2) %}{{ loop.index }}/{{ loop.length }}{{ loop.revindex }}{% endfor %}",
        "{% for x in none_such %}a{% else %}b{% endfor %}",
        "{% for x in [3, 1] | sort if x > 1 %}{{ x }}{{ ',' if not loop.last }}{% endfor %}",
        "{% set x %}<{{ 'a' | upper }}>{% endset %}{{ x ~ 1 ~ none ~ none_such }}",
        "{% macro f(a, b=[1, x]) %}{{ a }}{{ b }}{% endmacro %}{{ f('<') }}",
        "{% macro f() %}{{ caller([1, n]) }}{% endmacro %}{% call(x) f() %}{{ x }}{% endcall %}",
        "{% set a, b = (1, 2) %}{{ b }}{{ a }}{{ (a, b) }}{{ {a: b} }}",
        "{% filter upper %}a{{ 'b' }}{% endfilter %}{{ 7 // 2 }}{{ 2 ** 3 }}{{ -7 % 3 }}",
        "{% autoescape true %}<b>{{ '<' }}{{ '<' ~ 1 }}{{ '<' | safe }}{% endautoescape %}",
        "{{ ['b', 'a'] | map('upper') | join('-') }}{{ '%s-%d' % ('x', 3) }}",
        "{{ '{}:{n}'.format(1, n='y') }}{{ ', '.join(['a', 'b']) }}{{ 'a-b'.split('-') }}",
        "{{ 'a,b' | replace(',', ';') }}{{ 'ab'.replace('a', 'c') }}{{ [1, 2] | batch(2) | list }}",
        "{% for k, v in {'a': 1, 'b': [2]} | dictsort %}{{ k }}={{ v }}{% endfor %}",
        "{% for x in [[1, [2]], 3] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
        "{% set n = namespace(x=1) %}{% for i in range(3) %}{% set n.x = n.x + i %}{% endfor %}"
        "{{ n.x }}",
    ],
)
def test_counting_changes_no_text(template):
    options = {"trim_blocks": True, "lstrip_blocks": True}
    plain = ImmutableSandboxedEnvironment(**options).from_string(template)
    assert render_chat(template, [], special_tokens={}, source="m.gguf") == plain.render()
