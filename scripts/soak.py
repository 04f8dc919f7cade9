#!/usr/bin/env python3
"""Puts a running server under a long, mixed, partly hostile load and checks every answer.

Needs the Python standard library only:

    kvasir serve --kv-cache-memory 48MiB --port 8190
    python scripts/soak.py --url http://127.0.0.1:8190 --minutes 20 --json soak.json

What it sends is a function of --seed (what the server makes of it is not: threads race). Every
--idle-every seconds the clients pause, and the server must come to rest: nothing running, nothing
waiting, no bytes in use, and none held after POST /reset_prefix_cache. Use a server of its own: other
clients would disturb that (a server that is busy at the start is refused), and this load would disturb them.

The server checks its cache whenever it is idle. A check that fails stops the engine: /health is 503
from then on, which counts as a failure here, and the reason is in the server's log (`the engine
failed: cache integrity: ...`). Keep the log; a panic is only there, too.

Probes are requests whose answer is known: the same prompt, recipe f16, with log-probabilities. Answers
from the empty server at the start must come back to the bit during the soak, for every tenant. Where
blocks are shared by content, that is asked only of tenants that nobody else uses (--probes private).

Exit codes: 0 nothing failed, 1 something failed, 2 wrong usage or no server.
"""

import argparse
import collections
import http.client
import itertools
import json
import os
import random
import re
import sys
import threading
import time
from pathlib import Path

from soak_answers import Answers, Probes
from soak_client import Bad, Client, check, closing
from soak_requests import Maker, chat_path

RECIPES = (
    "none,f16,int8,joint4,joint3,joint:2.75,joint2,auto,kivi4,kivi2,rotation3,gear:4,snapkv:0.5,h2o:0.5,"
    "streaming:tokens=64,chunkkv:0.5+kivi4,compactor:0.5,dbudget:0.05,snapkv:0.5+joint3,"
    "think:0.6,think:0.6+kivi4,clusterkv:0.25,recalkv:0.8,recalkv:0.5+kivi4,lorc:0.9,kvsharer:0.9,"
    "snapkv:0.5+kvsharer:0.9+recalkv:0.8+int8"
)


