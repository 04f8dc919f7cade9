#!/usr/bin/env python3
"""Checks a running server with the official openai client.

    python openai_client.py http://127.0.0.1:8000/v1 MODEL [--api-key KEY]

Give --api-key if and only if the server asks for one. Prints a line per check and a summary;
exits with 1 if a check failed, with 2 if the server cannot be reached.
"""

import argparse
import math
import sys

import openai

CHECKS = []


class Skip(Exception):
    """The check does not apply to this server."""


def check(function):
    """Registers a check; its docstring's first line is its name."""
    CHECKS.append(function)
    return function


class Context:
    def __init__(self, client, base_url, model, api_key):
        self.client = client
        self.base_url = base_url
        self.model = model
        self.api_key = api_key

    def chat(self, content="Name three colours.", **options):
        options = {"temperature": 0, "max_tokens": 12, **options}
        messages = [{"role": "user", "content": content}]
        return self.client.chat.completions.create(
            model=self.model, messages=messages, **options
        )

    def complete(self, prompt="Once upon a time", **options):
        options = {"temperature": 0, "max_tokens": 12, **options}
        return self.client.completions.create(model=self.model, prompt=prompt, **options)

    def tokenize(self, text):
        """Token ids of a text; the route lies beside /v1."""
        url = self.base_url.rstrip("/").removesuffix("/v1") + "/tokenize"
        return self.client.post(url, body={"prompt": text}, cast_to=object)["tokens"]


def equal(found, expected, what):
    assert found == expected, f"{what}: expected {expected!r}, got {found!r}"


def check_usage(usage, choices=1):
    assert usage.prompt_tokens > 0, usage
    assert usage.completion_tokens >= choices, usage
    equal(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens, "total_tokens")
    assert 0 <= usage.prompt_tokens_details.cached_tokens <= usage.prompt_tokens, usage


def raises(kind, call):
    try:
        call()
    except kind as error:
        return error
    except openai.OpenAIError as error:
        raise AssertionError(f"expected {kind.__name__}, got {type(error).__name__}: {error}")
    raise AssertionError(f"expected {kind.__name__}, got an answer")


# --- models ---------------------------------------------------------------------------------


@check
def models_list(ctx):
    """models: list and retrieve"""
    ids = [model.id for model in ctx.client.models.list()]
    assert ctx.model in ids, ids
    card = ctx.client.models.retrieve(ctx.model)
    equal(card.object, "model", "object")
    assert card.max_model_len > 0, card


# --- chat -----------------------------------------------------------------------------------


@check
def chat_plain(ctx):
    """chat: one answer"""
    answer = ctx.chat()
    equal(answer.object, "chat.completion", "object")
    equal(answer.model, ctx.model, "model")
    equal(len(answer.choices), 1, "choices")
    choice = answer.choices[0]
    equal(choice.index, 0, "index")
    equal(choice.message.role, "assistant", "role")
    assert isinstance(choice.message.content, str), choice
    assert choice.finish_reason in ("stop", "length"), choice.finish_reason
    check_usage(answer.usage)


@check
def chat_roles_and_parts(ctx):
    """chat: system message, earlier turns, content in parts"""
    answer = ctx.client.chat.completions.create(
        model=ctx.model,
        messages=[
            {"role": "system", "content": "You are terse."},
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": [{"type": "text", "text": "How are you?"}]},
        ],
        max_tokens=4,
    )
    assert 1 <= answer.usage.completion_tokens <= 4, answer.usage


@check
def chat_stream(ctx):
    """chat: a stream says what one answer says"""
    whole = ctx.chat()
    stream = ctx.chat(stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    *body, last = chunks
    equal(last.choices, [], "choices of the last chunk")
    check_usage(last.usage)
    equal(last.usage.completion_tokens, whole.usage.completion_tokens, "completion_tokens")
    equal(body[0].choices[0].delta.role, "assistant", "role of the first chunk")
    equal({chunk.id for chunk in chunks}, {last.id}, "ids")
    assert all(chunk.usage is None for chunk in body), "usage before the last chunk"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in body)
    equal(text, whole.choices[0].message.content, "text")
    reasons = [chunk.choices[0].finish_reason for chunk in body]
    equal(reasons[-1], whole.choices[0].finish_reason, "finish_reason")
    assert not any(reasons[:-1]), reasons


