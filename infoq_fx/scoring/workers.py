"""Measures blocks of sites in other processes; model and data are sent to each worker once, not with every block."""

from __future__ import annotations

import hashlib
import logging
import pickle
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.threads import one_torch_thread
from infoq_fx.errors import OptionError
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.runtime.forward import RunOptions
from infoq_fx.scoring.criterion import Measure
from infoq_fx.types import Measurement, QuantSite

__all__ = ["Job", "count_workers", "map_blocks", "measure_block", "pack_job"]

Block = Sequence[QuantSite]
_Loaded = tuple[PreparedModel, CalibrationData | None, Measure]
_here: dict[str, _Loaded] = {}  # jobs of this process, whose threads and forks need no copy
_loaded: dict[str, _Loaded] = {}  # in a worker: its current job
_gate, _running = threading.Condition(), 0


@dataclass(frozen=True)
class Job:
    """Where workers find the model, the data and the measure; ``content`` is for those that cannot read the files.

    ``digest`` identifies the job.
    """

    folder: str
    digest: str
    content: tuple[bytes, bytes] | None = None


@contextmanager
def pack_job(prepared: PreparedModel, data: CalibrationData | None, measure: Measure) -> Iterator[Job]:
    """Write a job to files that workers on this machine can map into memory; they are deleted after scoring.

    Raises:
        OptionError: the model or the measure of a user-defined criterion cannot be pickled.
    """
    labels = None if data is None else data.labels
    try:
        model = pickle.dumps((prepared, labels, data is not None, measure))
    except Exception as error:
        raise OptionError(
            f"executor needs the model and the criterion to be picklable: {error}; leave executor out to score here"
        ) from error
    with tempfile.TemporaryDirectory(prefix="infoq_fx_") as folder:
        (Path(folder) / "model").write_bytes(model)
        inputs = {} if data is None else {name: x.cpu() for name, x in data.inputs.items()}
        torch.save(inputs, Path(folder) / "inputs")
        job = Job(folder, hashlib.blake2b(model + folder.encode(), digest_size=16).hexdigest())
        _here[job.digest] = prepared, data, measure
        try:
            yield job
        finally:
            _here.pop(job.digest, None)


def measure_block(job: Job, sites: Block, threads: int) -> list[Measurement] | None:
    """Measure a block in a worker; None if the worker cannot read the job's files."""
    with _entered(job) as loaded:
        if loaded is None:
            return None
        prepared, data, measure = loaded
        with one_torch_thread():
            return measure(prepared, data, sites, RunOptions(threads=threads))


@contextmanager
def _entered(job: Job) -> Iterator[_Loaded | None]:
    """The loaded job. Loading traces its graph, which patches torch for the whole process: nothing else may run."""
    global _running
    with _gate:
        loaded = _here.get(job.digest) or _loaded.get(job.digest)
        if loaded is None:
            _gate.wait_for(lambda: _running == 0)
            loaded = _loaded.get(job.digest) or _load(job)
            if loaded is not None:
                _loaded.clear()
                _loaded[job.digest] = loaded
        _running += 1
    try:
        yield loaded
    finally:
        with _gate:
            _running -= 1
            _gate.notify_all()


def count_workers(executor: Executor) -> int | None:
    """Return the number of an executor's workers, None if it is not known."""
    count = getattr(executor, "_max_workers", None)
    return count if isinstance(count, int) and count > 0 else None


def map_blocks(
    executor: Executor, job: Job, blocks: Sequence[Block], threads: int
) -> Iterator[tuple[Block, list[Measurement] | None]]:
    """Yield blocks with their measurements as they finish, None for blocks that a broken executor left unfinished."""
    waiting: dict[Future[Any], int] = {}
    to_submit, unfinished = list(range(len(blocks))), set(range(len(blocks)))
    try:
        while unfinished:
            for index in to_submit:
                waiting[executor.submit(measure_block, job, blocks[index], threads)] = index
            to_submit = []
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                index = waiting.pop(future)
                found = future.result()
                if found is None:  # a worker on another machine: send the content with all further blocks
                    job = job if job.content is not None else _with_content(job)
                    to_submit.append(index)
                else:
                    unfinished.remove(index)
                    yield blocks[index], found
    except BrokenExecutor as error:
        logging.getLogger(__name__).warning("the executor broke (%s); what is left is scored in this process", error)
        for index in sorted(unfinished):
            yield blocks[index], None
    finally:
        for future in waiting:
            future.cancel()


def _with_content(job: Job) -> Job:
    folder = Path(job.folder)
    return Job(job.folder, job.digest, ((folder / "model").read_bytes(), (folder / "inputs").read_bytes()))


def _load(job: Job) -> _Loaded | None:
    folder = Path(job.folder)
    if job.content is not None:
        with tempfile.TemporaryDirectory(prefix="infoq_fx_") as own:
            for name, content in zip(("model", "inputs"), job.content, strict=True):
                (Path(own) / name).write_bytes(content)
            return _read(Path(own))
    try:
        return _read(folder)
    except OSError:
        return None


def _read(folder: Path) -> _Loaded:
    prepared, labels, has_data, measure = pickle.loads((folder / "model").read_bytes())
    # Mapped, not read: workers of one machine share the pages.
    inputs = torch.load(folder / "inputs", mmap=True, weights_only=True)
    device = prepared.device
    return prepared, CalibrationData(inputs, labels, False).to(device) if has_data else None, measure