class Soak:
    """The clients, their pauses, and what they saw."""

    def __init__(self, options, client, recipes, answers, probes, max_model_len):
        self.options, self.client, self.recipes = options, client, recipes
        self.answers, self.probes, self.max_model_len = answers, probes, max_model_len
        self.lock = threading.Condition()
        self.counts, self.by_recipe = collections.Counter(), collections.Counter()
        self.failures, self.rounds = [], []
        self.paused, self.active, self.ended = False, 0, False
        self.start = time.monotonic()

    def seconds(self):
        return round(time.monotonic() - self.start, 1)

    def count(self, *kinds):
        with self.lock:
            self.counts.update(kinds)

    def failed(self, what, request=None, request_id=None):
        failure = {"seconds": self.seconds(), "what": what}
        if request:
            failure |= {"kind": request.kind, "id": request_id, "request": request.described()}
        with self.lock:
            self.failures.append(failure)
            if len(self.failures) >= self.options.max_failures:
                self.ended = True
            print(f"FAILED at {failure['seconds']} s: {request_id or 'server'}: {what}", flush=True)

    def run_client(self, number):
        seed = f"{self.options.seed}/{number}"
        maker = Maker(seed, self.recipes, self.max_model_len)
        sent = 0
        while True:
            with self.lock:
                self.lock.wait_for(lambda: not self.paused or self.ended)
                if self.ended:
                    return
                self.active += 1
            sent += 1
            request_id = f"soak-{self.options.seed}-{number}-{sent}"
            probe, request = None, None
            try:
                if maker.random.random() < 0.08:
                    probe, request = self.probes.pick(maker.random)
                else:
                    request = maker.next()
                self.send(request, request_id, probe)
            except Exception as error:  # Whatever it is, the soak goes on.
                what = str(error) if isinstance(error, Bad) else repr(error)
                self.failed(what, request, request_id)
            finally:
                with self.lock:
                    self.active -= 1
                    self.lock.notify_all()

    def send(self, request, request_id, probe):
        r = random.Random(request_id)  # Of its own, so that no answer changes what is sent next.
        deadline = time.monotonic() + self.options.timeout
        self.count("sent", f"sent: {request.kind}")
        recipe = "none"
        if isinstance(request.body, dict) and request.status == 200:
            recipe = request.body.get("kv_cache", "none")
            with self.lock:
                self.by_recipe[recipe] += 1
        stream = isinstance(request.body, dict) and request.body.get("stream")
        if request.hang_up and not stream:
            return self.hang_up_before_answer(request, request_id, r)
        connection, answer = self.client.open("POST", request.path, request.data(), request_id)
        with closing(connection):
            if answer.status == 429:
                self.count("refused: queue full (429)")
                time.sleep(min(5, float(answer.headers.get("Retry-After", 1))))
                return
            if answer.status != request.status:
                text = answer.read().decode("utf-8", "replace")
                raise Bad(f"status {answer.status} where {request.status} was due: {text[:500]}")
            if request.status != 200:
                self.answers.refusal(request, answer.read().decode("utf-8"))
                return self.count(f"refused as due: {request.kind}")
            if request.hang_up:
                # An event has two lines and mostly one token, so this is half-way at the most.
                lines = r.randint(1, request.body["max_tokens"])
                for _ in itertools.islice(before(deadline, answer), lines):
                    pass
                return self.count("hung up in the stream")
            if stream:
                self.answers.stream(request, before(deadline, answer))
            elif probe is not None:
                self.probes.compare(probe, answer.read().decode("utf-8"))
            else:
                self.answers.whole(request, answer.read().decode("utf-8"))
            self.count("answered")

    def hang_up_before_answer(self, request, request_id, r):
        connection = http.client.HTTPConnection(*self.client.address, timeout=r.uniform(0.01, 1))
        with closing(connection):
            headers = {**self.client.headers, "X-Request-Id": request_id}
            try:
                connection.request("POST", request.path, request.data(), headers)
                connection.getresponse()
            except TimeoutError:
                pass
        self.count("hung up before the answer")

    def healthy(self):
        """Metrics, which must be within the budget while requests run."""
        status, text = self.client.ask("GET", "/health")
        check(status == 200, f"/health is {status}: {text[:300]}; the reason is in the server's log")
        metrics = self.client.metrics()
        for name in ["physical", "peak_physical", "reserved"]:
            held, budget = metrics[f"kvasir_kv_{name}_bytes"], metrics["kvasir_kv_budget_bytes"]
            check(held <= budget, f"{name} bytes are {held:.0f} of a budget of {budget:.0f}")
        return metrics

    def come_to_rest(self):
        """Pauses all clients, waits until the server is idle, and looks for what is left."""
        with self.lock:
            self.paused = True
            self.lock.wait_for(lambda: self.active == 0)
        try:
            patience, calm = time.monotonic() + 60, 0
            while calm < 2:  # Twice: a request that was hung up at once may only be on its way in.
                time.sleep(0.3)
                metrics = self.healthy()
                busy = {k: metrics[f"vllm:num_requests_{k}"] for k in ["running", "waiting"]}
                calm = 0 if any(busy.values()) else calm + 1
                check(time.monotonic() < patience, f"no clients, but after 60 s: {busy}")
            held, evictable = (metrics[f"kvasir_kv_{k}_bytes"] for k in ["physical", "evictable"])
            # What finds blocks to share is held, too, and goes with the prefixes.
            if held != evictable and not self.probes.private:
                self.failed(f"at rest: {held:.0f} bytes held, of which {evictable:.0f} evictable")
            self.client.ok("POST", "/reset_prefix_cache")
            metrics = self.healthy()  # Reset wakes the engine, so this is after another check.
            for name in ["physical", "evictable", "logical"]:
                left = metrics[f"kvasir_kv_{name}_bytes"]
                check(left == 0, f"{left:.0f} {name} bytes after /reset_prefix_cache")
            rest = {"seconds": self.seconds(), "held_bytes": int(held), "evictable_bytes": int(evictable)}
            self.rounds.append(rest | resident(self.options.pid))
        except Exception as error:
            self.failed(f"at rest: {error if isinstance(error, Bad) else repr(error)}")
        with self.lock:
            self.paused = False
            self.lock.notify_all()

    def progress(self):
        with self.lock:
            counts, failed = self.counts.copy(), len(self.failures)
        try:
            m = self.healthy()
            server = (
                f"running {m['vllm:num_requests_running']:.0f}"
                f" waiting {m['vllm:num_requests_waiting']:.0f}"
                f" MiB {m['kvasir_kv_physical_bytes'] / 2**20:.1f}"
                f" preemptions {m['vllm:num_preemptions_total']:.0f}"
            )
        except Exception as error:
            self.failed(f"under load: {error if isinstance(error, Bad) else repr(error)}")
            server = "no metrics"
        refused = sum(n for kind, n in counts.items() if kind.startswith("refused"))
        hung_up = sum(n for kind, n in counts.items() if kind.startswith("hung up"))
        print(
            f"{self.seconds():6.0f} s  sent {counts['sent']} answered {counts['answered']}"
            f" refused {refused} hung up {hung_up} failed {failed}  {server}",
            flush=True,
        )

    def run(self):
        run = [threading.Thread(target=self.run_client, args=(i,)) for i in range(self.options.clients)]
        for thread in run:
            thread.start()
        end = self.start + 60 * self.options.minutes
        rest, report = self.start + self.options.idle_every, self.start + 10
        try:
            while (now := time.monotonic()) < end and not self.ended:
                if now >= rest:
                    self.come_to_rest()
                    rest = time.monotonic() + self.options.idle_every
                elif now >= report:
                    self.progress()
                    report = now + 10
                time.sleep(0.1)
        except KeyboardInterrupt:
            print("interrupted: waiting for what runs", flush=True)
        with self.lock:
            self.ended = True
            self.lock.notify_all()
        for thread in run:
            thread.join()
        self.come_to_rest()

    def summary(self):
        counts = dict(sorted(self.counts.items()))
        summary = {
            "passed": not self.failures,
            "seed": self.options.seed,
            "seconds": self.seconds(),
            "clients": self.options.clients,
            "counts": counts,
            "by_recipe": dict(self.by_recipe),
            "probes": "private" if self.probes.private else "shared",
        }
        try:
            m = self.client.metrics()
            summary["preemptions"] = int(m["vllm:num_preemptions_total"])
            summary["peak_bytes"] = int(m["kvasir_kv_peak_physical_bytes"])
            summary["budget_bytes"] = int(m["kvasir_kv_budget_bytes"])
            summary["prompt_tokens_cached"] = int(m["vllm:prompt_tokens_cached_total"])
            # Blocks coded again with fewer bits, and blocks shared, where the server counts them.
            kinds = re.compile(r"kvasir_kv_\w*(lowered|shared|sealed)\w*")
            summary |= {name: int(value) for name, value in m.items() if kinds.fullmatch(name)}
        except Exception as error:
            self.failed(f"at the end: {error!r}")
            summary["passed"] = False
        return summary | {"at_rest": self.rounds, "failures": self.failures}


