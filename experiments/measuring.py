"""Measuring for the benchmarks: two sides of a ratio in turns, shares of a total, and how both are written down."""

from __future__ import annotations

import contextlib
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from ardrag_rl.envs import ARDragVectorEnv
from ardrag_rl.envs.mdp import Episodes
from ardrag_rl.hub import write_json
from ardrag_rl.policies import Session, VideoPolicy


@dataclass
class MeasureArguments:
    """On what, and how often; of every benchmark."""

    pipeline: str = field(default="tiny", metadata={"help": "An embedded pipeline, a folder, or a hub id."})
    tasks: str = field(default="sprites-hard", metadata={"help": "A name, a manifest, or a folder of clips."})
    repeats: int = field(default=5, metadata={"help": "Turns of each side."})
    warmup: int = field(default=1, metadata={"help": "Turns before these."})
    threads: int = field(default=2, metadata={"help": "torch threads."})
    output_dir: str = field(default="runs/benchmark", metadata={"help": "Where the two files go."})
    only: list[str] = field(default_factory=list, metadata={"help": "Parts to measure; unset: all."})


@dataclass(frozen=True)
class Measured:
    """Slow over fast, by medians of seconds.

    Attributes:
        what: the two sides, in words.
        ratio: of the medians; above 1 the first named side is slower.
        low, high: quartiles of the ratios of single turns.
        seconds: the two medians, slow side first.
        target: what it should be, in words; empty where nothing is promised.
    """

    what: str
    ratio: float
    low: float
    high: float
    seconds: tuple[float, float]
    target: str = ""


@dataclass(frozen=True)
class Share:
    """Where the time of something goes.

    Attributes:
        what: it is.
        total: seconds, the median.
        parts: part -> fraction.
        inside: the parts that are the models' own work.
        target: what the rest should be, in words.
    """

    what: str
    total: float
    parts: dict[str, float]
    inside: tuple[str, ...] = ("transformer", "codec")
    target: str = ""

    @classmethod
    def of(cls, what: str, turns: Sequence[dict[str, float]], **settings: Any) -> Share:
        """Of the seconds by part of several turns."""
        totals = [sum(t.values()) for t in turns]
        names = sorted({name for t in turns for name in t})
        parts = {k: float(np.sum([t.get(k, 0.0) for t in turns]) / np.sum(totals)) for k in names}
        return cls(what, float(np.median(totals)), parts, **settings)

    @property
    def outside(self) -> float:
        """What is not inside."""
        return 1 - sum(self.parts[name] for name in self.inside)


