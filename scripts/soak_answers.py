"""What `soak.py` expects of answers."""

import json
import re
import threading

from soak_client import check
from soak_requests import TENANTS, Request, chat_path, passages


class Answers:
    """Checks of answers."""

    def __init__(self, default_recipe):
        self.default_recipe = default_recipe

    def refusal(self, request, text):
        error = json.loads(text)["error"]
        check(error.get("message"), "an error without a message")
        if request.kind == "bad recipe":
            check(error.get("param") == "kv_cache", f"param is {error.get('param')}, not kv_cache")
        if request.kind == "too long":
            code = error.get("code")
            check(code == "context_length_exceeded", f"code is {code}, not context_length_exceeded")

    def whole(self, request, text):
        answer = json.loads(text)
        reasons = {}
        for choice in answer["choices"]:
            check(choice["index"] not in reasons, f"two choices {choice['index']}")
            reasons[choice["index"]] = choice["finish_reason"]
            said = choice["message"]["content"] if "message" in choice else choice["text"]
            check(isinstance(said, str), f"content is {said!r}")
        self.ended(request, reasons, answer.get("usage"))

    def stream(self, request, lines):
        """Checks a whole stream, event by event as it comes."""
        reasons, usage, done = {}, None, False
        for line in lines:
            line = line.decode("utf-8").rstrip("\r\n")
            if not line or line.startswith(":"):  # Comments keep slow streams open.
                continue
            check(line.startswith("data: "), f"a line of the stream is {line[:200]!r}")
            check(not done, "events after [DONE]")
            if line == "data: [DONE]":
                done = True
                continue
            event = json.loads(line[6:])
            check("error" not in event, f"error in the stream: {event.get('error')}")
            check(usage is None, "events after the usage")
            for choice in event["choices"]:
                index, reason = choice["index"], choice["finish_reason"]
                check(index not in reasons, f"choice {index} goes on after its end")
                if reason is not None:
                    reasons[index] = reason
            if not event["choices"]:
                usage = event["usage"]
        check(done, "the stream ended without [DONE]")
        self.ended(request, reasons, usage)

    def ended(self, request, reasons, usage):
        body = request.body
        n, most = body.get("n", 1), body["max_tokens"]
        check(sorted(reasons) == list(range(n)), f"choices {sorted(reasons)} of {n}")
        for reason in reasons.values():
            check(reason in ("stop", "length"), f"finish_reason is {reason!r}")
        check(usage, "no usage")
        prompt, output = usage["prompt_tokens"], usage["completion_tokens"]
        check(prompt > 0 and usage["total_tokens"] == prompt + output, f"usage is {usage}")
        check(0 < output <= n * most, f"{output} tokens where {n} x {most} are the most")
        if body.get("ignore_eos") and "stop" not in body:
            check(set(reasons.values()) == {"length"}, f"finish_reason {reasons} despite ignore_eos")
            check(output == n * most, f"{output} tokens where {n} x {most} were asked for")
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        check(0 <= cached <= prompt * n, f"{cached} of {prompt} prompt tokens cached")
        kv = usage.get("kvasir")
        check(kv, "no usage.kvasir")
        asked = body.get("kv_cache", self.default_recipe)
        check(same_recipe(kv["recipe"], asked), f"recipe {kv['recipe']} where {asked} was asked for")
        check(kv["logical_bytes"] > 0 and kv["physical_bytes"] > 0, f"usage.kvasir is {kv}")
        ratio = kv["logical_bytes"] / kv["physical_bytes"]
        check(abs(kv["ratio"] - ratio) < 1e-6 * ratio, f"usage.kvasir is {kv}")


def same_recipe(told, asked):
    """`joint3` and `joint:3` are one recipe."""
    rate = r"joint:?([\d.]+)"
    pair = re.fullmatch(rate, told), re.fullmatch(rate, asked)
    return float(pair[0][1]) == float(pair[1][1]) if all(pair) else told == asked


class Probes:
    """Requests whose answers must never change."""

    def __init__(self, client, private):
        self.client, self.private = client, private
        text = "".join(passages()[:12])
        prompts = [text[:30], text[:333], text[100:800], text[:1400]]
        # Sequences of one request share blocks by content with each other; which comes first depends
        # on the load.
        n = 1 if private else 2
        ways = [{"temperature": 0}, {"temperature": 1.0, "seed": 7, "n": n}]
        self.bodies = [
            {"prompt": p, "max_tokens": 24, "logprobs": 1, "kv_cache": "f16", "ignore_eos": True, **way}
            for p in prompts
            for way in ways
        ]
        self.expected, self.asked, self.lock = {}, 0, threading.Lock()

    def learn(self):
        """Answers of an empty server."""
        for index, body in enumerate(self.bodies):
            self.client.ok("POST", "/reset_prefix_cache")
            self.expected[index] = content(self.client.ok("POST", chat_path(False), body))

    def pick(self, r):
        """A probe and its number; tenants of private ones are never used twice."""
        index = r.randrange(len(self.bodies))
        with self.lock:
            self.asked += 1
            number = self.asked
        if self.private:
            salt = f"probe-{number}"
        else:
            salt = r.choice(TENANTS + [f"probe-{number}"])
        body = {**self.bodies[index], **({"cache_salt": salt} if salt else {})}
        return index, Request("probe", chat_path(False), body)

    def compare(self, index, text):
        told, expected = content(text), self.expected[index]
        for (a, a_logprobs), (b, b_logprobs) in zip(told, expected, strict=True):
            check(a == b, f"a probe's text changed: {a!r} where {b!r} was expected")
            check(a_logprobs == b_logprobs, "a probe's log-probabilities changed, not its text")


def content(text):
    choices = sorted(json.loads(text)["choices"], key=lambda choice: choice["index"])
    return [(choice["text"], choice["logprobs"]["token_logprobs"]) for choice in choices]
