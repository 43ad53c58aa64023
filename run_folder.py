"""run_folder.py: what a training writes down and goes on from: checkpoints, a log, curves.

Read with   App. B.3: the average of the weights is what is validated, sampled and kept
Not here    the loop (train.py), networks as files (checkpoints.py), shards (devices.py)
Files       config.json, log.jsonl, loss.png, samples-STEP.png, model.safetensors, and in
            checkpoints/STEP/ all that a run goes on from. A run may be killed at any instant.
"""

import fcntl
import json
import math
import shutil
import signal
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import devices
from checkpoints import save_networks
from devices import World, whole
from mmdit import MMDiT
from options import write_atomically, write_json


@dataclass
class Run:
    """A run folder. All ranks write its checkpoints together, and rank 0 writes the rest."""
    folder: Path
    config: object                   # a train.TrainConfig
    world: World = None              # if none, one is made
    times: object = None             # times(batch) -> t (B,), by which the log sorts losses
    report: object = None            # report(average, step) -> entries for the log, a picture
    average: torch.nn.Module = None        # a place for the average; if none, a copy of the model
    metadata: dict = None            # of an MM-DiT's model.safetensors; if none, it is not written
    about: dict = field(default_factory=dict)        # more entries for config.json
    began: float = 0                 # when the --minutes began; 0: when the loop did
    may_stop: bool = False           # Ctrl-C ends the training early; if not, it ends the program

    def say(self, sentence):
        """Prints a line beside the progress bar, once for all processes."""
        if self.world.rank == 0:
            tqdm.write(sentence)

    def start(self, model, average, optimizers):
        """Locks the folder, loads its newest whole checkpoint, and drops later lines of the log."""
        self.folder = Path(self.folder)
        self.world = self.world or World(self.config.device)
        (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / "lock", "w")              # The system frees it when we die.
        self.began = self.began or time.time()
        self.done = self.steps = 0
        self.skipped = 0                                         # steps in a row, not finite
        self.recent = []                                         # steps that wait for a line
        self.stopping = False
        self.signals = []
        if self.world.rank == 0:
            self.take_over()
        self.resume(model, average, optimizers)
        self.first = self.done
        self.last_due = self.done
        self.entries = read_log(self.folder / "log.jsonl", self.done)
        if self.world.rank == 0:
            write_json(self.folder / "config.json", {"train": asdict(self.config), **self.about})
            log = "".join(json.dumps(entry) + "\n" for entry in self.entries)
            write_atomically(self.folder / "log.jsonl", partial(Path.write_text, data=log))
        self.steps = self.total_steps()
        if self.steps == 0:
            raise ValueError("--minutes were over before the first step; give more")
        self.bar = tqdm(initial=self.done, disable=self.world.rank > 0, unit="step")
        self.last_line = time.time()
        self.handlers = ExitStack()                              # It undoes what follows.
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, self.note_signal)
            self.handlers.callback(signal.signal, number, before)

    def note_signal(self, number, frame):
        """Ctrl-C or SIGTERM: the run saves and ends after this step. A second one kills it."""
        self.signals.append(number)
        self.handlers.close()

    # --- Checkpoints ------------------------------------------------------------------------------
    def take_over(self):
        """Locks the folder, and clears away what a kill or a full disk left half."""
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{self.folder} is in use; choose another --out, or wait") from None
        for half in (self.folder / "checkpoints").glob("*.partial"):
            shutil.rmtree(half, ignore_errors=True)
        for half in self.folder.glob("*.partial"):
            half.unlink()

    def resume(self, model, average, optimizers):
        """Loads the newest whole checkpoint. OSError if none can be read."""
        found = self.world.same(checkpoints_of(self.folder))
        for folder in reversed(found):
            state = self.state(model, average, optimizers)
            try:
                devices.load_state(state, folder)
                break
            except OSError as problem:
                if folder == found[0]:
                    raise
                self.say(f"{problem}; the checkpoint before it is taken")
        if found:
            devices.set_optimizer_state_dict(model, optimizers, state["optimizer"])
            self.done = state["step"]
            self.steps = state["steps"]                          # until some new steps are timed
            self.began -= state["seconds"]                       # as if it had run without a pause

    def state(self, model, average, optimizers):
        """What a run goes on from. Random numbers need no state: they are keyed by the step."""
        return {
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimizer": devices.get_optimizer_state_dict(model, optimizers),
            "step": self.done,
            "steps": self.steps,
            "seconds": time.time() - self.began,
        }

    def save(self, model, average, optimizers):
        """The average as model.safetensors, and a checkpoint. The last two checkpoints stay."""
        self.last_due = self.done
        if self.metadata:
            self.save_model(average)
        target = self.folder / "checkpoints" / f"{self.done:08}"
        unfinished = target.with_suffix(".partial")
        devices.save_state(self.state(model, average, optimizers), unfinished)
        if self.world.rank == 0:
            shutil.rmtree(target, ignore_errors=True)            # A damaged one may be there.
            unfinished.rename(target)
            older = [folder for folder in checkpoints_of(self.folder) if folder < target]
            for folder in older[:-1]:
                shutil.rmtree(folder, ignore_errors=True)

    def save_model(self, average):
        """model.safetensors, for sample.py. Only rank 0 gets the weights, whole."""
        weights = devices.get_model_state_dict(average, options=devices.WHOLE)
        if self.world.rank == 0:
            with torch.device("meta"):
                mmdit = MMDiT(average.config)
            mmdit.load_state_dict(weights, assign=True)
            save_networks(self.folder / "model.safetensors", {"mmdit": mmdit}, **self.metadata)

    # --- Steps ------------------------------------------------------------------------------------
    def total_steps(self):
        """--steps, or as many as fit into nine tenths of --minutes; the rest is for the score."""
        if self.config.steps:
            return self.config.steps
        left = max(0, 0.9 * 60 * self.config.minutes - (time.time() - self.began))
        taken = self.done - self.first - 2                       # The first two are slow.
        if taken >= 1:
            steps = self.done + int(left * taken / (time.time() - self.paced))
        else:
            self.paced = time.time()
            steps = self.done
            if left:
                steps = self.steps if self.steps > self.done else self.done + 1000
        if self.first < self.done and taken < 2 and steps < 100:
            self.say(f"a run of {steps} steps teaches next to nothing; give more --minutes")
        return self.world.same(steps)

    def count_step(self, model, grad_norm):
        """One step is done. Sets `due`: whether a checkpoint follows it."""
        self.done += 1
        self.steps = self.total_steps()
        self.bar.total = self.steps
        self.bar.update()
        self.stopping = any(self.world.gather(bool(self.signals)))
        self.check_numbers(model, grad_norm)
        period = self.config.every or max(1, self.steps // 10)
        ended = self.stopping or self.done == self.steps
        regular = self.skipped == 0 and self.done >= self.last_due + period
        self.due = ended or regular

    def check_numbers(self, model, grad_norm):
        """Ends the run when its numbers stop being finite, before they are averaged or saved."""
        self.skipped += 1
        if math.isfinite(grad_norm):
            self.skipped = 0
        stuck = self.skipped == 10 or (self.skipped > 0 and self.done == self.steps)
        total = whole(torch.nn.utils.get_total_norm(model.parameters())).item()
        if stuck or not math.isfinite(total):
            raise RuntimeError(f"loss, gradient or weights are not finite at step {self.done}; all "
                               f"that is saved is. Give --out {self.folder} and a lower --lr")

    # --- The log ----------------------------------------------------------------------------------
    def log(self, **entry):
        """Adds a line to log.jsonl."""
        self.entries.append({"step": self.done, **entry})
        if self.world.rank == 0:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(self.entries[-1]) + "\n")

    def log_step(self, batch, losses, grad_norm):
        """Collects a step. The first 20, every 20th and the last one write a line of the log."""
        t = self.times(batch) if self.times else losses * math.nan
        rows = torch.stack([losses.float().cpu(), t.float().cpu()])                    # (2, B)
        self.recent.append((rows, grad_norm))
        if self.done > 20 and self.done % 20 and self.done != self.steps:
            return
        rows, norms = zip(*self.recent, strict=True)
        ranks = self.world.gather(torch.cat(rows, dim=1))              # (2, n / ranks) each
        losses, t = torch.cat(ranks, dim=1)                            # (n,) each
        norms = torch.tensor(norms)
        tenths = (10 * t).floor()
        self.log(
            loss=mean(losses),
            loss_by_t=[mean(losses[tenths == tenth]) for tenth in range(10)],
            grad_norm=mean(norms),
            skipped=int((~norms.isfinite()).sum()),
            memory_gb=torch.cuda.max_memory_allocated() / 1e9,
            images_seen=self.done * self.config.batch_size,
            images_per_second=len(losses) / (time.time() - self.last_line),
        )
        self.bar.set_postfix(loss=self.entries[-1]["loss"], refresh=False)
        self.last_line = time.time()
        self.recent = []

    def sample(self, average):
        """Validation, pictures, and the curves of the losses."""
        if self.report is None or self.stopping:
            return
        entries, picture = self.report(average, self.done)
        self.log(**entries)
        self.save_picture("loss.png", draw_losses(self.entries))
        if picture:
            self.save_picture(f"samples-{self.done:06}.png", picture)

    def save_picture(self, name, picture):
        """A PNG in the folder, once for all processes."""
        if self.world.rank == 0:
            write_atomically(self.folder / name, partial(picture.save, format="PNG"))


