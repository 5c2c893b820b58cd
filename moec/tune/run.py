"""`moec tune`: measure the candidates of a layer's plan, keep the fastest, and lose nothing when killed on the way.

Every measurement goes to a journal before the next begins; a search that finds its journal continues where it ended.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol, cast

from filelock import FileLock, Timeout

from moec.codegen.storage import panel_spec
from moec.codegen.triton_config import GpuConfig
from moec.codegen.tuning import Sizes, Tuning, candidates
from moec.errors import MoecError, ParseError, TargetError
from moec.files import write_whole
from moec.ir.spec import KernelSpec
from moec.options import Environment
from moec.runtime import tune_cache
from moec.runtime.tune_cache import DEFAULT, Entry, Key
from moec.target import Target
from moec.tune import gpu as tune_gpu
from moec.tune.ahead import compile_ahead
from moec.tune.job import Job, profile_name
from moec.tune.search import Decision, Record, Standing, decide, search
from moec.tune.worker import Worker


class Asked(Protocol):
    """What answers `start`, `measure` and `check`."""

    def ask(self, word: str, text: str = "") -> tuple[str, Any]:
        """("ok", answer) or ("failed", reason)."""
        ...

    def close(self) -> None:
        """Ends it."""
        ...


@dataclass(frozen=True)
class Result:
    """A finished search: the entry that was kept, every candidate in the model's order, how each did."""

    entry: Entry
    candidates: tuple[str, ...]
    decision: Decision
    resumed: int


def key_of(job: Job, target: Target) -> Key:
    """What the winner is kept under."""
    if job.device:
        return tune_gpu.key_of(job)
    weights = "" if job.weights == "stored" else job.weights
    spec = panel_spec(KernelSpec.parse(job.spec)) if weights else job.spec
    return Key.of(spec, job.sizes, job.threads, target.isa, weights)


def journal_path(job: Job, folder: Path) -> Path:
    """The journal of a job; one for each layer, size, profile and number of threads."""
    text = json.dumps([asdict(job), profile_name(job.profile, job.sizes.E)])
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.jsonl"


def tune(
    job: Job,
    budget: float,
    make_worker: Callable[[Job], Asked] = Worker,
    progress: Callable[[float, int], None] = lambda spent, measured: None,
) -> Result:
    """Search for `budget` seconds of measuring, check the winner, keep it. Raises MoecError where nothing runs."""
    path = journal_path(job, _folder())
    with _alone(path):
        journal = _open(path, job)
        if job.device:
            known = {record.candidate for record in journal.records()}
            compile_ahead(job, [text for i, text in enumerate(journal.texts) if i not in known])
        worker = make_worker(job)
        try:
            decision = _run(journal, worker, budget, progress)
            decision = _checked(journal, worker, decision)
            entry = _entry(job, journal, decision)
        except MoecError:
            journal.path.unlink(missing_ok=True)  # what failed for the moment's sake is to be tried again
            raise
        finally:
            worker.close()
        tune_cache.store([entry])
        journal.path.replace(path.with_suffix(".done"))
    return Result(entry, journal.texts, decision, journal.resumed)


def _folder() -> Path:
    """Where journals are; raises TargetError where that cannot be made."""
    folder = Environment.read().cache_dir / "tuning"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TargetError(f"no journal can be kept in {folder}: {error}; set MOEC_CACHE_DIR") from error
    return folder


@contextmanager
def _alone(path: Path) -> Generator[None]:
    lock = FileLock(f"{path}.lock")
    try:
        with lock.acquire(timeout=0.1):
            yield
    except Timeout:
        raise TargetError("another `moec tune` is measuring this layer; wait for it or stop it") from None


@dataclass
class Journal:
    """What is known so far, on disk: a first line that says what for, then one line a measurement or check."""

    path: Path
    texts: tuple[str, ...]
    date: str
    lines: list[dict[str, Any]]
    resumed: int

    def add(self, line: dict[str, Any]) -> None:
        """Write a line and be sure that it is written whole or, when killed, ignored."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)

    def records(self) -> list[Record]:
        """The measurements."""
        return [Record(**line["record"]) for line in self.lines if "record" in line]


def _open(path: Path, job: Job) -> Journal:
    """The journal as far as it is whole, or a new one where there is none or the candidates are others by now."""
    made = _made_of(job, job.spec)
    head = {"texts": list(_texts(job)), "job": asdict(job), "made": asdict(made)}
    lines = _whole_lines(path)
    if lines and {name: lines[0].get(name) for name in head} == head and _is_date(lines[0].get("date")):
        journal = Journal(path, tuple(head["texts"]), lines[0]["date"], lines[1:], len(lines) - 1)
    else:
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        journal, lines = Journal(path, tuple(head["texts"]), date, [], 0), [{**head, "date": date}]
    try:  # without the torn last line of a process that was killed
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        raise TargetError(f"the journal {path} cannot be used: {error}; remove it or set MOEC_CACHE_DIR") from error
    return journal


def _is_date(data: Any) -> bool:
    return isinstance(data, str) and data.isascii()


def _texts(job: Job) -> tuple[str, ...]:
    """The candidates in the model's order, the default first."""
    if job.device:
        return tune_gpu.gpu_texts(job)
    return tuple(map(str, candidates(KernelSpec.parse(job.spec), job.sizes, Target.host(), job.threads)))


