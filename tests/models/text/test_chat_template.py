"""Chat templates get all that transformers' renderer offers them; broken ones are refused."""

import datetime

import pytest

from models.errors import CheckpointError
from models.text.chat_template import render_chat

SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>"}
CHATML = (
    "{% for message in messages %}\n"
    "  {% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}\n"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}\n"
)
# The shape of Gemma 3's: a BOS, the system text within the first turn, text or parts, trimmed.
GEMMA_LIKE = """{{ bos_token }}
{%- set turns = messages -%}
{%- set before = '' -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set before = messages[0]['content'] + '\n\n' -%}
    {%- set turns = messages[1:] -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if turn['role'] != ['user', 'assistant'][loop.index0 % 2] -%}
        {{ raise_exception('turns must alternate') }}
    {%- endif -%}
    {%- set role = 'model' if turn['role'] == 'assistant' else turn['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (before if loop.first else '') }}
    {%- if turn['content'] is string -%}
        {{ turn['content'] | trim }}
    {%- else -%}
        {%- for part in turn['content'] if part['type'] == 'text' -%}
            {{ part['text'] | trim }}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}
"""
# The shape of gpt-oss's: macros that see variables and recurse, a namespace, tojson, the date.
GPT_OSS_LIKE = """{#- variables: reasoning_effort, model_identity, builtin_tools #}
{%- macro kind(spec, depth=0) -%}
    {%- if spec.type == 'array' -%}
        {{- kind(spec['items'], depth + 1) + '[]' }}
    {%- elif spec.enum -%}
        {{- '"' + spec.enum | join('" | "') + '"' }}
    {%- else -%}
        {{- 'number' if spec.type == 'integer' else spec.type }}
    {%- endif -%}
{%- endmacro -%}
{%- macro system() -%}
    {%- if model_identity is not defined %}
        {%- set model_identity = 'You are a model.' %}
    {%- endif %}
    {{- model_identity + '\n' }}
    {{- 'Current date: ' + strftime_now('%Y-%m-%d') + '\n' }}
    {%- if reasoning_effort is not defined %}
        {%- set reasoning_effort = 'medium' %}
    {%- endif %}
    {{- 'Reasoning: ' + reasoning_effort }}
    {%- if builtin_tools %}
        {%- set has = namespace(python=false) %}
        {%- for tool in builtin_tools %}
            {%- if tool == 'python' %}{%- set has.python = true %}{%- endif %}
        {%- endfor %}
        {{- '\npython' if has.python }}
    {%- endif -%}
{%- endmacro -%}
{{- '<|start|>system<|message|>' + system() + '<|end|>' }}
{%- if tools %}
    {{- '<|start|>developer<|message|>' }}
    {%- for tool in tools %}
        {{- 'type ' + tool.function.name + ' = (_: {' }}
        {%- for name, spec in tool.function.parameters.properties.items() %}
            {{- name + ': ' + kind(spec) + (', // default: ' + spec.default | tojson
                if spec.default is defined else '') + (', ' if not loop.last else '') }}
        {%- endfor %}
        {{- '}) => any;' }}
    {%- endfor %}
    {{- '<|end|>' }}
{%- endif %}
{%- set last = namespace(name=none) %}
{%- for message in messages -%}
    {%- if message.role == 'assistant' and 'tool_calls' in message %}
        {%- set call = message.tool_calls[0].function %}
        {%- if message.thinking %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json' }}
        {{- '<|message|>' + call.arguments | tojson + '<|call|>' }}
        {%- set last.name = call.name %}
    {%- elif message.role == 'assistant' %}
        {%- if '<|channel|>' in message.content %}
            {{- raise_exception('content must be without channels') }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
    {%- elif message.role == 'tool' %}
        {%- if last.name is none %}{{- raise_exception('no call before') }}{%- endif %}
        {{- '<|start|>functions.' + last.name + ' to=assistant<|channel|>commentary<|message|>' }}
        {{- message.content | tojson + '<|end|>' }}
    {%- else %}
        {{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start|>assistant
{%- endif -%}
"""


def render(template, messages, **variables):
    return render_chat(
        template, messages, special_tokens=SPECIAL, source="m.gguf", variables=variables
    )