def checkpoints_of(folder):
    """The checkpoints of a run, oldest first: the entries with eight-digit names."""
    return sorted((folder / "checkpoints").glob("[0-9]" * 8))


def read_log(file, last):
    """The entries of a log.jsonl up to a step. What else a kill or a stranger left is dropped."""
    if not file.is_file():
        return []
    entries = []
    for line in file.read_text().split("\n"):
        with suppress(Exception):
            entry = json.loads(line)
            numbers = [entry["step"], entry.get("loss") or 0, entry.get("validation") or 0]
            if 0 <= entry["step"] <= last and all(map(math.isfinite, numbers)):
                entries.append(entry)
    return entries


def mean(values):
    """The mean over what is finite; None where nothing is."""
    values = values[values.isfinite()]
    return round(values.mean().item(), 6) if values.numel() else None


def draw_losses(entries):
    """loss.png: the loss in training (black) and in validation (red) by step, on a log scale."""
    last = entries[-1]["step"]
    image = Image.new("RGB", (720, 480), "white")
    draw = ImageDraw.Draw(image)
    draw.text((60, 3), f"loss over {last} steps; red: validation", "black")
    for loss in (0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5):
        y = 220 - 280 * math.log10(loss)
        draw.line((60, y, 700, y), "lightgray")
        draw.text((50, y), str(loss), "black", anchor="rm")
    for name, color in (("loss", "black"), ("validation", "red")):
        points = []
        for entry in entries:
            if (entry.get(name) or 0) > 0:
                x = 60 + 640 * entry["step"] / last
                y = 220 - 280 * math.log10(entry[name])
                points.append((x, y))
        draw.line(points, color, 3)
    return image