def _made_of(job: Job, spec: str) -> tune_cache.Made:
    """Where, by what compiler and of what source candidates run."""
    return tune_gpu.made_of(job) if job.device else tune_cache.made_here(spec, Target.host())


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    try:
        text = path.read_text(encoding="utf-8")
        for line in text.split("\n")[:-1]:
            data = json.loads(line)
            if not isinstance(data, dict) or not _is_line(cast("dict[str, Any]", data)):
                break
            found.append(cast("dict[str, Any]", data))
    except (OSError, ValueError, RecursionError):
        pass  # what was read before the damage still counts: it is only measurements, and more can be taken
    return found


def _is_line(data: dict[str, Any]) -> bool:
    """Whether what a line says of a measurement or a check is what one says."""
    try:
        record = tune_cache.built(Record, dict(data["record"])) if "record" in data else None
    except (ParseError, TypeError, ValueError):
        return False
    check = (data["check"], data.get("wrong")) if "check" in data else ()
    measured = record is None or record.seconds > 0 or bool(record.failed)
    return measured and all(isinstance(text, str) for text in check)


def _run(journal: Journal, worker: Asked, budget: float, progress: Callable[[float, int], None]) -> Decision:
    """Hold the conversation: old answers from the journal, new ones from the worker."""
    known = iter(journal.records())
    talk = search(len(journal.texts), budget)
    spent, measured = 0.0, 0
    try:
        question = next(talk)
        while True:
            record = next(known, None)
            if record is None or record.candidate != question:
                known = iter(())
                record = _measured(worker, question, journal.texts[question])
                journal.add({"record": asdict(record)})
            spent, measured = spent + record.spent, measured + 1
            progress(spent, measured)
            question = talk.send(record)
    except StopIteration as end:
        return end.value


def _measured(worker: Asked, candidate: int, text: str) -> Record:
    status, answer = worker.ask("start")
    if status != "ok":
        return Record(candidate, 0.0, 0.0, str(answer))
    start = time.perf_counter()
    status, answer = worker.ask("measure", text)
    spent = time.perf_counter() - start
    return Record(candidate, float(answer), spent) if status == "ok" else Record(candidate, 0.0, spent, str(answer))


def _checked(journal: Journal, worker: Asked, decision: Decision) -> Decision:
    """The decision among candidates whose results are right: a winner with wrong ones is left out."""
    known = {line["check"]: line["wrong"] for line in journal.lines if "check" in line}
    while True:
        text = journal.texts[decision.winner]
        if text not in known:
            status, answer = worker.ask("check", text)
            known[text] = "" if status == "ok" and not answer else str(answer)
            journal.add({"check": text, "wrong": known[text]})
        if not known[text]:
            return decision
        if decision.winner == 0:
            raise MoecError(f"the default plan cannot be used for this layer: {known[text]}")
        wrong = decision.winner
        decision = decide(
            [
                Standing(s.candidate, s.seconds, known[text] if s.candidate == wrong else s.failed)
                for s in decision.standings
            ]
        )


def _entry(job: Job, journal: Journal, decision: Decision) -> Entry:
    key = key_of(job, Target.host())
    best, default = decision.standing(decision.winner), decision.standing(0)
    if not best.seconds:
        raise MoecError(f"nothing was measured: {best.failed or 'the budget is too small'}")
    kept = 1e6 * default.median if default.median < float("inf") else 0.0
    return Entry(
        key,
        _made_of(job, key.spec),
        journal.texts[decision.winner] if decision.winner else DEFAULT,
        "tune",
        profile_name(job.profile, job.sizes.E),
        journal.date,
        *(round(micros, 3) for micros in (1e6 * best.median, 1e6 * best.spread, kept)),
    )


def finished(folder: Path | None = None) -> list[tuple[Job, tuple[str, ...], Decision]]:
    """Searches that ended on this machine: the job, its candidates in the model's order, and how each did."""
    found: list[tuple[Job, tuple[str, ...], Decision]] = []
    for path in sorted((folder or Environment.read().cache_dir / "tuning").glob("*.done")):
        lines = _whole_lines(path)
        try:
            job = _job(lines[0]["job"])
            parse = GpuConfig.parse if job.device else Tuning.parse
            texts = tuple(str(parse(text)) for text in _strings(lines[0]["texts"]))
        except (MoecError, LookupError, TypeError):
            continue  # not a journal of this version
        records = [Record(**line["record"]) for line in lines if "record" in line]
        found.append((job, texts, _standings(texts, records)))
    return found


def _job(data: dict[str, Any]) -> Job:
    """The job of a journal; raises ParseError, LookupError or TypeError where the journal is another version's."""
    job = tune_cache.built(Job, {**data, "sizes": tune_cache.built(Sizes, data["sizes"])})
    KernelSpec.parse(job.spec)
    return job


def _strings(data: Any) -> list[str]:
    """The texts of a journal's candidates, of which there is one at least; raises TypeError for anything else."""
    if not isinstance(data, list) or not data or not all(isinstance(text, str) for text in cast("list[Any]", data)):
        raise TypeError("expected a list of texts")
    return cast("list[str]", data)


def _standings(texts: Sequence[str], records: Sequence[Record]) -> Decision:
    return decide(
        [
            Standing(
                i,
                tuple(r.seconds for r in records if r.candidate == i and not r.failed),
                next((r.failed for r in records if r.candidate == i and r.failed), ""),
            )
            for i in range(len(texts))
        ]
    )