def before(deadline, lines):
    """Lines of a stream. Comments keep a stream open however long it waits, hence the deadline."""
    for line in lines:
        check(time.monotonic() < deadline, "the stream takes longer than --timeout")
        yield line


def resident(pid):
    """Memory of the server's process, on Linux."""
    if pid is None:
        return {}
    status = Path(f"/proc/{pid}/status").read_text()
    return {"resident_kib": int(re.search(r"VmRSS:\s+(\d+)", status)[1])}


def usable_recipes(client, listed, default):
    """Recipes that the server takes. Of the default list some may need statistics it lacks."""
    usable, default_recipe = [], None
    for recipe in listed:
        body = {"prompt": "a", "max_tokens": 1}
        if recipe != "none":
            body["kv_cache"] = recipe
        status, text = client.ask("POST", chat_path(False), json.dumps(body))
        if status == 200:
            usable.append(recipe)
            if recipe == "none":
                default_recipe = json.loads(text)["usage"]["kvasir"]["recipe"]
        elif default and status == 400:
            print(f"left out: {recipe}: {json.loads(text)['error']['message']}", flush=True)
        else:
            raise Bad(f"recipe {recipe}: {status} {text[:300]}")
    return usable, default_recipe


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="the server (default %(default)s)")
    add("--api-key", default=os.environ.get("KVASIR_API_KEY"), help="or KVASIR_API_KEY")
    add("--minutes", type=float, default=20, help="how long (default %(default)s)")
    add("--clients", type=int, default=24, help="threads that send (default %(default)s)")
    add("--seed", type=int, default=1, help="of the requests (default %(default)s)")
    add("--recipes", help=f"values of kv_cache, none for no field (default {RECIPES}, less those the "
        "server refuses at the start)")
    add("--probes", choices=["auto", "shared", "private"], default="auto", help="tenants of probes; "
        "auto is private if /server_info says kv_sharing, and not off (default %(default)s)")
    add("--idle-every", type=float, default=120, help="seconds (default %(default)s)")
    add("--timeout", type=float, default=600, help="seconds a request may take (default %(default)s)")
    add("--max-failures", type=int, default=50, help="then give up (default %(default)s)")
    add("--pid", type=int, help="of the server, to report its memory at rest (Linux)")
    add("--json", metavar="FILE", help="write the summary there, too")
    return parser.parse_args()


def main():
    options = arguments()
    client = Client(options.url, options.api_key, options.timeout)
    try:
        info = json.loads(client.ok("GET", "/server_info"))
        metrics = client.metrics()
        busy = metrics["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"]
        check(busy == 0, f"{busy:.0f} requests of others: the soak needs a server of its own")
        sharing = info["config"].get("kv_sharing") not in (None, False, "off")
        private = sharing if options.probes == "auto" else options.probes == "private"
        listed = (options.recipes or RECIPES).split(",")
        recipes, default_recipe = usable_recipes(client, listed, options.recipes is None)
        probes = Probes(client, private)
        probes.learn()
    except (Bad, OSError, http.client.HTTPException) as error:
        print(f"cannot start: {error}", file=sys.stderr)
        return 2
    print(f"seed {options.seed}, recipes {','.join(recipes)}", flush=True)
    answers = Answers(default_recipe)
    soak = Soak(options, client, recipes, answers, probes, info["max_model_len"])
    soak.run()
    summary = json.dumps(soak.summary(), indent=2, ensure_ascii=False)
    print(summary)
    if options.json:
        Path(options.json).write_text(summary + "\n", encoding="utf-8")
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main())