@check
def chat_stream_without_usage(ctx):
    """chat: a stream without usage has none"""
    chunks = list(ctx.chat(stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


@check
def chat_stream_n(ctx):
    """chat: a stream of two choices"""
    texts, ends = {}, {}
    for chunk in ctx.chat(stream=True, n=2, temperature=1, seed=3):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            ends[choice.index] = choice.finish_reason or ends.get(choice.index)
    equal(sorted(texts), [0, 1], "indexes")
    assert all(ends.values()), ends


@check
def chat_logprobs(ctx):
    """chat: logprobs and top_logprobs"""
    answer = ctx.chat(logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    equal(len(content), answer.usage.completion_tokens, "entries")
    for entry in content:
        assert entry.logprob <= 0, entry
        equal(len(entry.top_logprobs), 3, "top_logprobs")
        values = [top.logprob for top in entry.top_logprobs]
        equal(values, sorted(values, reverse=True), "order")
        assert entry.bytes is not None, entry
    # Greedy: the token chosen is the most likely one.
    first = content[0]
    assert math.isclose(first.logprob, first.top_logprobs[0].logprob, abs_tol=1e-4), first
    equal(ctx.chat().choices[0].logprobs, None, "logprobs when not asked for")


@check
def chat_max_tokens(ctx):
    """chat: max_tokens and max_completion_tokens are exact with ignore_eos"""
    forced = {"ignore_eos": True}
    answer = ctx.chat(max_tokens=7, extra_body=forced)
    equal(answer.usage.completion_tokens, 7, "completion_tokens")
    equal(answer.choices[0].finish_reason, "length", "finish_reason")
    answer = ctx.client.chat.completions.create(
        model=ctx.model,
        messages=[{"role": "user", "content": "Hi"}],
        max_completion_tokens=5,
        extra_body=forced,
    )
    equal(answer.usage.completion_tokens, 5, "completion_tokens")


# --- completions ----------------------------------------------------------------------------


@check
def completion_string(ctx):
    """completions: a string"""
    answer = ctx.complete()
    equal(answer.object, "text_completion", "object")
    equal(answer.choices[0].index, 0, "index")
    assert answer.choices[0].text, answer
    check_usage(answer.usage)


@check
def completion_strings(ctx):
    """completions: a list of strings is answered like each alone"""
    prompts = ["Once upon a time", "The capital of France is"]
    answer = ctx.complete(prompts)
    equal([choice.index for choice in answer.choices], [0, 1], "indexes")
    check_usage(answer.usage, choices=2)
    for prompt, choice in zip(prompts, answer.choices):
        equal(choice.text, ctx.complete(prompt).choices[0].text, prompt)


@check
def completion_tokens(ctx):
    """completions: token ids, and lists of them, are answered like their text"""
    text = "The capital of France is"
    ids = ctx.tokenize(text)
    expected = ctx.complete(text).choices[0].text
    equal(ctx.complete(ids).choices[0].text, expected, "token ids")
    answer = ctx.complete([ids, ids])
    equal([choice.text for choice in answer.choices], [expected] * 2, "lists of token ids")
    equal(answer.usage.prompt_tokens, 2 * len(ids), "prompt_tokens")


@check
def completion_stream(ctx):
    """completions: a stream says what one answer says"""
    chunks = list(ctx.complete(stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    equal(text, ctx.complete().choices[0].text, "text")
    check_usage(chunks[-1].usage)


@check
def completion_logprobs(ctx):
    """completions: logprobs"""
    answer = ctx.complete(logprobs=2)
    logprobs = answer.choices[0].logprobs
    count = answer.usage.completion_tokens
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        equal(len(getattr(logprobs, name)), count, name)
    assert all(value <= 0 for value in logprobs.token_logprobs), logprobs.token_logprobs
    assert all(1 <= len(top) <= 3 for top in logprobs.top_logprobs), logprobs.top_logprobs
    equal(logprobs.text_offset[0], 0, "first offset")
    equal(logprobs.text_offset, sorted(logprobs.text_offset), "offsets")


@check
def completion_echo(ctx):
    """completions: echo scores a prompt"""
    prompt = "The capital of France is Paris"
    answer = ctx.complete(prompt, echo=True, max_tokens=0, logprobs=1)
    choice = answer.choices[0]
    equal(choice.text, prompt, "text")
    equal(choice.logprobs.token_logprobs[0], None, "first logprob")
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])
    equal(len(choice.logprobs.tokens), answer.usage.prompt_tokens, "tokens")


@check
def prompt_logprobs(ctx):
    """completions: prompt_logprobs, token ids, stop_reason of vLLM"""
    extra = {"prompt_logprobs": 1, "return_token_ids": True}
    choice = ctx.complete(extra_body=extra).choices[0]
    equal(choice.prompt_logprobs[0], None, "first prompt logprob")
    for token, known in zip(choice.prompt_token_ids[1:], choice.prompt_logprobs[1:]):
        assert str(token) in known, (token, known)
        assert known[str(token)]["rank"] >= 1, known
    assert choice.token_ids and all(isinstance(token, int) for token in choice.token_ids)
    assert hasattr(choice, "stop_reason")


# --- sampling -------------------------------------------------------------------------------


@check
def several_choices(ctx):
    """n: two choices of one prompt"""
    answer = ctx.chat(n=2, temperature=1, seed=1)
    equal([choice.index for choice in answer.choices], [0, 1], "indexes")
    answer = ctx.complete(n=2, temperature=1, seed=1, max_tokens=24)
    texts = [choice.text for choice in answer.choices]
    equal(len(texts), 2, "choices")
    assert texts[0] != texts[1], "both choices are the same"


@check
def stop_string(ctx):
    """stop: the text ends before the stop string"""
    options = {"max_tokens": 24, "extra_body": {"ignore_eos": True}}
    text = ctx.complete(**options).choices[0].text
    middle = text[len(text) // 2 :][:4]
    assert middle, text
    expected = text[: text.index(middle)]
    answer = ctx.complete(stop=middle, **options).choices[0]
    equal(answer.text, expected, "text")
    equal(answer.finish_reason, "stop", "finish_reason")
    equal(answer.stop_reason, middle, "stop_reason")
    equal(ctx.complete(stop=["\0never", middle], **options).choices[0].text, expected, "a list")
    stream = ctx.complete(stop=middle, stream=True, **options)
    streamed = "".join(chunk.choices[0].text for chunk in stream)
    equal(streamed, expected, "text of the stream")


@check
def greedy_repeats(ctx):
    """temperature 0: the same answer every time"""
    equal(ctx.chat().choices[0].message.content, ctx.chat().choices[0].message.content, "text")


@check
def seed_repeats(ctx):
    """seed: the same answer for the same seed, others for others"""

    def sample(seed):
        return ctx.complete(temperature=1, seed=seed, max_tokens=24).choices[0].text

    equal(sample(42), sample(42), "text")
    assert len({sample(seed) for seed in range(4)}) > 1, "four seeds, one answer"


@check
def sampling_parameters(ctx):
    """all sampling parameters are taken"""
    ctx.chat(
        temperature=0.8,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"5": -100},
        user="somebody",
        extra_body={
            "top_k": 20,
            "min_p": 0.01,
            "repetition_penalty": 1.1,
            "min_tokens": 1,
            "stop_token_ids": [3],
            "skip_special_tokens": True,
            "cache_salt": "salt",
            "a_field_nobody_knows": {"x": 1},
        },
    )


# --- errors ---------------------------------------------------------------------------------


def error_body(error):
    body = error.body
    assert isinstance(body, dict), body
    assert body["message"] and body["type"], body
    assert "param" in body and "code" in body, body
    return body


@check
def unknown_model(ctx):
    """errors: an unknown model is a 404"""
    error = raises(
        openai.NotFoundError,
        lambda: ctx.client.completions.create(model="no-such-model", prompt="x"),
    )
    equal(error_body(error)["code"], "model_not_found", "code")


@check
def wrong_type(ctx):
    """errors: a wrong type is a 400 that names the field"""
    error = raises(openai.BadRequestError, lambda: ctx.complete(max_tokens="many"))
    equal(error_body(error)["param"], "max_tokens", "param")
    error = raises(openai.BadRequestError, lambda: ctx.chat(temperature=-1))
    equal(error_body(error)["param"], "temperature", "param")
    create = ctx.client.chat.completions.create
    error = raises(openai.BadRequestError, lambda: create(model=ctx.model, messages=[]))
    equal(error_body(error)["param"], "messages", "param")


@check
def too_long(ctx):
    """errors: a prompt beyond the context is a 400"""
    limit = ctx.client.models.retrieve(ctx.model).max_model_len
    prompt = [ctx.tokenize("x")[-1]] * (limit + 1)
    error = raises(openai.BadRequestError, lambda: ctx.complete(prompt))
    equal(error_body(error)["code"], "context_length_exceeded", "code")


@check
def bad_key(ctx):
    """errors: a wrong key is a 401"""
    if not ctx.api_key:
        raise Skip("no --api-key")
    client = ctx.client.with_options(api_key="not-" + ctx.api_key)
    error = raises(openai.AuthenticationError, client.models.list)
    equal(error_body(error)["code"], "invalid_api_key", "code")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base_url", help="such as http://127.0.0.1:8000/v1")
    parser.add_argument("model", help="name of the served model")
    parser.add_argument("--api-key", help="key, if the server asks for one")
    arguments = parser.parse_args()
    key = arguments.api_key
    client = openai.OpenAI(
        base_url=arguments.base_url, api_key=key or "none", max_retries=0, timeout=300
    )
    try:
        client.models.list()
    except openai.APIConnectionError as error:
        print(f"cannot reach {arguments.base_url}: {error}", file=sys.stderr)
        return 2
    ctx = Context(client, arguments.base_url, arguments.model, key)
    passed = failed = 0
    for function in CHECKS:
        name = function.__doc__.splitlines()[0]
        try:
            function(ctx)
        except Skip as reason:
            print(f"skip {name}: {reason}")
        except Exception as error:  # one failing check must not hide the others
            failed += 1
            print(f"FAIL {name}: {type(error).__name__}: {error}")
        else:
            passed += 1
            print(f"ok   {name}")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
