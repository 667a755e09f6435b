"""Free memory goes back to the system where the process has grown; what is kept of batches stays out of the heap."""

import gc
from types import SimpleNamespace

import psutil
import torch

from infoq_fx.core import memory


def test_memory_is_returned_after_the_process_has_grown(monkeypatch):
    resident, trims = [1 << 30], []

    def trim(_):
        trims.append(resident[0])
        resident[0] -= 100 << 20

    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=resident[0]))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    monkeypatch.setattr(memory, "_find_trim", lambda: trim)
    monkeypatch.setattr(memory, "_resident_bytes", 0)
    for growth in (0, 100, 50, -500, 100, 50):  # MiB
        resident[0] += growth << 20
        memory.return_free_memory()
    at = [size >> 20 for size in trims]
    assert at == [1024, 1074, 624]


def test_copies_out_of_the_heap_are_equal_and_stay():
    given = [torch.randn(3, 5), torch.arange(7), torch.zeros(0, 4), torch.tensor(2.5), torch.randn(4, 6).mT]
    copies = memory.copy_out_of_heap(given)
    for x, copy in zip(given, copies, strict=True):
        assert copy.dtype == x.dtype
        assert torch.equal(copy, x)
    kept, wanted = copies[1], given[1].clone()
    storages = {copy.untyped_storage().data_ptr() for copy in copies if copy.numel()}
    assert not storages & {x.untyped_storage().data_ptr() for x in given}
    del copies, given
    gc.collect()
    assert torch.equal(kept, wanted)  # it keeps the memory
    assert memory.copy_out_of_heap([]) == []


def test_copies_on_disk_hold_the_same_values_and_do_not_write_to_others():
    given = [
        torch.arange(7, dtype=torch.int8),
        torch.randn(3, 5),
        torch.zeros(0),
        torch.tensor(2.5, dtype=torch.float64),
    ]
    copies = memory.copy_to_disk(given)
    for x, copy in zip(given, copies, strict=True):
        assert copy.dtype == x.dtype
        assert torch.equal(copy, x)
    copies[0].add_(1)
    assert torch.equal(copies[1], given[1])
    assert given[0].tolist() == list(range(7))
    assert memory.copy_to_disk([]) == []


def test_without_room_on_the_disk_tensors_stay_in_memory(monkeypatch):
    def refuse(*args, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(memory.tempfile, "TemporaryFile", refuse)
    given = [torch.ones(3)]
    assert memory.copy_to_disk(given)[0] is given[0]


def test_a_step_may_take_an_eighth_of_a_gpus_memory(monkeypatch):
    class Card:
        total_memory = 80 << 30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    assert memory.usual_bytes(torch.device("cpu"), 100) == 100
    assert memory.usual_bytes(torch.device("cuda"), 100) == 10 << 30
    Card.total_memory = 400
    assert memory.usual_bytes(torch.device("cuda"), 100) == 100
