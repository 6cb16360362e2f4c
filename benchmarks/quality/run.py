"""The runs: a learning-rate sweep, the comparison, and the time of one pass for all adapters. Each unit can be done on its own.

sweep/TASK        plain and block-diagonal (4 blocks) at several learning rates and both starts, on the validation rows
heal/TASK         conversions of the LoRA at the sweep's best rate, healed at several rates, on the validation rows
main/TASK/SEED    every arm trained in one pass from PEFT's start, then conversions of its LoRA, before and after healing; on the test rows
start/TASK/SEED   the block-diagonal arms again, from a start as small as a LoRA's
base/TASK         the model without an adapter
speed/TASK        seconds a step of all arms in one pass, and one after another
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.quality import data, learn
from benchmarks.quality.arms import Arm, arms_of
from benchmarks.quality.bank import Bank, Tensors
from benchmarks.quality.stats import validation_loss
from benchmarks.quality.weights import load_model
from benchmarks.record import Rows as RowFile
from benchmarks.record import read_rows
from sgl_bdlora.adapters.model import read_model

RATES = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
# A converted adapter is nearly right, and AdamW's steps are as long as its rate however small the gradient: rates as high as for
# training undo conversions that were exact.
HEAL_RATES = (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4)
SWEEP_SEED = 100
CONVERTED_GOALS = (1.0, 1.74)


@dataclass(frozen=True)
class Plan:
    """What to run and how long. rank: of the plain LoRA. together: adapters in one pass. test: rows, None for all of them.

    lr, heal_lr: where there is no sweep.
    """

    rank: int = 30
    nblocks: tuple[int, ...] = (2, 4, 8)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 200
    heal_steps: int = 50
    batch: int = 16
    test: int | None = None
    together: int = 12
    rates: tuple[float, ...] = RATES
    heal_rates: tuple[float, ...] = HEAL_RATES
    lr: float = 1e-3
    heal_lr: float = 5e-5


QUICK = Plan(
    rank=4,
    nblocks=(2,),
    seeds=(0, 1),
    steps=4,
    heal_steps=2,
    batch=2,
    test=16,
    together=4,
    rates=(1e-3, 2e-3),
    heal_rates=(1e-4, 2e-4),
)


class Quality:
    """One prepared folder, one file of rows."""

    def __init__(self, folder: Path, output: Path, plan: Plan, device: str, resume: bool = False):
        self.folder, self.plan = folder, plan
        self.device = torch.device(device)
        torch.set_float32_matmul_precision("high")
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        base = read_model(folder)
        self.model_name = folder.name
        self.layers = base.linear_layers()
        self.model = load_model(folder, self.device, dtype)
        self.arms = arms_of(self.layers, plan.rank, plan.nblocks)
        self.earlier = read_rows(output) if resume and output.exists() else []
        self._seconds: dict[str, float] = {}
        self.rows = RowFile(output, benchmark="quality", model=folder.name, dtype=str(dtype).removeprefix("torch."))

    def units(self) -> dict[str, Callable[[str], None]]:
        """By name, in the order in which they have to run: the comparison takes its learning rates from the sweeps' rows."""
        tasks, found = data.tasks_in(self.folder), {}
        found |= {f"sweep/{task}": lambda unit, task=task: self._sweep(unit, task) for task in tasks}
        found |= {f"heal/{task}": lambda unit, task=task: self._heal_sweep(unit, task) for task in tasks}
        found |= {f"speed/{task}": lambda unit, task=task: self._speed(unit, task) for task in tasks[:1]}
        found |= {f"base/{task}": lambda unit, task=task: self._base(unit, task) for task in tasks}
        for seed in self.plan.seeds:
            found |= {
                f"main/{task}/{seed}": lambda unit, task=task, seed=seed: self._main(unit, task, seed) for task in tasks
            }
            found |= {
                f"start/{task}/{seed}": lambda unit, task=task, seed=seed: self._start(unit, task, seed)
                for task in tasks
            }
        return found

    def run(self, only: Sequence[str] = (), minutes: float | None = None) -> list[str]:
        """Run what is selected and not done; returns the names of units left over when the minutes are nearly up."""
        units = self.units()
        wanted = [name for name in units if not only or any(fnmatch.fnmatch(name, p) for p in only)]
        begin, longest, ran = time.monotonic(), 0.0, False
        for place, name in enumerate(wanted):
            if self._is_done(name):
                continue
            start = time.monotonic()
            if minutes is not None and ran and start - begin + 1.2 * longest > 60 * minutes:
                left = [name for name in wanted[place:] if not self._is_done(name)]
                print(f"{minutes:g} minutes are nearly up; left: {' '.join(left)}", flush=True)
                return left
            self._seconds, ran = {}, True
            # A GPU's process only starts operations: threads for the few small tensors on the CPU cost more than they do.
            with learn.one_thread() if self.device.type == "cuda" else nullcontext():
                units[name](name)
            seconds = time.monotonic() - start
            longest = max(longest, seconds)
            phases = {phase: round(spent, 2) for phase, spent in self._seconds.items()}
            self._write(kind="done", unit=name, seconds=round(seconds, 2), phases=phases)
            print(f"{name}: {seconds:.1f} s, of which {phases}", flush=True)
        return []

    def _is_done(self, unit: str) -> bool:
        """A sweep: all its rates are there. What was trained or healed at another rate than the sweeps choose now is not done."""
        kind, task, *_ = unit.split("/")
        if kind == "sweep":
            return not self._unswept(task)
        rates, done = {}, False
        for row in self.earlier:
            if (row["model"], row["unit"]) == (self.model_name, unit):
                done = row["kind"] == "done"
                if "lr" in row:
                    rates[row["arm"]] = row["lr"] == self.chosen_rate(task, row["nblocks"] > 1, row.get("init", "peft"))
                elif kind == "main" and row.get("variant") == "healed":
                    rates[row["arm"], "healed"] = row["heal_lr"] == self.chosen_heal_rate(task, row["nblocks"])
        return done and all(rates.values())

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Adds its seconds, until the device has finished, to the unit's."""
        begin = self._now()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - begin

    def _write(self, **fields) -> None:
        self.earlier.append(self.rows.write(**fields))

    def _part(self, task: str, name: str) -> data.Rows:
        rows = data.load(self.folder, task)[name]
        if self.plan.test is None or name == "train":
            return rows
        return rows.take(torch.arange(min(self.plan.test, len(rows))))

    def _batches(self, task: str, steps: int, seed: int):
        rows = data.load(self.folder, task)["train"]
        return data.batches(rows, steps, self.plan.batch, seed)

    def _passes(self, arms: list[Arm], task: str, seed: int):
        """Trained banks of at most `together` arms each; all arms see the same batches."""
        for at in range(0, len(arms), self.plan.together):
            with self._phase("build"):
                bank = Bank(self.model, self.layers, arms[at : at + self.plan.together], seed)
            with self._phase("train"):
                losses = learn.train(self.model, bank, self._batches(task, self.plan.steps, seed), self.plan.steps)
            yield bank, losses

    def _scores(self, bank: Bank | None, rows: data.Rows) -> list[learn.Score]:
        with self._phase("score"):
            return learn.score(self.model, bank, rows)

    def _sweep_rows(self, task: str) -> list[dict]:
        return [
            row for row in self.earlier
            if row["kind"] == "sweep" and (row["model"], row["task"]) == (self.model_name, task)
        ]  # fmt: skip

    def _unswept(self, task: str) -> list[Arm]:
        plain = self.arms[0]
        blocked = next((arm for arm in self.arms if arm.nblocks == 4 and arm.goal == 1.0), None)
        blocked = blocked or next((arm for arm in self.arms if arm.goal == 1.0 and arm.nblocks > 1), None)
        wanted = [(plain, "peft")] + ([(blocked, "peft"), (blocked, "lora")] if blocked else [])
        there = {(row["arm"], row["init"], row["lr"]) for row in self._sweep_rows(task)}
        arms = [replace(arm, lr=lr, init=init) for arm, init in wanted for lr in self.plan.rates]
        return [arm for arm in arms if (arm.name, arm.init, arm.lr) not in there]

    def _sweep(self, unit: str, task: str) -> None:
        rows = self._part(task, "validation")
        for bank, _ in self._passes(self._unswept(task), task, SWEEP_SEED):
            for arm, score in zip(bank.arms, self._scores(bank, rows), strict=True):
                self._result("sweep", unit, task, SWEEP_SEED, arm, "trained", score, lr=arm.lr, init=arm.init)

    def _base(self, unit: str, task: str) -> None:
        arm = Arm(0, 0, 0.0, 0.0)
        score = self._scores(None, self._part(task, "test"))[0]
        self._result("result", unit, task, None, arm, "base", score)

    def _main(self, unit: str, task: str, seed: int) -> None:
        test = self._part(task, "test")
        arms = [replace(arm, lr=self.chosen_rate(task, arm.nblocks > 1)) for arm in self.arms]
        plain = None
        for bank, losses in self._passes(arms, task, seed):
            scores = self._scores(bank, test)
            for index, (arm, score) in enumerate(zip(bank.arms, scores, strict=True)):
                if arm.nblocks == 1:
                    plain = bank.get(index)
                self._result("result", unit, task, seed, arm, "trained", score, lr=arm.lr, loss=float(losses[index]))
        chosen = [
            replace(arm, lr=self.chosen_heal_rate(task, arm.nblocks))
            for arm in arms
            if arm.nblocks > 1 and arm.goal in CONVERTED_GOALS
        ]
        for variant, arm, error, score in self._healing(task, seed, arms[0], plain, chosen, test):
            self._result("result", unit, task, seed, arm, variant, score, relative_error=error, heal_lr=arm.lr)

    def _heal_sweep(self, unit: str, task: str) -> None:
        rows, plain = self._part(task, "validation"), replace(self.arms[0], lr=self.chosen_rate(task, False))
        blocked = [arm for arm in self.arms if arm.nblocks > 1 and arm.goal == 1.0]
        arms = [replace(arm, lr=rate) for arm in blocked for rate in self.plan.heal_rates]
        for bank, _ in self._passes([plain], task, SWEEP_SEED):
            self._result("heal", unit, task, SWEEP_SEED, plain, "trained", self._scores(bank, rows)[0], lr=plain.lr)
            for variant, arm, error, score in self._healing(task, SWEEP_SEED, plain, bank.get(0), arms, rows):
                self._result("heal", unit, task, SWEEP_SEED, arm, variant, score, relative_error=error, heal_lr=arm.lr)

    def _healing(
        self, task: str, seed: int, plain: Arm, tensors: Tensors, arms: list[Arm], rows: data.Rows
    ) -> Iterator[tuple[str, Arm, float, learn.Score]]:
        """The plain adapter converted to `arms`, then healed at their rates: variant, arm, error of the updates, score of `rows`."""
        if not arms:
            return
        with self._phase("build"):
            teacher = Bank(self.model, self.layers, [plain])
            teacher.put(0, tensors)
        fits = {}
        for at in range(0, len(arms), self.plan.together):
            with self._phase("build"):
                students = Bank(self.model, self.layers, arms[at : at + self.plan.together])
            with self._phase("convert"), learn.one_thread():  # one after another: threads contend for the interpreter
                for arm in students.arms:
                    if arm.name not in fits:
                        fits[arm.name] = learn.convert(students, tensors, arm.nblocks, arm.rank)
            with self._phase("build"):
                for index, arm in enumerate(students.arms):
                    students.put(index, fits[arm.name][0])
            for variant in ("converted", "healed"):
                if variant == "healed":
                    batches = self._batches(task, self.plan.heal_steps, seed + 1000)
                    with self._phase("heal"):
                        learn.train(self.model, students, batches, self.plan.heal_steps, teacher)
                for arm, score in zip(students.arms, self._scores(students, rows), strict=True):
                    yield variant, arm, round(fits[arm.name][1], 5), score

    def _start(self, unit: str, task: str, seed: int) -> None:
        lr = self.chosen_rate(task, True, "lora")
        arms = [replace(arm, lr=lr, init="lora") for arm in self.arms if arm.nblocks > 1]
        for bank, losses in self._passes(arms, task, seed):
            scores = self._scores(bank, self._part(task, "test"))
            for arm, score, loss in zip(bank.arms, scores, losses, strict=True):
                self._result(
                    "result", unit, task, seed, arm, "small start", score, lr=lr, init=arm.init, loss=float(loss)
                )

    def _speed(self, unit: str, task: str) -> None:
        steps = max(3, self.plan.steps // 20)

        def seconds(arms: list[Arm]) -> float:
            with self._phase("build"):
                bank = Bank(self.model, self.layers, arms)
            learn.train(self.model, bank, self._batches(task, 2, 0), steps)
            begin = self._now()
            learn.train(self.model, bank, self._batches(task, steps, 0), steps)
            return (self._now() - begin) / steps

        arms = self.arms[: self.plan.together]
        together, alone = seconds(arms), sum(seconds([arm]) for arm in arms)
        self._write(
            kind="speed", unit=unit, task=task, adapters=len(arms), batch=self.plan.batch,
            together_s=together, one_after_another_s=alone, speed_up=alone / together,
        )  # fmt: skip
        print(
            f"  {len(arms)} adapters: {together:.3f} s a step in one pass, {alone:.3f} s one after another", flush=True
        )

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def chosen_rate(self, task: str, blocked: bool, init: str = "peft") -> float:
        """The learning rate with the lowest validation loss in the sweep's rows; the plan's if there are none."""
        rows = [row for row in self._sweep_rows(task) if (row["nblocks"] > 1, row["init"]) == (blocked, init)]
        return min(rows, key=validation_loss)["lr"] if rows else self.plan.lr

    def chosen_heal_rate(self, task: str, nblocks: int) -> float:
        """The rate at which the sweep's conversion to `nblocks` has the lowest validation loss; the plan's if there are no rows."""
        rows = [
            row for row in self.earlier
            if row["kind"] == "heal" and (row["model"], row["task"]) == (self.model_name, task)
            and (row["variant"], row["nblocks"]) == ("healed", nblocks)
        ]  # fmt: skip
        return min(rows, key=validation_loss)["heal_lr"] if rows else self.plan.heal_lr

    def _result(
        self, kind: str, unit: str, task: str, seed, arm: Arm, variant: str, score: learn.Score, **more
    ) -> None:
        bits = "".join("01"[hit] for hit in score.correct)
        self._write(
            kind=kind, unit=unit, task=task, seed=seed, variant=variant,
            arm="base" if variant == "base" else arm.name, nblocks=arm.nblocks, rank=arm.rank, goal=arm.goal,
            params_ratio=round(arm.ratio, 4), steps=self.plan.steps, batch=self.plan.batch, perplexity=score.perplexity,
            text_loss=_log(score.perplexity), accuracy=score.accuracy, label_loss=score.label_loss, rows=len(bits),
            correct=f"{int(bits, 2):x}", **more,
        )  # fmt: skip


def _log(perplexity: float) -> float:
    return float(torch.tensor(perplexity, dtype=torch.float64).log())
