"""The requests of `soak.py`."""

import json
import random
from pathlib import Path

TENANTS = ["red", "green", "blue", None]
BAD_RECIPES = ["f15", "", "joint:99", "joint:", 4, "x" * 5000, ["f16"], "F16", "joint:nan", "kivi"]
LONGEST_PROMPT = 1500  # Characters.
MOST_TOKENS = 60
MALFORMED = [
    b"", b"{", b"null", b"[1]", b"\xff\xfe", b'{"prompt": "a", "max_tokens": 1e400}', b"{}",
    b'{"prompt": 5}', b'{"prompt": []}', b'{"prompt": ["a", 1]}', b'{"prompt": [-1]}',
    b'{"prompt": [4000000000]}', b'{"prompt": "a", "max_tokens": -1}', b'{"prompt": "a", "n": 0}',
    b'{"prompt": "a", "n": "two"}', b'{"prompt": "a", "temperature": -1}', b'{"prompt": "a"',
    b'{"prompt": "a", "stop": 3}', b'{"prompt": "a", "stream": "yes"}', b'{"messages": []}',
    b'{"messages": [{}]}', b'{"prompt": "a", "top_p": 2}', b"[" * 500,
]
# Multi-byte characters: text must survive being cut anywhere. Added to the paragraphs of LICENSE.
FOREIGN = [
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. ",
    "いろはにほへと ちりぬるを わかよたれそ つねならむ。 ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200f\u202e weird \ud7ff \uffff\n",
    "0123456789 " * 12,
]


def passages():
    """Texts that prompts are put together from; few, so that requests repeat each other's."""
    text = (Path(__file__).resolve().parent.parent / "LICENSE").read_text(encoding="utf-8")
    paragraphs = [" ".join(p.split()) + "\n\n" for p in text.split("\n\n") if len(p) > 80]
    return paragraphs[:24] + FOREIGN


class Request:
    """One request of the load: what is sent, and what must come back."""

    def __init__(self, kind, path, body, status=200, hang_up=False):
        self.kind, self.path, self.body = kind, path, body
        self.status, self.hang_up = status, hang_up

    def data(self):
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()

    def described(self):
        """For the summary; enough to send it again."""
        if isinstance(self.body, bytes):
            return {"path": self.path, "bytes": repr(self.body)}
        body = dict(self.body)
        tokens = body.get("prompt")
        if isinstance(tokens, list):
            body["prompt"] = f"[{tokens[0]}] * {len(tokens)}"
        return {"path": self.path, "body": body}


class Maker:
    """Makes the requests of one client."""

    def __init__(self, seed, recipes, max_model_len):
        self.random = random.Random(seed)
        self.recipes, self.max_model_len = recipes, max_model_len
        self.passages = passages()

    def next(self):
        chance = self.random.random()
        if chance < 0.10:
            return self.too_long()
        if chance < 0.15:
            body = self.random.choice(MALFORMED)
            chat = b"messages" in body
            return Request("malformed", chat_path(chat), body, status=400)
        if chance < 0.18:
            request = self.ordinary()
            request.body["kv_cache"] = self.random.choice(BAD_RECIPES)
            request.kind, request.status, request.hang_up = "bad recipe", 400, False
            return request
        return self.ordinary()

    def prompt(self):
        """Whole passages in any order, cut anywhere."""
        r = self.random
        length = r.randint(1, LONGEST_PROMPT)
        text = self.passages[r.randrange(3)] if r.random() < 0.5 else ""
        while len(text) < length:
            text += r.choice(self.passages)
        return text[:length]

    def ordinary(self):
        r = self.random
        chat, stream = r.random() < 0.4, r.random() < 0.6
        body = {"max_tokens": r.randint(1, MOST_TOKENS), "stream": stream}
        text = self.prompt()
        if chat:
            cut = r.randint(0, len(text) // 2)
            system = [{"role": "system", "content": text[:cut]}] if cut else []
            body["messages"] = system + [{"role": "user", "content": text[cut:]}]
        else:
            body["prompt"] = text
        if r.random() < 0.5:
            body["temperature"] = 0
        else:
            body["temperature"] = r.choice([0.5, 1.0, 1.5])
            body["n"] = r.choice([1, 1, 2, 3])
            body["top_p"] = r.choice([0.8, 1.0])
            body["seed"] = r.randrange(1 << 31)
        if r.random() < 0.5:
            body["ignore_eos"] = True
        if r.random() < 0.2:
            body["stop"] = r.choice([".", ["\n\n", "the"], "。"])
        recipe, tenant = r.choice(self.recipes), r.choice(TENANTS)
        if recipe != "none":
            body["kv_cache"] = recipe
        if tenant:
            body["cache_salt"] = tenant
        if stream:
            body["stream_options"] = {"include_usage": True}
        hang_up = r.random() < (0.3 if stream else 0.05)
        kind = ("chat" if chat else "completion") + (" stream" if stream else "")
        return Request(kind, chat_path(chat), body, hang_up=hang_up)

    def too_long(self):
        """Too long by itself, or only together with the tokens asked for."""
        r = self.random
        request = self.ordinary()
        over = r.choice([1 - request.body["max_tokens"], 0, 1, 500, self.max_model_len])
        if "messages" in request.body:
            words = " word" * (self.max_model_len + max(over, 0))
            request.body["messages"] = [{"role": "user", "content": words}]
        else:
            request.body["prompt"] = [1] * (self.max_model_len + over)
        request.kind, request.status, request.hang_up = "too long", 400, False
        return request


def chat_path(chat):
    return "/v1/chat/completions" if chat else "/v1/completions"