@dataclass(frozen=True)
class Table:
    """Figures that are neither: what stands in each cell, in words.

    Attributes:
        title: what was measured, and on what.
        columns: their names; rows: a cell for each.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def run(bench: Callable[[Any], Any], args: Any, parts: Sequence[str], name: str) -> None:
    """Measures the parts that `args` asks for, all by default, by the methods of their names; writes, prints.

    A bench has the `policy` that is measured, and says `where`.
    """
    unknown = [part for part in args.only if part not in parts]
    if unknown or args.repeats < 1:
        raise SystemExit(
            f"--only {' '.join(unknown)} --repeats {args.repeats}: choose of {', '.join(parts)}; 1 or more."
        )
    torch.set_num_threads(args.threads)
    made = bench(args)
    results = [result for part in args.only or parts for result in getattr(made, part)()]
    write_results(Path(args.output_dir), name, results, made, args)


def write_results(folder: Path, name: str, results: list[Measured | Share | Table], made: Any, args: Any) -> None:
    """Writes name.md and name.json, and prints the first."""
    facts = {
        "machine": f"{platform.processor() or platform.machine()}, {args.threads} threads, {made.where}",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in made.policy.parameters()),
        "arguments": vars(args),
    }
    ratios, shares, tables = ([r for r in results if isinstance(r, kind)] for kind in (Measured, Share, Table))
    text = format_markdown(ratios, shares, tables, facts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text)
    measured = {"ratios": [asdict(r) for r in ratios], "shares": [asdict(s) for s in shares]}
    measured |= {"tables": [asdict(t) for t in tables]}
    write_json(folder / f"{name}.json", measured | {"facts": facts})
    print(f"\n{text}\n{folder}/: {name}.json, {name}.md")


@contextlib.contextmanager
def profile(policy: VideoPolicy, envs: ARDragVectorEnv, wait: Callable[[], None]) -> Iterator[dict[str, float]]:
    """Seconds by part while it is open: each call's own, without the parts it calls; the rest is `other`."""
    seconds: dict[str, float] = defaultdict(float)
    running = ["other"]
    last = [time.perf_counter()]

    def switch() -> None:
        wait()
        now = time.perf_counter()
        seconds[running[-1]] += now - last[0]
        last[0] = now

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            switch()
            running.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                switch()
                running.pop()

        return call

    def rewarded(name: str, start: Callable[..., Any]) -> Callable[..., Any]:
        def begin(controls: Any) -> Any:
            session = start(controls)
            session.append = timed(name, session.append)
            return session

        return timed(name, begin)

    with contextlib.ExitStack() as stack:

        def patch(target: Any, attribute: str, replacement: Any) -> None:
            stack.enter_context(mock.patch.object(target, attribute, replacement))

        parts: list[tuple[str, Any, tuple[str, ...]]] = [
            ("transformer", policy.transformer, ("forward", "encode_context")),
            ("codec", envs.codec, ("encode", "decode", "decode_next", "encode_heat_maps", "encode_text")),
            ("tasks", type(envs.source), ("__getitem__",)),
            ("tasks", envs.mdp, ("fit",)),
            ("observations", Episodes, ("observe",)),
            ("session", Session, ("transition",)),
        ]
        for name, target, methods in parts:
            for method in methods:
                patch(target, method, timed(name, getattr(target, method)))
        for reward in (term.reward for term in envs.rewards):
            patch(reward, "start", rewarded(f"reward {reward.name}", reward.start))
        last[0] = time.perf_counter()
        yield seconds
        switch()


def measure(
    what: str,
    slow: Callable[[], object],
    fast: Callable[[], object],
    repeats: int,
    warmup: int,
    target: str = "",
    now: Callable[[], float] = time.perf_counter,
) -> Measured:
    """Both sides in turns."""
    seconds = np.zeros((warmup + repeats, 2))
    for turn in seconds:
        for side, run in enumerate((slow, fast)):
            start = now()
            run()
            turn[side] = now() - start
    return ratio(what, *seconds[warmup:].T, target)


def ratio(what: str, slow: np.ndarray, fast: np.ndarray, target: str) -> Measured:
    """Of the seconds of both sides, turn by turn."""
    low, high = np.quantile(slow / fast, [0.25, 0.75])
    seconds = float(np.median(slow)), float(np.median(fast))
    return Measured(what, seconds[0] / seconds[1], float(low), float(high), seconds, target)


def format_markdown(ratios: list[Measured], shares: list[Share], tables: list[Table], facts: dict[str, Any]) -> str:
    """A table of ratios, one for each share, and the others."""
    lines = [f"{facts['machine']}, torch {facts['torch']}, {facts['parameters'] / 1e6:.1f} M parameters", ""]
    if ratios:
        lines += ["| slow / fast | ratio | quartiles | seconds | promised |", "|---|---|---|---|---|"]
    for r in ratios:
        seconds = " / ".join(f"{s:.3g}" for s in r.seconds)
        lines.append(f"| {r.what} | **{r.ratio:.2f}** | {r.low:.2f}-{r.high:.2f} | {seconds} | {r.target} |")
    for s in shares:
        promised = f" (promised: {s.target})" if s.target else ""
        lines += ["", f"{s.what}, {s.total:.3g} s: **{s.outside:.0%}** outside {' and '.join(s.inside)}{promised}"]
        lines += ["", "| part | share |", "|---|---|"]
        ordered = sorted(s.parts.items(), key=lambda item: -item[1])
        lines += [f"| {name} | {part:.1%} |" for name, part in ordered]
    for t in tables:
        lines += [
            "",
            t.title,
            "",
            *(f"| {' | '.join(row)} |" for row in (t.columns, ["---"] * len(t.columns), *t.rows)),
        ]
    return "\n".join(lines) + "\n"