def turn(role, content="x", **more):
    return {"role": role, "content": content, **more}


def test_template_blocks_are_trimmed_as_transformers_does():
    assert render(CHATML, [turn("user", "Hi"), turn("assistant", "Yes")]) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_template_helpers_work():
    template = (
        "{{ messages | tojson }}{{ strftime_now('%Y') | length }}{{ eos_token }}"
        "{% for x in [1, 2] %}{% generation %}g{% endgeneration %}{% break %}{% endfor %}"
    )
    text = render(template, [turn("user", "<é>")])
    assert text == '[{"role": "user", "content": "<é>"}]4<eos>g'


@pytest.mark.parametrize(
    ("template", "rule"),
    [
        (CHATML, "no tools"),
        ("{% if %}", "Expected an expression"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "append.*is unsafe"),
        ("{{ 'a' + none }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_template_failures_are_one_line(template, rule):
    with pytest.raises(CheckpointError, match=rule) as caught:
        render(template, [turn("tool")])
    assert str(caught.value).startswith("m.gguf: ") and "\n" not in str(caught.value)


def test_variables_reach_the_template_and_replace_defaults():
    assert render("{{ tools }} {{ effort }}", [], effort="low") == "None low"
    assert render("{{ tools[0] }} {{ bos_token }}", [], tools=["t"], bos_token="B") == "t B"
    assert render(CHATML, [], add_generation_prompt=False) == ""


def test_a_variable_that_the_template_ignores_is_refused():
    with pytest.raises(CheckpointError, match="does not read reasoning_efort, only .*g_effort"):
        render(GPT_OSS_LIKE, [turn("user")], reasoning_efort="low")
    with pytest.raises(CheckpointError, match="does not read a, tools, only none"):
        render("{{ raise_exception and namespace }}", [], tools=[], a=1)


def test_gemma_turns():
    parts = [{"type": "text", "text": " Hi "}, {"type": "image"}]
    talk = [turn("system", "Be brief."), turn("user", parts), turn("assistant", " Yes \n")]
    assert render(GEMMA_LIKE, [*talk, turn("user", "Why?")]) == (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
        "<start_of_turn>model\nYes<end_of_turn>\n"
        "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"
    )
    with pytest.raises(CheckpointError, match="turns must alternate"):
        render(GEMMA_LIKE, [turn("user"), turn("user")])


def test_gpt_oss_conversation_with_tools():
    day = datetime.date.today().isoformat()
    sizes = {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}
    fields = {"sizes": sizes, "unit": {"enum": ["m", "ft"], "default": "m"}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": fields}}}]
    call = {"type": "function", "function": {"name": "f", "arguments": {"unit": "<é>"}}}
    talk = [turn("user", "Hi"), turn("assistant", "", thinking="Hm.", tool_calls=[call])]
    talk += [turn("tool", "4 m"), turn("assistant", "4."), turn("user", "Why?")]
    text = render(GPT_OSS_LIKE, talk, tools=tools, builtin_tools=["python"], reasoning_effort="low")
    assert text == (
        f"<|start|>system<|message|>You are a model.\nCurrent date: {day}\nReasoning: low\npython"
        "<|end|><|start|>developer<|message|>type f = (_: "
        '{sizes: number[][], unit: "m" | "ft", // default: "m"}) => any;<|end|>'
        "<|start|>user<|message|>Hi<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Hm.<|end|>"
        '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"unit": "<é>"}'
        '<|call|><|start|>functions.f to=assistant<|channel|>commentary<|message|>"4 m"<|end|>'
        "<|start|>assistant<|channel|>final<|message|>4.<|end|>"
        "<|start|>user<|message|>Why?<|end|><|start|>assistant"
    )


def test_gpt_oss_defaults_and_refusals():
    text = render(GPT_OSS_LIKE, [turn("user", "Hi")], model_identity="You are Bo.")
    assert text.startswith("<|start|>system<|message|>You are Bo.\n") and "medium<|end|>" in text
    with pytest.raises(CheckpointError, match="no call before"):
        render(GPT_OSS_LIKE, [turn("tool")])
    with pytest.raises(CheckpointError, match="content must be without channels"):
        render(GPT_OSS_LIKE, [turn("assistant", "<|channel|>final<|message|>x")])
