"""A worker that trains nothing: holds the lock, writes events, obeys commands. Standard library only, run as a script.

python fake_worker.py RUN --steps 400 --delay 0.02 [--start 0] [--hostile] [--fail-at N] [--die-at N] [--nan-at N]
"""

import argparse
import fcntl
import json
import math
import os
import pathlib
import time

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>\x1b[31m\u202e"
ARABIC = "مرحبا بالعالم! الطلب: ثلاث تفاحات وكوب شاي."


class Worker:
    def __init__(self, options):
        self.options, self.run = options, pathlib.Path(options.run)
        self.lock = os.open(self.run / "worker.lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.file = open(self.run / "events.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self.n, self.stopping, self.paused, self.step = options.first_event, False, False, options.start

    def say(self, event, **fields):
        self.file.write(json.dumps({"event": event, "seq": self.n, "time": round(time.time(), 3), **fields}) + "\n")
        self.file.flush()
        self.n += 1

    def obey(self):
        for file in sorted((self.run / "commands").glob("*.json")):
            content = json.loads(file.read_text())
            command = content["command"]
            file.unlink()
            if command == "stop":
                self.stopping = True
            elif command in ("pause", "resume"):
                self.paused = command == "pause"
                self.say("phase", phase="paused" if self.paused else "train")
            elif command == "sample":
                self.sample(content.get("prompts"))
            elif command == "evaluate":
                self.evaluate(0.8)
            elif command == "checkpoint":
                self.say("checkpoint", step=self.step, path=f"checkpoints/step-{self.step:06d}", bytes=12345678)
            detail = f"2e-4 → {content['learning_rate']:g}" if command == "learning_rate" else ""
            self.say("command", name=command, id=file.stem, refused=False, detail=detail)

    def sample(self, prompts=None):
        for prompt in prompts or ():
            self.say("sample", step=self.step, prompt=prompt, text=f"You asked: {prompt}")
        if prompts:
            return
        text = ARABIC + (HOSTILE if self.options.hostile else "")
        self.say("sample", step=self.step, prompt="Greet the world in Arabic.", text=text)
        self.say(
            "sample", step=self.step, prompt="Three apples and a cup of tea, please.", text='{"apples": 3, "tea": 1}' if self.step > 100 else "apples, tea ..."
        )

    def memory(self):
        now = 3.1e9 + 2e8 * math.sin(self.step / 9)
        self.say("memory", process_bytes=now, peak_bytes=max(3.25e9, now), available_bytes=14e9, total_bytes=24e9, free_bytes=6e9,
                 cached_bytes=8.5e9, swap_used_bytes=0, pressure_percent=0.0, others={"ollama (process 812)": 3e9, HOSTILE: 1e9}, watts=41.0)  # fmt: skip

    def advance(self):
        options, step = self.options, self.step
        loss = 2.2 * math.exp(-step / (options.steps / 5)) + 0.35 + 0.16 * math.sin(step * 1.7) * math.cos(step * 0.31)
        if step == options.nan_at:
            loss = None
        self.say("step", step=step, steps=options.steps, epoch=3 * step / options.steps, loss=loss, tokens=2000 + step % 7,
                 learning_rate=2e-4 * min(1, step / 20) * (1 - step / options.steps), grad_norm=1.1 + 0.6 * math.sin(step / 3) + 2 * math.exp(-step / 9),
                 seconds=max(options.delay, 0.002) * (1 + 0.2 * math.sin(step)), wait_seconds=options.delay * 0.01)  # fmt: skip
        if step % 10 == 0:
            self.memory()
        if step % max(1, options.steps // 10) == 0:
            self.evaluate(loss or 1.0)

    def evaluate(self, loss, **answers):
        self.say("phase", phase="evaluate")
        self.say("eval", step=self.step, loss=loss + 0.06 + 0.1 * (self.step / self.options.steps) ** 3, tokens=4000, **answers)
        if self.step % max(1, self.options.steps // 5) == 0:
            self.sample()
        self.say("phase", phase="train")

    def work(self):
        options = self.options
        self.say("started", pid=os.getpid(), host="here", device="cpu", dtype="fp32", method="lora", resumed_from=options.start or None)
        self.say("phase", phase="load")
        time.sleep(options.load)
        self.memory()
        self.say("model", parameters=3_400_000, trainable_parameters=120_000)
        if not options.start:
            self.evaluate(2.5, exact_match=0.015, n=200)
        if options.hostile:
            self.say("warning", message=HOSTILE)
        while self.step < options.steps:
            self.obey()
            if self.stopping:
                return self.say("stopped", step=self.step, reason="asked to stop" + (HOSTILE if options.hostile else ""))
            if self.paused:
                time.sleep(0.05)
                continue
            self.step += 1
            if self.step == options.die_at:
                os._exit(9)
            if self.step == options.fail_at:
                fact = f"loss nan at step {self.step}: the update cannot be trusted" + HOSTILE * options.hostile
                return self.say("failed", step=self.step, error="RunFailed", fact=fact, fix="resume from the last checkpoint with a lower learning rate")
            self.advance()
            time.sleep(options.delay)
        self.evaluate(0.4, exact_match=0.94, n=200)
        return self.say("finished", step=self.step, seconds=12.0, tokens=800_000, tokens_per_second=66_000.0, peak_bytes=3.3e9)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--hostile", action="store_true")
    for name, default in (("steps", 400), ("start", 0), ("first-event", 0), ("fail-at", -1), ("die-at", -1), ("nan-at", -1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("delay", 0.02), ("load", 0.2)):
        parser.add_argument(f"--{name}", type=float, default=default)
    Worker(parser.parse_args()).work()
