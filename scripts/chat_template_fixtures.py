#!/usr/bin/env python3
"""Renders the chat templates of crates/model/tests/fixtures/chat_templates with Jinja2 in the
environment that transformers sets up, and writes inputs and outputs to cases.json beside them.

    pip install jinja2==3.1.6 && python3 scripts/chat_template_fixtures.py
"""

import copy
import datetime
import json
import pathlib

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

FOLDER = pathlib.Path(__file__).parent.parent / "crates/model/tests/fixtures/chat_templates"
NOW = 1720000000  # 2024-07-03 09:46:40 UTC
CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class Generation(Extension):
    """{% generation %} marks the assistant's words and changes nothing in the text."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller):
        return caller()


def environment():
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def strftime_now(format):
        return datetime.datetime.fromtimestamp(NOW, datetime.timezone.utc).strftime(format)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = strftime_now
    return env


def render(case):
    template = environment().from_string((FOLDER / case["template"]).read_text())
    messages = copy.deepcopy(case["messages"])
    if case.get("continue_final_message"):
        last = messages[-1]
        if isinstance(last["content"], list):
            block = next(part for part in reversed(last["content"]) if "text" in part)
            block["text"] += CONTINUE_TAG
        else:
            last["content"] += CONTINUE_TAG
    special = {k: case[k] for k in ("bos_token", "eos_token") if k in case}
    text = template.render(
        messages=messages,
        tools=case.get("tools"),
        documents=case.get("documents"),
        add_generation_prompt=case.get("add_generation_prompt", False),
        **{**special, **case.get("extra", {})},
    )
    if case.get("continue_final_message"):
        at = text.rindex(CONTINUE_TAG.strip())
        if text[at : at + len(CONTINUE_TAG)] == CONTINUE_TAG:
            return text[:at]
        return text[:at].rstrip()
    return text


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather at a place, e.g. \"Zürich\" <now>",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Name & country"},
                    "days": {"type": "integer", "default": 1, "maximum": 1e16, "step": 0.5},
                    "units": {"type": "string", "enum": ["°C", "°F"]},
                },
                "required": ["city"],
                "additionalProperties": False,
                "x-empty": [{}, [], None, True],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {}}},
]
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "abcdef123",
            "type": "function",
            "function": {"name": "get_weather", "arguments": {"city": "Genève", "days": 2}},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "abcdef123", "name": "get_weather", "content": "12 °C"}
DATA = {
    "list": ["a", "b", "ç"],
    "text": "é\"\\\n\t\u2028\u007f\u0001 😀 </script>",
    "numbers": [0, -1, 1.0, 0.1, 1e22, 1.5e-9, 12345678901234567890],
    "nested": {"empty": {}, "none": None, "yes": True},
}
CHAT = [system("Be brief."), user("  Hi there \n"), assistant(" Hello! "), user("Why?")]
QWEN = {"template": "qwen2_5.jinja", "eos_token": "<|im_end|>"}
LLAMA = {"template": "llama3.jinja", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
GEMMA2 = {"template": "gemma2.jinja", "bos_token": "<bos>", "eos_token": "<eos>"}
GEMMA3 = {"template": "gemma3.jinja", "bos_token": "<bos>", "eos_token": "<eos>"}
MISTRAL = {"template": "mistral.jinja", "bos_token": "<s>", "eos_token": "</s>"}
SMOLLM2 = {"template": "smollm2.jinja", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}

CASES = {
    "smollm2": {**SMOLLM2, "messages": CHAT[1:], "add_generation_prompt": True},
    "smollm2 with system": {**SMOLLM2, "messages": CHAT},
    "smollm2 continued": {**SMOLLM2, "messages": CHAT[:3], "continue_final_message": True},
    "qwen": {**QWEN, "messages": CHAT, "add_generation_prompt": True},
    "qwen default system": {**QWEN, "messages": CHAT[1:2], "add_generation_prompt": True},
    "qwen tools": {
        **QWEN, "messages": CHAT + [CALL, RESULT, RESULT], "tools": TOOLS,
        "add_generation_prompt": True,
    },
    "llama": {**LLAMA, "messages": CHAT, "add_generation_prompt": True},
    "llama date": {**LLAMA, "messages": CHAT, "extra": {"date_string": "1 April 2025"}},
    "llama tools": {
        **LLAMA, "messages": CHAT[:2] + [CALL, RESULT], "tools": TOOLS,
        "add_generation_prompt": True,
    },
    "llama tools in system": {
        **LLAMA, "messages": CHAT[:2] + [CALL, RESULT], "tools": TOOLS,
        "extra": {"tools_in_user_message": False},
    },
    "llama builtin tools": {
        **LLAMA,
        "messages": CHAT[:2] + [{
            "role": "assistant",
            "tool_calls": [{"function": {"name": "search", "arguments": {"query": "x", "lang": "é"}}}],
        }, {"role": "ipython", "content": {"output": [1, 2.0]}}],
        "extra": {"builtin_tools": ["code_interpreter", "search", "wolfram"]},
    },
    "llama no user message": {**LLAMA, "messages": CHAT[:1], "tools": TOOLS},
    "llama continued": {**LLAMA, "messages": CHAT[:3], "continue_final_message": True},
    "gemma2": {**GEMMA2, "messages": CHAT[1:], "add_generation_prompt": True},
    "gemma2 system": {**GEMMA2, "messages": CHAT},
    "gemma2 order": {**GEMMA2, "messages": [user("a"), user("b")]},
    "gemma3": {**GEMMA3, "messages": CHAT, "add_generation_prompt": True},
    "gemma3 parts": {
        **GEMMA3,
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "S"}]},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " what? "}]},
            {"role": "assistant", "content": [{"type": "text", "text": " A cat. "}]},
        ],
        "continue_final_message": True,
    },
    "mistral": {**MISTRAL, "messages": CHAT},
    "mistral tools": {**MISTRAL, "messages": CHAT[:2] + [CALL, RESULT, assistant("12"), user("ok")], "tools": TOOLS},
    "mistral order": {**MISTRAL, "messages": [user("a"), user("b")]},
    "mistral continued": {**MISTRAL, "messages": CHAT[:3], "continue_final_message": True},
    "features": {
        "template": "features.jinja",
        "bos_token": "<s>",
        "messages": [user("one"), {"role": "skip"}, assistant("two"), {"role": "stop"}, user("x")],
        "documents": [{"title": "d"}],
        "extra": {"data": DATA, "thinking": False},
    },
}


def main():
    out = []
    for name, case in CASES.items():
        try:
            result = {"rendered": render(case)}
        except jinja2.exceptions.TemplateError as error:
            result = {"error": str(error)}
        out.append({"name": name, **case, **result})
    path = FOLDER / "cases.json"
    path.write_text(json.dumps(out, ensure_ascii=False, indent=1) + "\n")
    print(f"{len(out)} cases in {path}")


if __name__ == "__main__":
    main()
